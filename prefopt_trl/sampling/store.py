"""The folder of a sampled dataset: what is made so far, with which settings, and whether it is finished."""

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset, Features, load_from_disk
from datasets.arrow_writer import ArrowWriter

from prefopt_trl.data.formats import Row
from prefopt_trl.runtime.settings import Settings, as_json, differences, read_json, remove, writing

logger = logging.getLogger(__name__)

MANIFEST_SECONDS = 1800.0  # processes that start together may be so far apart, as they load their models
REMINDER_SECONDS = 60.0  # between two lines on what is waited for
POLL_SECONDS = 0.5
WRITTEN = ("README.md", "candidates", "pairs", "statistics.json")  # in the end
ROWS_IN_MEMORY = 100  # of prompts with all their candidates, while they are written


class SampleStore:
    """Manifest, shards, candidates, pairs and statistics of one sampled dataset, in a folder.

    `manifest.json` holds every setting the dataset depends on, and whether it is finished. Each file or folder is
    written under a temporary name, synced to the disk and then renamed, so that what is there is whole, whenever a
    process or the machine dies. Any number of processes may share the folder: each shard has one writer, and all else
    is written by the main process.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.shards = self.folder / "shards"

    # The manifest

    def finished(self, settings: Settings) -> bool:
        """Whether the folder holds a finished dataset made with these settings.

        A `ValueError` names the settings that differ where it holds a dataset, finished or not, made with others; a
        manifest alone may be overwritten.
        """
        now = as_json(settings)  # as they will be read back
        holds_results = self._holds_results()  # asked first: another process may be about to begin
        manifest = self._manifest()
        if manifest is None:
            if holds_results or any((self.folder / name).exists() for name in WRITTEN):
                raise ValueError(
                    f"{self.folder} holds {', '.join(WRITTEN)} or shards, and no manifest.json that says how they "
                    "were made. Choose another `output_dir`, or delete the folder."
                )
            return False
        changed = _lines(manifest["settings"], now)
        if manifest["finished"] and not (self.folder / "pairs").exists():
            raise ValueError(
                f"{self.folder} says that it is finished, and `pairs` is not there. Delete the folder to make it "
                "anew, or choose another `output_dir`."
            )
        if changed and holds_results:
            raise ValueError(
                f"{self.folder} holds a dataset sampled with other settings:\n  "
                + "\n  ".join(changed)
                + "\nSet them as they were to reuse it, choose another `output_dir`, or delete the folder. "
                f"To keep its candidates, pass {self._candidates_there()} as `prompts` with another "
                "`output_dir`; without their column `rewards` they are scored again. (If `ranker.function` alone "
                "differs and its rewards are the same, give `FunctionRanker` a `version`.)"
            )
        return not changed and manifest["finished"]

    def begin(self, settings: Settings, prompts_per_shard: int, num_shards: int) -> None:
        """Write down the settings, unless they are there already; what follows is made with them."""
        manifest = self._manifest()
        if manifest is None or differences(manifest["settings"], as_json(settings)):
            layout = {"num_shards": num_shards, "prompts_per_shard": prompts_per_shard}
            self.write_json("manifest.json", {"finished": False, **layout, "settings": settings})

    def wait_for_settings(self, settings: Settings) -> None:
        """Wait until the main process has written down these settings; raise `RuntimeError` after half an hour."""
        now = as_json(settings)
        began = reminded = time.monotonic()
        while (manifest := self._manifest()) is None or differences(manifest["settings"], now):
            changed = "\n  ".join(_lines(manifest["settings"], now)) if manifest else "there is none"
            if time.monotonic() - reminded > REMINDER_SECONDS:
                logger.warning(
                    "Waiting for the main process to write %s with the settings of this one:\n  %s",
                    self.folder / "manifest.json",
                    changed,
                )
                reminded = time.monotonic()
            if time.monotonic() - began > MANIFEST_SECONDS:
                raise RuntimeError(
                    f"The main process wrote no manifest.json with the settings of this one to {self.folder} within "
                    f"{MANIFEST_SECONDS:g} seconds. `output_dir` must be on a file system that all processes see, and "
                    f"all must be given the same arguments. What differs:\n  {changed}"
                )
            time.sleep(POLL_SECONDS)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no other run make a dataset in this folder, or raise `RuntimeError` if one does.

        A process that dies lets go of the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"Another run is making a dataset in {self.folder}. Wait for it, or stop it (killing `torchrun` "
                    "leaves its processes running), or choose another `output_dir`."
                ) from None
            except OSError:  # a file system without locks
                logger.warning("%s cannot be locked: see that no other run uses it.", self.folder)
            yield
        finally:
            os.close(descriptor)

    def layout(self) -> tuple[int, int]:
        """Return the prompts per shard, and the number of shards."""
        manifest = self._manifest()
        assert manifest is not None  # written by `begin`
        return manifest["prompts_per_shard"], manifest["num_shards"]

    def is_finished(self) -> bool:
        """Whether the dataset that is being made is finished."""
        manifest = self._manifest()
        return manifest is not None and manifest["finished"]

    def wait_until_finished(self) -> None:
        """Wait until the main process has finished the dataset."""
        while not self.is_finished():
            time.sleep(POLL_SECONDS)

    def finish(self) -> None:
        """Say that the dataset is finished, and remove what it was made of."""
        manifest = self._manifest()
        assert manifest is not None
        self.write_json("manifest.json", {**manifest, "finished": True})
        self.clear()

    def clear(self) -> None:
        """Remove what a finished dataset was made of, and what was left half written."""
        for path in self.folder.glob("*.partial"):
            remove(path)
        remove(self.shards)

    # Shards

    def has_shard(self, shard: int, stage: str) -> bool:
        """Whether a shard is finished, of the stage `"candidates"` or `"ranked"`."""
        return self._shard(shard, stage).exists()

    def ranked_shards(self) -> list[int]:
        """Return the numbers of the shards that are ranked, by any process."""
        return sorted(int(path.name.split(".")[0]) for path in self.shards.glob("*.ranked.jsonl"))

    def write_shard(self, shard: int, stage: str, rows: Iterable[Row]) -> None:
        """Write the rows of a shard."""
        with self.writing(self._shard(shard, stage)) as temporary:
            lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows)
            temporary.write_bytes("".join(lines).encode())

    def read_shard(self, shard: int, stage: str) -> list[Row]:
        """Read the rows of a finished shard."""
        with self._shard(shard, stage).open("rb") as lines:
            return [json.loads(line) for line in lines]

    def _shard(self, shard: int, stage: str) -> Path:
        return self.shards / f"{shard:05d}.{stage}.jsonl"

    # What is made of them

    def write_dataset(self, name: str, rows: Iterable[Row], features: Features) -> Dataset:
        """Write `rows`, one after the other, as a folder for `load_from_disk`, whose bytes depend on them alone."""
        digest = hashlib.sha256(repr(features).encode())
        arrow = self.shards / f"{name}.arrow"
        with self.writing(arrow) as temporary:
            writer = ArrowWriter(path=str(temporary), features=features, writer_batch_size=ROWS_IN_MEMORY)
            with writer:
                for row in rows:
                    digest.update(json.dumps(row, sort_keys=True).encode())
                    writer.write(row)
                writer.finalize()
        dataset = Dataset(Dataset.from_file(str(arrow)).data, fingerprint=digest.hexdigest()[:16])
        with self.writing(self.folder / name) as temporary:
            dataset.save_to_disk(str(temporary))
        del dataset
        arrow.unlink()
        return load_from_disk(str(self.folder / name))

    def write_json(self, name: str, content: Settings) -> None:
        """Write a file of JSON."""
        self.write_text(name, json.dumps(content, indent=2, sort_keys=True) + "\n")

    def write_text(self, name: str, content: str) -> None:
        """Write a file of text."""
        with self.writing(self.folder / name) as temporary:
            temporary.write_bytes(content.encode())

    def pairs(self) -> Dataset:
        """Read the pairs of a finished dataset."""
        folder = self.folder / "pairs"
        # `Dataset.map` writes its cache beside the file that it reads, unless what it reads is in memory
        return load_from_disk(str(folder), keep_in_memory=not os.access(folder, os.W_OK))

    def saved(self) -> str:
        """Say what is saved."""
        manifest = self._manifest()
        if manifest is not None and manifest["finished"]:
            return f"The finished dataset is saved in {self.folder}"
        saved = f"{len(self.ranked_shards())} of {manifest['num_shards']} shards are" if manifest else "Nothing is"
        return f"{saved} saved in {self.folder}"

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """Yield a temporary name to write under, as [`runtime.settings.writing`]; an `OSError` says what is saved."""
        try:
            with writing(path) as temporary:
                yield temporary
        except FileNotFoundError:  # of what is read to be written
            raise
        except OSError as error:
            raise OSError(
                error.errno,
                f"Could not write {path}: {error.strerror or error}. {self.saved()}, which is as it was before; once "
                "it can be written to (a full disk: once there is space), the same call resumes from there",
            ) from error

    def _manifest(self) -> Settings | None:
        file = self.folder / "manifest.json"
        try:
            manifest = read_json(file)
            if manifest is None and not file.exists():
                return None
        except ValueError:  # no JSON
            manifest = None
        if not isinstance(manifest, dict) or not {"finished", "settings"} <= manifest.keys():
            raise ValueError(f"{file} is not the manifest of a sampled dataset. Choose another `output_dir`.")
        return manifest

    def _holds_results(self) -> bool:
        shards = self.shards.glob("*.jsonl")
        return any(path.exists() for path in [self.folder / "candidates", self.folder / "pairs", *shards])

    def _candidates_there(self) -> str:
        """How to load the candidates that are in the folder, as Python."""
        if (self.folder / "candidates").exists():
            return f"`load_from_disk('{self.folder}/candidates')`"
        return f"`load_dataset('json', data_files='{self.shards}/*.candidates.jsonl', split='train')`"


def _lines(before: Settings, now: Settings) -> list[str]:
    """One line per setting that differs."""
    return [f"{name}: {old!r} there, {new!r} now" for name, (old, new) in differences(before, now).items()]
