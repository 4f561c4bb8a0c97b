"""Checks of a configuration's arguments, and the names of those of `DPOConfig` without effect in some trainers."""

import math
from collections.abc import Iterable
from dataclasses import fields

from trl import DPOConfig

# Arguments of `DPOConfig` that belong to TRL's own losses, and those that need a reference model
TRL_LOSS_ARGUMENTS = [
    "loss_weights",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "label_smoothing",
    "use_weighting",
    "discopop_tau",
]
REFERENCE_ARGUMENTS = [
    "beta",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
]


def refuse(config: DPOConfig, names: Iterable[str], reason: str) -> None:
    """Refuse arguments of `DPOConfig` that would be without effect, where they are not at their default.

    Raises:
        ValueError: naming the argument.
    """
    for argument in fields(DPOConfig):
        if argument.name in names:
            default = argument.default_factory() if callable(argument.default_factory) else argument.default
            if getattr(config, argument.name) != default:
                raise ValueError(
                    f"`{argument.name}`={getattr(config, argument.name)!r} has no effect in "
                    f"{type(config).__name__}: {reason}. Leave it out."
                )


def is_one_of(config: DPOConfig, name: str, choices: Iterable[str]) -> None:
    """Require an argument to be one of its choices.

    Raises:
        ValueError: naming the argument and the choices.
    """
    if getattr(config, name) not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(config, name)!r}.")


def is_number(config: DPOConfig, name: str, advice: str, above_zero: bool = False) -> None:
    """Require an argument to be finite and at least 0, or above it.

    Raises:
        ValueError: naming the argument, its value and the advice.
    """
    value = getattr(config, name)
    if not isinstance(value, int | float):
        raise ValueError(f"`{name}` must be a number, got {value!r}. {advice}")
    if not (value > 0 if above_zero else value >= 0) or value == math.inf:
        bound = "greater than 0" if above_zero else "at least 0"
        raise ValueError(f"`{name}` must be {bound} and finite, got {value}. {advice}")


def refuse_online_sampling(config: DPOConfig, name: str, remedy: str = "Use `sampling='offline'`.") -> None:
    """Refuse to sample from a reference model where there is none.

    Raises:
        ValueError: saying what to do instead.
    """
    if getattr(config, "sampling", None) == "online":
        raise ValueError(f"`sampling='online'` samples from the reference model, and {name} has none. {remedy}")
