"""Fingerprints (SHA-256 in hex) of what a sampled dataset was made with: equal ones let its rows be used again."""

import hashlib
import inspect
import json
import platform
import re
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import CellType
from typing import Any

from datasets import Dataset, config
from datasets.fingerprint import Hasher
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedTokenizerBase

# Of each parameter at least so many elements are read, evenly spaced: training moves nearly all of them
ELEMENTS_PER_PARAMETER = 32


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint the weights of a model without reading all of them.

    It covers the config, the adapters and which of them is active, and names, shapes, dtypes and a few dozen evenly
    spaced elements of each parameter. So it is cheap for a 7B model and differs after any training, but not after a
    change that spares those elements.
    """
    digest = hashlib.sha256(_settings_of(model).encode())
    # What stands idle behind a trained copy: a new classification head's is random in every process
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


# Says where a model was loaded from or how it is run, not what it computes
NOT_THE_MODEL = {
    "_name_or_path",
    "base_model_name_or_path",
    "inference_mode",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}


def _settings_of(model: Any) -> str:
    """Config of a model and of its adapters, as JSON."""
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
    """Fingerprint a tokenizer by all it does to a text, its special tokens and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = (
        sorted(tokenizer.get_vocab().items()) if backend is None else _without_calls(backend.to_str()),
        sorted(tokenizer.special_tokens_map.items()),
        tokenizer.chat_template,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _without_calls(tokenizer: str) -> str:
    """A tokenizer as JSON, without the padding and truncation that its last call left in it."""
    return json.dumps({**json.loads(tokenizer), "padding": None, "truncation": None}, sort_keys=True)


def template_date(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the setting `{"date_in_chat_template": "28 Nov 2026"}` of a chat template that writes today's date.

    Llama 3.2's and Granite's do, by `strftime_now`: on another day the same messages are other tokens. It is an empty
    `dict` for other templates.
    """
    template = str(tokenizer.chat_template)
    formats = re.findall(r"""strftime_now\(\s*["'](.+?)["']""", template) or ["%Y-%m-%d"]
    if "strftime_now" not in template:
        return {}
    return {"date_in_chat_template": datetime.now().strftime(", ".join(formats))}


def cache_of_contents(path: Path) -> str:
    """Return a `cache_dir` for `load_dataset`, which differs with the contents of a file or of a folder's files.

    `datasets` identifies a local file by its path and modification time, and reads stale rows from its cache where a
    file was replaced and that time is the same. Remove this once `datasets` compares contents.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.rglob("[!.]*")):
        if file.is_file():
            with file.open("rb") as content:
                digest.update(f"{file} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return str(Path(config.HF_DATASETS_CACHE, digest.hexdigest()[:16]))


def function_fingerprint(function: Callable[..., Any]) -> str:
    """Fingerprint a function by its name, its source code, its defaults and the values it closes over.

    Of a method, the attributes of its object count too. What is read from elsewhere (a global, a file) is not seen. A
    callable whose source Python cannot find (typed at a prompt, a `functools.partial`, an object with `__call__`) is
    fingerprinted by what it pickles to, and one that does not pickle is refused. The name and a colon come first.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        source = inspect.getsource(function)
        cells = [_contents(cell) for cell in getattr(function, "__closure__", None) or ()]
        defaults = (getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None))
        held: Any = (cells, defaults, getattr(getattr(function, "__self__", None), "__dict__", None))
    except (OSError, TypeError):
        source, held = "", function
    try:
        values = Hasher.hash(held)
    except Exception as error:  # whatever its parts raise on pickling
        raise ValueError(
            f"Cannot tell whether {name} changes between runs: what it holds does not pickle, or Python finds no "
            "source for it. Wrap it in a plain `def` function saved in a file."
        ) from error
    return f"{name}:{hashlib.sha256((source + values).encode()).hexdigest()}"


def dataset_fingerprint(dataset: Dataset) -> str:
    """Fingerprint the rows of a dataset, as JSON: columns, order and values, not where they are stored."""
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
    """Versions of what results depend on, for the files that hold results."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # closes over a name that has no value yet
        return None
