"""The folder of a sampled dataset: what was made, with which settings, and whether it is finished."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk


class SampleStore:
    """Candidates, pairs, statistics and the manifest of one sampled dataset.

    `manifest.json` holds every setting the dataset depends on, and whether it is finished. Each file or folder is
    written under a temporary name and then renamed, so that what is there is whole.

    Args:
        folder (`str` or `Path`):
            Folder of the dataset, made when something is first written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def finished(self, settings: dict[str, Any]) -> bool:
        """Whether the folder holds a finished dataset made with these settings.

        Raises:
            ValueError: if it holds one made with other settings, finished or not (the message names those that
                differ), or candidates or pairs without the manifest that says how they were made.
            TypeError: if a setting cannot be written as JSON.
        """
        now = json.loads(json.dumps(settings))  # as they will be read back
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
        except FileNotFoundError:
            if (self.folder / "candidates").exists() or (self.folder / "pairs").exists():
                raise ValueError(
                    f"{self.folder} holds candidates or pairs, and no manifest.json that says how they were made. "
                    "Choose another `output_dir`, or delete the folder."
                ) from None
            return False
        differences = list(_differences(manifest["settings"], now))
        if differences:
            raise ValueError(
                f"{self.folder} holds a dataset sampled with other settings:\n  "
                + "\n  ".join(differences)
                + "\nSet them as they were to reuse it, choose another `output_dir`, or delete the folder. "
                "To keep its candidates, pass `load_from_disk('.../candidates')` as `prompts` with another "
                "`output_dir`; without their column `rewards` they are scored again."
            )
        return manifest["finished"]

    def begin(self, settings: dict[str, Any]) -> None:
        """Write down the settings; what follows is made with them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_json("manifest.json", {"finished": False, "settings": settings})

    def candidates(self) -> Dataset | None:
        """Candidates saved by a run with these settings that did not finish, or None."""
        folder = self.folder / "candidates"
        return load_from_disk(str(folder)) if folder.exists() else None

    def save_candidates(self, candidates: Dataset) -> None:
        """Save the candidates, with or without rewards."""
        self._write_dataset("candidates", candidates)

    def pairs(self) -> Dataset:
        """Pairs of a finished dataset."""
        return load_from_disk(str(self.folder / "pairs"))

    def finish(self, pairs: Dataset, statistics: dict[str, Any]) -> None:
        """Save the pairs and statistics, and say that the dataset is finished."""
        self._write_dataset("pairs", pairs)
        self._write_json("statistics.json", statistics)
        manifest = json.loads((self.folder / "manifest.json").read_text())
        self._write_json("manifest.json", {**manifest, "finished": True})

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        temporary = self.folder / f"{name}.partial"
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        os.replace(temporary, self.folder / name)

    def _write_dataset(self, name: str, dataset: Dataset) -> None:
        temporary, folder = self.folder / f"{name}.partial", self.folder / name
        shutil.rmtree(temporary, ignore_errors=True)
        dataset.save_to_disk(str(temporary))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """One line per setting that differs, nested settings by their dotted name."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            line
            for key in keys
            for line in _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == now else [f"{name}: {before!r} there, {now!r} now"]
