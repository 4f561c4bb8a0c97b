"""How a run is recognized again: settings as JSON, fingerprints (SHA-256), and files that are whole or absent."""

import errno
import hashlib
import inspect
import json
import logging
import os
import platform
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import _lru_cache_wrapper
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

from datasets import Dataset, config
from datasets.utils._dill import Pickler  # independent of the order of sets and dictionaries
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

logger = logging.getLogger(__name__)

Settings = dict[str, Any]  # by name, and serializable as JSON

# At least so many elements of each parameter are read, evenly spaced: training changes nearly all of them
ELEMENTS_PER_PARAMETER = 32
# Where a model was loaded from or how it is run, not what it computes
NOT_THE_MODEL = {
    "_name_or_path",
    "base_model_name_or_path",
    "inference_mode",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}


def as_json(settings: object, default: Callable[[Any], object] | None = None) -> Any:
    """Return settings as a JSON file would give them back: tuples become lists, and keys become strings."""
    return json.loads(json.dumps(settings, default=default))


def differences(before: object, now: object, name: str = "") -> dict[str, tuple[object, object]]:
    """Return the settings that differ as `{name: (before, now)}`, with dotted names for nested ones."""
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[object, object]] = {}
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


def write_json(path: str | Path, content: object) -> None:
    """Write a file of JSON that is whole or absent."""
    write_text(Path(path), json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file of text that is whole or absent."""
    with writing(path) as temporary:
        temporary.write_bytes(text.encode())


def read_lines(path: Path) -> list[Settings]:
    """Return the content of a file of JSON Lines."""
    with path.open("rb") as lines:
        return [json.loads(line) for line in lines]


def write_lines(path: Path, rows: Iterable[Settings]) -> None:
    """Write a file of JSON Lines that is whole or absent."""
    write_text(path, "".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary name for a file or folder, which is renamed to `path` once it is synced to the disk.

    If writing fails, `path` is unchanged and the `OSError` has a note that names it.
    """
    # Unique to this process, in case another run writes the same file
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
    except OSError as error:
        remove(temporary)
        error.add_note(f"Could not write {path}, which is unchanged. Free disk space, or make the folder writable.")
        raise


@contextmanager
def plotting() -> Iterator[None]:
    """Within, plots are drawn; without matplotlib they are left out, and a warning says so."""
    try:
        yield
    except ImportError:
        logger.warning("No plot was drawn: install matplotlib, with `pip install 'prefopt-trl[plots]'`.")


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():  # on a read-only disk, `unlink` fails even for a missing file
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


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint the weights of a model without reading all of them.

    It covers the config, the adapters and which of them is active, and the name, shape, dtype and a few dozen evenly
    spaced elements of each parameter. So it is cheap for a 7B model and differs after any training, but misses a
    change of the other elements alone.
    """
    digest = hashlib.sha256(_settings_of(model).encode())
    # The original behind a trained copy is not used, and that of a new classification head is random in every process
    copied = [part for part in model.modules() if isinstance(part, ModulesToSaveWrapper) and not part.disable_adapters]
    idle = {id(parameter) for part in copied for parameter in part.original_module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in idle:
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // ELEMENTS_PER_PARAMETER)].cpu()
        digest.update(repr(sample.tolist()).encode())
    return digest.hexdigest()


def _settings_of(model: Any) -> str:
    """Return the config of a model and of its adapters as JSON."""
    configs = {"config": model.config.to_dict()} if hasattr(model, "config") else {}
    if hasattr(model, "peft_config"):
        configs |= {name: adapter.to_dict() for name, adapter in model.peft_config.items()}
        layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]
        configs["active"] = {
            "adapters": model.active_adapters,
            "disabled": any(layer.disable_adapters for layer in layers),
            "merged": sorted({name for layer in layers for name in layer.merged_adapters}),
        }
    kept = {
        name: {key: value for key, value in config.items() if key not in NOT_THE_MODEL}
        for name, config in configs.items()
    }
    return json.dumps(
        kept, sort_keys=True, default=lambda value: sorted(map(str, value)) if isinstance(value, set) else str(value)
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint a tokenizer by its backend, its special tokens and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: object = sorted(tokenizer.get_vocab().items())
    else:  # the last call left its padding and truncation in the backend
        rules = json.dumps({**json.loads(backend.to_str()), "padding": None, "truncation": None}, sort_keys=True)
    parts = (rules, sorted(tokenizer.special_tokens_map.items()), tokenizer.chat_template)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def template_date(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> dict[str, str]:
    """Return the setting `{"date_in_chat_template": "28 Nov 2026"}` of a chat template that writes today's date.

    Those of Llama 3.2 and Granite do, with `strftime_now`, so the same messages have other tokens on another day.
    Other templates return an empty `dict`. By default the chat template is the tokenizer's.
    """
    template = str(chat_template or tokenizer.chat_template)
    formats = re.findall(r"""strftime_now\(\s*["'](.+?)["']""", template) or ["%Y-%m-%d"]
    if "strftime_now" not in template:
        return {}
    return {"date_in_chat_template": datetime.now().strftime(", ".join(formats))}


def cache_of_contents(path: Path) -> str:
    """Return a `cache_dir` for `load_dataset` that depends on the contents of a file or of a folder's files.

    `datasets` identifies a local file by its path and modification time, and reads stale rows from its cache if a file
    was replaced by one with the same time. To go once it compares contents:
    https://github.com/huggingface/datasets/issues/2956
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("[!.]*")):
        if file.is_file():
            with file.open("rb") as content:
                digest.update(f"{file} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return str(Path(config.HF_DATASETS_CACHE, digest.hexdigest()[:16]))


def path_fingerprint(path: str) -> str:
    """Return what recognizes a model by its path: an id on the Hub, or of a folder the names, the sizes and 64 pieces
    of its files, with those of an adapter's base.

    Checkpoints and logs in its subfolders, and its card, may come and go.
    """
    if not Path(path).is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(one for one in Path(path).iterdir() if one.is_file() and one.suffix not in (".md", ".png")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            for piece in range(64):  # of 1 KiB
                content.seek(size * piece // 64)
                digest.update(content.read(1024))
    config = find_adapter_config_file(path)
    base = str(json.loads(Path(config).read_text())["base_model_name_or_path"]) if config else ""
    return digest.hexdigest() + (f" on {path_fingerprint(base)}" if base else "")


def function_fingerprint(function: Callable[..., object]) -> str:
    """Fingerprint a function by its name, its source code, its defaults and the values it closes over.

    A method, a `functools.partial` and an object with `__call__` are fingerprinted by what they hold: functions, the
    source of classes and of their bases, attributes and arguments. The path of the file has no influence. What the
    source reads elsewhere (a global, a file) is not covered. Functions and classes whose source Python cannot find
    (typed at a prompt, or compiled) are pickled. The fingerprint begins with the name and a colon.

    Raises:
        ValueError: if what the function holds does not pickle.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        _BySource(pickled := BytesIO(), recurse=True).dump(function)
    except Exception as error:  # whatever its parts raise when they are pickled
        raise ValueError(
            f"Cannot tell whether {name} changes between runs: what it holds does not pickle, or Python finds no "
            "source for it. Wrap it in a plain `def` function saved in a file."
        ) from error
    return f"{name}:{hashlib.sha256(pickled.getvalue()).hexdigest()}"


class _BySource(Pickler):
    """Pickle functions and classes by their source. The usual reference would have the path of a `path/to/file.py`.

    The pickle is only for hashing. `compile` stands for what would load it.
    """

    def reducer_override(self, value: Any) -> Any:
        try:
            if isinstance(value, FunctionType):
                held = [_contents(cell) for cell in value.__closure__ or ()], value.__defaults__, value.__kwdefaults__
                return compile, (value.__qualname__, inspect.getsource(value.__code__)), held
            if isinstance(value, type):
                return compile, (value.__qualname__, inspect.getsource(value)), value.__bases__
        except (OSError, TypeError):  # Python finds no source
            return NotImplemented
        # `functools.cache` would be pickled by reference
        return (compile, (), value.__wrapped__) if isinstance(value, _lru_cache_wrapper) else NotImplemented


def dataset_fingerprint(dataset: Dataset) -> str:
    """Fingerprint the rows of a dataset as JSON: columns, order and values, but not where they are stored."""
    digest = hashlib.sha256()
    for row in dataset:
        try:
            digest.update(json.dumps(row, sort_keys=True).encode())
        except TypeError as error:
            raise TypeError(
                f"One of the columns {', '.join(dataset.column_names)} cannot be written as JSON ({error}). Convert "
                "it to text or numbers, or remove it with `dataset.remove_columns`."
            ) from error
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # the name has no value yet
        return None
