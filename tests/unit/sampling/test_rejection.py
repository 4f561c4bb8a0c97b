import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from prefopt_trl.sampling.rejection import (
    BETAS,
    acceptance_rate,
    automatic_beta,
    effective_sample_size,
    statistical_rejection_sampling,
)


def total_variation(counts: Counter, law: dict) -> float:
    num_draws = sum(counts.values())
    return sum(abs(counts[key] / num_draws - law.get(key, 0.0)) for key in counts.keys() | law.keys()) / 2


def expected_total_variation(num_outcomes: int, num_draws: int) -> float:
    """No law's independent draws are expected to be farther from it: half the sum of the frequencies' deviations."""
    return math.sqrt((num_outcomes - 1) / num_draws) / 2


def chance_of_exceeding(excess: float, num_draws: int) -> float:
    """Bound on the chance that total variation exceeds its expectation by so much: one draw moves it by 1 / num_draws
    at most (McDiarmid)."""
    return math.exp(-2 * num_draws * excess**2)


def algorithm_1(rewards: list[float], num_samples: int, beta: float) -> dict[tuple[int, ...], float]:
    """The exact law of what Algorithm 1 accepts, in order, by trying every order of proposals and every coin."""
    law: Counter = Counter()

    def run_pass(accepted: tuple[int, ...], remaining: tuple[int, ...], probability: float) -> None:
        if len(accepted) == num_samples:
            law[accepted] += probability
            return
        best = max(rewards[candidate] for candidate in remaining)
        accept = {candidate: math.exp((rewards[candidate] - best) / beta) for candidate in remaining}
        orders = list(itertools.permutations(remaining))
        for order, coins in itertools.product(orders, itertools.product([True, False], repeat=len(remaining))):
            chance = math.prod(accept[c] if coin else 1 - accept[c] for c, coin in zip(order, coins, strict=True))
            if chance > 0:
                passed = tuple(itertools.compress(order, coins))
                left = tuple(candidate for candidate in remaining if candidate not in passed)
                run_pass((accepted + passed)[:num_samples], left, probability * chance / len(orders))

    run_pass((), tuple(range(len(rewards))), 1.0)
    return dict(law)


def draws(rewards: list[float], num_samples: int, beta: float, num_draws: int, seed: int) -> Counter:
    accepted = statistical_rejection_sampling(np.tile(rewards, (num_draws, 1)), num_samples, beta, rng=seed)
    return Counter(map(tuple, accepted.tolist()))


def test_the_exact_law_is_that_derived_by_hand() -> None:
    # Two candidates with weights 1 and 1/2, one sample: the worse one is accepted only if it is proposed first (1/2)
    # and passes (1/2).
    rewards = [0.0, -math.log(2)]
    assert algorithm_1(rewards, 1, beta=1.0) == pytest.approx({(0,): 3 / 4, (1,): 1 / 4})


@pytest.mark.parametrize("rewards", [[0.0, 1.0, 2.0], [2.0, 0.0, 1.0], [1.0, 2.0, 0.0]])
@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_law_of_three_candidates_in_any_position_is_exact(num_samples: int, rewards: list[float]) -> None:
    """Chance of failing: below 1e-7 for each of the 9 cases."""
    law = algorithm_1(rewards, num_samples, beta=1.0)
    counts = draws(rewards, num_samples, 1.0, num_draws=40_000, seed=0)
    assert chance_of_exceeding(0.02 - expected_total_variation(len(law), 40_000), 40_000) < 1e-7
    assert total_variation(counts, law) < 0.02


def test_accepted_of_a_large_pool_follow_the_optimal_policy() -> None:
    """RSO Theorem 1: pools of 20,000 draws from a proposal law p; the accepted follow p * exp(reward / beta).

    Chance of failing: below 1e-3. The first pass accepts half the pool, and of independent candidates the first to
    pass are independent draws from that very law.
    """
    num_pools, pool_size, num_samples, beta = 50, 20_000, 2000, 1.0
    proposal = np.array([0.05, 0.10, 0.15, 0.20, 0.20, 0.30])
    outcome_rewards = np.array([1.0, 0.5, 0.8, 0.0, -0.5, 0.3])
    weights = np.exp(outcome_rewards / beta)
    law = proposal * weights / (proposal @ weights)

    rng = np.random.default_rng(0)
    pools = rng.choice(6, size=(num_pools, pool_size), p=proposal)
    accepted = statistical_rejection_sampling(outcome_rewards[pools], num_samples, beta, rng=rng)
    counts = np.bincount(np.take_along_axis(pools, accepted, axis=1).ravel(), minlength=6)

    num_draws = num_samples * num_pools
    assert counts.sum() == num_draws
    assert chance_of_exceeding(0.02 - expected_total_variation(6, num_draws), num_draws) < 1e-3
    assert np.abs(counts / num_draws - law).sum() / 2 < 0.02


