"""What a run starts from must belong together: model and tokenizer, adapter and base, checkpoint and settings."""

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from prefopt_trl.data.tokenization import check_vocabulary

logger = logging.getLogger(__name__)

SETTINGS_FILE = "training_settings.json"

# Of the arguments of transformers, those that decide what is trained
DECIDING = {
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "data_seed",
    "dataloader_drop_last",
    "learning_rate",
    "length_column_name",
    "lr_scheduler_kwargs",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_steps",
    "neftune_noise_alpha",
    "num_train_epochs",
    "optim",
    "optim_args",
    "optim_target_modules",
    "seed",
    "train_sampling_strategy",
    "warmup_steps",
    "weight_decay",
}
# Of TRL's and ours, those that do not: how it is computed, and what is shown of it
NOT_DECIDING = {
    "activation_offloading",
    "dataset_num_proc",
    "generation_batch_size",
    "generation_memory_budget",
    "log_completions",
    "model_init_kwargs",
    "pad_to_multiple_of",
    "pad_token",
    "padding_free",
    "precompute_ref_batch_size",
    "precompute_ref_log_probs",
    "reference_logps",
    "share_prefix",
    "trust_remote_code",
}
# A run may be made longer; its learning rate then follows the schedule of the new length
LENGTHS = ["num_train_epochs", "max_steps"]
GLOBAL_BATCH = "per_device_train_batch_size * gradient_accumulation_steps * processes"


class Resumable:
    """The part of a trainer that keeps settings with its checkpoints, before [`~trl.DPOTrainer`] in its bases."""

    args: Any
    state: Any
    _name: str  # of the method

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer`] does.

        Raises:
            ValueError: for a checkpoint that was trained with other settings, naming them.
        """
        checkpoint: Any = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if checkpoint:
            check_settings(checkpoint, training_settings(self._name, self.args))
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]  # transformers'

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:  # first, so that they are there when the checkpoint is pushed
            trainer: Any = self
            folder = Path(trainer._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_settings(folder, training_settings(self._name, self.args))
        super()._save_checkpoint(model, trial)  # type: ignore[misc]  # TRL's


def training_settings(method: str, args: TrainingArguments) -> dict[str, Any]:
    """The settings that decide what is trained: loss, data order, optimiser, schedule, lengths and sampling.

    Args:
        method (`str`):
            Name of the method, such as `"RSO"`.
        args ([`~transformers.TrainingArguments`]):
            Configuration of the trainer.

    Returns:
        `dict`: as it would be read back from JSON. The batch size is that of a step of the optimiser on all processes.
    """
    general = {field.name for field in fields(TrainingArguments)}
    names = {field.name for field in fields(args)} - general - NOT_DECIDING | DECIDING
    values = args.to_dict()
    settings = {
        "method": method,
        GLOBAL_BATCH: args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **{name: values[name] for name in sorted(names & values.keys())},
    }
    return json.loads(json.dumps(settings, default=str))


def save_settings(checkpoint: str | Path, settings: dict[str, Any]) -> None:
    """Write the settings into the folder of a checkpoint, which need not be there yet."""
    Path(checkpoint).mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2) + "\n"
    (Path(checkpoint) / SETTINGS_FILE).write_text(text, encoding="utf-8")


def check_settings(checkpoint: str | Path, settings: dict[str, Any]) -> None:
    """Refuse to resume a checkpoint with settings other than those it was trained with.

    A checkpoint without settings, such as one of TRL's `DPOTrainer`, passes with a logged line, and so does a run of
    another length.

    Args:
        checkpoint (`str` or `Path`):
            Folder of the checkpoint.
        settings (`dict`):
            Of the run that resumes.

    Raises:
        ValueError: naming each setting, with its old and new value.
    """
    file = Path(checkpoint) / SETTINGS_FILE
    if not file.exists():
        logger.warning(
            "%s has no %s, as when another trainer saved it. Whether it was trained with the settings of this run is "
            "not checked.",
            checkpoint,
            SETTINGS_FILE,
        )
        return
    saved = json.loads(file.read_text(encoding="utf-8"))
    # Only what both have: another version may know of more
    changed = [name for name in saved if name in settings and saved[name] != settings[name]]
    described = [f"`{name}` was {saved[name]!r} and is {settings[name]!r}" for name in changed if name not in LENGTHS]
    if described:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {'; '.join(described)}. Resume with those that it had. To "
            "train on with new ones, give the checkpoint as `model` of a new run, without `resume_from_checkpoint`."
        )
    lengths = [f"`{name}` was {saved[name]!r} and is {settings[name]!r}" for name in changed]
    if lengths:
        logger.warning(
            "%s is resumed for another length: %s. Its learning rate goes on along the schedule of the new length.",
            checkpoint,
            "; ".join(lengths),
        )


def check_model(model: str | PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, args: Any) -> None:
    """Refuse, before anything is sampled or loaded, a model with another one's tokenizer or adapter.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model that is trained, or its path.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        args ([`PreferenceConfig`]):
            Configuration of the trainer.

    Raises:
        ValueError: as [`check_vocabulary`] and [`check_adapter`].
    """
    if isinstance(model, str):
        revision = (args.model_init_kwargs or {}).get("revision")
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
        check_vocabulary(tokenizer, config)
        return
    check_vocabulary(tokenizer, model)
    if isinstance(model, PeftModel):
        check_adapter(model)


def check_adapter(model: PeftModel) -> None:
    """Refuse an adapter that was trained on another base model than the one it is on.

    Names are compared by their last part, so that a model of the Hub and a folder with a copy of it are the same.

    Args:
        model ([`~peft.PeftModel`]):
            Base model with adapters. A base or an adapter that does not say where it comes from passes.

    Raises:
        ValueError: naming both.
    """
    base = str(getattr(model.get_base_model().config, "_name_or_path", None) or "")
    for name, adapter in model.peft_config.items():
        trained_on = str(adapter.base_model_name_or_path or "")
        if base and trained_on and _last_part(base) != _last_part(trained_on):
            raise ValueError(
                f"The adapter {name!r} was trained on {trained_on}, and the model it is on is {base}. Load it on its "
                "own base model, with `AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)`. If the "
                f"two are the same, say so: `model.peft_config[{name!r}].base_model_name_or_path = {base!r}`."
            )


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").split("/")[-1]
