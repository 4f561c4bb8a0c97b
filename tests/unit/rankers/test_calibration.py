"""The temperature of a ranker, against values derived by hand and against simulated people."""

import math

import numpy as np
import pytest
from datasets import Dataset
from scipy.stats import binom

from prefopt_trl import FunctionRanker, calibrate
from prefopt_trl.rankers import Ranker
from prefopt_trl.rankers.base import logit, sigmoid
from prefopt_trl.rankers.calibration import fit_temperature
from prefopt_trl.rankers.comparative import ComparativeRanker
from prefopt_trl.rankers.comparisons import Compared


def number(prompts, completions, **columns):
    """The reward that a completion states; None if it states none."""
    return [None if text == "none" else float(text) for text in completions]


class Reader(ComparativeRanker):
    """Adds 1 to the log-odds of the completion shown first."""

    def both_orders(self, prompts, first, second, rows=None):
        margins = np.array([float(a) - float(b) for a, b in zip(first, second, strict=True)])
        return np.stack([sigmoid(margins + 1), sigmoid(margins - 1)], axis=1)

    def settings(self):
        return {"temperature": self.temperature}


class Plain(Ranker):
    """Knows probabilities only, and has no temperature."""

    def compare(self, prompts, first, second):
        return sigmoid(np.array([float(a) - float(b) for a, b in zip(first, second, strict=True)]))

    def score(self, prompts, completions, baselines=None):
        raise NotImplementedError

    def settings(self):
        return {}


def comparisons(margins, prompts=None):
    """One comparison for each reward difference between the chosen and the rejected completion."""
    prompts = range(len(margins)) if prompts is None else prompts
    rows = [{"prompt": f"{p}?", "chosen": repr(m), "rejected": "0.0"} for p, m in zip(prompts, margins, strict=True)]
    return Dataset.from_list(rows)


def compared(log_odds, prompts=None):
    prompts = np.arange(len(log_odds)) if prompts is None else prompts
    others = dict.fromkeys(("rows", "lengths", "subsets", "orders"))
    return Compared(np.asarray(log_odds), prompts, **others)


def test_the_temperature_and_its_interval_by_hand():
    # 30 of 40 verdicts are right, each by 2 nats: sigmoid(2 / T) = 3 / 4
    found = calibrate(FunctionRanker(number), comparisons([2.0] * 30 + [-2.0] * 10))
    inverse, information, scores = math.log(3) / 2, 40 * 2**2 * 3 / 16, 30 * (2 / 4) ** 2 + 10 * (2 * 3 / 4) ** 2
    error = math.sqrt(40 / 39 * scores) / information
    assert found.temperature == pytest.approx(1 / inverse)
    assert found.interval == pytest.approx((1 / (inverse + 1.959964 * error), 1 / (inverse - 1.959964 * error)))
    assert (found.num_comparisons, found.num_prompts) == (40, 40)


def test_copies_of_a_comparison_say_nothing_more():
    rng = np.random.default_rng(0)
    margins = rng.normal(1, 2, 100)
    once = fit_temperature(compared(margins))
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
    ranker = FunctionRanker(number)
    ranker.temperature = 7.0
    assert calibrate(ranker, margins).temperature == pytest.approx(2 / math.log(3))
    large = comparisons([200.0] * 30 + [-200.0] * 10)  # where probabilities are 0 and 1
    assert calibrate(ranker, large).temperature == pytest.approx(200 / math.log(3))
    reader = Reader()
    mean = logit((sigmoid(np.array(3.0)) + sigmoid(np.array(1.0))) / 2)  # of both orders
    for reader.temperature in (1.0, 7.0):
        assert calibrate(reader, margins).temperature == pytest.approx(mean / math.log(3))
    assert calibrate(Plain(), margins).temperature == pytest.approx(2 / math.log(3))


@pytest.mark.parametrize("ranker", [FunctionRanker(number), Reader()])
def test_a_calibrated_ranker_says_so_and_its_probabilities_are_those_of_people(ranker):
    margins = comparisons([2.0] * 30 + [-2.0] * 10)
    found = calibrate(ranker, margins)
    found.apply(ranker)
    assert ranker.settings()["temperature"] == found.temperature
    assert ranker.compare(["1?"], ["2.0"], ["0.0"]) == pytest.approx([0.75])
    assert np.ptp(ranker.score(["1?"], [["2.0", "0.0"]], baselines=["0.0"])[0]) == pytest.approx(math.log(3))


def test_a_ranker_without_a_temperature_is_refused():
    found = calibrate(Plain(), comparisons([2.0] * 30 + [-2.0] * 10))
    with pytest.raises(TypeError, match="A Plain has no temperature. Derive it from `PointwiseRanker`"):
        found.apply(Plain())


def test_comparisons_without_an_opinion_are_left_out():
    rows = comparisons([2.0] * 30 + [-2.0] * 10)
    extra = Dataset.from_list([{"prompt": "1?", "chosen": "none", "rejected": "1"}] * 3)
    told = calibrate(FunctionRanker(number), Dataset.from_list([*rows, *extra]))
    assert told == calibrate(FunctionRanker(number), rows)


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
        calibrate(FunctionRanker(number), comparisons(margins))


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="`ranker` is a function, not a ranker. Wrap"):
        calibrate(number, comparisons([1.0, -2.0]))
    with pytest.raises(TypeError, match="`comparisons` must be a datasets.Dataset, got list"):
        calibrate(FunctionRanker(number), [{"prompt": "1?"}])
    with pytest.raises(ValueError, match="`comparisons` lacks the columns chosen, rejected"):
        calibrate(FunctionRanker(number), Dataset.from_dict({"prompt": ["1?"]}))


def test_the_interval_has_no_upper_end_where_the_ranker_may_know_nothing():
    uncertain = fit_temperature(compared([1.0, -1.0] * 20 + [1.0] * 6))
    assert 0 < uncertain.interval[0] < uncertain.temperature < uncertain.interval[1] == math.inf
    assert str(uncertain) == (
        f"temperature {uncertain.temperature:.3g} (95% interval {uncertain.interval[0]:.3g} to inf) by 46 comparisons "
        "of 46 prompts"
    )
