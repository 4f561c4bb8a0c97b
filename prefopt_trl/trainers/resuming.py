"""What a run starts from must belong together: model and tokenizer, adapter and base, checkpoint and settings."""

import logging
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefopt_trl.data.tokenization import check_vocabulary
from prefopt_trl.runtime.fingerprints import dataset_fingerprint
from prefopt_trl.runtime.processes import checkpoints, interruptible, last_checkpoint, what_is_trained
from prefopt_trl.runtime.settings import as_json, read_json, write_json
from prefopt_trl.trainers.rso_config import LOSS_NAMES

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
# In force only where the trainer samples what it learns from, and where `sync_ref_model` is on
SAMPLING = {
    "max_new_tokens",
    "num_candidates",
    "num_samples",
    "pairing",
    "rejection_beta",
    "sampling_temperature",
    "strategy",
    "temperature",
    "top_k",
    "top_p",
}
SYNCHRONISING = {"ref_model_mixup_alpha", "ref_model_sync_steps"}
# Of an adapter's config, what does not decide how it is trained
NOT_OF_THE_ADAPTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
}
TRAINING_DATA = "training_data"
# Computed anew when a run resumes, so that the last digits may differ, or in Python objects
NOT_FINGERPRINTED = {"image", "images", "ref_chosen_logps", "ref_rejected_logps"}
RSO_NAMES = {of_trl: of_rso for of_rso, of_trl in LOSS_NAMES.items()}
# A run may be made longer; its learning rate then follows the schedule of the new length
LENGTHS = ["num_train_epochs", "max_steps"]
GLOBAL_BATCH = "per_device_train_batch_size * gradient_accumulation_steps * processes"


class Resumable:
    """The part of a trainer that keeps settings with its checkpoints, before [`~trl.DPOTrainer`] in its bases."""

    args: Any
    state: Any
    model: Any
    train_dataset: Any
    samples: bool  # what it learns from, before training or during it
    _name: str  # of the method

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As [`~transformers.Trainer`] does. Where a checkpoint was cut off as it was saved, True is the one before.

        Raises:
            ValueError: for a checkpoint that was trained with other settings, another adapter or other data, or longer
                than this run, naming them; if there is no whole one.
        """
        self._set_signature_columns_if_needed()  # type: ignore[attr-defined]  # TRL's
        self._training_data = data_fingerprint(self.train_dataset, set(self._signature_columns))  # type: ignore[attr-defined]
        output_dir = self.args.output_dir
        checkpoint = last_checkpoint(output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if checkpoint:
            check_settings(checkpoint, self._settings())
            check_length(checkpoint, self.args)
        before = [] if checkpoint else checkpoints(output_dir)
        with interruptible(partial(what_is_trained, output_dir, before)):
            return super().train(checkpoint, *args, **kwargs)  # type: ignore[misc]  # transformers'

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:  # first, so that they are there when the checkpoint is pushed
            trainer: Any = self
            folder = Path(trainer._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_settings(folder, self._settings())
        super()._save_checkpoint(model, trial)  # type: ignore[misc]  # TRL's

    def _settings(self) -> dict[str, Any]:
        settings = training_settings(self._name, self.args, self.samples) | adapter_settings(self.model)
        return settings | ({TRAINING_DATA: self._training_data} if self._training_data else {})


def training_settings(method: str, args: TrainingArguments, samples: bool = True) -> dict[str, Any]:
    """Return the settings that decide what is trained: loss, data order, optimiser, schedule, lengths and sampling.

    They are as they would be read back from JSON, without what is not in force, such as the options of sampling where
    the trainer does not sample. The batch size is that of a step of the optimiser on all processes.
    """
    general = {field.name for field in fields(TrainingArguments)}
    names = {field.name for field in fields(args)} - general - NOT_DECIDING | DECIDING
    values = args.to_dict()
    if not samples:
        # PRO has a `temperature` of its own, in its loss
        names -= SAMPLING - ({"temperature"} if "sampling_temperature" in names else set())
    if not values["sync_ref_model"]:
        names -= SYNCHRONISING
    settings = {
        "method": method,
        GLOBAL_BATCH: args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **{name: values[name] for name in sorted(names & values.keys())},
    }
    return as_json(settings, default=str)


def adapter_settings(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Return the config of the adapter that is trained, as it would be read back from JSON.

    Its keys are `"peft_config.<name>"`. Without an adapter `"peft_config.peft_type"`, which is None, is the only key.
    """
    config = model.active_peft_config.to_dict() if isinstance(model, PeftModel) else {"peft_type": None}
    settings = {
        f"peft_config.{name}": sorted(value) if isinstance(value, set) else value
        for name, value in config.items()
        if name not in NOT_OF_THE_ADAPTER and isinstance(value, str | int | float | list | tuple | set | dict | None)
    }
    return as_json(settings, default=str)


