"""Run the cells of a table over seeds, in one or several processes; what is finished is never done again."""

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import transformers
from tqdm.auto import tqdm

from prefopt_trl.experiments import cells, kitchen, worlds
from prefopt_trl.experiments.cells import NOTHING, Cell, measure
from prefopt_trl.experiments.tables import Table
from prefopt_trl.experiments.worlds import LEARNED, World
from prefopt_trl.runtime.settings import (
    Settings,
    as_json,
    differences,
    read_json,
    versions,
    write_json,
)

MAKERS = (cells, kitchen, worlds)  # of what is saved
Make = Callable[[int, Path], World]  # the world of a seed, in a folder
Results = dict[str, list[Settings]]  # of each row, by seed


def run_table(
    table: Table, make: Make, settings: Settings, seeds: Sequence[int], folder: Path, num_workers: int = 1
) -> Results:
    """Train and measure all cells of a table in the worlds of all seeds, after the SFT policy.

    Raise `ValueError` if `folder` has results of other `settings`, or of other versions of the libraries or of the
    code that makes worlds and cells.
    """
    code = {one.__name__: hashlib.sha256(Path(str(one.__file__)).read_bytes()).hexdigest() for one in MAKERS}
    settings = as_json({**settings, **versions(), **code})
    if changed := differences(read_json(folder / "settings.json") or settings, settings):
        raise ValueError(f"{folder} has results with other {', '.join(changed)}. Choose another `output_dir`.")
    write_json(folder / "settings.json", settings)
    rows = {"SFT policy": Cell(method=NOTHING), **table.cells}
    jobs = [(seed, cell, folder / f"seed-{seed}" / key_of(cell)) for seed in seeds for cell in rows.values()]
    missing = [job for job in jobs if not (job[2] / "results.json").exists()]
    rankers = sorted({LEARNED, *(cell.ranker for cell in rows.values())})
    if missing:
        start = (make, folder, num_workers > 1)
        with ProcessPoolExecutor(num_workers, get_context("spawn"), _start, start) as pool:
            _run(pool, missing, rankers, table.title)
    found = iter([read_json(job[2] / "results.json") for job in jobs])
    by_seed = [{row: next(found) for row in rows} for _ in seeds]
    return {row: [one[row] for one in by_seed] for row in rows}


def key_of(cell: Cell) -> str:
    """Return the name of a cell's folder."""
    return hashlib.sha256(json.dumps(asdict(cell), sort_keys=True).encode()).hexdigest()[:12]


def _run(pool: ProcessPoolExecutor, jobs: Sequence[tuple[int, Cell, Path]], rankers: list[str], title: str) -> None:
    """Prepare the world of each seed, and run its cells as soon as it is there."""
    seed_of = {pool.submit(_prepare, seed, rankers): seed for seed in sorted({job[0] for job in jobs})}
    pending = set(seed_of)
    try:
        with tqdm(desc=f"{title}: worlds and policies", total=len(seed_of) + len(jobs)) as bar:
            while pending:
                done, pending = wait(pending, timeout=5, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    seed = seed_of.get(future)
                    pending |= {pool.submit(_measure, *job) for job in jobs if job[0] == seed}
                bar.update(len(done))
                bar.refresh()  # a job can take minutes
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


_process: dict[str, Any] = {}  # what each process of the pool has


def _start(make: Make, folder: Path, is_quiet: bool) -> None:
    if is_quiet:  # the bars of several processes would mix
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    Thread(target=_end_with_parent, daemon=True).start()
    _process.update(make=make, folder=folder)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # plots of single policies take a tenth of the time
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _end_with_parent() -> None:
    """End this process when the command is killed: a worker alone would wait for work forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@lru_cache(maxsize=1)  # a world holds its rankers, which may be large
def _world(seed: int) -> World:
    return _process["make"](seed, _process["folder"] / f"seed-{seed}")


def _prepare(seed: int, rankers: list[str]) -> None:
    for ranker in rankers:
        _world(seed).accuracy(ranker)  # needs its candidates, and those of the truth


def _measure(seed: int, cell: Cell, folder: Path) -> None:
    try:
        measure(cell, _world(seed), folder)
    except Exception as error:
        error.add_note(f"This was seed {seed}, {cell}.")
        raise
