"""Weights that DeepSpeed ZeRO-3 or FSDP2 has spread over the processes, brought together to sample and to rank."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

# Modules of these run before and after each part of a model, to gather its weights and to let go of them
ENGINES = ("deepspeed.", "torch.distributed.fsdp.")


@contextmanager
def gathered(*models: nn.Module | None) -> Iterator[None]:
    """Hold the whole weights of the models on every process: gathered once, and not for each token.

    Within, the models are ordinary ones: the hooks with which an engine gathers and spreads the weights of each part
    are off, so that processes may make different numbers of forward passes. All processes must enter and leave
    together. Models that are not spread, and None, are left alone; so is FSDP1, which has no weights to be gathered
    module by module.
    """
    held = {id(module): module for model in models if model is not None for module in model.modules()}
    modules = list(held.values())
    partitioned = {
        id(parameter): parameter
        for module in modules
        for parameter in module.parameters(recurse=False)
        if hasattr(parameter, "ds_id")
    }
    with ExitStack() as stack:
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(list(partitioned.values())))
        sharded = _sharded(modules)
        if sharded:
            stack.enter_context(_unsharded(sharded))
        if partitioned or sharded:
            stack.enter_context(_without_hooks(modules))
        yield


def _sharded(modules: list[nn.Module]) -> list[Any]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in modules if isinstance(module, FSDPModule)]


@contextmanager
def _unsharded(modules: list[Any]) -> Iterator[None]:
    for module in modules:  # a model comes before its parts, and the first becomes the root unless there is one
        module._get_fsdp_state()._lazy_init()
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


@contextmanager
def _without_hooks(modules: list[nn.Module]) -> Iterator[None]:
    """Turn the engines' own hooks off, as they would let go of the weights after each forward pass."""
    registries = [hooks for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    before = [dict(hooks) for hooks in registries]
    for hooks in registries:
        for key, hook in list(hooks.items()):
            if (getattr(hook, "__module__", None) or "").startswith(ENGINES):
                del hooks[key]
    try:
        yield
    finally:
        for hooks, saved in zip(registries, before, strict=True):
            hooks.clear()
            hooks.update(saved)
