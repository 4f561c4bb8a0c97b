"""How a run is recognized again: settings as JSON, their differences, and files that are whole or absent."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Settings = dict[str, Any]  # by name, and serializable as JSON


def as_json(settings: Any, default: Callable[[Any], Any] | None = None) -> Any:
    """Return settings as they are read back from a file of JSON: tuples become lists, and keys strings."""
    return json.loads(json.dumps(settings, default=default))


def differences(before: Any, now: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, as `{name: (before, now)}`, nested ones by their dotted name."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(before.keys() | now.keys()):
            found |= differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return {} if before == now else {name: (before, now)}


def read_json(path: str | Path) -> Any:
    """Return the content of a file of JSON, or None if there is no such file."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return None


def write_json(path: str | Path, content: Any) -> None:
    """Write a file of JSON that is whole or absent."""
    with writing(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary name for a file or folder, which becomes `path` once it is whole and on the disk.

    If writing fails, `path` is as it was.
    """
    # A name of this process's own, should another run write here too
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        yield temporary
        for file in [temporary, *temporary.rglob("*")]:
            _sync(file)
        if path.is_dir():
            remove(path)  # a folder is not replaced
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError:
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():  # on a read-only disk, to remove what is not there is an error too
        path.unlink()


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)
