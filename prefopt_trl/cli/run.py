"""The module that `accelerate launch` starts in each process: `python -m prefopt_trl.cli.run COMMAND ...`.

A `ValueError`, `OSError` or `ImportError` ends a command with one line and exit code 2. Once sampling or training has
begun, and for every other type, the traceback is shown.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from tqdm.auto import tqdm

from prefopt_trl.cli.commands import load
from prefopt_trl.runtime.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers.hf_argparser import DataClass

USER_ERRORS = (ValueError, OSError, ImportError)  # errors that a user can correct
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
SECONDS_FOR_OTHERS = 10


def main(name: str, arguments: Sequence[str]) -> None:
    """Run a command in this process.

    Raises:
        SystemExit: after one line on the main process, with exit code 2 for a user error, 1 for a push that failed
            and 130 for Ctrl-C. With `log_level=debug` a user error keeps its traceback.
    """
    quiet_libraries()
    from prefopt_trl.cli.parsing import parse  # it imports torch
    from prefopt_trl.runtime.hub import PushError
    from prefopt_trl.runtime.processes import SavedNote, is_main_process

    signal.signal(signal.SIGINT, partial(_interrupt, os.getpid()))
    debug = False
    try:
        parsed, launch = parse(name, arguments)
        debug = any(getattr(part, "log_level", None) == "debug" for part in parsed)
        run(name, parsed, launch)
    except KeyboardInterrupt as interrupt:
        if is_main_process():
            message = str(interrupt) or "Interrupted before anything was saved."
            tqdm.write(f"prefopt-trl {name}: {message}", file=sys.stderr)  # below a progress bar
        raise SystemExit(128 + signal.SIGINT) from None
    except PushError as error:
        fail(name, error, code=1)
    except USER_ERRORS as error:
        notes = getattr(error, "__notes__", [])
        is_saved = any(isinstance(note, SavedNote) for note in notes)
        if debug or (is_saved and not isinstance(error, ConnectionError)):  # a server's, which says all in a sentence
            raise
        fail(name, " ".join([str(error), *notes]))


def run(name: str, parsed: Sequence["DataClass"], launch: dict[str, object]) -> None:
    """Run a command with instances of its dataclasses and a function that writes its configuration."""
    from prefopt_trl.cli.parsing import config_text, write_config

    folder = next(part.output_dir for part in parsed if hasattr(part, "output_dir"))
    text = config_text(parsed, launch)  # before the command changes its arguments
    load(name).run(*parsed, partial(write_config, folder, text))


def fail(name: str, message: object, code: int = 2) -> NoReturn:
    """Print one line on the main process and exit.

    torchrun ends all processes once the first has ended, so the others wait for the main process to print its line.
    They print theirs only if the main process did not fail.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(SECONDS_FOR_OTHERS)
    print(f"prefopt-trl {name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _interrupt(owner: int, number: int, frame: FrameType | None) -> None:
    if os.getpid() != owner:  # a forked child, such as a pool worker, inherits the handler
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    signal.signal(number, signal.SIG_IGN)  # torchrun sends the terminal's signal to its processes again
    raise KeyboardInterrupt


def end_with_parent() -> None:
    """Have Linux end this process with its parent, which cannot forward `kill -9`."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1], sys.argv[2:])
