"""Push a sampled dataset to the Hub."""

import re
from pathlib import Path

from prefopt_trl.runtime.hub import push_folder
from prefopt_trl.sampling.statistics import read_sampled

PUSHED = ["README.md", "manifest.json", "statistics.json", "statistics.png"]
# Not every Arrow file: `Dataset.map` leaves caches beside the data
PUSHED += [f"{folder}/{files}" for folder in ("candidates", "pairs") for files in ("data-*.arrow", "*.json")]


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
