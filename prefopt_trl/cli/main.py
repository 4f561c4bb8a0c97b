"""The `prefopt-trl` command."""

import argparse
import re
import sys
from collections.abc import Sequence

from prefopt_trl import __version__
from prefopt_trl.cli.commands import COMMANDS
from prefopt_trl.runtime.quiet import quiet_libraries
from prefopt_trl.trainers import METHODS

quiet_libraries()  # here, as the processes that a command spawns import this module and do not call `main`

QUICKSTART = ["reproduce", "quickstart", "--num_seeds", "3", "--output_dir", "outputs/quickstart"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; see `prefopt-trl --help`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["quickstart"]:
        words = [*QUICKSTART, *words[1:]]
    if words[:1] == ["reproduce"] and words[1:] and not words[1].startswith("-"):
        words.insert(1, "--tables")
    try:
        name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
        if name is not None:
            _run_command(name, *words[len(name.split()) :])
        elif words[:1] == ["rounds"]:
            print(f"prefopt-trl rounds: error: it needs a method: rounds {', rounds '.join(METHODS)}", file=sys.stderr)
            raise SystemExit(2)
        else:
            _print_help_or_environment(words)
    except KeyboardInterrupt as stopped:  # before a command starts
        print(f"prefopt-trl: {str(stopped) or 'Interrupted.'}", file=sys.stderr)
        raise SystemExit(130) from None


def _run_command(name: str, *arguments: str) -> None:
    if {"--help", "-h"} & set(arguments):
        from prefopt_trl.cli.help import first_screen

        if "all" in arguments:
            from prefopt_trl.cli.parsing import make_parser

            make_parser(name).print_help()
        else:
            print(first_screen(name))
    elif COMMANDS[name].launched:
        from prefopt_trl.cli.launch import launch

        launch(name, arguments)
    else:
        from prefopt_trl.cli.run import main as run

        run(name, arguments)


def _print_help_or_environment(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="prefopt-trl", description="Preference optimization from sampled preferences."
    )
    parser.add_argument("--version", action="version", version=f"prefopt-trl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    names = {re.sub("^rounds .+", "rounds METHOD", name): command for name, command in COMMANDS.items()}
    for name, command in names.items():
        commands.add_parser(name, help=command.summary)
    commands.add_parser("quickstart", help="the same as: " + " ".join(QUICKSTART))
    commands.add_parser("env", help="print versions, devices and engines, for a bug report")
    given = parser.parse_args(arguments)
    if given.command == "env":
        from prefopt_trl.cli.env import print_environment

        print_environment()


if __name__ == "__main__":
    main()
