"""What cannot work, or would be without effect, of arguments that are each valid: said before anything is started."""

import json
import os
import sys
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from trl import ModelConfig

from prefopt_trl.data.loading import check_name, is_lost
from prefopt_trl.runtime.processes import checkpoints

ADAPTER_CONFIG = "adapter_config.json"


def check_arguments(own: Any, *others: Any) -> None:
    """Refuse arguments of a command, its dataclasses, that cannot work together, or on this machine.

    Raises:
        ValueError: naming the argument and the remedy.
        FileNotFoundError: for a path with nothing at it.
    """
    model: ModelConfig = others[-1]
    training = others[0] if len(others) > 1 else None
    if model.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing. Give the folder or Hub id of a model.")
    _check_model("model_name_or_path", model.model_name_or_path)
    check_name(own.dataset_name)
    if getattr(own, "reference", None) is not None:
        _check_model("reference", own.reference)
    if getattr(own, "ranker", None) is not None:
        _check_ranker(own.ranker)
    is_adapter = Path(model.model_name_or_path, ADAPTER_CONFIG).is_file()
    if model.use_peft and is_adapter:
        raise ValueError(
            f"{model.model_name_or_path} is an adapter already, and `use_peft` would put another on top. Leave "
            "`use_peft` out to train this one further, or merge it into its base first (`merge_and_unload` of PEFT)."
        )
    _refuse_without("use_peft", model, [name for name in _names(model) if "lora" in name] + ["use_dora"])
    _refuse_without("load_in_4bit", model, [name for name in _names(model) if "bnb" in name])
    quantised = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(model, name)]
    if quantised and find_spec("bitsandbytes") is None:
        raise ValueError(f"`{quantised[0]}` needs bitsandbytes. Run `pip install 'prefopt-trl[bitsandbytes]'`.")
    if training is None:
        if model.use_peft:
            raise ValueError("`use_peft` is for training, and this command trains nothing. Leave it out.")
        return
    if quantised and not model.use_peft and not is_adapter:
        raise ValueError(f"`{quantised[0]}` alone cannot be trained. Add `use_peft`, which trains an adapter.")
    if "8bit" in training.optim and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"`optim={training.optim.value}` needs bitsandbytes. Run `pip install 'prefopt-trl[bitsandbytes]'`."
        )
    installed = get_available_reporting_integrations()
    for tracker in training.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            nearest = get_close_matches(str(tracker), [*INTEGRATION_TO_CALLBACK, "none"], n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"`report_to={tracker}` is no tracker that transformers knows.{hint}")
        if tracker not in installed:
            raise ValueError(
                f"`report_to={tracker}` is not among the trackers installed ({', '.join(installed)}). Run "
                f"`pip install {tracker}`, or use `report_to=none`."
            )
    _check_checkpoint(training.resume_from_checkpoint, training.output_dir)
    if getattr(own, "ranker", None) is None and getattr(training, "bootstrap_parts", False):
        raise ValueError("`bootstrap_parts` needs a `ranker` to score the samples. Give one.")


def is_function(ranker: str) -> bool:
    """Whether a ranker is named as a function, `package.module.function`."""
    return not os.path.exists(ranker) and "/" not in ranker and "." in ranker


def look_beside_the_data() -> None:
    """As TRL's GRPO command, for a function in a file of the current folder."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def not_importable(ranker: str, reason: object) -> ValueError:
    """Say what a ranker may be, where a function cannot be imported."""
    return ValueError(
        f"`ranker`={ranker!r} is no folder, and no function that can be imported ({reason}). Give a folder, a Hub id "
        "with its organisation, or `package.module.function`."
    )


def other_base(adapter: str, base: str) -> ValueError:
    """Say that the base model of an adapter is gone, and where its name is written."""
    return ValueError(
        f"the adapter {adapter} names its base {base!r}, which is not there or cannot be read now. Edit "
        f"`base_model_name_or_path` in {Path(adapter, ADAPTER_CONFIG)}."
    )


def _check_model(argument: str, name: str) -> None:
    if is_lost(name):
        raise FileNotFoundError(f"`{argument}`={name!r} is not there. Check the path, or give the id of a model.")
    config = Path(name, ADAPTER_CONFIG)
    if config.is_file():
        base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if base and is_lost(base):
            raise other_base(name, base)


def _check_ranker(ranker: str) -> None:
    file, _, function = ranker.partition(":")
    if file.endswith(".py"):
        parts = Path(file).with_suffix("").parts
        module = ".".join(parts) if Path(file).is_file() and not {"/", ".."} & set(parts) else parts[-1]
        raise ValueError(f"`ranker`={ranker!r} is a file. Give its function as `{module}.{function or 'FUNCTION'}`.")
    if not is_function(ranker):
        _check_model("ranker", ranker)
        return
    look_beside_the_data()
    try:
        found = find_spec(ranker.rpartition(".")[0])
    except ImportError as error:
        raise not_importable(ranker, error) from error
    if found is None:
        raise not_importable(ranker, f"there is no module {ranker.rpartition('.')[0]}")


def _check_checkpoint(given: Any, output_dir: str) -> None:
    """Refuse to resume what is no checkpoint; `True` is the latest one, and may be spelt so in a file."""
    if not given:
        return
    if given is True:
        if not checkpoints(output_dir):
            raise ValueError(
                f"`resume_from_checkpoint` finds no checkpoint in {output_dir}. Leave it out to train from the start."
            )
    elif not Path(given, "trainer_state.json").is_file():
        folder = given if checkpoints(given) else Path(given).parent
        there = ", ".join(checkpoints(folder)) or "none"
        raise FileNotFoundError(f"`resume_from_checkpoint`={given!r} is no checkpoint. Those in {folder}: {there}.")


def _names(model: ModelConfig) -> list[str]:
    return [field.name for field in fields(model)]


def _refuse_without(flag: str, model: ModelConfig, names: list[str]) -> None:
    defaults = ModelConfig()
    for name in names:
        if not getattr(model, flag) and getattr(model, name) != getattr(defaults, name):
            raise ValueError(f"`{name}` has no effect without `{flag}`. Add `{flag}`, or leave `{name}` out.")
