"""What the benchmarks share: two sides timed in turn, and the machine they ran on."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prefopt_trl.data.fingerprints import versions

RESULTS = Path(__file__).parent / "results"


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, warmup: int = 1) -> dict[str, Any]:
    """Time two functions in turn, the first to run changing every round.

    Returns:
        `dict`: median seconds of each side, and the median, smallest and largest ratio theirs / ours of a round, so
        above 1 where ours is faster. Ratios hold where seconds do not: the speed of a shared machine drifts.
    """
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for round_number in range(warmup + rounds):
        sides = [("ours", ours), ("theirs", theirs)]
        for name, run in sides if round_number % 2 else reversed(sides):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "ours_seconds_median": round(statistics.median(seconds["ours"]), 4),
        "theirs_seconds_median": round(statistics.median(seconds["theirs"]), 4),
        "rounds": rounds,
    }


def environment() -> dict[str, Any]:
    """Versions and the machine, as far as a reader needs them to compare."""
    return {
        **versions(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def write_results(name: str, settings: dict[str, Any], results: dict[str, Any]) -> Path:
    """Write `results/<name>.json`: settings, results and environment."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"settings": settings, "results": results, "environment": environment()}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
