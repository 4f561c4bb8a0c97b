"""`prefopt-trl evaluate-ranker`: how far to trust a ranker, and the temperature that calibrates it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from prefopt_trl.cli.arguments import EvaluateRankerConfig
from prefopt_trl.cli.data import require_columns
from prefopt_trl.cli.rankers import load_ranker
from prefopt_trl.data.loading import load_rows
from prefopt_trl.evaluation.ranker_quality import measure
from prefopt_trl.evaluation.report import json_numbers
from prefopt_trl.rankers.base import Ranker
from prefopt_trl.rankers.calibration import fit_temperature
from prefopt_trl.rankers.comparisons import ask_comparisons
from prefopt_trl.rankers.function import FunctionRanker
from prefopt_trl.rankers.pairwise import PairwiseRanker
from prefopt_trl.runtime.processes import interruptible
from prefopt_trl.runtime.settings import write_json, write_text


def run(own: EvaluateRankerConfig, save_config: Callable[[], None]) -> None:
    """Ask the ranker about each comparison once, print and write what it is worth, and calibrate it if asked to."""
    if own.use_cpu:
        PartialState(cpu=True)
    rows = load_rows(own.dataset_name, own.dataset_config, own.dataset_split, own.num_rows)
    require_columns(rows, own.dataset_name, {"prompt", "chosen", "rejected"})
    ranker, folder = load_ranker(own), Path(own.output_dir)
    ranker.check_columns(set(rows.column_names) - {"prompt", "chosen", "rejected"})
    save_config()
    with interruptible(lambda: "Interrupted before anything was saved."):
        compared = ask_comparisons(ranker, rows)
    quality = measure(ranker, compared)
    quality.save(folder)
    print(f"{quality}\n\nThe report is saved in {folder}.")
    if own.calibrate:
        calibration = fit_temperature(compared)
        calibration.apply(ranker)
        write_json(folder / "calibration.json", json_numbers(asdict(calibration)))
        specification = _specification(own, ranker) | {"temperature": calibration.temperature}
        write_text(folder / "ranker.yaml", yaml.safe_dump(specification, sort_keys=False, allow_unicode=True))
        print(f"{calibration}\nThe calibrated ranker is --ranker {folder / 'ranker.yaml'}.")


def _specification(own: EvaluateRankerConfig, ranker: Ranker) -> dict[str, Any]:
    """Return the ranker's class and arguments, as a YAML file of `ranker` has them."""
    if own.ranker.endswith((".yaml", ".yml")):
        return yaml.safe_load(Path(own.ranker).read_text(encoding="utf-8"))
    if isinstance(ranker, FunctionRanker):
        return {"class": "FunctionRanker", "function": own.ranker}
    template = {"template": own.ranker_template} if isinstance(ranker, PairwiseRanker) else {}
    return {"class": type(ranker).__name__, "model": own.ranker, "batch_size": own.ranker_batch_size, **template}
