import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from prefopt_trl.sampling.pairing import (
    Pairs,
    all_pairs,
    first_round_pairs,
    play,
    tournament_pairs,
)

sizes = pytest.mark.parametrize("num_completions", [2, 3, 4, 5, 7, 8, 13, 64])
NUM_PAIRS = {
    first_round_pairs: lambda n: n // 2,
    tournament_pairs: lambda n: n - 1,
    all_pairs: lambda n: n * (n - 1) // 2,
}
pairings = pytest.mark.parametrize("pairing", NUM_PAIRS)


class Ranker:
    """Prefers the higher of distinct rewards with the logistic probability, and keeps what it was asked."""

    def __init__(self, num_completions: int):
        self.rewards = np.random.default_rng(num_completions).permutation(num_completions) / 10
        self.rounds: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        self.rounds.append((first, second))
        return 1 / (1 + np.exp(self.rewards[second] - self.rewards[first]))


@sizes
@pairings
def test_pairs_are_as_many_as_the_paper_says_and_labelled_as_the_ranker_says(pairing, num_completions):
    ranker = Ranker(num_completions)
    pairs, num_pairs = pairing(num_completions, ranker, rng=0), NUM_PAIRS[pairing](num_completions)
    assert pairs.chosen.shape == pairs.rejected.shape == pairs.probability.shape == (num_pairs,)
    assert pairs.chosen.dtype == pairs.rejected.dtype == np.int64
    margins = ranker.rewards[pairs.chosen] - ranker.rewards[pairs.rejected]
    assert (margins > 0).all()
    np.testing.assert_allclose(pairs.probability, 1 / (1 + np.exp(-margins)), rtol=0, atol=1e-15)


@sizes
def test_first_round_uses_each_completion_at_most_once_in_one_call(num_completions: int) -> None:
    ranker = Ranker(num_completions)
    pairs = first_round_pairs(num_completions, ranker, rng=0)
    met = np.concatenate([pairs.chosen, pairs.rejected])
    assert len(set(met.tolist())) == len(met) == num_completions // 2 * 2
    assert len(ranker.rounds) == 1


@sizes
def test_tournament_is_single_elimination(num_completions: int) -> None:
    ranker = Ranker(num_completions)
    pairs = tournament_pairs(num_completions, ranker, rng=0)
    champion = int(ranker.rewards.argmax())
    assert sorted(pairs.rejected.tolist()) == sorted(set(range(num_completions)) - {champion})
    assert pairs.chosen[-1] == champion
    # Whoever has lost never plays again.
    for match in range(len(pairs.chosen)):
        lost = set(pairs.rejected[:match].tolist())
        assert not lost & {int(pairs.chosen[match]), int(pairs.rejected[match])}
    # The ranker is asked once a round, and nobody rests twice running.
    assert len(ranker.rounds) == math.ceil(math.log2(num_completions))
    players, rested = set(range(num_completions)), set()
    for first, second in ranker.rounds:
        playing = {*first.tolist(), *second.tolist()}
        resting = players - playing
        assert playing <= players and len(playing) == len(players) // 2 * 2
        assert not resting & rested
        winners = np.where(ranker.rewards[first] > ranker.rewards[second], first, second)
        players, rested = {*winners.tolist(), *resting}, resting
    assert len(players) == 1


def test_tournament_of_four_is_the_papers_example() -> None:
    """RSO section 5: c1 against c2 and c3 against c4, then winner(c1, c2) against winner(c3, c4)."""
    ranker = Ranker(4)
    tournament_pairs(4, ranker, rng=0)
    (first, second), (finalist, other) = ranker.rounds
    better = np.where(ranker.rewards[first] > ranker.rewards[second], first, second)
    assert [finalist.tolist(), other.tolist()] == [[better[0]], [better[1]]]


@sizes
def test_all_pairs_meet_once_in_one_call(num_completions: int) -> None:
    ranker = Ranker(num_completions)
    pairs = all_pairs(num_completions, ranker, rng=0)
    met = {frozenset(pair) for pair in zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)}
    assert met == {frozenset((i, j)) for i in range(num_completions) for j in range(i)}
    assert len(ranker.rounds) == 1


