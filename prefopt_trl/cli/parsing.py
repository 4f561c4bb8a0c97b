"""Read the arguments of a command from the command line and from `--config`, and write them for `--config`."""

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

import yaml
from accelerate.commands.launch import launch_command_parser
from transformers import TrainingArguments
from transformers.hf_argparser import DataClass, DataClassType
from trl import ModelConfig, RewardConfig, SFTConfig, TrlParser

import prefopt_trl
from prefopt_trl.cli.arguments import RewardModelData, TrainingData
from prefopt_trl.cli.commands import COMMANDS
from prefopt_trl.sampling.options import AUTO
from prefopt_trl.trainers import METHODS

LaunchOptions = dict[str, object]  # options of `accelerate launch` by name; a flag is True
SECRETS = {"token", "hub_token", "push_to_hub_token", "use_auth_token"}


def parse(name: str, arguments: Sequence[str]) -> tuple[tuple[DataClass, ...], LaunchOptions]:
    """Return an instance of each of the command's dataclasses, and the options of `accelerate launch`.

    Raises:
        ValueError: as [`read`], and for values that a dataclass rejects.
    """
    parser, given, launch = read(name, arguments)
    if issubclass(COMMANDS[name].own, RewardModelData):
        _measure_checkpoints(given)
    return parser.parse_dict(vars(given), allow_extra_keys=True), launch


def read(name: str, arguments: Sequence[str]) -> tuple[TrlParser, Namespace, LaunchOptions]:
    """Return the command's parser, its arguments before the dataclasses check them, and those of `accelerate launch`.

    The command line wins over the file of `--config`. Environment variables in the file are set.

    Raises:
        ValueError: for an unknown argument, or a value in the file that does not fit its argument.
        SystemExit: with exit code 2 for errors of argparse.
    """
    parser = make_parser(name)
    hints = {field: hint for part in parser.dataclass_types for field, hint in get_type_hints(part).items()}
    if "resume_from_checkpoint" in hints:
        hints["resume_from_checkpoint"] = str | bool | None
    actions = {action.dest: action for action in parser._actions}
    config, words = _read_config(parser.prog, arguments)
    if "activation_checkpointing" in config.keys() - hints.keys():  # its name since transformers 5.23
        config["gradient_checkpointing"] = config.pop("activation_checkpointing")
    lists, scalars = [], []  # words for argparse, which converts and checks them
    for field, value in config.items():
        if field not in hints:
            continue
        _check_kind(field, value, hints[field])
        if isinstance(value, list) and value and actions[field].nargs == "+":
            lists += [f"--{field}", *map(str, value)]
        elif isinstance(value, list | dict | None):
            parser.set_defaults(**{field: value})
        else:
            scalars.append(f"--{field}={value}")
    given, others = parser.parse_known_args([*lists, *scalars, *words])
    launch = {option: value for option, value in config.items() if option not in hints} | _options(others)
    known = _launch_names() if COMMANDS[name].launched else set()
    for option in launch:
        if option not in known:
            nearest = get_close_matches(option, [*hints, "config", *known], n=1)
            remedy = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"unknown argument {option!r}.{remedy} See --help.")
    return parser, given, launch


def make_parser(name: str) -> TrlParser:
    """Return the parser of a command, without the options of `accelerate launch`."""
    own, model = COMMANDS[name].own, [ModelConfig] if COMMANDS[name].takes_model else []
    configs = [RewardConfig if own is RewardModelData else SFTConfig] if issubclass(own, TrainingData) else []
    if (method := name.split()[-1]) in METHODS:
        configs = [getattr(prefopt_trl, f"{METHODS[method].name}Config")]
    dataclasses = map(DataClassType, [own, *configs, *model])
    usage = f"prefopt-trl {name} [--config FILE.yaml] [--OPTION VALUE ...], or --help for the options"
    parser = TrlParser(list(dataclasses), prog=f"prefopt-trl {name}", usage=usage, allow_abbrev=False)
    if issubclass(own, RewardModelData):  # until `_measure_checkpoints`
        unset = ("eval_strategy", "save_strategy", "save_steps", "load_best_model_at_end")
        parser.set_defaults(**dict.fromkeys(unset), metric_for_best_model="eval_accuracy")
    for action in parser._actions:  # TRL's parser requires a value for these, and users write a flag
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const, action.type = "?", True, _checkpoint
        elif action.dest == "rejection_beta":
            action.type = number_or_auto
        elif getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
            action.nargs, action.const = "?", True
    return parser


