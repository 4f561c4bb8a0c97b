"""What each process of a launched command runs: `python -m prefopt_trl.cli.run COMMAND ...`."""

import ctypes
import linecache
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tqdm.auto import tqdm

import prefopt_trl
from prefopt_trl.cli.checks import check_arguments
from prefopt_trl.cli.commands import COMMANDS
from prefopt_trl.cli.parsing import config_text, parse, write_config
from prefopt_trl.runtime.hub import PushError
from prefopt_trl.runtime.processes import checkpoints, is_main_process, last_checkpoint, what_is_trained

USER_ERRORS = (ValueError, OSError, ImportError)  # of the arguments
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a scheduler sends
SECONDS_FOR_OTHERS = 10  # in which the launcher ends a process whose main one has failed


def main(name: str, arguments: Sequence[str]) -> None:
    """Run a command in this process; options of `accelerate launch` among its arguments were the launcher's.

    What our own checks refuse ends with one line, on the main process, and exit code 2; a failed push with 1. With
    `log_level=debug`, and for any other exception, there is a traceback. An interrupted command ends with one line
    that says what is saved, and exit code 130 (Ctrl-C) or 143 (SIGTERM).
    """
    try:
        parsed, launch = parse(name, arguments)
    except USER_ERRORS as error:
        fail(name, error)
    owner = os.getpid()
    for number in INTERRUPTS:
        signal.signal(number, partial(_interrupt, owner))
    folder, resumes = next(
        ((part.output_dir, part.resume_from_checkpoint) for part in parsed if hasattr(part, "resume_from_checkpoint")),
        (None, None),
    )
    before = checkpoints(folder) if folder and not resumes else []
    try:
        run(name, parsed, launch)
    except KeyboardInterrupt as interrupt:
        saved = what_is_trained(folder, before) if folder else "Interrupted before anything was saved."
        what = str(interrupt) or saved
        if is_main_process():
            tqdm.write(f"prefopt-trl {name}: {what}", file=sys.stderr)  # not behind a bar
        raise SystemExit(128 + getattr(interrupt, "signal", signal.SIGINT)) from None
    except (ValueError, TypeError, FileNotFoundError, PushError) as error:
        if any(getattr(part, "log_level", None) == "debug" for part in parsed) or not _is_ours(error):
            raise
        fail(name, error, code=1 if isinstance(error, PushError) else 2)


def fail(name: str, message: object, code: int = 2) -> NoReturn:
    """End with one line, which is the main process's: the others wait for its end, which is theirs."""
    if not is_main_process():
        time.sleep(SECONDS_FOR_OTHERS)  # it speaks only where the main process has nothing to say
    print(f"prefopt-trl {name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def run(name: str, parsed: Sequence[Any], launch: dict[str, object]) -> None:
    """Check the arguments of a command, and run it.

    Raises:
        ValueError, FileNotFoundError: for arguments that cannot work.
    """
    check_arguments(*parsed)
    folder = next(part.output_dir for part in parsed if hasattr(part, "output_dir"))
    text = config_text(parsed, launch)  # as given: a command changes its arguments
    for part in parsed:
        if getattr(part, "resume_from_checkpoint", None) is True:
            part.resume_from_checkpoint = last_checkpoint(part.output_dir)
        if getattr(part, "resume_from_checkpoint", True) or not is_main_process():
            continue
        if earlier := checkpoints(part.output_dir):
            print(
                f"{part.output_dir} has checkpoints of an earlier run ({', '.join(earlier)}), and this one writes "
                "over those of the same step. `--resume_from_checkpoint` goes on from the last one instead."
            )
    COMMANDS[name].run(*parsed, partial(write_config, folder, text))


def _interrupt(owner: int, number: int, frame: Any) -> None:
    if os.getpid() != owner:  # a forked child, such as one of a pool, has the handler too
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    for each in INTERRUPTS:  # torchrun sends its processes once more what the terminal has sent them
        signal.signal(each, signal.SIG_IGN)
    interrupt: Any = KeyboardInterrupt()
    interrupt.signal = number
    raise interrupt


def end_with_parent() -> None:
    """Have Linux end this process when the one that started it is gone, as it cannot pass `kill -9` on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_ours(error: Exception) -> bool:
    """Whether a line of this package has raised it on purpose."""
    if isinstance(error, PushError):
        return True
    where, line = list(traceback.walk_tb(error.__traceback__))[-1]
    file = where.f_code.co_filename
    in_package = Path(file).is_relative_to(Path(prefopt_trl.__file__).parent)
    return in_package and linecache.getline(file, line).lstrip().startswith("raise ")


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1], sys.argv[2:])
