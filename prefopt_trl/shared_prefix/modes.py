"""Running a model without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """While entered, the model is in evaluation mode; afterwards each of its modules is in the mode it was in.

    The 4-bit layers of bitsandbytes stay as they are. They do the same in both modes, except on a CPU: in evaluation
    mode they pack their weights for inference, and from then on let no gradient through. That may go once a layer
    which is trained again unpacks them (bitsandbytes 0.50, `Linear4bit.forward`).
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = type(module).__module__.startswith("bitsandbytes.")
    try:
        yield
    finally:
        for module in training:
            module.training = True
