"""The `prefopt-trl` command."""

import argparse
import sys
from collections.abc import Sequence

from prefopt_trl import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; see `prefopt-trl --help`."""
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt as stopped:  # before a command has begun, or in the quickstart
        print(f"prefopt-trl: {str(stopped) or 'Interrupted.'}", file=sys.stderr)
        raise SystemExit(130) from None


def _run(arguments: Sequence[str]) -> None:
    from prefopt_trl.cli.commands import COMMANDS

    name, *rest = arguments or [""]
    if name in COMMANDS:
        if {"--help", "-h"} & set(rest):
            from prefopt_trl.cli.help import command_help

            print(command_help(name))
            return
        if COMMANDS[name].launched:
            from prefopt_trl.cli.launch import launch  # it imports torch

            launch(name, rest)
        else:
            from prefopt_trl.cli.run import main as run

            run(name, rest)
        return

    parser = argparse.ArgumentParser(
        prog="prefopt-trl", description="Preference optimisation from sampled preferences."
    )
    parser.add_argument("--version", action="version", version=f"prefopt-trl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command_name, command in COMMANDS.items():
        commands.add_parser(command_name, help=command.summary)

    quickstart = commands.add_parser(
        "quickstart",
        help="compare DPO, SFT-sampled pairs and RSO on a small text world whose true reward is known",
        description="Train an SFT policy and a pairwise ranker on the controlled task, then train the policy on the "
        "given comparisons (direct), pairs of its own samples (sft-sample-rank) and rejection-sampled pairs (RSO), "
        "and compare them. Needs no network and no GPU, and takes about six minutes on two cores.",
    )
    quickstart.add_argument(
        "--output_dir", default="outputs/quickstart", help="folder for the report and the RSO model"
    )
    quickstart.add_argument("--seed", type=int, default=0, help="seed of data, models and samples (default 0)")
    what_env_does = "print versions, devices and engines, for a bug report"
    commands.add_parser("env", help=what_env_does, description=what_env_does.capitalize() + ".")

    options = parser.parse_args(arguments)
    if options.command == "env":
        from prefopt_trl.cli.env import print_environment

        print_environment()
        return
    if options.seed < 0:
        parser.error(f"argument --seed: must be at least 0, got {options.seed}")
    from prefopt_trl.quickstart.study import run_quickstart  # after parsing: it imports torch

    run_quickstart(options.output_dir, options.seed)


if __name__ == "__main__":
    main()
