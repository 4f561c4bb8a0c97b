"""The dataset card of a sampled dataset, and its push to the Hub."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import DatasetCardData

from prefopt_trl.runtime.cards import render
from prefopt_trl.runtime.fingerprints import dataset_fingerprint
from prefopt_trl.runtime.hub import push_folder
from prefopt_trl.runtime.settings import Settings, read_json
from prefopt_trl.sampling.statistics import SamplingStatistics

PUSHED = ["README.md", "manifest.json", "statistics.json", "statistics.png"]
# Not every Arrow file: `Dataset.map` leaves caches beside the data
PUSHED += [f"{folder}/{files}" for folder in ("candidates", "pairs") for files in ("data-*.arrow", "*.json")]

CONFIGS: list[dict[str, Any]] = [
    {"config_name": "pairs", "data_files": "pairs/data-*.arrow", "default": True},
    {"config_name": "candidates", "data_files": "candidates/data-*.arrow"},
]


def dataset_card(settings: Settings, statistics: SamplingStatistics, dataset: Dataset) -> str:
    """Write the README.md of a sampled dataset, by which the Hub and `load_dataset(folder, "pairs")` read it.

    `settings` are those of the manifest, and `dataset` holds the pairs or rankings. The card depends on the arguments
    alone.
    """
    # `load_dataset` finds a folder in its cache by these lines, and not by what is in the folder: without the
    # fingerprint, a dataset that was made anew in the same place would be read as it was before
    content = [settings, statistics.as_dict(), dataset_fingerprint(dataset)]
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    metadata = DatasetCardData(
        configs=[{**config, "description": f"Fingerprint {fingerprint}"} for config in CONFIGS],
        tags=["trl", "prefopt-trl", "preference", settings["strategy"], settings["pairing"]],
        pretty_name=f"Sampled preferences ({statistics.made})",
    )
    card = render("dataset", metadata, settings=settings, statistics=statistics, columns=dataset.column_names)
    return f"{card}\n"


def read_sampled(folder: str | Path) -> tuple[Settings, SamplingStatistics] | None:
    """Return the settings and statistics of a sampled dataset, or None if the folder holds no finished one."""
    manifest = read_json(Path(folder, "manifest.json"))
    if manifest is None or not manifest["finished"]:
        return None
    numbers = read_json(Path(folder, "statistics.json"))
    del numbers["quantiles"]  # the same in all of them
    return manifest["settings"], SamplingStatistics(**numbers)


def push_preference_dataset(
    output_dir: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a finished dataset of [`build_preference_dataset`] to the Hub: pairs, candidates, statistics and card.

    Only what the pipeline has written is uploaded. The card then says how to load it from there. Call it in one
    process.

    Args:
        output_dir (`str` or `Path`):
            Folder of the dataset.
        repo_id (`str`):
            Dataset repository, such as `"my-org/my-pairs"`. It is created if it is missing.
        private (`bool`, *optional*):
            Whether a repository created here is private. By default as the organization has set it.
        token (`str`, *optional*):
            Access token. By default the one you are logged in with.

    Returns:
        `str`: address of the repository.

    Raises:
        ValueError: if `output_dir` holds no finished dataset.
        PushError: if the upload fails, with the command that retries it. The folder stays complete.

    Example:

    ```python
    push_preference_dataset("outputs/pairs", "my-org/my-pairs", private=True)
    ```
    """
    if read_sampled(output_dir) is None:
        raise ValueError(
            f"{output_dir} holds no finished dataset. Give `build_preference_dataset` the same settings and "
            f"output_dir={str(output_dir)!r} to finish it, then push again."
        )

    def write_card(repo_id: str) -> None:
        card = Path(output_dir, "README.md")
        # The first place is the snippet's: settings, which come later, may hold the same words
        place, named = r'load_dataset\("[^"]*", "pairs"', f'load_dataset("{repo_id}", "pairs"'
        card.write_text(re.sub(place, named, card.read_text(encoding="utf-8"), count=1), encoding="utf-8")

    return push_folder(
        output_dir,
        repo_id,
        write_card,
        repo_type="dataset",
        allow_patterns=PUSHED,
        delete_patterns=["candidates/*", "pairs/*"],  # files of an earlier dataset that had more of them
        private=private,
        token=token,
        commit_message="Upload sampled preferences",
    )
