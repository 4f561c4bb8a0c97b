"""The models of rounds: folders that the trainers saved, of whole models or adapters, loaded one at a time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import find_adapter_config_file

from prefopt_trl.data.formats import is_lost
from prefopt_trl.trainers.base import load_policy
from prefopt_trl.trainers.base_config import PreferenceConfig
from prefopt_trl.trainers.policy import init_kwargs


def base_of(path: str) -> str | None:
    """Return the base model of an adapter, or None if the path is that of a whole model."""
    if find_adapter_config_file(path) is None:
        return None
    return str(PeftConfig.from_pretrained(path).base_model_name_or_path)


def load(
    path: str, args: PreferenceConfig, quantization: BitsAndBytesConfig | None, is_trainable: bool = False
) -> PreTrainedModel:
    """Load a model, or an adapter on its base, onto the training device; raise `FileNotFoundError` if it is gone."""
    if is_lost(path):
        raise FileNotFoundError(
            f"{path} is missing. Restore the folder, or remove the `record.json` of its round and of all later ones."
        )
    base = base_of(path)
    if base is None:
        return load_policy(path, args, quantization)
    args, config = copy(args), PeftConfig.from_pretrained(path)
    args.model_init_kwargs = {**init_kwargs(args), "revision": config.revision or "main"}  # of the base
    loaded: Any = load_policy(base, args, quantization)
    return PeftModel.from_pretrained(loaded, path, is_trainable=is_trainable)  # type: ignore[return-value]  # it generates


@contextmanager
def loading_whole(args: PreferenceConfig) -> Iterator[None]:
    """Within, models are loaded whole on each process, to be sampled; DeepSpeed ZeRO-3 would partition them."""
    engine = getattr(args, "hf_deepspeed_config", None)  # with DeepSpeed only
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if engine is not None:
            set_hf_deepspeed_config(engine)


def release() -> None:
    """Return the memory of models that nothing refers to any more to the device."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
