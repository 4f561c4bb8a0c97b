"""Pairs by reward alone, margins, penalties and the best of n: values by hand, and laws."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from scipy.stats import chisquare

from prefopt_trl import FunctionRanker, SamplingOptions, build_preference_dataset
from prefopt_trl.rankers.base import logit, sigmoid
from prefopt_trl.sampling.options import BY_REWARD
from prefopt_trl.sampling.pairing import pairs_by_reward
from prefopt_trl.sampling.selection import penalties_of, select_and_pair
from tests.unit.known_rankers import number
from tests.unit.laws import CHANCE

WHOLE: dict[str, Any] = {"strategy": "sft", "num_candidates": 4, "num_samples": 4}  # all candidates are kept


class Unasked(FunctionRanker):
    """Scores, and refuses to compare."""

    def compare(self, prompts, first, second, columns=None):
        raise AssertionError("`compare` is called")


def build(folder: Path, rows: list[list[str]], ranker=None, finished=None, **options) -> tuple[list[dict], dict]:
    """What is made of these candidates of prompts p0, p1, ..., and its statistics."""
    given = {"prompt": [f"p{row}" for row in range(len(rows))], "completions": rows}
    dataset = Dataset.from_dict(given | ({"finished": finished} if finished else {}))
    ranker = ranker or Unasked(number)
    made = build_preference_dataset(dataset, None, None, ranker, folder, **{**WHOLE, **options}).to_list()
    return made, json.loads((folder / "statistics.json").read_text())


# The mean of 0, 1, 2, 9 is 3 and the variance (9 + 4 + 1 + 36) / 4: a deviation of 3.54
@pytest.mark.parametrize(("deviations", "rejected"), [(2.0, 0.0), (0.8, 0.0), (0.6, 1.0), (0.0, 2.0), (-5.0, 2.0)])
def test_the_rejected_one_is_nearest_to_some_deviations_below_the_mean(deviations: float, rejected: float) -> None:
    rewards = np.array([2.0, 9.0, 0.0, 1.0])
    pairs = pairs_by_reward("best-quantile", rewards, deviations=deviations)
    assert (rewards[pairs.chosen].tolist(), rewards[pairs.rejected].tolist()) == ([9.0], [rejected])
    assert pairs.probability == pytest.approx([1 / (1 + math.exp(rejected - 9))], rel=1e-12)


def test_the_best_meets_the_worst_and_equal_ones_do_not_meet() -> None:
    pairs = pairs_by_reward("best-worst", np.array([2.0, 9.0, 0.0]), 2.0)
    assert (pairs.chosen.tolist(), pairs.rejected.tolist()) == ([1], [2])
    for pairing in BY_REWARD:
        assert [len(values) for values in pairs_by_reward(pairing, np.ones(3), 2.0)] == [0, 0, 0]


def test_each_correct_one_meets_each_wrong_one_alike_and_once() -> None:
    rewards, met = np.array([1.0, 0.0, 1.0, 0.0, 0.0]), Counter[tuple[int, ...]]()
    for seed in range(3000):
        pairs = pairs_by_reward("correct-wrong", rewards, 2.0, rng=seed)
        assert sorted(pairs.chosen) == [0, 2]
        assert len(set(pairs.rejected)) == 2
        met[tuple(pairs.rejected[np.argsort(pairs.chosen)])] += 1
    assert len(met) == 6
    assert chisquare(list(met.values())).pvalue > CHANCE
    assert pairs.probability == pytest.approx(1 / (1 + math.exp(-1)))


def test_pairs_by_reward_ask_no_comparison_and_are_counted(tmp_path: Path) -> None:
    rows = [["3", "0", "1", "2"], ["5", "5.0", "5.00", "05"]]
    for pairing in ("best-worst", "best-quantile"):
        [pair], statistics = build(tmp_path / pairing, rows, pairing=pairing)
        assert (pair["chosen"], pair["chosen_reward"], pair["rejected"], pair["rejected_reward"]) == ("3", 3, "0", 0)
        assert pair["label_probability"] == pytest.approx(sigmoid(3.0))
        assert (statistics["num_skipped"], statistics["num_left_out"], statistics["warning"]) == (1, 1, None)


def test_prompts_all_right_or_all_wrong_are_left_out(tmp_path: Path) -> None:
    rows = [["1", "0", "1.0", "0.0"], ["1", "1.0", "01"], ["0", "00", "0.0"], ["1", "0", "00"]]
    pairs, statistics = build(tmp_path / "out", rows, pairing="correct-wrong")
    assert Counter(pair["prompt"] for pair in pairs) == {"p0": 2, "p3": 1}
    assert {(pair["chosen_reward"], pair["rejected_reward"]) for pair in pairs} == {(1.0, 0.0)}
    assert (statistics["num_pairs"], statistics["num_skipped"], statistics["num_left_out"]) == (3, 2, 2)
    with pytest.raises(ValueError, match="needs rewards of exactly 1 and 0, and row 1 has 0.5. Give a ranker"):
        build(tmp_path / "other", [rows[0], ["1", "0.5"]], pairing="correct-wrong")
    with pytest.raises(ValueError, match="The pairing left out 2 prompts with equal rewards, and the margins 0 pairs"):
        build(tmp_path / "none", rows[1:3], pairing="correct-wrong")


def test_pairs_outside_the_margins_are_left_out_and_counted(tmp_path: Path) -> None:
    ranker = FunctionRanker(number)
    margins = {"min_margin": 1.0, "max_margin": 2.0}
    pairs, statistics = build(tmp_path / "out", [["0", "0.5", "1", "3"], ["0", "9"]], ranker, pairing="all", **margins)
    # The differences are 0.5, 1, 3, 0.5, 2.5, 2 and 9
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {("1", "0"), ("3", "1")}
    assert (statistics["num_outside_margins"], statistics["num_skipped"], statistics["num_left_out"]) == (5, 1, 0)


def test_penalties_select_pair_and_label_and_are_not_saved(tmp_path: Path) -> None:
    # Rewards 4, 3, 0 and 2.5 less 0.5 per character (4, 1, 1, 3), and 2 less for the last, which is cut
    rows, finished = [["4.00", "3", "0", "2.5"]], [[True, True, True, False]]
    how = {"length_penalty": 0.5, "unfinished_penalty": 2.0}
    [pair], _ = build(tmp_path / "out", rows, finished=finished, pairing="best-worst", **how)
    assert (pair["chosen"], pair["chosen_reward"], pair["rejected"], pair["rejected_reward"]) == ("3", 2.5, "2.5", -1)
    assert pair["label_probability"] == pytest.approx(1 / (1 + math.exp(-3.5)))
    assert load_from_disk(tmp_path / "out" / "candidates")["rewards"][0] == [4, 3, 0, 2.5]
    [ranking], _ = build(tmp_path / "ranking", rows, FunctionRanker(number), finished, pairing="ranking", **how)
    assert (ranking["completions"], ranking["rewards"]) == (["3", "4.00", "0", "2.5"], [2.5, 2, -0.5, -1])
    top, _ = build(tmp_path / "top", rows, FunctionRanker(number), finished, strategy="top-k", num_samples=2, **how)
    assert (top[0]["chosen"], top[0]["rejected"]) == ("3", "4.00")
    with pytest.raises(ValueError, match="`unfinished_penalty` needs a column `finished` beside `completions`"):
        build(tmp_path / "unknown", rows, unfinished_penalty=1.0)


@pytest.mark.parametrize(("said", "expected"), [(0.7, float(sigmoid(logit(0.7) - 1.0))), (1.0, 1.0), (0.0, 0.0)])
def test_the_log_odds_of_the_ranker_are_shifted_by_the_penalties(said: float, expected: float) -> None:
    class Sure(FunctionRanker):
        def compare(self, prompts, first, second, columns=None):  # of the longer one
            is_longer = np.array([len(one) > len(other) for one, other in zip(first, second, strict=True)])
            return np.where(is_longer, said, 1 - said)

    options = SamplingOptions(strategy="sft", num_samples=2, length_penalty=0.5)
    completions = [["1", "2.0"]]  # one is longer by two characters: by 1 nat
    penalties = [penalties_of(completions[0], None, options)]
    rewards = [np.array([1.0, 2.0])]
    [one] = select_and_pair(["p"], completions, rewards, Sure(number), options, seed=0, penalties=penalties)
    assert one.rewards == [1, 2]
    assert one.chosen == [int(expected > 0.5)]
    assert one.probabilities == pytest.approx([max(expected, 1 - expected)])


def test_the_best_of_n_is_a_target_of_sft(tmp_path: Path) -> None:
    rows = [["3", "0", "7", "2"], ["5", "5"], ["5", "5.0"]]
    made, statistics = build(tmp_path / "out", rows, pairing="best")
    assert made[0] == {"prompt": "p0", "completion": "7", "reward": 7.0}
    assert [row["prompt"] for row in made] == ["p0", "p2"]  # the second prompt has one text only
    assert (statistics["made"], statistics["num_skipped"]) == ("completions", 1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from trl import SFTTrainer" in card
    assert "| best | 7.00 | `7` |" in card
