"""What the benchmarks on the quickstart's kitchen task share: its SFT policy and ranker, and numbers over seeds."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefopt_trl.quickstart import study
from prefopt_trl.quickstart.kitchen import ControlledTask
from prefopt_trl.rankers.pairwise import PairwiseRanker, pairwise_ranker_dataset
from prefopt_trl.rankers.templates import ANSWERS, dialogue


def prepare(seed: int, folder: Path) -> tuple[ControlledTask, Any, Any, PairwiseRanker]:
    """Return the task, its tokenizer, the SFT policy (saved in `folder/sft`) and the ranker, as in the quickstart."""
    torch.manual_seed(seed)
    task = ControlledTask(seed=seed, **study.TASK)
    tokenizer = task.tokenizer()
    ranker_tokenizer = task.tokenizer(extra_words=[*dialogue("|", "|", "|").split("|"), *ANSWERS])
    sft = study.fine_tune(
        task.policy_model(tokenizer, seed), tokenizer, task.sft_dataset, study.SFT, folder / "sft", seed
    )
    comparisons = pairwise_ranker_dataset(task.comparisons, seed=seed)
    judge = task.policy_model(ranker_tokenizer, seed + 1)
    study.fine_tune(judge, ranker_tokenizer, comparisons, study.RANKER, folder / "ranker", seed)
    return task, tokenizer, sft, PairwiseRanker(judge, ranker_tokenizer, batch_size=512, seed=seed)


def with_error(values: np.ndarray) -> str:
    """Mean and its standard error over seeds."""
    error = f" +- {values.std(ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{error}"
