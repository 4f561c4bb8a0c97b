"""The policy, and its reference model: the weights that the policy had when it was given to the trainer.

TRL loads the reference model again by the name in the policy's config, which is another model once the weights have
changed, and copies a trained adapter by a pattern of names that some PEFT types do not follow. A path is loaded twice,
as TRL does.
"""

import contextlib
import copy
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from accelerate.hooks import add_hook_to_module
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from prefopt_trl.data.formats import is_lost
from prefopt_trl.data.tokenization import check_vocabulary

logger = logging.getLogger(__name__)

Policy: TypeAlias = str | PreTrainedModel | PeftModel  # a path or a model

# These move a part of the base weights into the adapter, so the base without the adapter is another model
SPLITTING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_policy(model: Policy, ref_model: object, peft_config: PeftConfig | None, has_reference: bool) -> None:
    """Refuse, before anything is sampled, a policy that cannot be trained or from which no reference can be derived.

    The errors say how to load or wrap the model.
    """
    if isinstance(ref_model, str):
        raise TypeError(
            f"`ref_model` is the path {ref_model!r}. Load it, with `AutoModelForCausalLM.from_pretrained` or, for an "
            "adapter, `AutoPeftModelForCausalLM.from_pretrained`."
        )
    init = getattr(peft_config, "init_lora_weights", None)
    if has_reference and isinstance(init, str) and init.startswith(SPLITTING_INITS):
        raise ValueError(
            f"`init_lora_weights={init!r}` changes the base weights, so the model without the adapter is not the "
            "reference model. Call `get_peft_model(model, peft_config)` and pass the result as `model`, without "
            "`peft_config`: the reference is then a frozen copy of its adapter."
        )
    config = peft_config or (model.peft_config.get("default") if isinstance(model, PeftModel) else None)
    bias = getattr(config, "bias", "none")
    if isinstance(bias, str) and bias != "none" and (has_reference or isinstance(model, PeftModel)):
        raise ValueError(
            f"`bias={bias!r}` of the adapter trains biases of the base model, which the reference model shares. Set "
            '`bias="none"`.'
        )
    if isinstance(model, str):
        if is_lost(model):
            raise FileNotFoundError(f"There is no folder {model!r} for `model`. Check the path.")
        if Path(model, "adapter_config.json").is_file() and not Path(model, "config.json").is_file():
            raise ValueError(
                f"`model`={model!r} is an adapter. Load it on its base, with "
                "`AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True)`, and pass the result."
            )
        return
    if isinstance(model, PeftModel) and model.active_adapters != ["default"]:
        raise ValueError(
            f"The active adapter of `model` is {', '.join(model.active_adapters)!r}, and TRL trains the one named "
            "'default'. Load it with `PeftModel.from_pretrained(base, path, is_trainable=True)`, without "
            "`adapter_name`."
        )
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    of_base = [name for name in trained if isinstance(model, PeftModel) and "default" not in name.split(".")]
    if has_reference and ref_model is None and of_base:
        raise ValueError(
            f"{len(of_base)} parameters of the base model are trained beside the adapter ({of_base[0]}, ...), and the "
            "reference model shares them. Name their modules in `modules_to_save` of the adapter's config, or "
            "pass a `ref_model`."
        )
    if any(module is ref_model for module in model.modules() if module is not model):  # TRL refuses the model itself
        raise ValueError("`ref_model` is a part of `model`, so training would change it. Load a second copy.")
    if has_reference and ref_model is None and isinstance(model, PeftModel) and "ref" in model.peft_config:
        raise ValueError(
            "`model` has an adapter named 'ref', probably from an earlier trainer, and TRL adds another of that name. "
            "Call `model.delete_adapter('ref')`."
        )
    if peft_config is None and not trained:
        remedy = "Call `model.requires_grad_(True)`, or pass `peft_config`."
        if isinstance(model, PeftModel):
            remedy = "Load the adapter with `is_trainable=True`."
        raise ValueError(f"No parameter of `model` requires a gradient, so nothing would be trained. {remedy}")


