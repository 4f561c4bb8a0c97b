"""Run the cells of tables over seeds, in one or several processes; what is finished is never done again."""

import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import transformers
from tqdm.auto import tqdm

from prefopt_trl.experiments.cells import NOTHING, Cell, measure
from prefopt_trl.experiments.tables import Table
from prefopt_trl.experiments.worlds import LEARNED, TRUTH, World
from prefopt_trl.runtime.settings import Settings, as_json, differences, read_json, versions, write_json

PACKAGE = Path(__file__).parents[1]
Make = Callable[[int, Path], World]  # the world of a seed, in a folder
Results = dict[str, list[Settings]]  # of each row, by seed
Jobs = dict[Path, tuple[int, Cell]]  # by the folder of the policy


def run_tables(
    tables: Mapping[str, Table], make: Make, settings: Settings, seeds: Sequence[int], folder: Path, num_workers: int
) -> Iterator[tuple[str, Results]]:
    """Train and measure all cells in the worlds of all seeds; yield each table as soon as all of its cells are done.

    Raise `ValueError` if `folder` has results of other `settings`, or of other versions of the libraries or of the
    code that makes them.
    """
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.parent.name != "cli" and file.name not in ("tables.py", "report.py"):  # which make no policy
            digest.update(file.read_bytes())
    settings = as_json({**settings, **versions(), "code": digest.hexdigest()})
    known = read_json(folder / "settings.json") if any(folder.glob("seed-*")) else None  # nothing was made
    if changed := differences(known or settings, settings):
        raise ValueError(f"{folder} has results with other {', '.join(changed)}. Choose another `output_dir`.")
    write_json(folder / "settings.json", settings)
    return _tables(tables, (make, folder, num_workers > 1), seeds, num_workers)


def _tables(
    tables: Mapping[str, Table], start: tuple[Make, Path, bool], seeds: Sequence[int], num_workers: int
) -> Iterator[tuple[str, Results]]:
    folder = start[1]
    rows = {name: {"SFT policy": Cell(method=NOTHING), **table.cells} for name, table in tables.items()}
    jobs: Jobs = {}
    for of_table in rows.values():
        jobs |= {folder_of(folder, seed, cell): (seed, cell) for seed in seeds for cell in of_table.values()}
    missing = {path: job for path, job in jobs.items() if not (path / "results.json").exists()}
    rankers = sorted({LEARNED, TRUTH, *(cell.ranker for _, cell in jobs.values())})
    for _ in _run(missing, start, num_workers, rankers) if missing else [None]:
        for name, of_table in list(rows.items()):
            files = {
                row: [folder_of(folder, seed, cell) / "results.json" for seed in seeds]
                for row, cell in of_table.items()
            }
            if all(file.exists() for of_row in files.values() for file in of_row):
                del rows[name]
                yield name, {row: list(map(read_json, of_row)) for row, of_row in files.items()}


def folder_of(folder: Path, seed: int, cell: Cell) -> Path:
    """Return the folder of a policy."""
    key = hashlib.sha256(json.dumps(asdict(cell), sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"seed-{seed}" / key


def _run(jobs: Jobs, start: tuple[Make, Path, bool], num_workers: int, rankers: list[str]) -> Iterator[None]:
    """Prepare the world of each seed, and run the jobs in their order, each as soon as its world is there."""
    seeds, left, ready = dict.fromkeys(seed for seed, _ in jobs.values()), dict(jobs), set[int]()
    with ProcessPoolExecutor(num_workers, get_context("spawn"), _start, start) as pool:
        seed_of = {pool.submit(_prepare, seed, rankers): seed for seed in seeds}
        pending: set[Future[None]] = set(seed_of)
        try:
            with tqdm(desc="Worlds and policies", total=len(seeds) + len(jobs)) as bar:
                while pending:
                    done, pending = wait(pending, timeout=5, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        ready |= {seed_of[future]} if future in seed_of else set()
                    free = max(0, num_workers - len(pending))
                    for path in [path for path, (seed, _) in left.items() if seed in ready][:free]:
                        pending.add(pool.submit(_measure, *left.pop(path), path))
                    bar.update(len(done))
                    bar.refresh()  # a job can take minutes
                    if done:
                        yield
        finally:
            for future in pending:
                future.cancel()


_process: dict[str, Any] = {}  # what each process of the pool has


def _start(make: Make, folder: Path, is_quiet: bool) -> None:
    if is_quiet:  # the bars of several processes would mix
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    Thread(target=_end_with_parent, daemon=True).start()
    _process.update(make=make, folder=folder)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # plots of single policies take a tenth of the time
    logging.getLogger("prefopt_trl").setLevel(logging.ERROR)
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


@cache
def _world(seed: int) -> World:
    return _process["make"](seed, _process["folder"] / f"seed-{seed}")


def _prepare(seed: int, rankers: list[str]) -> None:
    for ranker in rankers:
        _world(seed).candidates(ranker)


def _measure(seed: int, cell: Cell, folder: Path) -> None:
    try:
        measure(cell, _world(seed), folder)
    except Exception as error:
        error.add_note(f"This was seed {seed}, {cell}.")
        raise
