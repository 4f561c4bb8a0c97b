"""Fingerprints of what a sampled dataset was made with: equal ones mean that its rows may be used again."""

import hashlib
import inspect
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import nn
from transformers import PreTrainedTokenizerBase

# Of each parameter at least so many elements are read, evenly spaced: training moves nearly all of them
ELEMENTS_PER_PARAMETER = 32


def model_fingerprint(model: nn.Module) -> str:
    """Fingerprint the weights of a model without reading all of them.

    It covers names, shapes, dtypes and a few dozen evenly spaced elements of each parameter, so it is cheap for a 7B
    model and differs after any training, but not after a change that spares those elements.

    Args:
        model ([`~torch.nn.Module`]):
            Model on any device, in any dtype.

    Returns:
        `str`: SHA-256 in hexadecimal.

    Example:

    ```python
    >>> before = model_fingerprint(model)
    >>> trainer.train()
    >>> model_fingerprint(model) == before
    False
    ```
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // ELEMENTS_PER_PARAMETER)].cpu()
        digest.update(repr(sample.tolist()).encode())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint a tokenizer by its vocabulary, special tokens and chat template.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.

    Returns:
        `str`: SHA-256 in hexadecimal.
    """
    parts = (
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.special_tokens_map.items()),
        tokenizer.chat_template,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def function_fingerprint(function: Callable[..., Any]) -> str:
    """Fingerprint a function by its name and its source code.

    What the function reads from outside (a global, a file, a closure) is not seen: it changes nothing here.

    Args:
        function (`Callable`):
            Function, or any other callable. One whose source Python cannot find (typed at a prompt, a
            `functools.partial`, an object with `__call__`) is fingerprinted by what it pickles to.

    Returns:
        `str`: name and SHA-256 in hexadecimal, joined by a colon.

    Raises:
        ValueError: if it has no source and does not pickle.

    Example:

    ```python
    >>> function_fingerprint(length_reward)
    'length_reward:6b3c...'
    ```
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        try:
            source = Hasher.hash(function)
        except Exception as error:  # whatever its parts raise on pickling
            raise ValueError(
                f"Cannot tell whether {name} changes between runs: Python finds no source for it and it does not "
                "pickle. Wrap it in a plain `def` function saved in a file."
            ) from error
    return f"{name}:{hashlib.sha256(source.encode()).hexdigest()}"


def dataset_fingerprint(dataset: Dataset) -> str:
    """Fingerprint the rows of a dataset: columns, order and values, not where they are stored.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset whose values can be written as JSON.

    Returns:
        `str`: SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what results depend on, for the files that hold results."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}
