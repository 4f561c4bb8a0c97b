import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import chisquare

from prefopt_trl import SamplingOptions
from prefopt_trl.rankers import FunctionRanker
from prefopt_trl.rankers.base import Ranker, sigmoid
from prefopt_trl.sampling.rejection import automatic_beta
from prefopt_trl.sampling.selection import preference_rows, select_and_pair
from prefopt_trl.sampling.statistics import QUANTILES, Numbers, SamplingStatistics, summarize
from tests.unit.laws import CHANCE


def value(prompts, completions, **kwargs):
    """A completion is a number, its reward; under the prompt "low" the lower the better."""
    signs = [-1 if prompt == "low" else 1 for prompt in prompts]
    return [sign * float(completion) for sign, completion in zip(signs, completions, strict=True)]


RANKER = FunctionRanker(value)


def scored(*rows: Sequence[str], prompts: Sequence[str] | None = None) -> Dataset:
    """Candidates with the ranker's rewards, of prompts named p0, p1, ... unless others are given."""
    prompts = prompts or [f"p{row}" for row in range(len(rows))]
    rewards = [row.tolist() for row in RANKER.score(prompts, rows)]
    return Dataset.from_dict({"prompt": prompts, "completions": rows, "rewards": rewards})


@dataclass
class Selection:
    pairs: Dataset
    statistics: SamplingStatistics
    numbers: Numbers


def select(candidates: Dataset, ranker: Ranker = RANKER, seed: int = 0, **options) -> Selection:
    """What is made of candidates in one shard, and its statistics."""
    how = SamplingOptions(**{"num_samples": 2, "rejection_beta": 1.0, "pairing": "all"} | options)
    prompts, completions = candidates["prompt"][:], candidates["completions"][:]
    rewards = list(map(np.array, candidates["rewards"]))
    selected = select_and_pair(prompts, completions, rewards, ranker, how, seed=seed)
    statistics, numbers = summarize(zip(candidates, selected, strict=True), how)
    pairs = [
        pair
        for row, kept in zip(candidates, selected, strict=True)
        for pair in preference_rows(row, kept, how.pairing)
    ]
    return Selection(Dataset.from_list(pairs), statistics, numbers)


def kept(pairs: Dataset) -> dict[str, set[str]]:
    """The completions of each prompt that met, which are all that were kept where each meets each."""
    met: dict[str, set[str]] = {}
    for row in pairs:
        met.setdefault(row["prompt"], set()).update([row["chosen"], row["rejected"]])
    return met


# Which candidates are kept


REPEATS = ["0", "5", "5", "2", "5 ", "3", "4", "5"]


def test_beta_infinite_keeps_any_distinct_candidates_alike() -> None:
    rows = 3000
    selected = select(scored(*[REPEATS] * rows), num_samples=2, rejection_beta=math.inf)
    counts = Counter(frozenset(pair) for pair in kept(selected.pairs).values())
    assert len(counts) == 10  # each 2 of the 5 that are distinct
    assert sum(counts.values()) == rows
    assert chisquare(list(counts.values())).pvalue > CHANCE


def test_sft_keeps_any_candidates_alike_and_makes_no_pair_of_equal_texts() -> None:
    rows = 3000
    selected = select(scored(*[REPEATS] * rows), num_samples=2, strategy="sft")
    counts = Counter(frozenset(text.strip() for text in pair) for pair in kept(selected.pairs).values())
    # Of the 28 pairs of candidates, 6 are two 5s, 16 a 5 with one of the 4 others, and 6 two of these others
    expected = [4 if "5" in pair else 1 for pair in counts] + [6]
    assert (len(counts), sum(expected)) == (10, 28)
    observed = [*counts.values(), selected.statistics.num_skipped]
    assert chisquare(observed, [rows * share / 28 for share in expected]).pvalue > CHANCE


@pytest.mark.parametrize("pairing", ["first-round", "tournament", "all", "ranking"])
def test_sft_loses_no_prompt_to_repeats(pairing: str) -> None:
    candidates = scored(*[["1", "2", "1", "3"]] * 20, ["7", "7", "7 "])
    selected = select(candidates, num_samples=4, strategy="sft", pairing=pairing)  # all that there are
    made = Counter(selected.pairs["prompt"])
    assert (selected.statistics.num_skipped, selected.statistics.num_short, len(made)) == (1, 0, 20)
    if pairing == "all":
        met = [(row["prompt"], frozenset([row["chosen"], row["rejected"]])) for row in selected.pairs]
        each = {frozenset("12"): 2, frozenset("13"): 2, frozenset("23"): 1}  # five of six pairs: not 1 with 1
        assert Counter(met) == {(f"p{row}", pair): count for row in range(20) for pair, count in each.items()}
    if pairing == "ranking":
        assert selected.pairs["completions"] == [["3", "2", "1", "1"]] * 20
        assert selected.pairs["rewards"] == [[3.0, 2.0, 1.0, 1.0]] * 20


