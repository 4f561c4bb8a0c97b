"""Make the ranker that `--ranker` names: a model, a function, or a YAML file with a class and its arguments."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import yaml

import prefopt_trl
from prefopt_trl.cli.arguments import EvaluateConfig, RankerArguments, RoundsArguments
from prefopt_trl.cli.models import in_short, named, renaming
from prefopt_trl.rankers.base import Ranker
from prefopt_trl.rankers.function import FunctionRanker
from prefopt_trl.rankers.inference import check_temperature, is_reward_model
from prefopt_trl.rankers.pairwise import PairwiseRanker
from prefopt_trl.rankers.pointwise import RewardModelRanker

YAML = (".yaml", ".yml")
CLASSES = [name for name in prefopt_trl.__all__ if name.endswith("Ranker")]


def load_ranker(arguments: RankerArguments, trust_remote_code: bool = False) -> Ranker:
    """Make the ranker. A model's configuration decides its class.

    Raises:
        ValueError: naming `ranker`, if it cannot be loaded, or an option that has no effect on it.
    """
    name = str(arguments.ranker)
    if name.endswith(".py"):
        raise ValueError(f"`ranker`={name!r} is a file. Name a function in it as {name}:function.")
    if not is_model(name):
        for option in ("ranker_template", "ranker_batch_size"):
            if getattr(arguments, option) != getattr(RankerArguments(), option):
                raise ValueError(f"`{option}` has no effect on `ranker`={name!r}. Leave it out.")
        return _from_file(name) if name.endswith(YAML) else FunctionRanker(_function(name))
    init = {"trust_remote_code": True} if trust_remote_code else {}
    given: dict[str, Any] = {"batch_size": arguments.ranker_batch_size, "model_init_kwargs": init}
    with named(f"`ranker`={name!r}"):
        if is_reward_model(name, **init):
            return RewardModelRanker(name, **given)
        return PairwiseRanker(name, template=arguments.ranker_template, **given)


def load_judges(
    judges: list[str], own: EvaluateConfig | RoundsArguments, trust_remote_code: bool
) -> dict[str, Ranker]:
    """Make the rankers that judge, by name, with the options of those that take them."""
    given, load = by_name("judges", judges), renaming("judges")(load_ranker)
    options: Any = {"ranker_template": own.ranker_template, "ranker_batch_size": own.ranker_batch_size}
    takers = [what for what in given.values() if is_model(what)] or [*given.values()]  # the latter refuse the options
    return {
        name: load(RankerArguments(ranker=what, **(options if what in takers else {})), trust_remote_code)
        for name, what in given.items()
    }


def by_name(argument: str, given: list[str]) -> dict[str, str]:
    """Split what is given as [NAME=]WHAT; the default name is the last part of WHAT."""
    named: dict[str, str] = {}
    for one in given:
        pattern = r"(?:([^=/:]+)=)?((?:(best-of-\d+):)?.*?([^/:]+)/*)"
        name, what, best, last = re.fullmatch(pattern, one, re.DOTALL).groups()  # type: ignore[union-attr]
        name = name or " ".join(filter(None, (best, last)))
        if name in named:
            raise ValueError(f"`{argument}` has two with the name {name!r}. Give names: NAME={what}.")
        named[name] = what
    return named


def is_model(name: str) -> bool:
    """Return whether a ranker's name is that of a model, rather than of a function or YAML file."""
    is_function = not os.path.exists(name) and (":" in Path(name).name or ("/" not in name and "." in name))
    return not is_function and not name.endswith(YAML)


def _function(path: str) -> Callable[..., Any]:
    """Import `module:function`, `module.function` or `path/to/file.py:function`."""
    if os.getcwd() not in sys.path:  # for a file in the current folder, as TRL's GRPO command does
        sys.path.insert(0, os.getcwd())
    source, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        if not source.endswith(".py"):
            found = getattr(importlib.import_module(source), name)
        else:
            spec = spec_from_file_location(source, source)  # not its stem, which may be that of another module
            assert spec is not None and spec.loader is not None  # it ends with .py
            sys.modules[spec.name] = module = module_from_spec(spec)
            spec.loader.exec_module(module)
            found = getattr(module, name)
        FunctionRanker(found)  # raises for what does not take the arguments of a reward function
        return found
    except (OSError, ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`ranker`={path!r} is not a folder, and cannot be imported as a function ({in_short(error)}). Give a "
            "folder, a Hub id with its organization, `module:function` or `path/to/file.py:function`."
        ) from error


def _from_file(path: str) -> Ranker:
    try:
        return _make(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"In `ranker`={path!r}: {' '.join(str(error).split())}") from error


def _make(specification: Any) -> Ranker:
    """Make a ranker from its class and arguments, where `rankers` are specifications themselves."""
    if not isinstance(specification, dict) or specification.get("class") not in CLASSES:
        found = specification.get("class") if isinstance(specification, dict) else specification
        raise ValueError(f"`class` is {found!r}. Name one of {', '.join(CLASSES)}.")
    given = {name: value for name, value in specification.items() if name not in ("class", "temperature")}
    if "function" in given:
        given["function"] = _function(str(given["function"]))
    if "rankers" in given:  # made one after the other
        given["rankers"] = [partial(_make, member) for member in given["rankers"]]
    ranker = getattr(prefopt_trl, specification["class"])(**given)
    ranker.temperature = check_temperature(specification.get("temperature", 1.0))  # not all classes have the argument
    return ranker
