"""Gather weights that DeepSpeed ZeRO-3 or FSDP2 has sharded over the processes, to sample and to rank with them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

# Modules of the hooks that gather the weights of each part of a model before it runs, and release them after it
ENGINES = ("deepspeed.", "torch.distributed.fsdp.")


@contextmanager
def gathered(*models: nn.Module | None) -> Iterator[None]:
    """Hold the whole weights of the models on every process, gathered once instead of for each token.

    Within, the engines' hooks are off, so that processes may make different numbers of forward passes. All processes
    must enter and leave together. Models that are not sharded, and None, are left alone. So is FSDP1, whose weights
    cannot be gathered module by module.
    """
    modules = list(dict.fromkeys(module for model in models if model is not None for module in model.modules()))
    parameters = dict.fromkeys(parameter for module in modules for parameter in module.parameters(recurse=False))
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    sharded = _sharded(modules)
    with ExitStack() as stack:
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        for module in sharded:
            module.unshard()
            stack.callback(module.reshard)
        if partitioned or sharded:
            stack.enter_context(_without_hooks(modules))
        yield


def _sharded(modules: list[nn.Module]) -> list[Any]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in modules if isinstance(module, FSDPModule)]


@contextmanager
def _without_hooks(modules: list[nn.Module]) -> Iterator[None]:
    """Remove the engines' hooks, which would release the weights after each forward pass.

    Neither engine has a public way to turn them off. To go once both do.
    """
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