def init_kwargs(args: DPOConfig) -> dict[str, Any]:
    assert not isinstance(args.model_init_kwargs, str)  # `__post_init__` has parsed it
    return args.model_init_kwargs or {}


def check_model(model: Policy, tokenizer: PreTrainedTokenizerBase, args: DPOConfig) -> None:
    """Refuse, before anything is sampled, an encoder-decoder, or a tokenizer that does not fit the model.

    Warn of an adapter that was trained on another base model.
    """
    if isinstance(model, str):
        revision = init_kwargs(args).get("revision")
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
    else:
        config = model.config
    if config.is_encoder_decoder:
        raise ValueError(
            f"`model` is an encoder-decoder ({config.model_type}), which TRL's trainers do not train. Sample from it "
            "with `build_preference_dataset`, and train a causal language model on the pairs."
        )
    check_vocabulary(tokenizer, config if isinstance(model, str) else model)
    if isinstance(model, PeftModel):
        check_adapter(model)


def check_adapter(model: PeftModel) -> None:
    """Warn if the config of an adapter names another base model.

    Names are compared by their last part, so that a model on the Hub equals a local copy of it; a missing name passes.
    PEFT refuses an adapter of other shapes when it loads it.
    """
    base = model.config.name_or_path or ""
    for name, adapter in model.peft_config.items():
        trained_on = adapter.base_model_name_or_path or ""
        if base and trained_on and _last_part(base) != _last_part(trained_on):
            # A warning only: the same weights may have another name
            logger.warning(
                "The adapter %r was trained on %s, and is loaded on %s. If these are not the same weights, load it on "
                "its base model with `AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True)`.",
                name,
                trained_on,
                base,
            )


def _last_part(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").split("/")[-1]


def reference_for_trl(
    model: Policy, ref_model: PreTrainedModel | PeftModel | None, peft_config: PeftConfig | None, args: DPOConfig
) -> torch.nn.Module | None:
    """Return the `ref_model` for `DPOTrainer.__init__`: a copy of a model that it would load again by its name.

    Return None for a path, which TRL loads twice, for an adapter, which is switched off or replaced by a copy, and if
    log-probabilities are precomputed, which needs no second model.
    """
    if isinstance(ref_model, PeftModel):
        return ref_model.get_base_model()  # has the adapter in its layers, and a head that TRL can fuse
    # TRL then loads none (https://github.com/huggingface/trl/pull/5542), but with FSDP, which shards the policy later
    precomputes = args.precompute_ref_log_probs and os.environ.get("ACCELERATE_USE_FSDP") != "true"
    if ref_model is None and peft_config is None and not precomputes and isinstance(model, PreTrainedModel):
        return frozen_copy(model)
    return ref_model


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy a model with its current weights, adapters and hooks, in evaluation mode and without gradients.

    Trainers' patches of the forward are not copied, as they are bound to the weights of the original. The model may be
    partitioned by DeepSpeed ZeRO-3.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        copied = _copy_of_partitioned(model)
    else:
        copied = copy.deepcopy(model)
        hook = vars(copied).pop("_hf_hook", None)  # of a model on several devices: it wraps the forward
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
def adding_reference_adapter(model: Policy) -> Iterator[None]:
    """Within, TRL can add the adapter "ref" with the config of "default".

    An initialization such as PiSSA would change the base weights a second time; the initial weights of "ref" do not
    matter, as they are overwritten. AdaLoRA refuses a second adapter that is to be trained.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    config = model.peft_config["default"]
    changes = {"inference_mode": True} if config.peft_type == "ADALORA" else {}
    if isinstance(getattr(config, "init_lora_weights", None), str):
        changes["init_lora_weights"] = True
    before = {name: getattr(config, name) for name in changes}
    vars(config).update(changes)
    try:
        yield
    finally:
        vars(config).update(before)


def copy_adapter(model: PeftModel) -> None:
    """Copy every parameter and buffer of the adapter "default" to "ref", which TRL has added and copied in part.

    TRL copies those with ".default." in their name, but the names in a `ParameterDict` end with ".default". Remove
    once `DPOTrainer` copies these too: https://github.com/huggingface/trl/pull/6975

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
