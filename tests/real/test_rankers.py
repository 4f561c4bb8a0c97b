"""Rankers that people have, on completions of a pretrained model: sentiment with a column, an ensemble, a T5 model."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from transformers import T5Config, T5ForConditionalGeneration

from prefopt_trl import EnsembleRanker, FunctionRanker, PairwiseRanker, build_preference_dataset
from prefopt_trl.rankers.base import Ranker

pytestmark = pytest.mark.real

TOPICS = ["the sea", "a rainy Monday", "my neighbor's dog", "an exam"]
PROMPTS = {
    "prompt": [[{"role": "user", "content": f"Write one sentence about {topic}."}] for topic in TOPICS],
    "sign": [1.0, -1.0, 1.0, -1.0],  # whether the sentence should be glad or sad
}


async def sentiment(completions: Any, sign: list[float], **columns: Any) -> list[float | None]:
    """Five times VADER's compound sentiment, with the sign of the row; no opinion on neutral texts."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    await asyncio.sleep(0)
    analyzer = SentimentIntensityAnalyzer()
    compound = [analyzer.polarity_scores(completion[-1]["content"])["compound"] for completion in completions]
    return [5 * way * one if one else None for way, one in zip(sign, compound, strict=True)]


def brevity(completions: Any, **columns: Any) -> list[float]:
    return [-len(completion[-1]["content"]) / 50 for completion in completions]


def t5(tokenizer: Any) -> PairwiseRanker:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = T5Config(
        vocab_size=len(tokenizer), decoder_start_token_id=0, eos_token_id=tokenizer.eos_token_id, **sizes
    )
    return PairwiseRanker(T5ForConditionalGeneration(config), tokenizer)


@pytest.mark.parametrize("kind", ["function", "ensemble", "T5"])
def test_it_labels_real_completions(smollm2: Any, kind: str, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    rankers: dict[str, Ranker] = {
        "function": FunctionRanker(sentiment),
        "ensemble": EnsembleRanker([FunctionRanker(sentiment), FunctionRanker(brevity)], combine="mean-std"),
        "T5": t5(tokenizer),
    }
    how: Any = {"num_candidates": 12, "num_samples": 4, "max_new_tokens": 24, "rejection_beta": 2.0}
    data = Dataset.from_dict(PROMPTS)
    pairs = build_preference_dataset(data, model, tokenizer, rankers[kind], tmp_path / "made", **how)
    assert len(pairs) >= 4
    if kind == "T5":  # the labels are its own verdicts, asked again
        again = rankers[kind].compare(*(pairs[column][:] for column in ("prompt", "chosen", "rejected")))
        assert again == pytest.approx(np.array(pairs["label_probability"][:]), abs=1e-5)
        return
    signs = {row["prompt"][0]["content"]: row["sign"] for row in data}
    for pair in pairs.to_list():  # right for the row's own sign
        assert pair["sign"] == signs[pair["prompt"][0]["content"]]
        both = asyncio.run(sentiment([pair["chosen"], pair["rejected"]], [pair["sign"]] * 2))
        if kind == "function":
            assert [pair["chosen_reward"], pair["rejected_reward"]] == both
            assert both[0] >= both[1]
    candidates = load_from_disk(tmp_path / "made" / "candidates")
    assert ("disagreement" in candidates.column_names) == (kind == "ensemble")
