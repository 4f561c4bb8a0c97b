"""Load models, adapters and tokenizers by the names given on the command line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file
from trl import DPOConfig, ModelConfig, RewardConfig, SFTConfig, get_peft_config, get_quantization_config

from prefopt_trl.data.formats import is_lost

TrainingConfig: TypeAlias = SFTConfig | DPOConfig | RewardConfig
AUTO_CLASSES: dict[str | None, Any] = {  # by PEFT's name of the task
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
}


def check_model(model: ModelConfig, trains: bool = True, is_optional: bool = False) -> None:
    """Check, before anything is loaded, that no argument of the model is missing or has no effect."""
    if model.model_name_or_path is None and not is_optional:
        raise ValueError("`model_name_or_path` is missing. Give the folder or Hub id of a model.")
    if model.use_peft and not trains:
        raise ValueError("`use_peft` is for training, and this command trains nothing. Leave it out.")
    defaults = ModelConfig()
    for field in fields(model):
        flag = "load_in_4bit" if "bnb" in field.name else "use_peft"
        belongs = "bnb" in field.name or "lora" in field.name or field.name == "use_dora"
        if belongs and not getattr(model, flag) and getattr(model, field.name) != getattr(defaults, field.name):
            raise ValueError(
                f"`{field.name}` has no effect without `{flag}`. Add `{flag}`, or leave `{field.name}` out."
            )
    if model.load_in_4bit or model.load_in_8bit:
        check_bitsandbytes("load_in_4bit" if model.load_in_4bit else "load_in_8bit")


def check_bitsandbytes(argument: str) -> None:
    """Require the package that an argument needs."""
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"`{argument}` needs bitsandbytes. Run `pip install 'prefopt-trl[bitsandbytes]'`.")


def model_to_train(model: ModelConfig, args: TrainingConfig, task: str | None = "CAUSAL_LM") -> dict[str, Any]:
    """Return the trainer's arguments that define its model, for a task of [`AUTO_CLASSES`].

    A `task` of None is that of a language model, causal or encoder-decoder.

    The path of an adapter gives its base model with the adapter on top, to be trained further; TRL keeps a frozen copy
    of the adapter as the reference model. An encoder-decoder is loaded too, as TRL's trainers load none. For other
    paths, `args.model_init_kwargs` is completed with the arguments of `model`.
    """
    path = str(model.model_name_or_path)
    init = {**init_kwargs(model), **(args.model_init_kwargs or {})}  # type: ignore[dict-item]  # no text any more
    if find_adapter_config_file(path, revision=model.model_revision) is not None:
        if model.use_peft:
            raise ValueError(
                f"{path} is an adapter already, and `use_peft` would put another on top. Leave `use_peft` out to "
                "train this one further, or merge it into its base first (`merge_and_unload` of PEFT)."
            )
        adapted = PeftConfig.from_pretrained(path, revision=model.model_revision).task_type
        if (adapted == "SEQ_CLS") != (task == "SEQ_CLS"):
            raise ValueError(
                f"{path} is an adapter for {adapted}, which this command does not train. Merge it into its base first."
            )
        args.model_init_kwargs = None
        init["trust_remote_code"] = args.trust_remote_code
        return {"model": load_adapter(path, model, init, is_trainable=True)}
    if task is None:
        task = "SEQ_2_SEQ_LM" if _is_encoder_decoder(path, model, args.trust_remote_code) else "CAUSAL_LM"
    if model.lora_task_type == ModelConfig.lora_task_type:
        model.lora_task_type = task
    peft_config, quantization = get_peft_config(model), get_quantization_config(model)
    if task != "SEQ_2_SEQ_LM":
        args.model_init_kwargs = init
        return {"model": path, "peft_config": peft_config, "quantization_config": quantization}
    with named(f"`model_name_or_path`={path!r}"):
        init |= {"trust_remote_code": args.trust_remote_code, "quantization_config": quantization}
        loaded = AutoModelForSeq2SeqLM.from_pretrained(path, **init)
    if peft_config is None:
        return {"model": loaded}
    if args.gradient_checkpointing:  # its input must require a gradient, as TRL's trainers also set
        loaded.enable_input_require_grads()
    return {"model": get_peft_model(loaded, peft_config)}


def model_to_run(model: ModelConfig, device: torch.device | str, trust_remote_code: bool) -> PreTrainedModel:
    """Load a policy to sample from, or an adapter with its base model, onto a device."""
    init = {**init_kwargs(model), "trust_remote_code": trust_remote_code}
    path = str(model.model_name_or_path)
    with named(f"`model_name_or_path`={path!r}"):
        if find_adapter_config_file(path, revision=model.model_revision) is not None:
            loaded = load_adapter(path, model, init, is_trainable=False)
        else:
            is_encoder_decoder = _is_encoder_decoder(path, model, trust_remote_code)
            auto_class: Any = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
            loaded = auto_class.from_pretrained(path, quantization_config=get_quantization_config(model), **init)
    return (loaded if getattr(loaded, "is_quantized", False) else loaded.to(device)).eval()


def load_adapter(path: str, model: ModelConfig, init: dict[str, object], is_trainable: bool) -> Any:
    """Load an adapter on its base model, quantized as `model` says: a PeftModel, with a PreTrainedModel's methods."""
    config = PeftConfig.from_pretrained(path, revision=model.model_revision)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {path} names no base model. Add `base_model_name_or_path` to its config.")
    init = {**init, "revision": config.revision or "main", "quantization_config": get_quantization_config(model)}
    init |= {"num_labels": 1} if config.task_type == "SEQ_CLS" else {}
    with named(f"`base_model_name_or_path`={base!r} in {path}/adapter_config.json"):
        on_base = AUTO_CLASSES.get(config.task_type, AutoModelForCausalLM).from_pretrained(base, **init)
    with named(f"the adapter {path} on its base {base}"):
        return PeftModel.from_pretrained(on_base, path, revision=model.model_revision, is_trainable=is_trainable)