def _measure_checkpoints(given: Namespace) -> None:
    """Evaluate and save a ranker together, by default each epoch, and keep the best, unless the user set otherwise."""
    default = "steps" if given.save_steps or given.eval_steps else "epoch"
    given.eval_strategy, given.save_strategy = given.eval_strategy or default, given.save_strategy or default
    given.save_steps = given.save_steps or given.eval_steps or TrainingArguments.save_steps
    given.eval_steps = given.eval_steps or given.save_steps
    if given.load_best_model_at_end is None:
        together = (given.eval_strategy, given.eval_steps) == (given.save_strategy, given.save_steps)
        given.load_best_model_at_end = together and given.eval_strategy != "no"


def write_config(output_dir: str | Path, text: str) -> None:
    """Write [`config_text`] into the folder of a run."""
    file = Path(output_dir, "config.yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not (file.is_file() and file.read_text(encoding="utf-8") == text):  # the disk may be read-only
        file.write_text(text, encoding="utf-8")


def config_text(parsed: Sequence[DataClass], launch: LaunchOptions) -> str:
    """Return every argument of a run as YAML, so that `--config` repeats the run.

    Access tokens and the checkpoint that the run resumes are left out.
    """
    values = {field.name: getattr(part, field.name) for part in parsed for field in fields(part) if field.init}
    values.pop("resume_from_checkpoint", None)
    plain = json.loads(json.dumps(launch | values, default=asdict), object_hook=_without_secrets)
    comment = f"# Every argument of this run, by prefopt-trl {prefopt_trl.__version__}; `--config` takes it\n"
    return comment + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=119)


def _without_secrets(values: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if name not in SECRETS}


def _checkpoint(word: str) -> str | bool:
    """Read a path, or `true` to resume the latest checkpoint."""
    return {"true": True, "false": False}.get(word.lower(), word)


def number_or_auto(word: str) -> float | str:
    """Read a number, or `auto`. Argparse names this function in its error."""
    return word if word == AUTO else float(word)


def _read_config(prog: str, arguments: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """Return the mapping in the file of `--config` and the other words. Set the environment variables in the file."""
    parser = ArgumentParser(prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[], metavar="FILE.yaml")
    given, words = parser.parse_known_args(arguments)
    if not given.config:
        return {}, words
    if len(given.config) > 1:
        raise ValueError("--config is given twice. Give one file; arguments on the command line win over it.")
    path = Path(given.config[0])
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} is not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {path} must hold a YAML mapping, `name: value` on each line.")
    if isinstance(config.get("env"), dict):  # anything else is reported as an unknown argument
        os.environ.update({name: str(value) for name, value in config.pop("env").items()})
    return config, words


def _check_kind(name: str, value: object, hint: object) -> None:
    """Raise for a value of the file that the command line could not give. argparse checks text and numbers."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    kinds = {get_origin(part) or part for part in alternatives}
    if isinstance(value, bool | list | dict | None):
        fits = type(value) in kinds
    else:
        fits = isinstance(value, str) or not kinds <= {str, NoneType}
    if not fits:
        expected = hint.__name__ if isinstance(hint, type) else hint
        remedy = " Put text that YAML reads as something else, such as no, in quotes." if str in kinds else ""
        found = json.dumps(value, default=str)
        raise ValueError(f"`{name}` in the file of --config is {found}, and must be {expected}.{remedy}")


def _options(words: list[str]) -> LaunchOptions:
    """Read `--name value`, `--name=value` and the flag `--name`."""
    options: LaunchOptions = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"unexpected argument {word!r}: options have names, such as --dataset_name {word}.")
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        options[name.replace("-", "_")] = value or True
    return options


def _launch_names() -> set[str]:
    options = [option for action in launch_command_parser()._actions for option in action.option_strings]
    return {"accelerate_config", *(option.lstrip("-").replace("-", "_") for option in options)}