def test_rso_keeps_by_algorithm_1_with_this_beta() -> None:
    # The candidates with the highest reward pass at once, the third with a probability of exp(-1 / beta) = 1/2, and of
    # three that passed two are kept: the third one with a probability of 1/2 * 2/3.
    rows = 3000
    selected = select(scored(*[["3", "3.0", "2"]] * rows), num_samples=2, rejection_beta=1 / math.log(2))
    third = sum("2" in pair for pair in kept(selected.pairs).values())
    assert chisquare([third, rows - third], [rows / 3, 2 * rows / 3]).pvalue > CHANCE
    assert selected.statistics.acceptance_rate == pytest.approx((1 + 1 + 0.5) / 3)


def test_an_automatic_beta_is_that_of_each_prompts_distinct_candidates() -> None:
    spread = [
        [f"{reward:.3f}" for reward in np.random.default_rng(row).normal(scale=row + 1, size=9)] for row in range(6)
    ]
    candidates = scored(*[[*row, *row[:3]] for row in spread])
    chosen = select(candidates, num_samples=4, rejection_beta="auto")
    expected = [automatic_beta(np.array(row, dtype=float), 4) for row in spread]
    assert len(set(expected)) > 3
    for row, beta in enumerate(expected):
        alike = select(candidates, num_samples=4, rejection_beta=beta)
        assert kept(chosen.pairs)[f"p{row}"] == kept(alike.pairs)[f"p{row}"]
    statistics = chosen.statistics
    assert statistics.beta_quantiles == np.quantile(expected, QUANTILES, method="nearest").tolist()
    assert f"rejection_beta of a prompt: median {statistics.beta_quantiles[3]:.2g}" in str(statistics)
    assert select(candidates, rejection_beta=1.0).statistics.beta_quantiles == []


def test_of_equal_texts_the_first_counts() -> None:
    candidates = Dataset.from_dict({"prompt": ["p"], "completions": [["x", "y", "x"]], "rewards": [[1.0, 2.0, 9.0]]})
    ranker = FunctionRanker(lambda prompts, completions: [ord(text) for text in completions])
    row = select(candidates, ranker, strategy="top-k").pairs[0]
    assert (row["chosen"], row["chosen_reward"], row["rejected"], row["rejected_reward"]) == ("y", 2.0, "x", 1.0)


@pytest.mark.parametrize("options", [{"strategy": "top-k"}, {"strategy": "rso", "rejection_beta": 0.0}])
def test_top_k_and_beta_0_keep_the_highest_distinct_candidates_and_count_prompts_that_have_few(options: dict) -> None:
    rows = (
        ["1", "1", "1"],
        ["1", "2", "3"],
        [],
        ["4", "4", "5"],
        ["9", "1", "9", "9", "7", "8", "3"],
        ["2", "5", "6", "4"],
    )
    candidates = scored(*rows, prompts=["p0", "p1", "p2", "p3", "p4", "low"])
    for seed in range(5):
        selected = select(candidates, num_samples=3, seed=seed, **options)
        highest = {"p1": {"1", "2", "3"}, "p3": {"4", "5"}, "p4": {"7", "8", "9"}, "low": {"2", "4", "5"}}
        assert kept(selected.pairs) == highest
    assert Counter(selected.pairs["prompt"]) == {"p1": 3, "p3": 1, "p4": 3, "low": 3}
    assert selected.statistics.num_prompts == 6
    assert (selected.statistics.num_skipped, selected.statistics.num_short) == (2, 1)
    assert selected.statistics.num_candidates == len(selected.numbers.rewards["candidates"]) == 20
    assert selected.statistics.num_duplicates == 5


def test_no_prompt_with_two_distinct_candidates_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="No prompt has candidates that differ .*prompt are 1.. Raise `num_candidates"
    ):
        select(scored(["1", "1", "1"], ["2", "2 "], []), num_samples=3)


# The pairs


