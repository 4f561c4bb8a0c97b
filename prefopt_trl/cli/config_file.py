"""The resolved configuration of a run, beside its result: every field, so that `--config` gives the same run again."""

from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from prefopt_trl import __version__

NAME = "config.yaml"


def save_config(output_dir: str | Path, *parsed: Any) -> Path:
    """Write the fields of dataclasses as a file for `--config`. Access tokens are left out.

    Args:
        output_dir (`str` or `Path`):
            Folder of the run. It is made where there is none.
        parsed:
            Instances of the command's dataclasses.

    Returns:
        `Path` of the file.
    """
    values = {field.name: _plain(getattr(part, field.name)) for part in parsed for field in fields(part) if field.init}
    kept = {name: value for name, value in values.items() if not _is_secret(name)}
    file = Path(output_dir, NAME)
    file.parent.mkdir(parents=True, exist_ok=True)
    comment = f"# Every argument of this run, by prefopt-trl {__version__}; `--config` takes it\n"
    file.write_text(comment + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=119), "utf-8")
    return file


def _plain(value: Any) -> Any:
    """As YAML writes it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items() if not _is_secret(str(key))}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def _is_secret(name: str) -> bool:
    return name == "token" or name.endswith("_token")
