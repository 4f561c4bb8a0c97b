"""Arguments of a command, from the command line and from `--config`, into its dataclasses; nothing unknown passes."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from accelerate.commands.launch import launch_command_parser
from trl import TrlParser

from prefopt_trl.cli.commands import COMMANDS

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
WORDS |= {dict: "a mapping", NoneType: "null"}
WITH_PATH = ("--config", "--accelerate_config")  # what TRL takes as two words, and users write as one with "=", too


def parse(name: str, arguments: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Parse the arguments of a command as TRL's commands do; exit with code 2 and one line if they are wrong.

    Returns:
        An instance of each of the command's dataclasses, and the options of `accelerate launch` (those of the file
        first, so that the command line wins).
    """
    with _failing(name):
        parser, words, _, launching = _read(name, arguments)
        *parsed, _ = parser.parse_args_and_config(words, return_remaining_strings=True)
        return parsed, launching


def launch_options(name: str, arguments: Sequence[str]) -> tuple[list[str], Namespace]:
    """The options of `accelerate launch`, and the command's own arguments before its dataclasses check them."""
    with _failing(name):
        _, _, given, launching = _read(name, arguments)
        return launching, given


def fail(name: str, message: object, code: int = 2) -> NoReturn:
    """End as a wrong argument ends: with one line, and exit code 2."""
    print(f"prefopt-trl {name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def _failing(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, ImportError) as error:  # an engine without its package is the second
        fail(name, error)


def _read(name: str, arguments: Sequence[str]) -> tuple[TrlParser, list[str], Namespace, list[str]]:
    """The parser, its words, what it makes of them, and the options that are not its own."""
    command = COMMANDS[name]
    dataclasses = command.dataclasses()
    parser = TrlParser(
        dataclasses,
        prog=f"prefopt-trl {name}",
        usage=f"prefopt-trl {name} [--config FILE.yaml] [--OPTION VALUE ...], or --help for all options",
        allow_abbrev=False,
    )
    types = {name: hint for dataclass in dataclasses for name, hint in get_type_hints(dataclass).items()}
    types["resume_from_checkpoint"] = str | bool | None
    for action in parser._actions:  # what TRL's parser wants a value for, and users write as a flag
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const, action.type = "?", True, _checkpoint
        elif types.get(action.dest) == bool | None and action.nargs is None:
            action.nargs, action.const = "?", True
    words = [part for word in arguments for part in _split(word)]
    config, own_words = _read_config(words)
    if "activation_checkpointing" in config.keys() - types.keys():  # its name in files, and since transformers 5.23
        config["gradient_checkpointing"] = config.pop("activation_checkpointing")
    choices = {action.dest: action.choices for action in parser._actions if action.choices}
    for name, value in config.items():
        _check_value(name, value, types.get(name, Any), choices.get(name))
    others = [option.removeprefix("--") for option in parser.set_defaults_with_config(**config)[::2]]
    given, unknown = parser.parse_known_args(own_words)
    launching = [*_as_options({key: config[key] for key in others}), *unknown]
    _refuse_unknown(launching, types, _launch_options() if command.launched else set())
    return parser, words, given, launching


def _checkpoint(word: str) -> str | bool:
    """A path, or whether to go on from the latest."""
    return {"true": True, "false": False}.get(word.lower(), word)


def _split(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith(tuple(f"{option}=" for option in WITH_PATH)) else [word]


def _read_config(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The mapping of the file of `--config`, without its environment variables, which are set, and the other words."""
    if "--config" not in words:
        return {}, words
    place = words.index("--config")
    if words.count("--config") > 1:
        raise ValueError("--config is given twice. Give one file; arguments on the command line win over it.")
    path = Path(words[place + 1]) if place + 1 < len(words) else None
    if path is None or not path.is_file():
        raise ValueError(f"--config needs a YAML file, and {path or 'nothing'} is none. Check the path.")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a YAML mapping, `name: value` on each line, and holds {config!r:.80}.")
    env = config.pop("env", None)
    if isinstance(env, dict):  # TRL's parser refuses anything else
        os.environ.update({key: str(value) for key, value in env.items()})
    return config, words[:place] + words[place + 2 :]


def _check_value(name: str, value: Any, hint: Any, choices: Any) -> None:
    """Refuse a value of a file that does not fit the type of its field. Text fits, as argparse converts it."""
    given = value if isinstance(value, list) else [value]
    if (isinstance(value, str) or _fits(value, hint)) and (not choices or value is None or set(given) <= set(choices)):
        return
    words = [WORDS.get(_kind(part), str(part)) for part in _alternatives(hint)]
    expected = f"one of {', '.join(choices)}" if choices else " or ".join(words)
    if "text" in words and not isinstance(value, str):
        expected += ". Put text that YAML reads as something else, such as no, in quotes"
    found = json.dumps(value, default=str)
    raise ValueError(f"`{name}` in the file of --config is {found}, and must be {expected}.")


def _fits(value: Any, hint: Any) -> bool:
    for part in _alternatives(hint):
        kind = _kind(part)
        if kind not in WORDS or type(value) is kind or (kind is float and type(value) is int):
            return not isinstance(value, list) or all(_fits(item, *get_args(part)) for item in value)
    return False


def _alternatives(hint: Any) -> Any:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]


def _kind(hint: Any) -> Any:
    return str if isinstance(hint, type) and issubclass(hint, Enum) else get_origin(hint) or hint


def _as_options(config: dict[str, Any]) -> list[str]:
    """Options of `accelerate launch` in a file: one that is true is a flag."""
    given = {f"--{key}": value for key, value in config.items() if value is not False and value is not None}
    return [word for key, value in given.items() for word in ([key] if value is True else [key, str(value)])]


def _launch_options() -> set[str]:
    actions = launch_command_parser()._actions
    return {option.lstrip("-").replace("-", "_") for action in actions for option in action.option_strings} | {
        "accelerate_config"
    }


def _refuse_unknown(words: list[str], types: dict[str, Any], launch_options: set[str]) -> None:
    for place, word in enumerate(words):
        key = word.removeprefix("--").split("=")[0].replace("-", "_")
        if not word.startswith("--") and place == 0:
            raise ValueError(f"unexpected argument {word!r}: options have names, such as --dataset_name {word}.")
        if word.startswith("--") and key not in launch_options:
            nearest = get_close_matches(key, [*types, "config", *launch_options], n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            if types.get(key.removeprefix("no_")) in (bool, bool | None):
                hint = f" Did you mean `--{key.removeprefix('no_')} False`?"
            raise ValueError(f"unknown argument {key!r}.{hint} See --help.")
