"""What a ranker may do beside rewarding: read columns, abstain, and report a column of its own."""

import json
import math
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_from_disk

from prefopt_trl import EnsembleRanker, FunctionRanker, PROConfig, PROTrainer, build_preference_dataset
from prefopt_trl.sampling.collator import DataCollatorForRejectionSampling
from tests.unit.known_rankers import brevity

CANDIDATES = {
    "prompt": ["2 + 2 =", "3 + 3 ="],
    "completions": [[" 4", " 5", " four", " 6"], [" 6", " 5", " six", " 4"]],
    "solution": [" 4", " 6"],
}
OPTIONS: dict[str, Any] = {"num_candidates": 4, "num_samples": 4, "pairing": "all", "strategy": "sft"}


async def correct(completions, solution, **columns):
    """Right or wrong, and no opinion on words."""
    return [
        None if text.strip().isalpha() else float(text == right)
        for text, right in zip(completions, solution, strict=True)
    ]


@pytest.mark.parametrize("pairing", ["all", "ranking"])
def test_a_candidate_without_a_reward_leaves(pairing, tmp_path):
    dataset = Dataset.from_dict(CANDIDATES)
    how = {**OPTIONS, "pairing": pairing}
    made = build_preference_dataset(dataset, None, None, FunctionRanker(correct), tmp_path / "out", **how)
    if pairing == "ranking":
        assert [sorted(row["rewards"]) for row in made] == [[0, 0, 1], [0, 0, 1]]
        assert [row["completions"][0] for row in made] == [" 4", " 6"]
    else:  # of 3 candidates; two wrong ones are a coin's toss
        pairs = {(row["prompt"], row["chosen"], row["rejected"]) for row in made if row["chosen_reward"] == 1}
        expected = {("2 + 2 =", " 4", " 5"), ("2 + 2 =", " 4", " 6"), ("3 + 3 =", " 6", " 5"), ("3 + 3 =", " 6", " 4")}
        assert pairs == expected
        assert len(made) == 6
    rewards = load_from_disk(tmp_path / "out" / "candidates")["rewards"]
    assert list(rewards) == [[1, 0, None, 0], [1, 0, None, 0]]
    statistics = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert (statistics["num_candidates"], statistics["num_without_reward"]) == (8, 2)
    # Candidates with their rewards are the prompts of another run, which scores none of them again
    again = load_from_disk(tmp_path / "out" / "candidates")
    assert "solution" in again.column_names
    same = build_preference_dataset(again, None, None, FunctionRanker(correct), tmp_path / "again", **how)
    assert same.to_list() == made.to_list()


def test_a_missing_column_is_named_before_anything_is_sampled(tmp_path):
    with pytest.raises(ValueError, match="needs the column `solution`, and the prompts' dataset has no other columns"):
        build_preference_dataset(["2 + 2 ="], None, None, FunctionRanker(correct), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_pair_on_which_the_ranker_has_no_opinion_is_left_out(tmp_path):
    class Silent(FunctionRanker):
        def compare(self, prompts, first, second, columns=None):
            either = [" 5" in both for both in zip(first, second, strict=True)]
            return np.where(either, np.nan, super().compare(prompts, first, second, columns))

    made = build_preference_dataset(
        Dataset.from_dict(CANDIDATES), None, None, Silent(correct), tmp_path / "out", **OPTIONS
    )
    assert {(row["chosen"], row["rejected"]) for row in made} == {(" 4", " 6"), (" 6", " 4")}


def test_the_disagreement_of_an_ensemble_is_a_column_of_candidates_alone(tmp_path):
    ranker = EnsembleRanker([FunctionRanker(correct), FunctionRanker(brevity)])
    made = build_preference_dataset(Dataset.from_dict(CANDIDATES), None, None, ranker, tmp_path / "out", **OPTIONS)
    candidates = load_from_disk(tmp_path / "out" / "candidates")[0]
    assert candidates["rewards"] == [-0.5, -1, None, -1]  # 1 and -2, 0 and -2, none and -5, 0 and -2
    assert candidates["disagreement"] == [1.5, 1, None, 1]
    assert "disagreement" not in made.column_names


@pytest.mark.parametrize("pairing", ["all", "ranking"])
def test_a_batch_keeps_its_size_if_the_ranker_has_no_opinion(pairing, sampler):
    seen = []

    def odd(completions, level, **columns):
        seen.extend(level)
        return [None if one == 2 else float(len(text)) for text, one in zip(completions, level, strict=True)]

    collator = DataCollatorForRejectionSampling(
        *sampler, FunctionRanker(odd), num_candidates=4, num_samples=3, max_new_tokens=4, pairing=pairing
    )
    batch = collator([{"prompt": "The sky", "level": 1}, {"prompt": "The sea", "level": 2}])
    assert set(seen) == {1, 2}
    if pairing == "all":
        assert len(batch["input_ids"]) == 2 * 6  # chosen and rejected of 3 pairs each
        chosen, rejected = batch["input_ids"][3:6], batch["input_ids"][9:]
        assert chosen.tolist() == rejected.tolist()  # of the second prompt: the loss is constant
    else:
        assert batch["rewards"].tolist()[-2:] == [0, 0]


def test_rankings_keep_what_the_ranker_has_an_opinion_on(tiny_llama_dir, tmp_path, caplog):
    data = {name: [*column, column[0]] for name, column in CANDIDATES.items()}
    data["completions"][2] = [" four", " 4"]
    args = PROConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, report_to="none")
    trainer = PROTrainer(
        tiny_llama_dir, args=args, train_dataset=Dataset.from_dict(data), ranker=FunctionRanker(correct)
    )
    assert [len(rewards) for rewards in trainer.train_dataset["rewards"]] == [3, 3]
    assert "no opinion on 3 completions of the train dataset, which are left out; 2 of 3 rankings" in caplog.text
    assert not math.isnan(trainer.train().training_loss)
