"""The reference model: the weights that the policy had when it was given to the trainer.

TRL loads it again by the name in the policy's config, which is another model once the weights have changed, and copies
a trained adapter by a pattern of names that some PEFT types do not follow. A path is loaded twice, as TRL does.
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from trl import DPOConfig


def reference_for_trl(model: Any, ref_model: Any, peft_config: PeftConfig | None, args: DPOConfig) -> Any:
    """Return the `ref_model` for `DPOTrainer.__init__`: a copy of a model that it would load again by its name.

    It is None for a path, which TRL loads twice, for adapters, which are switched off or to a copy instead, and where
    no model is needed because its log-probabilities are precomputed.
    """
    if isinstance(ref_model, PeftModel):
        return ref_model.get_base_model()  # with the adapter in its layers, and a head that TRL can fuse
    # TRL needs the model under FSDP, which shards the policy later
    precomputes = args.precompute_ref_log_probs and os.environ.get("ACCELERATE_USE_FSDP") != "true"
    is_copied = ref_model is None and peft_config is None and not precomputes and isinstance(model, PreTrainedModel)
    return frozen_copy(model) if is_copied else ref_model


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model with the weights, adapters and hooks it has now, in evaluation mode and without gradients.

    The memory is that of one more copy of the weights. What trainers have patched onto the forward of the model stays
    behind, as it is bound to the weights of the original. The model may be one that DeepSpeed ZeRO-3 has partitioned.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        copied = _copy_of_partitioned(model)
    else:
        copied = copy.deepcopy(model)
        hook = vars(copied).pop("_hf_hook", None)  # of a model on several devices: it wraps the forward, too
        for name in ("forward", "_old_forward", "_original_forward"):
            vars(copied).pop(name, None)
        if hook is not None:
            add_hook_to_module(copied, hook)
    return copied.eval().requires_grad_(False)


def _copy_of_partitioned(model: PreTrainedModel) -> PreTrainedModel:
    """Make a second model, which transformers partitions alike, and copy the weights one by one."""
    import deepspeed

    copied: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    for target, source in zip(copied.parameters(), model.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([target, source], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                target.data.copy_(source.data)
    for buffer, value in zip(copied.buffers(), model.buffers(), strict=True):
        buffer.data = value.data.clone()
    return copied


@contextlib.contextmanager
def adding_reference_adapter(model: Any) -> Iterator[None]:
    """While entered, TRL can add the adapter "ref" with the config of "default".

    An initialization such as PiSSA would change the base weights a second time; what "ref" begins with does not
    matter, as it is copied over. AdaLoRA refuses a second adapter, unless that is not to be trained.
    """
    config: Any = model.peft_config["default"] if isinstance(model, PeftModel) else None
    changes: dict[str, Any] = (
        {"init_lora_weights": True} if isinstance(getattr(config, "init_lora_weights", None), str) else {}
    )
    if config is not None and config.peft_type == "ADALORA":
        changes["inference_mode"] = True
    before = {name: getattr(config, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def copy_adapter(model: PeftModel) -> None:
    """Copy every parameter and buffer of the adapter "default" to "ref", which TRL has made and partly copied.

    TRL copies those with ".default." in their name, and the entries of a `ParameterDict` end with it. It may go once
    `DPOTrainer.__init__` copies these too.

    Raises:
        ValueError: naming the parameters that "ref" lacks.
    """
    values = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    missing = []
    for name, value in values.items():
        parts = name.split(".")
        if "default" in parts:
            target = values.get(".".join("ref" if part == "default" else part for part in parts))
            if target is None or target.shape != value.shape:
                missing.append(name)
            elif target is not value:
                target.data.copy_(value.data)
    if missing:
        kind = model.peft_config["default"].peft_type
        raise ValueError(
            f"No frozen copy of the {getattr(kind, 'value', kind)} adapter can be made as the reference model: "
            f"{', '.join(missing[:3])} cannot be copied. Pass a `ref_model`, or merge the adapter with "
            "`model.merge_and_unload()` and train a new one with `peft_config`."
        )
