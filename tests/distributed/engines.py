"""Starts each engine once, and makes the table of all that they have trained."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from cells import ENGINES, cells

HERE = Path(__file__).parent
SECONDS = 1800.0  # for all cells of an engine
Records = dict[str, dict[str, Any]]

results: dict[tuple[str, str], tuple[float, float]] = {}  # by engine and cell: difference of losses, seconds


class Engines:
    """Runs of the worker in a folder with a policy, a ranker and an adapter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records = cache(self._records)

    def _records(self, engine: str) -> list[Records]:
        """What each process of an engine has written down."""
        self.run(engine)
        ranks = range(1 if engine == "alone" else 2)
        return [json.loads(Path(self.folder, f"{engine}-{rank}.records").read_text()) for rank in ranks]

    def run(self, engine: str) -> None:
        """Run the worker to its end; the `AssertionError` if it fails or hangs has the end of its log."""
        launcher = (
            [] if engine == "alone" else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        )
        command = [sys.executable, *launcher, str(HERE / "worker.py"), engine, str(self.folder)]
        log = self.folder / f"{engine}.log"
        with open(log, "w") as output:
            process = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=SECONDS)
        assert process.returncode == 0, "\n".join(log.read_text().splitlines()[-100:])


def table() -> str:
    """A row per cell and a column per engine: the largest difference of a loss, relative to it, and seconds."""
    head = ["training", *ENGINES]
    lines = [head, ["---"] * len(head)]
    for cell in cells("ddp"):
        found = [results.get((engine, str(cell))) for engine in ENGINES]
        lines.append([str(cell), *("not run" if one is None else f"{one[0]:.0e}, {one[1]:.0f} s" for one in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
