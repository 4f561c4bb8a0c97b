"""The processes of a run: how many there are, and which one this is."""

import os

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
