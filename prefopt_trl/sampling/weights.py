"""Weights that DeepSpeed ZeRO-3 has spread over the processes, brought together to sample and to rank."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def gathered(*models: nn.Module | None) -> Iterator[None]:
    """Hold the whole weights of the models on every process: gathered once, and not for each token.

    All processes must enter it together; what they do inside is their own. Models that are not partitioned, and None,
    are left alone.
    """
    held = [parameter for model in models if model is not None for parameter in model.parameters()]
    partitioned = [parameter for parameter in held if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield
