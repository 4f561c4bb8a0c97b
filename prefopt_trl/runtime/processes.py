"""The processes of a run: which one this is, the weights they share, and what an interrupted run has saved."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from prefopt_trl.runtime.settings import read_json

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

logger = logging.getLogger(__name__)

# Modules of the hooks that gather the weights of each part of a model before it runs, and release them after it
ENGINES = ("deepspeed.", "torch.distributed.fsdp.")


def is_main_process() -> bool:
    """Return whether this is the only process, or the main one of `accelerate launch` or `torchrun`."""
    return os.environ.get("RANK", "0") == "0"


def process_state() -> PartialState:
    """Return the state of this process among those that were launched; raise if it does not know of the others."""
    state = PartialState(cpu=not torch.accelerator.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and state.num_processes == 1:
        raise RuntimeError(
            f"{started} processes were started, and this one knows of no other: `accelerate` was set up without "
            "them. On CPU, call `PartialState(cpu=True)` before anything else of accelerate, transformers or trl, or "
            "set `use_cpu=True` in the trainer's configuration."
        )
    return state


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


def _sharded(modules: list[nn.Module]) -> "list[FSDPModule]":
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


class SavedNote(str):
    """The note of an error that ends sampling or training: what is saved of it."""


@contextmanager
def interruptible(what_is_saved: Callable[[], str]) -> Iterator[None]:
    """Within, let `what_is_saved()` be the message of a `KeyboardInterrupt`, and print it on SIGTERM.

    SIGTERM then ends the process as before. A handler that the caller has set is left in place. Any other exception
    gets the sentence as a [`SavedNote`].
    """
    owner = os.getpid()

    def end(number: int, frame: object) -> None:
        if is_main_process() and os.getpid() == owner:  # a forked child, such as one of a pool, has the handler too
            print(f"\n{what_is_saved()}", file=sys.stderr, flush=True)  # below a bar
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    is_main_thread = threading.current_thread() is threading.main_thread()  # no other may set a handler
    handles = is_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if handles:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.args = interrupt.args or (what_is_saved(),)
        raise
    except Exception as error:
        note = SavedNote(what_is_saved())
        if note not in getattr(error, "__notes__", []):  # a command and its trainer say the same
            error.add_note(note)
        raise
    finally:
        if handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def checkpoints(folder: str | Path) -> list[str]:
    """Return the names of a run's complete checkpoints, the oldest first."""
    steps = [path.name.removeprefix("checkpoint-") for path in Path(folder).glob("checkpoint-*")]
    names = [f"checkpoint-{step}" for step in sorted(filter(str.isdigit, steps), key=int)]
    return [name for name in names if _is_complete(Path(folder, name))]


def _is_complete(checkpoint: Path) -> bool:
    try:
        return read_json(checkpoint / "trainer_state.json") is not None  # `Trainer` writes it last
    except ValueError:
        return False


def last_checkpoint(folder: str | Path) -> str:
    """Return the path of a run's last complete checkpoint, or raise; log a later one that is incomplete."""
    if not (names := checkpoints(folder)):
        raise ValueError(f"`resume_from_checkpoint` finds no checkpoint in {folder}. Leave it out to start anew.")
    last, latest = os.path.join(folder, names[-1]), get_last_checkpoint(str(folder))
    if latest != last and is_main_process():
        logger.warning("%s is incomplete, as its saving was interrupted. Resuming from %s.", latest, last)
    return last


def what_is_trained(folder: str | Path, before: Collection[str] = ()) -> str:
    """Say which checkpoint an interrupted training has saved, other than those from `before`, and how to resume."""
    if not (names := [name for name in checkpoints(folder) if name not in before]):
        return f"Interrupted before the first checkpoint was saved in {folder}. A lower `save_steps` saves sooner."
    return (
        f"Interrupted: {Path(folder, names[-1])} is saved. Resume from it with `resume_from_checkpoint=True` (of a "
        "command: `--resume_from_checkpoint`)."
    )
