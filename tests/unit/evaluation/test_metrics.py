"""The numbers of an evaluation, by hand, against an independent fit, and in simulated evaluations."""

import math

import numpy as np
import pytest
from sacrebleu import BLEU
from scipy.optimize import minimize
from scipy.stats import binom, t

from prefopt_trl.evaluation.metrics import LENGTH_PENALTY, Estimate, bleu, distinct, length_controlled_win_rate, wins

# Of 200 intervals, each of which holds the truth with probability 0.95, fewer hold it with a chance of 5e-4
SIMULATIONS, FEWEST = 200, 179
assert binom.cdf(FEWEST - 1, SIMULATIONS, 0.95) < 1e-3


def holds(estimate, truth):
    return abs(estimate.mean - truth) < 1.96 * estimate.standard_error


@pytest.mark.parametrize(
    ("values", "prompts", "mean", "error"),
    [
        ([1, 2, 3, 6], None, 3, math.sqrt(14 / 3 / 4)),
        ([1, 2, 3, 6], [7, 7, 2, 2], 3, math.sqrt(2 / 1 * (3**2 + 3**2)) / 4),  # sums of deviations from 3
        (np.repeat([1, 2, 3, 6], 5), np.repeat(np.arange(4), 5), 3, math.sqrt(14 / 3 / 4)),  # copies add nothing
        ([4, 5], [1, 1], 4.5, math.nan),
        ([], None, math.nan, math.nan),
    ],
)
def test_estimates_by_hand(values, prompts, mean, error):
    found = Estimate.of(values, prompts)
    assert [found.mean, found.standard_error] == pytest.approx([mean, error], nan_ok=True)


def test_p_values_and_wins_by_hand():
    for n in (2, 5, 30, 100_000):
        assert Estimate(0.4, 0.05, n).p_value(0.5) == pytest.approx(2 * t.sf(2, n - 1), rel=1e-5)
    unknown = Estimate(0.6, 0.0, 9), Estimate(0.6, math.nan, 9), Estimate.of(np.array([0.1 + 0.2, 0.3, 0.3]))
    assert all(math.isnan(one.p_value(0.5)) for one in unknown)  # the last has an error of rounding
    assert wins(np.array([0.1, -3.0, 0.0, np.nan])) == pytest.approx([1, 0, 0.5, np.nan], nan_ok=True)


def simulate(rng, num_prompts, per_prompt, theta, phi, longer=0.0):
    """Verdicts by the regression of AlpacaEval 2, on lengths that differ by `longer` standard deviations."""
    lengths = np.round(rng.normal(100 * longer, 100, num_prompts * per_prompt))
    chances = 1 / (1 + np.exp(-theta - phi * np.tanh(lengths / lengths.std(ddof=1))))
    return (rng.random(len(lengths)) < chances).astype(float), lengths, np.repeat(np.arange(num_prompts), per_prompt)


def fit(won, lengths):
    """The win rate at equal lengths, by a general minimizer of the same penalized loss."""
    margin = np.tanh(lengths / lengths.std(ddof=1))

    def loss(weights):
        log_odds = weights[0] + weights[1] * margin
        return (np.logaddexp(0, log_odds) - won * log_odds).sum() + LENGTH_PENALTY * weights[1] ** 2

    return 1 / (1 + math.exp(-minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-8}).x[0]))


@pytest.mark.parametrize(
    ("won", "lengths"),
    [
        *(simulate(np.random.default_rng(seed), 300, 1, 0.4, 1.5, longer=0.5)[:2] for seed in range(3)),
        ([1, 0.5, 0, 1, 0.5], [5, -3, 2, 8, 0]),
        ([1] * 20 + [0] * 20, [*range(1, 21), *range(-20, 0)]),  # the longer completion always wins
        ([1] * 39 + [0], [10] * 39 + [-9000]),
    ],
)
def test_the_length_controlled_win_rate_is_that_of_an_independent_fit(won, lengths):
    found = length_controlled_win_rate(np.array(won, float), np.array(lengths), np.arange(len(won)))
    assert found.mean == pytest.approx(fit(np.array(won, float), np.array(lengths)), abs=1e-5)
    assert 0 < found.mean < 1 and 0 <= found.standard_error < 1


def test_without_a_difference_in_length_or_verdict_it_is_the_win_rate():
    won, prompts = np.array([1, 0, 1, 0.5]), np.arange(4)
    assert length_controlled_win_rate(won, np.full(4, 7), prompts) == Estimate.of(won)
    assert length_controlled_win_rate(np.ones(4), np.arange(4), prompts) == Estimate(1, 0)


@pytest.mark.parametrize(
    ("num_prompts", "per_prompt", "theta", "phi", "longer"), [(200, 1, 0.5, 1.5, 0.0), (150, 4, -0.3, 2.0, 1.0)]
)
def test_its_interval_holds_the_truth_in_95_of_100_evaluations(num_prompts, per_prompt, theta, phi, longer):
    rng, truth = np.random.default_rng(per_prompt), 1 / (1 + math.exp(-theta))
    simulated = [simulate(rng, num_prompts, per_prompt, theta, phi, longer) for _ in range(SIMULATIONS)]
    assert sum(holds(length_controlled_win_rate(*one), truth) for one in simulated) >= FEWEST
    if longer:  # the plain win rate rewards the length
        assert sum(holds(Estimate.of(won, prompts), truth) for won, _, prompts in simulated) < FEWEST / 10


@pytest.mark.parametrize(("won", "lengths"), [([1, 0], [1, 2]), ([0] * 15 + [1], [*range(-30, -15), -5])])
def test_it_is_not_known_if_lengths_tell_wins_from_losses(won, lengths):
    found = length_controlled_win_rate(np.array(won, float), np.array(lengths), np.arange(len(won)))
    assert math.isnan(found.mean) and math.isnan(found.standard_error)


def test_distinct_n_by_hand():
    assert distinct(["a b a b", "a", ""], 1) == 2 / 5
    assert distinct(["a b a b", "a c"], 2) == 3 / 4
    assert math.isnan(distinct(["a", ""], 2))


def test_bleu_is_that_of_sacrebleu():
    texts, targets = ["the cat sat on the mat today", "no word here"], ["the cat sat on a mat today", "quite other"]
    assert bleu(texts, targets) == BLEU().corpus_score(texts, [targets]).score > 10
    assert bleu(targets, targets) == pytest.approx(100)
    assert bleu(["", ""], targets) == 0