def data_fingerprint(dataset: Any, columns: set[str]) -> str | None:
    """Fingerprint the training data as the model is given them, on any number of processes and in any folder.

    Images and log-probabilities of the reference model are left out of the `columns`. A stream has no fingerprint.
    """
    if not isinstance(dataset, Dataset):
        return None
    names = [name for name in dataset.column_names if name in columns - NOT_FINGERPRINTED]
    return dataset_fingerprint(dataset.select_columns(names).with_format(None))


def save_settings(checkpoint: str | Path, settings: dict[str, Any]) -> None:
    """Write the settings into the folder of a checkpoint, which need not be there yet."""
    write_json(Path(checkpoint) / SETTINGS_FILE, settings)


def check_settings(checkpoint: str | Path, settings: dict[str, Any]) -> None:
    """Refuse to resume a checkpoint with settings other than those it was trained with, naming each.

    A checkpoint without settings, such as one of TRL's `DPOTrainer`, passes with a logged line, and so does a run of
    another length.
    """
    file = Path(checkpoint) / SETTINGS_FILE
    saved = read_json(file)
    if saved is None:
        logger.warning(
            "%s has no %s, as when another trainer saved it. Whether it was trained with the settings of this run is "
            "not checked.",
            checkpoint,
            SETTINGS_FILE,
        )
        return
    # Only what both have: another version may know of more
    changed = [name for name in saved if name in settings and saved[name] != settings[name]]
    method = settings.get("method", "")

    def describe(name: str) -> str:
        if name == TRAINING_DATA:
            return "the training data are others"
        before, now = (as_written(method, name, values[name]) for values in (saved, settings))
        return f"`{name}` was {before!r} and is {now!r}"

    described = [describe(name) for name in changed if name not in LENGTHS]
    if described:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {'; '.join(described)}. Resume with those that it had. To "
            "train on with new ones, give the checkpoint as `model` of a new run, without `resume_from_checkpoint`."
        )
    lengths = list(map(describe, changed))
    if lengths:
        logger.warning(
            "%s is resumed for another length: %s. Its learning rate goes on along the schedule of the new length.",
            checkpoint,
            "; ".join(lengths),
        )


def as_written(method: str, name: str, value: Any) -> Any:
    """A setting by the name that the user has for its value: RSO's losses, which its configuration calls as TRL."""
    if (method, name) != ("RSO", "loss_type"):
        return value
    losses = [RSO_NAMES.get(loss, loss) for loss in value]
    return losses[0] if len(losses) == 1 else losses


def check_length(checkpoint: str | Path, args: TrainingArguments) -> None:
    """Refuse to resume a checkpoint beyond the end of this run, which would train nothing and save it as its result.

    One of the very end passes, as a finished run may be started again, and so does one without `trainer_state.json`.
    """
    file = Path(checkpoint) / TRAINER_STATE_NAME
    state = read_json(file)
    if state is None:
        return
    name, done = ("max_steps", state["global_step"]) if args.max_steps > 0 else ("num_train_epochs", state["epoch"])
    end = getattr(args, name)
    if done > end:
        raise ValueError(
            f"{checkpoint} was trained for {done} {name.split('_')[-1]} already, and this run ends before, at "
            f"`{name}`={end}. Raise it, or resume an earlier checkpoint."
        )


def check_model(model: str | PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, args: Any) -> None:
    """Refuse, before anything is sampled, a model with another one's tokenizer; warn of an adapter of another.

    `model` may be a path. An encoder-decoder is refused, too.
    """
    config: Any = None if isinstance(model, str) else model.config
    if isinstance(model, str):
        revision = (args.model_init_kwargs or {}).get("revision")
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
    if config.is_encoder_decoder:
        raise ValueError(
            f"`model` is an encoder-decoder ({config.model_type}), which TRL's trainers do not train. Sample from it "
            "with `build_preference_dataset`, and train a causal language model on the pairs."
        )
    check_vocabulary(tokenizer, config if isinstance(model, str) else model)
    if isinstance(model, PeftModel):
        check_adapter(model)


def check_adapter(model: PeftModel) -> None:
    """Warn of an adapter that says that it was trained on another base model than the one it is on.

    Names are compared by their last part, so that a model of the Hub and a folder with a copy of it are the same; a
    name that is missing passes. An adapter of other shapes does not load at all.
    """
    base = str(getattr(model.get_base_model().config, "_name_or_path", None) or "")
    for name, adapter in model.peft_config.items():
        trained_on = str(adapter.base_model_name_or_path or "")
        if base and trained_on and _last_part(base) != _last_part(trained_on):
            # Not refused: the same weights may stand under another name
            logger.warning(
                "The adapter %r was trained on %s, and the model it is on is %s. If these are not the same weights, "
                "load it on its own base, with `AutoPeftModelForCausalLM.from_pretrained(adapter, "
                "is_trainable=True)`.",
                name,
                trained_on,
                base,
            )


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").split("/")[-1]