@pairings
def test_every_match_and_both_orders_are_equally_likely(pairing: Callable[..., Pairs]) -> None:
    """Chance of failing: below 1e-6 for each pairing, by Hoeffding's bound on each of the 12 ordered matches.

    Four completions that never lose as the first: each of the 12 ordered matches is played with the probability
    (matches per run) / 12, which is below 1, so its frequency is that of a coin thrown anew in each run.
    """
    num_runs, counts = 20_000, Counter()
    rng = np.random.default_rng(0)
    for _ in range(num_runs):
        pairs = pairing(4, lambda first, second: np.ones(len(first)), rng=rng)
        counts.update(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))
    assert 12 * 2 * math.exp(-2 * num_runs * 0.0225**2) < 1e-6
    assert len(counts) == 12
    for count in counts.values():
        assert count / num_runs == pytest.approx(len(pairs.chosen) / 12, abs=0.0225)


@pairings
def test_ties_are_labelled_by_a_fair_coin(pairing: Callable[..., Pairs]) -> None:
    """Chance of failing: below 1e-6 for each pairing, by Hoeffding's bound."""
    firsts: list[np.ndarray] = []

    def undecided(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        firsts.append(first)
        return np.full(len(first), 0.5)

    rng = np.random.default_rng(1)
    won, played = 0, 0
    while played < 20_000:
        firsts.clear()
        pairs = pairing(101, undecided, rng=rng)
        assert (pairs.probability == 0.5).all()
        won += int((pairs.chosen == np.concatenate(firsts)).sum())
        played += len(pairs.chosen)
    assert 2 * math.exp(-2 * played * 0.02**2) < 1e-6
    assert won / played == pytest.approx(0.5, abs=0.02)


def test_a_probability_near_one_half_is_no_tie() -> None:
    pairs = first_round_pairs(1000, lambda first, second: np.where(first > second, 0.5 + 1e-12, 0.5 - 1e-12), rng=0)
    assert (pairs.chosen > pairs.rejected).all()
    np.testing.assert_allclose(pairs.probability, 0.5 + 1e-12, rtol=0, atol=1e-15)


@pairings
def test_seed_decides(pairing: Callable[..., Pairs]) -> None:
    runs = [pairing(32, Ranker(32), rng=seed).chosen.tolist() for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_many_prompts_side_by_side_get_the_pairs_each_would_get_alone() -> None:
    sizes = [2, 9, 5, 64, 3]
    rankers = [Ranker(size) for size in sizes]
    together = [Ranker(size) for size in sizes]
    calls: list[int] = []

    def compare(prompt: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        calls.append(len(prompt))
        return np.array([float(together[p](f, s)) for p, f, s in zip(prompt, first, second, strict=True)])

    alone = [tournament_pairs(size, ranker, rng=size) for size, ranker in zip(sizes, rankers, strict=True)]
    results = play("tournament", sizes, compare, [np.random.default_rng(size) for size in sizes])
    assert len(results) == len(sizes)
    for single, shared in zip(alone, results, strict=True):
        for expected, got in zip(single, shared, strict=True):
            np.testing.assert_array_equal(expected, got)
    # One call a round, for as many rounds as the largest tournament has: 64 completions take six.
    assert calls == [1 + 4 + 2 + 32 + 1, 2 + 1 + 16 + 1, 1 + 1 + 8, 1 + 4, 2, 1]


@pairings
@pytest.mark.parametrize("num_completions", [0, 1])
def test_fewer_than_two_completions_make_no_pair(num_completions: int, pairing: Callable[..., Pairs]) -> None:
    with pytest.raises(
        ValueError, match=f"`num_completions` must be at least 2, to make a pair, got {num_completions}"
    ):
        pairing(num_completions, lambda first, second: first > second)


@pairings
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda first, second: np.full(len(first) + 1, 0.7), "one probability per match"),
        (lambda first, second: 0.7, r"shape \(\) for \d+ matches"),
        (lambda first, second: np.where(first == 2, np.nan, np.where(second == 2, np.nan, 0.7)), "returned nan for"),
        (lambda first, second: np.full(len(first), 1.0001), "returned 1.0001 for completion"),
        (lambda first, second: np.full(len(first), -0.5), "returned -0.5 .*. Return the probability"),
    ],
)
def test_what_the_ranker_returns_is_checked(answer: Callable, message: str, pairing: Callable[..., Pairs]) -> None:
    with pytest.raises(ValueError, match=message):
        pairing(4, answer, rng=0)


def test_the_error_names_both_completions() -> None:
    with pytest.raises(
        ValueError, match=r"`compare` returned 2.0 for completion [01] against completion [01]. Return"
    ):
        first_round_pairs(2, lambda first, second: np.full(1, 2.0))
