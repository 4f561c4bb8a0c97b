"""The options of generation: each with its help, default and check, once. Imports the standard library alone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Self

# Help of an option that some configurations give another default
MAX_NEW_TOKENS = {"help": "Longest completion to sample, in tokens."}


@dataclass(kw_only=True)
class Options:
    """Options that a configuration may have among others."""

    @classmethod
    def of(cls, options: object | None = None, **changes: Any) -> Self:
        """Return the options alone, those of a configuration if one is given, with changes by name.

        Raises:
            TypeError: for a name that is no option, with the nearest one.
        """
        names = [option.name for option in fields(cls)]
        for name in changes:
            if name not in names:
                nearest = get_close_matches(name, names, n=1, cutoff=0.4)
                hint = f"Did you mean `{nearest[0]}`?" if nearest else f"The options are {', '.join(names)}."
                raise TypeError(f"`{name}` is not an option of {cls.__name__}. {hint}")
        given = {} if options is None else {name: getattr(options, name) for name in names}
        return cls(**{**given, **changes})


@dataclass(kw_only=True)
class GenerationOptions(Options):
    """How completions are generated. The help of each field says what it means.

    Raises:
        ValueError: naming an option that is out of its range.
    """

    max_new_tokens: int = field(default=256, metadata=MAX_NEW_TOKENS)
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Sampling temperature. Algorithm 1 assumes samples of the policy itself: 1. With 0, which is for "
            "evaluation, the most likely token is taken."
        },
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling threshold; 1 keeps the whole distribution."})
    top_k: int = field(
        default=0, metadata={"help": "Sample among the k most likely tokens only; 0 means all of them."}
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions generated at a time, over all prompts. By default as many as "
            "`generation_memory_budget` holds."
        },
    )
    generation_memory_budget: float = field(
        default=4.0,
        metadata={
            "help": "GiB for what sampling needs beside the model: keys, values and scores of completions as long as "
            "they may be. Raise it on a large GPU; lower it where memory runs out."
        },
    )
    share_prefix: bool = field(
        default=True,
        metadata={
            "help": "Compute each prompt once for all its completions, in training and in sampling. Exact; where a "
            "model cannot share (sliding window, ALiBi, recurrence) one logged line says so and each completion is a "
            "separate row."
        },
    )

    def __post_init__(self) -> None:
        is_whole(self, "max_new_tokens", 1)
        is_number(self, "temperature", "Algorithm 1 assumes 1.")
        if not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be a number in (0, 1], got {self.top_p!r}.")
        is_whole(self, "top_k", 0)
        if self.generation_batch_size is not None:
            is_whole(self, "generation_batch_size", 1)
        is_number(self, "generation_memory_budget", "It is in GiB.", above_zero=True)
        if not isinstance(self.share_prefix, bool):
            raise ValueError(f"`share_prefix` must be True or False, got {self.share_prefix!r}.")

    def is_whole_distribution(self, generation_kwargs: Iterable[str] = ()) -> bool:
        """Return whether samples follow the model's own distribution, which their log-probabilities are of."""
        whole = (self.temperature, self.top_p, self.top_k) == (1, 1, 0)
        return whole and not set(generation_kwargs) - {"stop_strings"}


def is_one_of(config: object, name: str, choices: Iterable[str]) -> None:
    """Require an option to be one of its choices; the `ValueError` names the option and the choices."""
    if getattr(config, name) not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(config, name)!r}.")


def is_whole(config: object, name: str, at_least: int) -> None:
    """Require an option to be a whole number, at least so large; the `ValueError` names the option and its value."""
    value = getattr(config, name)
    if type(value) is not int or value < at_least:  # True is an int, too
        raise ValueError(f"`{name}` must be a whole number, at least {at_least}, got {value!r}.")


def is_number(config: object, name: str, advice: str, above_zero: bool = False) -> None:
    """Require an option to be finite and at least 0, or above it; the `ValueError` ends with the advice."""
    value = getattr(config, name)
    if not isinstance(value, int | float):
        raise ValueError(f"`{name}` must be a number, got {value!r}. {advice}")
    if not (value > 0 if above_zero else value >= 0) or value == math.inf:
        bound = "greater than 0" if above_zero else "at least 0"
        raise ValueError(f"`{name}` must be {bound} and finite, got {value}. {advice}")