NUM_PAIRS = [("first-round", lambda n: n // 2), ("tournament", lambda n: n - 1), ("all", lambda n: n * (n - 1) // 2)]


@pytest.mark.parametrize("num_samples", [2, 5, 8])
@pytest.mark.parametrize("strategy", ["rso", "sft", "top-k"])
@pytest.mark.parametrize(("pairing", "num_pairs"), NUM_PAIRS)
def test_pairs_are_as_many_as_the_pairing_makes_and_labelled_by_the_ranker(
    pairing: str, num_pairs, strategy: str, num_samples: int
) -> None:
    numbers = np.random.default_rng(num_samples).normal(size=(6, 12))
    numbers[0] = 0.0  # the first prompt is skipped, so that no row stands for another
    candidates = scored(
        *[[str(number) for number in row] for row in numbers], prompts=["low", "a", "low", "b", "c", "d"]
    )
    selected = select(candidates, pairing=pairing, strategy=strategy, num_samples=num_samples)
    pairs = selected.pairs
    each = num_pairs(num_samples)
    assert pairs["prompt"] == [prompt for prompt in ["a", "low", "b", "c", "d"] for _ in range(each)]
    assert selected.statistics.num_pairs == len(pairs) == 5 * each
    chosen = np.array(value(pairs["prompt"], pairs["chosen"]))
    rejected = np.array(value(pairs["prompt"], pairs["rejected"]))
    assert (chosen > rejected).all()
    np.testing.assert_array_equal(pairs["chosen_reward"], chosen)
    np.testing.assert_array_equal(pairs["rejected_reward"], rejected)
    np.testing.assert_allclose(pairs["label_probability"], sigmoid(chosen - rejected), rtol=1e-12)
    of_row = {
        prompt: set(texts) for prompt, texts in zip(candidates["prompt"], candidates["completions"], strict=True)
    }
    assert all({row["chosen"], row["rejected"]} <= of_row[row["prompt"]] for row in pairs)


class Judge(Ranker):
    """Prefers the shorter completion with a probability of 0.8, whatever the rewards, and counts what it is asked."""

    def __init__(self, *probabilities: float) -> None:
        self.probabilities = list(probabilities)
        self.calls: list[int] = []

    def compare(self, prompts, first, second):
        self.calls.append(len(prompts))
        if self.probabilities:
            return self.probabilities
        return np.array([0.8 if len(one) < len(two) else 0.2 for one, two in zip(first, second, strict=True)])

    def score(self, prompts, completions, baselines=None):
        raise AssertionError("the rewards are there")

    def settings(self):
        return {}


def test_labels_are_the_rankers_also_against_the_rewards() -> None:
    # The longest has the highest reward
    candidates = scored(*[["1", "22", "333", "4444"]] * 3)
    judge = Judge()
    selected = select(candidates, judge, num_samples=4, pairing="tournament")
    assert all(len(row["chosen"]) < len(row["rejected"]) for row in selected.pairs)
    assert all(row["chosen_reward"] < row["rejected_reward"] for row in selected.pairs)
    assert set(selected.pairs["label_probability"]) == {0.8}
    # one call a round, for all prompts: random pairs of candidates, and the two rounds of the tournament
    assert judge.calls == [6, 6, 3]


def test_each_prompt_has_a_random_stream_of_its_own() -> None:
    numbers = [str(number) for number in range(30)]

    def pairs_of(prompt: str, *rows: Sequence[str], **options) -> list[dict]:
        return [
            row
            for row in select(scored(*rows), num_samples=4, rejection_beta=9.0, **options).pairs
            if row["prompt"] == prompt
        ]

    first = pairs_of("p2", numbers, numbers, numbers)
    assert first == pairs_of("p2", numbers, numbers, numbers)
    assert first == pairs_of("p2", numbers[:9], ["1", "1"], numbers, ["2", "3", "4", "5"])  # another row, one skipped
    assert first != pairs_of("p2", numbers, numbers, numbers, seed=1)
    by_row = [row | {"prompt": ""} for row in first]
    assert by_row != [row | {"prompt": ""} for row in pairs_of("p1", numbers, numbers, numbers)]


def test_completions_that_are_messages_stay_messages() -> None:
    def message(content: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": content}]

    prompt = [{"role": "user", "content": "A number?"}]
    ranker = FunctionRanker(lambda prompts, completions: [float(messages[0]["content"]) for messages in completions])
    completions = [[message("5"), message("5"), message("7"), message("6")]]
    candidates = Dataset.from_dict({"prompt": [prompt], "completions": completions, "rewards": [[5.0, 5.0, 7.0, 6.0]]})
    selected = select(candidates, ranker, num_samples=3, pairing="all")
    assert selected.statistics.num_duplicates == 1
    rows = sorted(selected.pairs, key=lambda row: (row["chosen_reward"], row["rejected_reward"]))
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [
        (prompt, message("6"), message("5")),
        (prompt, message("7"), message("5")),
        (prompt, message("7"), message("6")),
    ]


# Statistics


def test_statistics_are_those_worked_out_by_hand() -> None:
    # Two distinct candidates, so random pairs and pairs made are the same: 2 against 1, and 5 against 1
    candidates = scored(["1", "2", "1"], ["5", "1"], ["3"])
    candidates = candidates.add_column("finished", [[True, False, False], [False, True], [False]])
    selected = select(candidates, rejection_beta=2.0, pairing="first-round")
    statistics = selected.statistics
    assert (statistics.num_prompts, statistics.num_skipped, statistics.num_pairs) == (3, 1, 2)
    assert (statistics.num_candidates, statistics.num_duplicates, statistics.num_unfinished) == (6, 1, 4)
    # Theorem 1: 1/2 (1 + exp(-1/2)) and 1/2 (1 + exp(-4/2)), over distinct candidates
    assert statistics.acceptance_rate == pytest.approx((2 + math.exp(-0.5) + math.exp(-2)) / 4)
    assert statistics.acceptance_quantiles[::6] == pytest.approx([(1 + math.exp(-2)) / 2, (1 + math.exp(-0.5)) / 2])
    sure = (1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(-4))) / 2
    assert statistics.label_probability_before == pytest.approx(sure)
    assert statistics.label_probability_after == pytest.approx(sure)
    assert {name: (q[0], q[3], q[-1]) for name, q in statistics.reward_quantiles.items()} == {
        "candidates": (1, 1.5, 5),  # 1 1 1 2 3 5
        "accepted": (1, 1.5, 5),  # 1 1 2 5
        "chosen": (2, 3.5, 5),
        "rejected": (1, 1, 1),
    }
    assert sorted(selected.numbers.rewards["accepted"]) == [1, 1, 2, 5]
    assert sorted(selected.numbers.probabilities["pairs made"]) == pytest.approx(sorted(sigmoid(np.array([1.0, 4.0]))))


@pytest.mark.parametrize("strategy", ["sft", "top-k"])
def test_without_rejection_or_the_column_there_is_no_rate_and_no_count(strategy: str) -> None:
    statistics = select(scored(["1", "2"]), strategy=strategy).statistics
    assert statistics.acceptance_rate is statistics.num_unfinished is None


def test_a_beta_that_leaves_close_pairs_is_warned_of() -> None:
    # Of 32 candidates from 0 to 8, four are nearly equal and the best: beta 0 keeps just these, and labels are guesses
    row = ["8", "8.01", "8.02", "8.03", *[str(number / 4) for number in range(28)]]
    small = select(scored(*[row] * 20), num_samples=4, rejection_beta=0.0).statistics
    assert small.label_probability_after < 0.51
    assert small.label_probability_before > 0.75
    assert small.warning is not None
    assert "`rejection_beta`=0 is too small for this ranker" in small.warning
    top = select(scored(*[row] * 20), num_samples=4, rejection_beta=0.0, strategy="top-k").statistics
    assert "rejection_beta" not in str(top.warning)  # but "8.01" is longer than "1"
    assert select(scored(*[row] * 20), num_samples=4, rejection_beta=4.0).statistics.warning is None


# Errors


def test_a_ranker_that_compares_wrongly_is_named() -> None:
    with pytest.raises(ValueError, match="Judge.compare returned nan for prompt row 1, a probability in"):
        select(scored(["1", "2"], ["3", "4"]), Judge(0.5, math.nan))


# Rankings, and columns of the user's


def test_a_ranking_holds_what_was_accepted_best_first() -> None:
    candidates = scored(["9", "1", "9", "7", "8", "3"], ["2", "5", "6", "5", "4"], prompts=["a", "low"])
    selected = select(candidates, strategy="top-k", num_samples=3, pairing="ranking")
    assert selected.pairs.to_dict() == {
        "prompt": ["a", "low"],
        "completions": [["9", "8", "7"], ["2", "4", "5"]],
        "rewards": [[9.0, 8.0, 7.0], [-2.0, -4.0, -5.0]],
    }
    statistics = selected.statistics
    assert (statistics.num_pairs, statistics.made) == (2, "rankings") and "2 rankings from 2 of 2" in str(statistics)
    assert statistics.reward_quantiles["chosen"][0] == -2.0 and statistics.reward_quantiles["rejected"][-1] == 8.0


def test_a_ranking_and_pairs_keep_the_same_candidates() -> None:
    candidates = scored(*[[str(number) for number in range(12)]] * 20)
    ranked = select(candidates, num_samples=4, pairing="ranking").pairs
    assert {row["prompt"]: set(row["completions"]) for row in ranked} == kept(select(candidates, num_samples=4).pairs)
    assert all(row["rewards"] == sorted(row["rewards"], reverse=True) for row in ranked)


@pytest.mark.parametrize("pairing", ["first-round", "ranking"])
def test_other_columns_stay_with_their_prompt(pairing: str) -> None:
    candidates = scored(["1", "1"], ["4", "2", "3", "1"], ["5", "6", "7", "8"])
    candidates = candidates.add_column("target", ["t0", "t1", "t2"]).add_column("chosen", ["never", "these", "two"])
    made = select(candidates, num_samples=4, pairing=pairing).pairs
    rows = 1 if pairing == "ranking" else 2
    assert list(zip(made["prompt"], made["target"], strict=True)) == [("p1", "t1")] * rows + [("p2", "t2")] * rows
    assert pairing == "ranking" or "never" not in made["chosen"]
