"""The processes of a run: how many there are, and which one this is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState


def process_state() -> PartialState:
    """The state of this process among those that `accelerate launch` or `torchrun` started.

    Raises:
        RuntimeError: if there are others that it does not know of, and would do the same work over theirs.
    """
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
def whole_on_every_process() -> Iterator[None]:
    """Load models whole on each process, also where FSDP's `cpu_ram_efficient_loading` is on.

    With it `from_pretrained` reads the weights on one process of a machine and leaves the others empty, to be filled
    when the model is sharded. A model that samples or ranks is not sharded, and would stay empty.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
