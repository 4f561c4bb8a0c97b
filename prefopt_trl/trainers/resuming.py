"""Check that a run resumes a checkpoint with the settings, the adapter and the data that it was trained with."""

import logging
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from datasets import Dataset, IterableDataset
from packaging.version import Version
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from prefopt_trl.runtime.settings import Settings, as_json, dataset_fingerprint, differences, read_json, write_json
from prefopt_trl.sampling.options import SamplingOptions
from prefopt_trl.trainers.base_config import PreferenceConfig

logger = logging.getLogger(__name__)

SETTINGS_FILE = "training_settings.json"

# Patterns of the settings that may change when a run resumes: how it is computed, evaluated, saved and shown. All
# others determine what is trained and must stay the same, including those that later versions of TRL, transformers or
# PEFT add.
MAY_CHANGE = """
    accelerator_config activation_* auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16*
    dataloader_[!d]* dataset_num_proc ddp_* debug deepspeed disable_tqdm do_* enable_jit_checkpoint eval_* fp16* fsdp*
    full_determinism generation_* gradient_* greater_is_better hub_* ignore_data_skip
    include_* label_names liger_kernel_config load_best_model_at_end local_rank log_* logging_* metric_for_best_model
    model_init_kwargs output_dir pad_* padding_free parallelism_config per_device_*_size precompute_*
    prediction_loss_only project push_to_hub reference_logps remove_unused_columns report_to
    restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_* share_prefix skip_memory_metrics
    tf32 torch_* trackio_* trust_remote_code use_cache use_cpu use_liger_kernel
    peft_config.auto_mapping peft_config.base_model_name_or_path peft_config.inference_mode peft_config.peft_version
    peft_config.revision peft_config.task_type
"""
LENGTHS = ["num_train_epochs", "max_steps"]  # a run may be made longer
GLOBAL_BATCH = "per_device_train_batch_size * gradient_accumulation_steps * processes"
TRAINING_DATA = "training_data"
# Recomputed when a run resumes, so the last digits may differ; or Python objects
NOT_FINGERPRINTED = {"image", "images", "ref_chosen_logps", "ref_rejected_logps"}
NUM_ROWS = 64  # of the training data, in their fingerprint


def training_settings(
    method: str,
    args: PreferenceConfig,
    model: PreTrainedModel | PeftModel,
    dataset: Dataset | IterableDataset,
    ranker: Settings | None,
) -> Settings:
    """Return the settings that determine what is trained, as JSON: all except [`MAY_CHANGE`].

    The batch size is that of a step of the optimizer on all processes. The adapter's settings are
    `"peft_config.<name>"`; without an adapter `"peft_config.peft_type"`, which is None, is the only one. `ranker` are
    the ranker's settings, which count with `sampling="online"`.
    """
    settings = args.to_dict()
    options = {option.name: settings.pop(option.name) for option in fields(SamplingOptions)}
    adapter = model.active_peft_config.to_dict() if isinstance(model, PeftModel) else {"peft_type": None}
    settings |= {
        "method": method,
        GLOBAL_BATCH: args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        TRAINING_DATA: data_fingerprint(dataset),
        **{f"peft_config.{name}": value for name, value in adapter.items()},
    }
    kept = determining(settings)
    if args.sampling == "online":  # offline, they determine the data, which are compared
        kept |= {"ranker": ranker, **options}
    return as_json(kept, default=lambda value: sorted(value) if isinstance(value, set) else str(value))


def determining(settings: Settings) -> Settings:
    """Return the settings that determine what is trained: all except [`MAY_CHANGE`]."""
    patterns = MAY_CHANGE.split()
    return {name: settings[name] for name in sorted(settings) if not any(fnmatch(name, one) for one in patterns)}


def data_fingerprint(dataset: Dataset | IterableDataset) -> str | None:
    """Fingerprint a dataset by its columns, its number of rows and 64 of them, evenly spaced; None for a stream.

    Images and log-probabilities of the reference model are left out.
    """
    if not isinstance(dataset, Dataset):
        return None
    rows = np.unique(np.linspace(0, len(dataset) - 1, NUM_ROWS, dtype=int))
    columns = sorted(set(dataset.column_names) - NOT_FINGERPRINTED)
    spaced = dataset.select(rows).select_columns(columns).with_format(None)
    return f"{len(dataset)} rows, {dataset_fingerprint(spaced)}"


def save_settings(checkpoint: str | Path, settings: Settings) -> None:
    """Write the settings into the folder of a checkpoint; create it if it is missing."""
    write_json(Path(checkpoint) / SETTINGS_FILE, settings)


def check_settings(checkpoint: str | Path, settings: Settings) -> None:
    """Refuse to resume a checkpoint that was trained with other settings, naming each difference.

    Another length of the run, or a checkpoint without settings, such as one from TRL's `DPOTrainer`, logs a warning.
    """
    saved = read_json(Path(checkpoint) / SETTINGS_FILE)
    if saved is None:
        logger.warning(
            "%s has no %s, so another trainer may have saved it. That it was trained with the settings of this run is "
            "not checked.",
            checkpoint,
            SETTINGS_FILE,
        )
        return
    known = saved.keys() & settings.keys()  # another version may save more
    changed = {
        name: "the training data are others" if name == TRAINING_DATA else f"`{name}` was {before!r} and is {now!r}"
        for name, (before, now) in differences(
            {name: saved[name] for name in known}, {name: settings[name] for name in known}
        ).items()
    }
    longer = [changed.pop(name) for name in LENGTHS if name in changed]
    if changed:
        raise ValueError(
            f"{checkpoint} was trained with other settings: {'; '.join(changed.values())}. Resume with the same "
            "settings, or pass the checkpoint as `model` to a new run without `resume_from_checkpoint`."
        )
    if longer:
        logger.warning(
            "%s is resumed with another length: %s. The learning rate follows the schedule of the new length.",
            checkpoint,
            "; ".join(longer),
        )


def check_length(checkpoint: str | Path, args: PreferenceConfig) -> None:
    """Refuse to resume a checkpoint from beyond the end of this run, which would train nothing.

    A checkpoint at exactly the end passes, as a finished run may be restarted; so does one without
    `trainer_state.json`.
    """
    state = read_json(Path(checkpoint) / TRAINER_STATE_NAME)
    if state is None:
        return
    name, done = ("max_steps", state["global_step"]) if args.max_steps > 0 else ("num_train_epochs", state["epoch"])
    end, step = getattr(args, name), 1 if args.max_steps > 0 else done / max(state["global_step"], 1)
    if done >= end + step:  # the last step ends an epoch's fraction, or goes beyond it
        raise ValueError(
            f"{checkpoint} was trained for {done} {name.split('_')[-1]} already, and this run ends before, at "
            f"`{name}`={end}. Raise it, or resume an earlier checkpoint."
        )


def load_trained_adapter(checkpoint: str | Path, model: Any) -> None:
    """Load the adapter that a checkpoint has beside TRL's copy of it, the reference.

    transformers before 5.23 loads the copy alone, from its subfolder, so that training would begin anew. To go when
    these versions are not supported any more.
    """
    has_copy = isinstance(model, PeftModel) and "ref" in model.peft_config
    is_whole = Path(checkpoint, "adapter_config.json").is_file()  # and no engine's own checkpoint
    if has_copy and is_whole and Version(transformers.__version__) < Version("5.23"):
        model.load_adapter(str(checkpoint), "default", is_trainable=True)
