"""What a policy must be to be trained: with gradients, its own tokenizer, and a reference model apart from it."""

import logging
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.loading import is_lost
from prefopt_trl.data.tokenization import check_vocabulary

logger = logging.getLogger(__name__)

# They move a part of the base weights into the adapter, so without it the base is another model
SPLITTING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_policy(model: Any, ref_model: Any, peft_config: PeftConfig | None, has_reference: bool) -> None:
    """Refuse, before anything is sampled, a policy that could not be trained, or that has no reference model.

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
            f"`bias={bias!r}` of the adapter trains biases of the base model, which the reference model has, too. Set "
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
            "reference model has them in common. Name their modules in `modules_to_save` of the adapter's config, or "
            "pass a `ref_model`."
        )
    if any(module is ref_model for module in model.modules() if module is not model):  # TRL refuses the model itself
        raise ValueError("`ref_model` is a part of `model`, so it would change with it. Load it once more.")
    if has_reference and ref_model is None and isinstance(model, PeftModel) and "ref" in model.peft_config:
        raise ValueError(
            "`model` has an adapter named 'ref', as an earlier trainer leaves one, and TRL adds another of that name. "
            "Call `model.delete_adapter('ref')`."
        )
    if peft_config is None and not trained:
        remedy = "Call `model.requires_grad_(True)`, or pass `peft_config`."
        if isinstance(model, PeftModel):
            remedy = "Load the adapter with `is_trainable=True`."
        raise ValueError(f"No parameter of `model` requires a gradient, so nothing would be trained. {remedy}")


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
