"""The folder of work in shards, such as a sampled dataset: settings, shards, results, and the manifest of these."""

import fcntl
import hashlib
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from datasets import Dataset, Features, load_from_disk
from datasets.arrow_writer import ArrowWriter

from prefopt_trl.data.formats import Row
from prefopt_trl.runtime.settings import (
    Settings,
    as_json,
    differences,
    read_json,
    read_lines,
    remove,
    write_json,
    write_lines,
    writing,
)

logger = logging.getLogger(__name__)

MANIFEST_SECONDS = 1800.0  # for a process that loads its models faster than the main process
REMINDER_SECONDS = 180.0  # between two warnings while waiting
POLL_SECONDS = 0.5
ROWS_IN_MEMORY = 100  # prompts with all their candidates, in the Arrow writer


class ShardStore(ABC):
    """Manifest, shards and results of work that is made in shards, in a folder.

    `manifest.json` holds every setting the results depend on, and whether they are finished. Each file or folder is
    written under a temporary name, synced to the disk and renamed, so it is whole even if a process or the machine
    dies. Any number of processes may share the folder: each shard has one writer, and the main process writes all
    other files.
    """

    made: str  # what the results are, for messages
    results: tuple[str, ...]  # their names in the folder
    written: tuple[str, ...]  # names in a folder that has lost its manifest
    last_stage: str  # of a shard

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shards, self.manifest = self.folder / "shards", self.folder / "manifest.json"

    # The manifest

    def finished(self, settings: Settings) -> bool:
        """Return whether the folder holds finished results made with these settings.

        Raise `ValueError` if it holds results, finished or not, made with other settings, and name them. A manifest
        without shards may be overwritten.
        """
        now = as_json(settings)
        holds_results = self._holds_results()  # before the manifest is read: another process may begin in between
        manifest = self._manifest()
        if manifest is None:
            if holds_results or any((self.folder / name).exists() for name in self.written):
                raise ValueError(
                    f"{self.folder} holds {', '.join(self.written)} or shards, but no manifest.json with their "
                    "settings. Choose another `output_dir`, or delete the folder."
                )
            return False
        changed = _lines(manifest["settings"], now)
        if manifest["finished"] and not (self.folder / self.results[-1]).exists():
            raise ValueError(
                f"{self.folder} is marked as finished, but `{self.results[-1]}` is missing. Delete the folder to make "
                "it again, or choose another `output_dir`."
            )
        if changed and holds_results:
            raise ValueError(
                f"{self.folder} holds {self.made}, made with other settings:\n  "
                + "\n  ".join(changed)
                + "\nSet them back to reuse it, choose another `output_dir`, or delete the folder. "
                + self.advice()
            )
        return not changed and manifest["finished"]

    def begin(self, settings: Settings, prompts_per_shard: int, num_shards: int) -> None:
        """Write the manifest, unless it has these settings already."""
        manifest = self._manifest()
        if manifest is None or differences(manifest["settings"], as_json(settings)):
            layout = {"num_shards": num_shards, "prompts_per_shard": prompts_per_shard}
            write_json(self.manifest, {"finished": False, **layout, "settings": settings})

    def wait_for_settings(self, settings: Settings) -> None:
        """Wait until the main process has written these settings; raise `RuntimeError` after half an hour."""
        now = as_json(settings)
        began = reminded = time.monotonic()
        while (manifest := self._manifest()) is None or differences(manifest["settings"], now):
            changed = "\n  ".join(_lines(manifest["settings"], now)) if manifest else "no manifest.json"
            if time.monotonic() - reminded > REMINDER_SECONDS:
                logger.warning(
                    "Waiting for the main process to write %s with the settings of this process:\n  %s",
                    self.manifest,
                    changed,
                )
                reminded = time.monotonic()
            if time.monotonic() - began > MANIFEST_SECONDS:
                raise RuntimeError(
                    f"The main process wrote no manifest.json with the settings of this process to {self.folder} "
                    f"within {MANIFEST_SECONDS:g} seconds. `output_dir` must be on a file system that all processes "
                    f"see, and all processes need the same arguments. Differences:\n  {changed}"
                )
            time.sleep(POLL_SECONDS)

    def held(self, shared: bool = False) -> AbstractContextManager[None]:
        """Lock the folder as [`lock`] does."""
        return lock(self.folder, self.made, shared)

    def layout(self) -> tuple[int, int]:
        """Return the prompts per shard, and the number of shards."""
        manifest = self._manifest()
        assert manifest is not None  # written by `begin`
        return manifest["prompts_per_shard"], manifest["num_shards"]

    def is_finished(self) -> bool:
        """Return whether the main process has finished."""
        manifest = self._manifest()
        return manifest is not None and manifest["finished"]

    def wait_until_finished(self) -> None:
        """Wait until the main process has finished."""
        while not self.is_finished():
            time.sleep(POLL_SECONDS)

    def finish(self) -> None:
        """Mark the results as finished and remove the shards."""
        manifest = self._manifest()
        assert manifest is not None
        write_json(self.manifest, {**manifest, "finished": True})
        self.clear()

    def clear(self) -> None:
        """Remove the shards of finished results, and files whose writing was interrupted."""
        for path in list(self.folder.rglob("*.partial")):
            remove(path)
        remove(self.shards)

    # Shards

    def has_shard(self, shard: int, stage: str) -> bool:
        """Return whether a stage of a shard, such as `"ranked"`, is finished."""
        return self._shard(shard, stage).exists()

    def shards_with(self, stage: str) -> list[int]:
        """Return the numbers of the shards of which any process has finished a stage."""
        return sorted(int(path.name.split(".")[0]) for path in self.shards.glob(f"*.{stage}.jsonl"))

    def write_shard(self, shard: int, stage: str, rows: Iterable[Row]) -> None:
        """Write the rows of a shard."""
        write_lines(self._shard(shard, stage), rows)

    def read_shard(self, shard: int, stage: str) -> list[Row]:
        """Read the rows of a finished shard."""
        return read_lines(self._shard(shard, stage))

    def _shard(self, shard: int, stage: str) -> Path:
        return self.shards / f"{shard:05d}.{stage}.jsonl"

    def wait_for_shards(self, update: Callable[[], object] = lambda: None) -> None:
        """Wait until all shards are finished, on the main process; call `update` in between."""
        reminded, num_shards = time.monotonic(), self.layout()[1]
        while missing := num_shards - len(self.shards_with(self.last_stage)):
            time.sleep(POLL_SECONDS)
            update()
            if time.monotonic() - reminded > REMINDER_SECONDS:
                logger.warning("Waiting for %d of %d shards from other processes.", missing, num_shards)
                reminded = time.monotonic()

    def saved(self) -> str:
        """Return a sentence on what is saved."""
        manifest = self._manifest()
        if manifest is not None and manifest["finished"]:
            return f"The finished results are saved in {self.folder}"
        done = len(self.shards_with(self.last_stage))
        shards = f"{done} of {manifest['num_shards']} shards are" if manifest else "Nothing is"
        return f"{shards} saved in {self.folder}"

    @abstractmethod
    def advice(self) -> str:
        """Return a sentence on what to do with results that were made with other settings."""

    def _manifest(self) -> Settings | None:
        if not self.manifest.exists():  # before it is read: the main process may write it in between
            return None
        try:
            manifest = read_json(self.manifest)
        except ValueError:  # no JSON
            manifest = None
        if not isinstance(manifest, dict) or not {"finished", "settings"} <= manifest.keys():
            raise ValueError(f"{self.manifest} is not the manifest of {self.made}. Choose another `output_dir`.")
        return manifest

    def _holds_results(self) -> bool:
        paths = (self.folder / name for name in self.results)
        return any(path.exists() for path in [*paths, *self.shards.glob("*.jsonl")])


