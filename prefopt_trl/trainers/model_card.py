"""The model card of a trained policy: method, data, hyperparameters, reference model, and how to load it."""

from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData, RepoCard
from peft import PeftModel
from transformers import ProcessorMixin

from prefopt_trl.rankers.base import Ranker
from prefopt_trl.runtime.cards import name, public_name, render
from prefopt_trl.runtime.fingerprints import versions
from prefopt_trl.runtime.settings import as_json
from prefopt_trl.runtime.weights import gathered
from prefopt_trl.sampling.card import read_sampled, sampling_summary
from prefopt_trl.sampling.options import SamplingOptions
from prefopt_trl.sampling.statistics import SamplingStatistics
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


@dataclass(frozen=True)
class TrainingData:
    """Where the training data of a run came from.

    Attributes:
        sampled (`tuple` or `None`):
            Settings and statistics of the dataset, if [`build_preference_dataset`] saved it.
        ranker (`dict` or `None`):
            Settings of the ranker that scored the completions, or scores them during training.
    """

    sampled: tuple[dict[str, Any], SamplingStatistics] | None = None
    ranker: dict[str, Any] | None = None

    @classmethod
    def of(cls, dataset: Any, ranker: Ranker | None) -> "TrainingData":
        """Read how the dataset was sampled from beside its files, or take the ranker's settings.

        Call it on all processes.
        """
        for file in dataset.cache_files[:1] if isinstance(dataset, Dataset) else []:
            pairs = Path(file["filename"]).parent
            if pairs.name == "pairs" and (sampled := read_sampled(pairs.parent)):
                return cls(sampled, sampled[0].get("ranker"))
        if ranker is None:
            return cls()
        with gathered(ranker.model):
            return cls(None, ranker.settings())


def model_card(trainer: Any, trl_card: ModelCard, title: str, source: str, dataset_name: str | None) -> RepoCard:
    """Write the card of a trainer's model.

    The card that TRL writes gives the tags, the base model and the links to the trackers of the run. `source` is the
    repository or folder that the model is loaded from. Of a local `dataset_name` the card shows the last part only.
    """
    args, data, processor = trainer.args, trainer.training_data, trainer.processing_class
    model = trainer.accelerator.unwrap_model(trainer.model)
    reads_images = isinstance(processor, ProcessorMixin)
    sampling = None
    if data.sampled:
        training_data = f"Sampled before training. {sampling_summary(*data.sampled)}"
        sampling = {key: value for key, value in data.sampled[0].items() if key != "ranker"}
    elif args.sampling == "online":
        training_data = "Prompts, whose completions were sampled from the reference model during training."
        sampling = {**vars(SamplingOptions.of(args)), "seed": args.seed}
    elif data.ranker:
        training_data = "Completions that were given, scored by the ranker."
    else:
        training_data = f"{'Preference pairs' if trainer.learns_from == 'pairs' else 'Rankings'} that were given."
    metadata = ModelCardData(
        base_model=trl_card.data.get("base_model"),
        datasets=None if dataset_name is None or Path(dataset_name).exists() else dataset_name,
        library_name="peft" if isinstance(model, PeftModel) else "transformers",
        model_name=title,
        tags=trl_card.data.get("tags"),
    )
    return render(
        "model",
        metadata,
        title=title,
        trainer=trainer,
        model=model,
        base_name=public_name(model.config.name_or_path),
        source=source,
        is_adapter=isinstance(model, PeftModel),
        auto_model="AutoModelForImageTextToText" if reads_images else "AutoModelForCausalLM",
        auto_processor="AutoProcessor" if reads_images else "AutoTokenizer",
        has_chat_template=getattr(processor, "chat_template", None) is not None,
        dataset_name=public_name(dataset_name or ""),
        training_data=training_data,
        sampling=sampling,
        ranker=data.ranker,
        trackers="\n".join(line for line in trl_card.text.splitlines() if line.startswith("[<img ")),
        hyperparameters=_hyperparameters(trainer, model),
        reference_model=_reference_model(trainer, model),
        versions=[["prefopt-trl", version("prefopt-trl")], *map(list, versions().items())],
    )


def _hyperparameters(trainer: Any, model: Any) -> dict[str, Any]:
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


def _reference_model(trainer: Any, model: Any) -> str:
    if not trainer.has_reference:
        return f"None: {trainer._name} needs none."
    if trainer.args.keep_logps:
        return "The policy that was sampled: its log-probabilities were saved while sampling."
    if trainer.args.sync_ref_model:
        return "A copy of the model that followed it during training (`sync_ref_model`)."
    if trainer.reference_given:
        return f"A model of its own: {name(public_name(trainer.reference_given))}."
    if isinstance(model, PeftModel):
        if "ref" in model.peft_config:
            return "The base model with a frozen copy of the adapter as it was before training."
        return "The base model, without the adapter."
    return "A copy of the model as it was before training."
