"""Rewards of completions that come without them: each process scores its share, and all are saved."""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset

from prefopt_trl.data.fingerprints import dataset_fingerprint
from prefopt_trl.data.processes import process_state
from prefopt_trl.data.weights import gathered, model_of
from prefopt_trl.rankers.base import Ranker, check_rewards
from prefopt_trl.sampling.store import SampleStore

logger = logging.getLogger(__name__)


def score_or_read(dataset: Dataset, name: str, ranker: Ranker, output_dir: str | Path) -> list[list[float]]:
    """Return rewards of completions, from the file of an earlier run where it scored the same with the same ranker.

    The file is `<output_dir>/scored/<split name>.json`, which the main process alone reads and writes. Call it on all
    processes: each gets the rewards of all rows, and raises the errors of [`check_rewards`] for its share.
    """
    process, store = process_state(), SampleStore(Path(output_dir) / "scored")
    rows = dataset.select_columns(["prompt", "completions"]).with_format(None)
    with gathered(model_of(ranker)):  # by all processes
        settings = json.loads(json.dumps({"rows": dataset_fingerprint(rows), "ranker": ranker.settings()}))
        file = store.folder / f"{name}.json"
        saved = broadcast_object_list([_read(file, settings) if process.is_main_process else None])[0]
        if saved is None:
            start, end = (len(rows) * (process.process_index + n) // process.num_processes for n in (0, 1))
            rewards = gather_object(_score(rows.select(range(start, end)), start, name, ranker))
    if process.is_main_process and saved is None:
        store.write_json(file.name, {"settings": settings, "rewards": rewards})
    elif process.is_main_process:
        logger.warning("Reusing the rewards of the %s dataset in %s, made by the same ranker.", name, file)
    return rewards if saved is None else saved


def _read(file: Path, settings: dict[str, Any]) -> list[list[float]] | None:
    content = json.loads(file.read_bytes()) if file.exists() else {}
    return content["rewards"] if content.get("settings") == settings else None


def _score(share: Dataset, first_row: int, name: str, ranker: Ranker) -> list[list[float]]:
    if len(share) == 0:  # more processes than rows
        return []
    prompts, completions = list(share["prompt"]), list(share["completions"])
    try:
        rewards = check_rewards(ranker.score(prompts, completions), prompts, completions, type(ranker).__name__)
    except Exception as error:
        error.add_note(f"Row 0 of these {len(share)} is row {first_row} of the {name} dataset.")
        raise
    return [row.tolist() for row in rewards]
