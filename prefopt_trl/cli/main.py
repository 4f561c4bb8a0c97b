"""The `prefopt-trl` command."""

import argparse
import logging
from collections.abc import Sequence

from prefopt_trl import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; see `prefopt-trl --help`."""
    parser = argparse.ArgumentParser(
        prog="prefopt-trl", description="Preference optimisation from sampled preferences."
    )
    parser.add_argument("--version", action="version", version=f"prefopt-trl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    quickstart = commands.add_parser(
        "quickstart",
        help="compare DPO, SFT-sampled pairs and RSO on a small text world whose true reward is known",
        description="Train an SFT policy and a pairwise ranker on the controlled task, then train the policy on the "
        "given comparisons (direct), pairs of its own samples (sft-sample-rank) and rejection-sampled pairs (RSO), "
        "and compare them. Needs no network and no GPU, and takes about five minutes on two cores.",
    )
    quickstart.add_argument(
        "--output_dir", default="outputs/quickstart", help="folder for the report and the RSO model"
    )
    quickstart.add_argument("--seed", type=int, default=0, help="seed of data, models and samples (default 0)")

    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"argument --seed: must be at least 0, got {options.seed}")

    # It complains when it is imported that a CPU kernel is not installed, which nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from prefopt_trl.cli.quickstart import run_quickstart  # after parsing: it imports torch

    run_quickstart(options.output_dir, options.seed)


if __name__ == "__main__":
    main()
