"""What cannot work, or would be without effect, of arguments that are each valid: said before anything is started."""

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig

ADAPTER_CONFIG = "adapter_config.json"


def check_arguments(own: Any, *others: Any) -> None:
    """Refuse arguments of a command that cannot work together, or on this machine.

    Args:
        own, others:
            Instances of the command's dataclasses, with the model's last.

    Raises:
        ValueError: naming the argument and the remedy.
    """
    model: ModelConfig = others[-1]
    training = others[0] if len(others) > 1 else None
    if model.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing. Give the folder or Hub id of a model.")
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
        if tracker not in installed:
            raise ValueError(
                f"`report_to={tracker}` is not among the trackers installed ({', '.join(installed)}). Run "
                f"`pip install {tracker}`, or use `report_to=none`."
            )
    if getattr(own, "ranker", None) is None and getattr(training, "bootstrap_parts", False):
        raise ValueError("`bootstrap_parts` needs a `ranker` to score the samples. Give one.")


def _names(model: ModelConfig) -> list[str]:
    return [field.name for field in fields(model)]


def _refuse_without(flag: str, model: ModelConfig, names: list[str]) -> None:
    defaults = ModelConfig()
    for name in names:
        if not getattr(model, flag) and getattr(model, name) != getattr(defaults, name):
            raise ValueError(f"`{name}` has no effect without `{flag}`. Add `{flag}`, or leave `{name}` out.")
