"""Checks of the losses' arguments."""

import torch
from torch import Tensor


def as_float(name: str, values: Tensor) -> Tensor:
    """Return values in single precision at least: half holds too few digits for a difference of two sums."""
    if not values.is_floating_point():
        raise TypeError(f"`{name}` must be floating point, but is {values.dtype}: pass log-probabilities, not tokens.")
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be positive and finite, but is {value}: pass a number above 0.")


def check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"`{name}` must be finite and not negative, but is {value}: pass 0 or a number above it.")