@pytest.mark.parametrize(
    ("rewards", "beta"), [([0.0, 5.0, -3.0, 1.0], math.inf), ([2.0] * 4, 0.5), ([2.0] * 4, 0.0), ([2.0] * 4, 1e-300)]
)
def test_infinite_beta_and_equal_rewards_are_uniform_without_replacement(rewards, beta: float) -> None:
    """Chance of failing: below 1e-7 for each of the 4 cases."""
    law = dict.fromkeys(itertools.permutations(range(4), 2), 1 / 12)
    counts = draws(rewards, 2, beta, num_draws=40_000, seed=1)
    assert chance_of_exceeding(0.023 - expected_total_variation(12, 40_000), 40_000) < 1e-7
    assert total_variation(counts, law) < 0.023


@pytest.mark.parametrize("beta", [0.0, 1e-300])
def test_beta_zero_takes_the_highest_rewards_and_breaks_ties_at_random(beta: float) -> None:
    """Chance of failing: below 1e-7 for each of the 2 cases."""
    assert statistical_rejection_sampling([3.0, -1e300, 1e300, 7.0], 3, beta).tolist() == [2, 3, 0]
    counts = draws([1.0, 1.0, 2.0, 1.0, 0.0], 2, beta, num_draws=40_000, seed=2)
    assert chance_of_exceeding(0.02 - expected_total_variation(3, 40_000), 40_000) < 1e-7
    assert total_variation(counts, {(2, 0): 1 / 3, (2, 1): 1 / 3, (2, 3): 1 / 3}) < 0.02


