"""The processes of a run: how many there are, which one this is, and what is left of a run that is stopped."""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.trainer_utils import get_last_checkpoint

logger = logging.getLogger(__name__)


def is_main_process() -> bool:
    """Whether this is the main process of those that `accelerate launch` or `torchrun` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def process_state() -> PartialState:
    """Return the state of this process among those that were started; raise if others are not known to it."""
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
def interruptible(what_is_saved: Callable[[], str]) -> Iterator[None]:
    """While entered, the sentence `what_is_saved()` is the message of a `KeyboardInterrupt`, and SIGTERM prints it.

    SIGTERM then ends the process as before. A handler of the caller's is left in place.
    """
    owner = os.getpid()

    def end(number: int, frame: Any) -> None:
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
    finally:
        if handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def checkpoints(folder: str | Path) -> list[str]:
    """The names of a run's whole checkpoints, the oldest first."""
    steps = [path.name.removeprefix("checkpoint-") for path in Path(folder).glob("checkpoint-*")]
    names = [f"checkpoint-{step}" for step in sorted(filter(str.isdigit, steps), key=int)]
    return [name for name in names if _is_json(Path(folder, name, "trainer_state.json"))]  # which is written last


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return True


def last_checkpoint(folder: str | Path) -> str:
    """Return the path of a run's last whole checkpoint or raise; a logged line names a later one that is not whole."""
    if not (names := checkpoints(folder)):
        raise ValueError(f"`resume_from_checkpoint` finds no checkpoint in {folder}. Leave it out to start anew.")
    last, latest = os.path.join(folder, names[-1]), get_last_checkpoint(str(folder))
    if latest != last and is_main_process():
        logger.warning("%s is not whole, as its saving was interrupted: going on from %s.", latest, last)
    return last


def what_is_trained(folder: str | Path, before: Collection[str] = ()) -> str:
    """Say which checkpoint of a training that is stopped is saved, not one from `before` it, and how to go on."""
    if not (names := [name for name in checkpoints(folder) if name not in before]):
        return f"Interrupted before the first checkpoint was saved in {folder}. A lower `save_steps` saves sooner."
    return (
        f"Interrupted: {Path(folder, names[-1])} is saved, and `resume_from_checkpoint=True` (of a command: "
        "`--resume_from_checkpoint`) goes on from there."
    )
