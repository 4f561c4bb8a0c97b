"""The resolved configuration of a run, beside its result: every field, so that `--config` gives the same run again."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from prefopt_trl import __version__

NAME = "config.yaml"
SECRETS = {"token", "hub_token", "push_to_hub_token", "use_auth_token"}  # `pad_token` and `eos_token` are none
_launch_options: dict[str, Any] = {}  # of this process; they are no fields of a command


def launched_with(options: Sequence[str]) -> None:
    """Remember the options of `accelerate launch` that this process was started with, for the file."""
    _launch_options.clear()
    for place, word in enumerate(options):
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            after = options[place + 1] if place + 1 < len(options) else "--"
            _launch_options[name.replace("-", "_")] = value or (True if after.startswith("--") else after)


def save_config(output_dir: str | Path, *parsed: Any) -> Path:
    """Write the fields of dataclasses as a file for `--config`, and return its path."""
    return write_config(output_dir, config_text(*parsed))


def config_text(*parsed: Any) -> str:
    """The text of the file. Access tokens are left out, and the checkpoint that this run alone goes on from."""
    values = {field.name: _plain(getattr(part, field.name)) for part in parsed for field in fields(part) if field.init}
    values.pop("resume_from_checkpoint", None)
    kept = _launch_options | {name: value for name, value in values.items() if name not in SECRETS}
    comment = f"# Every argument of this run, by prefopt-trl {__version__}; `--config` takes it\n"
    return comment + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=119)


def write_config(output_dir: str | Path, text: str) -> Path:
    """Write [`config_text`] into the folder of a run, which is made where there is none."""
    file = Path(output_dir, NAME)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not (file.is_file() and file.read_text(encoding="utf-8") == text):  # it may be on a read-only disk
        file.write_text(text, encoding="utf-8")
    return file


def _plain(value: Any) -> Any:
    """As YAML writes it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items() if key not in SECRETS}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value