class SampleStore(ShardStore):
    """The folder of a sampled dataset: candidates, pairs and statistics."""

    made, last_stage = "a sampled dataset", "ranked"
    results, written = ("candidates", "pairs"), ("README.md", "candidates", "pairs", "statistics.json")

    def write_dataset(self, name: str, rows: Iterable[Row], features: Features) -> Dataset:
        """Stream `rows` to a folder for `load_from_disk`, whose bytes depend only on the rows."""
        digest = hashlib.sha256(repr(features).encode())
        arrow = self.shards / f"{name}.arrow"
        with writing(arrow) as temporary:
            writer = ArrowWriter(path=str(temporary), features=features, writer_batch_size=ROWS_IN_MEMORY)
            with writer:
                for row in rows:
                    digest.update(json.dumps(row, sort_keys=True).encode())
                    writer.write(row)
                writer.finalize()
        dataset = Dataset(Dataset.from_file(str(arrow)).data, fingerprint=digest.hexdigest()[:16])
        with writing(self.folder / name) as temporary:
            dataset.save_to_disk(str(temporary))
        del dataset
        arrow.unlink()
        return load_from_disk(str(self.folder / name))

    def pairs(self) -> Dataset:
        """Read the pairs of a finished dataset."""
        folder = self.folder / "pairs"
        # `Dataset.map` writes its cache beside the file that it reads, unless the dataset is in memory
        return load_from_disk(str(folder), keep_in_memory=not os.access(folder, os.W_OK))

    def advice(self) -> str:
        return (
            f"To keep its candidates, pass {self._candidates_there()} as `prompts` with another `output_dir`; remove "
            "their column `rewards` to score them again. (If only `ranker.function` differs and its rewards are the "
            "same, give `FunctionRanker` a `version`.)"
        )

    def _candidates_there(self) -> str:
        """Return the Python expression that loads the candidates in the folder."""
        if (self.folder / "candidates").exists():
            return f"`load_from_disk('{self.folder}/candidates')`"
        return f"`load_dataset('json', data_files='{self.shards}/*.candidates.jsonl', split='train')`"


@contextmanager
def lock(folder: Path, made: str, shared: bool = False) -> Iterator[None]:
    """Lock a folder against other runs, but for those that share it; raise `RuntimeError` if one has locked it.

    The lock ends with the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"Another run is making {made} in {folder}. Wait for it, or stop it (killing `torchrun` "
                "leaves its processes running), or choose another `output_dir`."
            ) from None
        except OSError:  # a file system without locks
            logger.warning("%s cannot be locked. Make sure that no other run uses it.", folder)
        yield
    finally:
        os.close(descriptor)


def _lines(before: Settings, now: Settings) -> list[str]:
    """Return one line per setting that differs."""
    return [f"{name}: {old!r} there, {new!r} now" for name, (old, new) in differences(before, now).items()]
