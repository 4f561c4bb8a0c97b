"""The model card of a trained policy: method, data, hyperparameters, reference model, and how to load it."""

from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, RepoCard
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from prefopt_trl.runtime.cards import public_name, render
from prefopt_trl.runtime.settings import Settings, as_json, versions
from prefopt_trl.sampling.options import SamplingOptions
from prefopt_trl.trainers.base_config import PreferenceConfig, RankingConfig

# Beside those of the method itself
HYPERPARAMETERS = [
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "max_length",
    "seed",
    "bf16",
    "fp16",
]
ADAPTER = ["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save"]
MANY_MODULES = 12  # of an adapter; more are counted, and shown by the last parts of their names


def model_card(trainer: Any, trl_card: ModelCard, title: str, source: str, dataset_name: str | None) -> RepoCard:
    """Write the card of a trainer's model.

    The card that TRL writes gives the tags, the base model and the links to the trackers of the run. `source` is the
    repository or folder that the model is loaded from. Of a local `dataset_name` the card shows the last part only.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_adapter, training_data = isinstance(model, PeftModel), trainer.training_data
    sampling, statistics = training_data.sampled or (None, None)
    if sampling is None and trainer.args.sampling == "online":
        sampling = {**vars(SamplingOptions.of(trainer.args)), "seed": trainer.args.seed}
    metadata = ModelCardData(
        base_model=trl_card.data.get("base_model"),
        datasets=None if dataset_name is None or Path(dataset_name).exists() else dataset_name,
        library_name="peft" if is_adapter else "transformers",
        model_name=title,
        tags=trl_card.data.get("tags"),
    )
    return render(
        "model",
        metadata,
        trainer=trainer,
        model=model,
        title=title,
        source=source,
        is_adapter=is_adapter,
        reads_images=isinstance(trainer.processing_class, ProcessorMixin),
        base_name=public_name(model.config.name_or_path),
        dataset_name=public_name(dataset_name or ""),
        reference_name=public_name(trainer.reference_given or ""),
        sampling={key: value for key, value in (sampling or {}).items() if key != "ranker"},
        statistics=statistics,
        ranker=training_data.ranker,
        trackers="\n".join(line for line in trl_card.text.splitlines() if line.startswith("[<img ")),
        hyperparameters=_hyperparameters(trainer, model),
        versions=[["prefopt-trl", version("prefopt-trl")], *map(list, versions().items())],
    )


def _hyperparameters(trainer: Any, model: PreTrainedModel | PeftModel) -> Settings:
    args = trainer.args
    methods = takewhile(lambda config: config not in (PreferenceConfig, RankingConfig), type(args).__mro__)
    sampling = {"strategy", "num_samples", "pairing"}
    own = {field for config in methods for field in vars(config).get("__annotations__", {})} - sampling
    chosen = {field: getattr(args, field) for field in [*sorted(own), *HYPERPARAMETERS]}
    shown = {field: value for field, value in chosen.items() if value is not None}
    shown["batch size, over all processes"] = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    )
    shown["steps"] = trainer.state.global_step
    if isinstance(model, PeftModel):
        adapter = model.peft_config["default"].to_dict()
        shown["adapter"] = {field: adapter[field] for field in ADAPTER if adapter.get(field) is not None}
        modules = adapter["target_modules"]
        if isinstance(modules, set) and len(modules) > MANY_MODULES:  # PEFT writes "all-linear" out layer by layer
            names = sorted({module.rpartition(".")[2] for module in modules})
            shown["adapter"]["target_modules"] = f"{len(modules)} modules named {', '.join(names)}"
    if (quantization := getattr(model.config, "quantization_config", None)) is not None:
        settings = quantization if isinstance(quantization, dict) else quantization.to_diff_dict()
        shown["quantization"] = {key: value for key, value in settings.items() if not key.startswith("_")}
    return as_json(shown, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
