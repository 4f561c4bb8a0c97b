"""What each process of a launched command runs: `python -m prefopt_trl.cli.run COMMAND ...`."""

import sys
from collections.abc import Sequence

from prefopt_trl.cli.checks import check_arguments
from prefopt_trl.cli.commands import COMMANDS
from prefopt_trl.cli.parsing import fail, parse


def run(name: str, arguments: Sequence[str]) -> None:
    """Run a command in this process; options of `accelerate launch` among its arguments were the launcher's."""
    parsed, _ = parse(name, arguments)
    try:
        check_arguments(*parsed)
    except ValueError as error:
        fail(name, error)
    COMMANDS[name].run(*parsed)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2:])