@pytest.mark.parametrize("beta", [0.0, 1e-300, 0.5, 1e300, math.inf])
@pytest.mark.parametrize("num_samples", [1, 8, 64])
def test_accepted_are_distinct_and_as_many_as_asked(num_samples: int, beta: float) -> None:
    rewards = np.random.default_rng(3).choice([-1e300, -1.0, 0.0, 0.1, 1e300], size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accepted = statistical_rejection_sampling(rewards, num_samples, beta, rng=4)
    assert accepted.shape == (num_samples,)
    assert accepted.dtype == np.int64
    assert len(set(accepted.tolist()) & set(range(64))) == num_samples


def test_prompts_in_a_batch_are_sampled_apart() -> None:
    rewards = [[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 3.0, 2.0]]
    accepted = statistical_rejection_sampling(rewards, 2, 0.0)
    assert accepted.tolist() == [[0, 1], [3, 2], [2, 3]]
    # Equal prompts do not share their luck: 64 draws of 1 among 8 agree with a chance of 8**-63.
    assert len(set(statistical_rejection_sampling(np.zeros((64, 8)), 1, 0.5).ravel().tolist())) > 1


def test_seed_decides_and_a_generator_moves_on() -> None:
    def sample(rng: np.random.Generator | int | None) -> list[int]:
        return statistical_rejection_sampling(np.zeros(1000), 10, 0.5, rng=rng).tolist()

    generator = np.random.default_rng(5)
    first, second = sample(generator), sample(generator)
    assert first == sample(5)
    assert len({tuple(first), tuple(second), tuple(sample(None)), tuple(sample(None))}) == 4


@pytest.mark.parametrize("num_samples", [np.int32(2), np.int64(2)])
def test_numpy_integers_count_as_integers(num_samples: np.integer) -> None:
    assert statistical_rejection_sampling([0, 2, 1], num_samples, 0.0).tolist() == [1, 2]


def bad_arguments() -> Iterator[tuple[dict, type[Exception], str]]:
    yield {"num_samples": 4}, ValueError, "from 1 to the number of candidates, 3, got 4. Lower it"
    yield {"num_samples": 0}, ValueError, "from 1 to the number of candidates, 3, got 0"
    yield {"num_samples": 2.0}, TypeError, "`num_samples` must be a whole number, got 2.0"
    yield {"rewards": [0.0, math.nan, 1.0]}, ValueError, r"`rewards` must be finite, got nan at \[1\]"
    yield {"rewards": [0.0, 1.0, -math.inf]}, ValueError, r"got -inf at \[2\]"
    yield {"rewards": [[0.0, 1.0], [math.inf, 0.0]]}, ValueError, r"got inf at \[1, 0\]"
    yield {"rewards": []}, ValueError, r"shape \(num_candidates,\) .* got \(0,\)"
    yield {"rewards": 1.0}, ValueError, r"got \(\)"
    yield {"rewards": np.zeros((2, 3, 4))}, ValueError, r"got \(2, 3, 4\)"
    yield {"beta": -0.1}, ValueError, "`beta` must be 0 .* got -0.1"
    yield {"beta": math.nan}, ValueError, "`beta` must be 0 .* got nan"


@pytest.mark.parametrize(("arguments", "error", "message"), list(bad_arguments()))
def test_bad_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        statistical_rejection_sampling(**{"rewards": [0.0, 1.0, 2.0], "num_samples": 1, "beta": 0.5, **arguments})


def test_acceptance_rate_by_hand() -> None:
    rewards = np.array([1.0, 1.0 - 0.5 * math.log(2), 1.0 - 0.5 * math.log(4)])
    assert acceptance_rate(rewards, beta=0.5) == pytest.approx((1 + 1 / 2 + 1 / 4) / 3, abs=1e-15)


@pytest.mark.parametrize(("beta", "rate"), [(0.0, 0.5), (1e-300, 0.5), (1e300, 1.0), (math.inf, 1.0)])
def test_acceptance_rate_at_its_limits(beta: float, rate: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert acceptance_rate(np.array([1e10, 1e10, 0.0, -1e10]), beta) == pytest.approx(rate, abs=1e-15)


def test_acceptance_rate_is_the_share_that_the_first_pass_accepts() -> None:
    """Chance of failing: below 1e-7, by Hoeffding's bound on 100,000 proposals."""
    # Asked for one sample, the algorithm makes a single pass; the candidate -100 is never accepted in it. So the share
    # of prompts where candidate 1 comes first is half its chance to pass.
    rewards = [0.0, -1.0, -100.0]
    counts = draws(rewards, 1, 1.0, num_draws=100_000, seed=6)
    rate = (1 + 2 * counts[(1,)] / 100_000) / 3
    assert 2 * math.exp(-2 * 100_000 * (0.007 * 3 / 2) ** 2) < 1e-7
    assert acceptance_rate(np.array(rewards), beta=1.0) == pytest.approx(rate, abs=0.007)


def automatic_beta_by_loops(rewards: list[float], num_samples: int) -> float:
    pairs = [(i, j) for i in range(len(rewards)) for j in range(len(rewards)) if i != j]

    def certainty(weights: list[float]) -> float:
        """The mean of what the probability of a label has above 1/2, over pairs drawn with these weights."""
        over = [1 / (1 + math.exp(-abs(rewards[i] - rewards[j]))) - 0.5 for i, j in pairs]
        return float(np.average(over, weights=[weights[i] * weights[j] for i, j in pairs]))

    for power in range(-12, 13):
        beta = 2 ** (power / 2)
        weights = [math.exp((reward - max(rewards)) / beta) for reward in rewards]
        effective_size = sum(weights) ** 2 / sum(weight**2 for weight in weights)
        if effective_size < min(num_samples, len(rewards)):
            continue
        if certainty(weights) >= 0.98 * certainty([1.0] * len(rewards)):
            return beta
    return 64


@pytest.mark.parametrize("num_samples", [2, 8, 30])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_automatic_beta_is_that_of_its_definition(scale: float, num_samples: int) -> None:
    found = []
    for seed in range(10):
        rewards = scale * np.random.default_rng(seed).normal(size=16 + seed) + 3
        found.append(automatic_beta(rewards, num_samples))
        assert found[-1] == automatic_beta_by_loops(rewards.tolist(), num_samples)
        assert automatic_beta(rewards - 100, num_samples) == found[-1]
    assert (64 in found) == (num_samples == 30)  # more than there are


def test_the_automatic_beta_of_sure_labels_is_limited_by_the_effective_size() -> None:
    rewards = 1000.0 * np.arange(16) ** 0.5
    sizes = [effective_sample_size(rewards, beta) for beta in BETAS]
    assert automatic_beta(rewards, 4) == min(
        (b for b, size in zip(BETAS, sizes, strict=True) if size >= 4), default=64
    )


@pytest.mark.parametrize("rewards", [[1.0] * 5, [0.0, 0.0, 9.0], [2.0, 1.0]])
def test_any_rewards_have_an_automatic_beta(rewards: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert automatic_beta(np.array(rewards), 2) > 0
