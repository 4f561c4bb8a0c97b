"""The temperature of a ranker, against values derived by hand and against simulated people."""

import math

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import binom

from prefopt_trl import EnsembleRanker, calibrate, evaluate_ranker
from prefopt_trl.rankers import Ranker
from prefopt_trl.rankers.base import logit, sigmoid
from prefopt_trl.rankers.calibration import fit_temperature
from prefopt_trl.rankers.comparisons import Compared
from tests.unit.known_rankers import Reader, comparisons, number, pointwise


class Plain(Ranker):
    """Knows probabilities only, and has no temperature."""

    def compare(self, prompts, first, second):
        return sigmoid(np.array([float(a) - float(b) for a, b in zip(first, second, strict=True)]))

    def score(self, prompts, completions, baselines):
        return [np.array([float(a[0]) - float(b)]) for a, b in zip(completions, baselines, strict=True)]

    settings = None  # not asked


def compared(log_odds, prompts=None):
    prompts = np.arange(len(log_odds)) if prompts is None else prompts
    others = dict.fromkeys(("rows", "lengths", "subsets", "orders"))
    return Compared(np.asarray(log_odds), prompts, **others)


def test_the_temperature_and_its_interval_by_hand():
    # 30 of 40 verdicts are right, each by 2 nats: sigmoid(2 / T) = 3 / 4
    found = calibrate(pointwise(), comparisons([2.0] * 30 + [-2.0] * 10))
    inverse, information, scores = math.log(3) / 2, 40 * 2**2 * 3 / 16, 30 * (2 / 4) ** 2 + 10 * (2 * 3 / 4) ** 2
    error = math.sqrt(40 / 39 * scores) / information
    assert found.temperature == pytest.approx(1 / inverse)
    assert found.interval == pytest.approx((1 / (inverse + 1.96 * error), 1 / (inverse - 1.96 * error)))
    assert (found.num_comparisons, found.num_prompts) == (40, 40)
    before = math.log1p(math.exp(-2)) + 0.25 * 2
    assert (found.log_loss_before, found.log_loss_after) == pytest.approx((before, math.log(4) - 0.75 * math.log(3)))


def test_copies_and_comparisons_without_an_opinion_say_nothing_more():
    margins = np.random.default_rng(0).normal(1, 2, 100)
    once = fit_temperature(compared([*margins, np.nan]))
    thrice = fit_temperature(compared(np.repeat(margins, 3), np.repeat(np.arange(100), 3)))
    assert thrice.interval == pytest.approx(once.interval)
    assert (thrice.num_comparisons, thrice.num_prompts) == (300, 100)


def simulate(rng, num_prompts, num_rejected, temperature):
    """One completion of each prompt against others, by people whose noise on it is the same in all comparisons."""
    rewards = rng.normal(0, temperature, (num_prompts, num_rejected + 1))
    utilities = rewards / temperature + rng.gumbel(size=rewards.shape)  # so that they follow Bradley-Terry
    margins = rewards[:, :1] - rewards[:, 1:]
    right = utilities[:, :1] > utilities[:, 1:]
    return np.where(right, margins, -margins).ravel(), np.repeat(np.arange(num_prompts), num_rejected)


REPETITIONS = 200


@pytest.mark.parametrize(
    ("num_prompts", "num_rejected", "temperature"), [(400, 1, 3.0), (150, 4, 0.2), (100, 8, 20.0)]
)
def test_the_interval_holds_the_true_temperature_in_95_of_100_simulations(num_prompts, num_rejected, temperature):
    rng = np.random.default_rng(num_prompts)
    held = 0
    for _ in range(REPETITIONS):
        low, high = fit_temperature(compared(*simulate(rng, num_prompts, num_rejected, temperature))).interval
        held += low < temperature < high
    least = 178
    assert binom.cdf(least - 1, REPETITIONS, 0.945) < 1e-3  # the chance to fail, by the coverage in 1,500 repetitions
    assert held >= least


