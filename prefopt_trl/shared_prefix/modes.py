"""Running a model without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """While entered, the model is in evaluation mode; afterwards each of its modules is in the mode it was in.

    The 4-bit layers of bitsandbytes are in training mode. They do the same in both, except on a CPU: in evaluation
    mode they pack their weights for inference, and from then on let no gradient through. That may go once a layer
    which is trained again unpacks them (bitsandbytes 0.50, `Linear4bit.forward`).
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = type(module).__module__.startswith("bitsandbytes.")
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
