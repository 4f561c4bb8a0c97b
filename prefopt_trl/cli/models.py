"""Models, adapters and rankers as the command line names them."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file
from trl import ModelConfig, get_peft_config, get_quantization_config

from prefopt_trl.cli.arguments import RankerArguments
from prefopt_trl.cli.checks import is_function, look_beside_the_data, not_importable, other_base
from prefopt_trl.data.tokenization import check_vocabulary
from prefopt_trl.rankers.base import Ranker
from prefopt_trl.rankers.function import FunctionRanker
from prefopt_trl.rankers.inference import is_reward_model
from prefopt_trl.rankers.pairwise import PairwiseRanker
from prefopt_trl.rankers.pointwise import RewardModelRanker


def model_to_train(model: ModelConfig, args: Any) -> dict[str, Any]:
    """The arguments of a trainer that say which model it trains.

    A path to an adapter gives its base with the adapter on top, to be trained further; TRL keeps a frozen copy of it
    as the reference model. For another path `args.model_init_kwargs` get what the model's arguments say.
    """
    path: Any = model.model_name_or_path
    init = {**_init_kwargs(model), **(args.model_init_kwargs or {})}
    with named("model_name_or_path", path):
        tokenizer = load_tokenizer(path, model.model_revision, args.trust_remote_code)
    if find_adapter_config_file(path, revision=model.model_revision) is not None:
        args.model_init_kwargs = None
        adapted = load_adapter(path, model, {**init, "trust_remote_code": args.trust_remote_code}, is_trainable=True)
        return {"model": adapted, "processing_class": tokenizer}
    args.model_init_kwargs = init
    return {
        "model": path,
        "processing_class": tokenizer,
        "peft_config": get_peft_config(model),
        "quantization_config": get_quantization_config(model),
    }


def model_to_run(path: str, model: ModelConfig, device: Any, trust_remote_code: bool) -> Any:
    """Load a policy to sample from, with its adapter if it is one, onto a device."""
    init = {**_init_kwargs(model), "trust_remote_code": trust_remote_code}
    if find_adapter_config_file(path, revision=model.model_revision) is not None:
        loaded = load_adapter(path, model, init, is_trainable=False)
    else:
        with named("model_name_or_path" if path == model.model_name_or_path else "reference", path):
            config = AutoConfig.from_pretrained(
                path, revision=model.model_revision, trust_remote_code=trust_remote_code
            )
        auto_class: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded = auto_class.from_pretrained(path, quantization_config=get_quantization_config(model), **init)
    return (loaded if getattr(loaded, "is_quantized", False) else loaded.to(device)).eval()


def load_adapter(path: str, model: ModelConfig, init: dict[str, Any], is_trainable: bool) -> PeftModel:
    """Load the base model that an adapter names, quantized as `model` says, and the adapter on top.

    Raises:
        ValueError: if it names no base, or does not fit it.
    """
    config = PeftConfig.from_pretrained(path, revision=model.model_revision)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"The adapter {path} names no base model. Add `base_model_name_or_path` to its config.")
    init = {**init, "revision": config.revision or "main", "quantization_config": get_quantization_config(model)}
    try:
        on_base = AutoModelForCausalLM.from_pretrained(base, **init)
    except OSError as error:
        raise other_base(path, base) from error
    try:
        return PeftModel.from_pretrained(on_base, path, revision=model.model_revision, is_trainable=is_trainable)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"The adapter {path} does not fit its base model {base}: {' '.join(str(error).split())[:300]}. Was it "
            "trained on another one? `base_model_name_or_path` in its adapter_config.json says which is loaded."
        ) from error


def load_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, which it must fit, or of an adapter's base if the adapter has none."""
    source, is_adapter = path, find_adapter_config_file(path, revision=revision) is not None
    if is_adapter and not _has_tokenizer(path):
        source = str(PeftConfig.from_pretrained(path, revision=revision).base_model_name_or_path)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source == path:
        options["revision"] = revision
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        if source != path:
            raise other_base(path, source) from error
        if not Path(path).is_dir():
            raise
        raise ValueError(
            f"{path} has no tokenizer that can be loaded ({_in_short(error)}). Save the model's there, with "
            "`save_pretrained`."
        ) from error
    if not is_adapter:
        check_vocabulary(tokenizer, AutoConfig.from_pretrained(path, **options))
    return tokenizer


def load_ranker(arguments: RankerArguments) -> Ranker | None:
    """Load the ranker that is named: a model by the class its configuration names, or a function by its path."""
    name = arguments.ranker
    if name is None:
        return None
    if is_function(name):
        return FunctionRanker(_import_function(name))
    with named("ranker", name):
        if is_reward_model(name):
            return RewardModelRanker(name, batch_size=arguments.ranker_batch_size)
        return PairwiseRanker(name, template=arguments.ranker_template, batch_size=arguments.ranker_batch_size)


@contextmanager
def named(argument: str, name: str) -> Iterator[None]:
    """While entered, a model that cannot be read is told by its argument and name, which transformers may omit."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"`{argument}`={name!r} is no local folder with a model in it, and no model of the Hub that can be read "
            f"now ({_in_short(error)})."
        ) from error


def _import_function(path: str) -> Any:
    module, _, name = path.rpartition(".")
    look_beside_the_data()
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise not_importable(path, error) from error


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def _init_kwargs(model: ModelConfig) -> dict[str, Any]:
    return {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }


def _has_tokenizer(path: str) -> bool:
    return not Path(path).is_dir() or Path(path, "tokenizer_config.json").is_file()