def test_the_temperature_is_of_the_rewards_without_one():
    margins = comparisons([2.0] * 30 + [-2.0] * 10)
    ranker, reader = pointwise(), Reader(bias=1.0)
    ranker.temperature = 7.0
    assert calibrate(ranker, margins).temperature == pytest.approx(2 / math.log(3))
    large = comparisons([200.0] * 30 + [-200.0] * 10)  # where probabilities are 0 and 1
    assert calibrate(ranker, large).temperature == pytest.approx(200 / math.log(3))
    mean = logit((sigmoid(np.array(3.0)) + sigmoid(np.array(1.0))) / 2)  # of both orders
    for reader.temperature in (1.0, 7.0):
        assert calibrate(reader, margins).temperature == pytest.approx(mean / math.log(3))
    judge = Reader(bias=0.0)  # a unanimous vote of 4 is clamped, in the fit as in its rewards
    judge.smallest_probability = 0.1
    certain = comparisons([50.0] * 32 + [-50.0] * 8)
    calibrate(judge, certain).apply(judge)
    assert judge.score(["p"], [["50"]], baselines=["0"])[0] == pytest.approx(math.log(4))
    assert judge.compare(["p"], ["50"], ["0"]) == pytest.approx(0.8)
    assert evaluate_ranker(judge, certain).estimates["log_loss"].mean == pytest.approx(
        -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    )
    mixed = EnsembleRanker([Reader(bias=1.0), pointwise()])
    expected = calibrate(mixed, margins).temperature
    mixed.temperature = 0.01
    assert calibrate(mixed, margins).temperature == pytest.approx(expected)
    plain = calibrate(Plain(), margins)
    assert plain.temperature == pytest.approx(2 / math.log(3))
    with pytest.raises(TypeError, match="A Plain has no temperature. Derive it from `PointwiseRanker`"):
        plain.apply(Plain())


@pytest.mark.parametrize("ranker", [pointwise(), Reader(bias=1.0), EnsembleRanker([pointwise(), pointwise()], "vote")])
def test_a_calibrated_ranker_says_so_and_its_probabilities_are_those_of_people(ranker):
    margins = comparisons([2.0] * 30 + [-2.0] * 10)
    found = calibrate(ranker, margins)
    found.apply(ranker)
    assert ranker.settings()["temperature"] == found.temperature
    assert ranker.compare(["1?"], ["2.0"], ["0.0"]) == pytest.approx([0.75])
    assert np.ptp(ranker.score(["1?"], [["2.0", "0.0"]], baselines=["0.0"])[0]) == pytest.approx(math.log(3))


@pytest.mark.parametrize(
    ("margins", "message"),
    [
        ([0.0] * 4, "no better than chance on the 4 comparisons: .* log-odds of 0. Check"),
        ([1.0, -3.0, 1.0], r"no better than chance on the 3 comparisons: .* log-odds of -0.333. Check its template"),
        ([1.0, 0.0, 2.0], "never wrong in the 3 comparisons, so any temperature fits. Give more comparisons."),
        ([1.0], "The ranker has an opinion on comparisons of 1 prompts in `comparisons`. Give at least 2"),
    ],
)
def test_where_no_temperature_fits_one_sentence_says_why(margins, message):
    with pytest.raises(ValueError, match=message):
        calibrate(pointwise(), comparisons(margins))


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="`ranker` is a function, not a ranker. Wrap"):
        calibrate(number, comparisons([1.0, -2.0]))
    with pytest.raises(TypeError, match="`comparisons` must be a datasets.Dataset, got list"):
        calibrate(pointwise(), [{"prompt": "1?"}])
    with pytest.raises(ValueError, match="`comparisons` lacks the columns chosen, rejected"):
        calibrate(pointwise(), Dataset.from_dict({"prompt": ["1?"]}))


def test_the_interval_has_no_upper_end_where_the_ranker_may_know_nothing():
    uncertain = fit_temperature(compared([1.0, -1.0] * 20 + [1.0] * 6))
    assert 0 < uncertain.interval[0] < uncertain.temperature < uncertain.interval[1] == math.inf
    assert "to inf) by 46 comparisons of 46 prompts" in str(uncertain)
