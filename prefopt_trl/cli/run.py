"""What each process of a command runs: `python -m prefopt_trl.cli.run COMMAND ...`, started by `accelerate launch`.

A `ValueError`, `OSError` or `ImportError` ends a command with one line and exit code 2, unless sampling or training
has begun: then, and for every other type, there is a traceback.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import Any, NoReturn

from tqdm.auto import tqdm

from prefopt_trl.cli.commands import load
from prefopt_trl.runtime.quiet import quiet_libraries

USER_ERRORS = (ValueError, OSError, ImportError)  # what a user can mend
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
SECONDS_FOR_OTHERS = 10


def main(name: str, arguments: Sequence[str]) -> None:
    """Run a command in this process.

    Raises:
        SystemExit: after one line on the main process, with exit code 2 for a user's mistake, 1 for a push that failed
            and 130 for Ctrl-C. With `log_level=debug` a mistake has its traceback.
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
            said = str(interrupt) or "Interrupted before anything was saved."
            tqdm.write(f"prefopt-trl {name}: {said}", file=sys.stderr)  # not behind a bar
        raise SystemExit(128 + signal.SIGINT) from None
    except PushError as error:
        fail(name, error, code=1)
    except USER_ERRORS as error:
        notes = getattr(error, "__notes__", [])
        if debug or any(isinstance(note, SavedNote) for note in notes):
            raise
        fail(name, " ".join([str(error), *notes]))


def run(name: str, parsed: Sequence[Any], launch: dict[str, object]) -> None:
    """Run a command with instances of its dataclasses, after which it can write its configuration."""
    from prefopt_trl.cli.parsing import config_text, write_config

    folder = next(part.output_dir for part in parsed if hasattr(part, "output_dir"))
    text = config_text(parsed, launch)  # as given: a command changes its arguments
    load(name).run(*parsed, partial(write_config, folder, text))


def fail(name: str, message: object, code: int = 2) -> NoReturn:
    """End with one line of the main process.

    torchrun ends all processes once the first has ended, so the others wait for the main one to print its line. They
    print theirs only if it has not failed.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(SECONDS_FOR_OTHERS)
    print(f"prefopt-trl {name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _interrupt(owner: int, number: int, frame: FrameType | None) -> None:
    if os.getpid() != owner:  # a forked child, such as one of a pool, has the handler too
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    signal.signal(number, signal.SIG_IGN)  # torchrun sends its processes once more what the terminal has sent them
    raise KeyboardInterrupt


def end_with_parent() -> None:
    """Have Linux end this process when the one that started it is gone, as it cannot pass `kill -9` on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1], sys.argv[2:])