def load_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `model_name_or_path`, or of its base model if it is an adapter without a tokenizer."""
    if is_lost(path):
        raise FileNotFoundError(f"`model_name_or_path`: there is no folder {path}. Check the path.")
    source, options = path, {"revision": revision, "trust_remote_code": trust_remote_code}
    has_tokenizer = not Path(path).is_dir() or Path(path, "tokenizer_config.json").is_file()
    if not has_tokenizer and find_adapter_config_file(path) is not None:
        source = str(PeftConfig.from_pretrained(path).base_model_name_or_path)
        del options["revision"]
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model_name_or_path`={path!r} has no tokenizer that can be loaded from {source} ({in_short(error)}). "
            "Check the path or id, or save the model's tokenizer there with `save_pretrained`."
        ) from error


@contextmanager
def named(argument: str) -> Iterator[None]:
    """Re-raise errors of loading a model with the argument that names it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{argument} cannot be loaded ({in_short(error)}). Check the path, or the Hub id.") from error


@contextmanager
def renaming(argument: str) -> Iterator[None]:
    """Within, errors name this argument instead of those of other commands."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(re.sub("`(model_name_or_path|ranker)`", f"`{argument}`", str(error))) from error


def in_short(error: Exception) -> str:
    """Return the beginning of an error's message, on one line."""
    return " ".join(str(error).split())[:200].rstrip(".")


def _is_encoder_decoder(path: str, model: ModelConfig, trust_remote_code: bool) -> bool:
    config = AutoConfig.from_pretrained(path, revision=model.model_revision, trust_remote_code=trust_remote_code)
    return config.is_encoder_decoder


def init_kwargs(model: ModelConfig) -> dict[str, object]:
    """Return the arguments of `from_pretrained`, without the quantization."""
    return {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
