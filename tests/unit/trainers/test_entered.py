"""How much of the package one run enters: what a reader of that run has to know."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import prefopt_trl
from prefopt_trl import FunctionRanker, RSOConfig, RSOTrainer
from tests.unit.known_rankers import brevity

PACKAGE = Path(prefopt_trl.__file__).parent
PAIRS = {"prompt": ["Why?", "Mix"], "chosen": [" Because.", " it"], "rejected": [" No.", " the bread"]}
SAMPLING = {"num_candidates": 6, "num_samples": 4, "max_new_tokens": 4}


def entered_files(run: Callable[[], Any]) -> list[str]:
    """Return the files of the package of which `run` calls a function, besides what is done on import."""
    files = set()

    def see(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name != "<module>" and code.co_filename.startswith(str(PACKAGE)):
            files.add(Path(code.co_filename).relative_to(PACKAGE).as_posix())

    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return sorted(files)


@pytest.mark.parametrize(("rows", "most"), [({"prompt": ["Why?", "Mix"]}, 30), (PAIRS, 15)], ids=["prompts", "pairs"])
def test_a_run_enters_few_files(rows: dict[str, list[str]], most: int, tiny_llama_dir: str, tmp_path: Path) -> None:
    options = {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no"}

    def run() -> None:
        args = RSOConfig(str(tmp_path), **options, **SAMPLING)
        ranker = None if "chosen" in rows else FunctionRanker(brevity)
        RSOTrainer(tiny_llama_dir, args=args, train_dataset=Dataset.from_dict(rows), ranker=ranker).train()

    files = entered_files(run)
    print(len(files), "files:", " ".join(files))
    assert len(files) <= most
