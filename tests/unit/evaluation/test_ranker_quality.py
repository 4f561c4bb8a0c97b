"""What is measured of a ranker, against values derived by hand and against planted faults."""

import json
import math
import sys
from dataclasses import asdict

import numpy as np
import pytest
from datasets import Dataset
from matplotlib.image import imread
from scipy.stats import binom

from prefopt_trl import FunctionRanker, evaluate_ranker
from prefopt_trl.evaluation.metrics import Estimate
from prefopt_trl.rankers.base import sigmoid
from tests.unit.known_rankers import Reader, comparisons, pointwise


def test_the_numbers_by_hand():
    # P(chosen preferred) is 3/4 and 1/4 on one prompt, 1/2 on another and 9/10 on a third
    margins = [math.log(3), -math.log(3), 0, math.log(9)]
    found = evaluate_ranker(pointwise(), comparisons(margins, [0, 0, 1, 2]))
    means = {name: estimate.mean for name, estimate in found.estimates.items()}
    assert means == pytest.approx(
        {
            "accuracy": 2.5 / 4,
            "brier_score": (1 / 16 + 9 / 16 + 1 / 4 + 1 / 100) / 4,
            "log_loss": -math.log(3 / 4 * 1 / 4 * 1 / 2 * 9 / 10) / 4,
            "ties": 1 / 4,
        }
    )
    by_prompt = np.array([1 + 0 - 2 * 0.625, 0.5 - 0.625, 1 - 0.625])  # deviations of the verdicts from their mean
    assert found.estimates["accuracy"].standard_error == pytest.approx(math.sqrt(3 / 2 * sum(by_prompt**2)) / 4)
    assert math.isnan(Estimate.of(np.arange(4), np.zeros(4)).standard_error)  # of one prompt
    assert (found.num_comparisons, found.num_prompts, found.num_without_opinion) == (4, 3, 0)
    assert found.warning is None


def test_the_temperature_is_in_effect():
    for ranker in (pointwise(), Reader(bias=0.0)):
        ranker.temperature = 2.0
        found = evaluate_ranker(ranker, comparisons([2 * math.log(3)] * 3))
        assert found.estimates["log_loss"].mean == pytest.approx(-math.log(3 / 4))
        assert f"{type(ranker).__name__} at temperature 2: 3 comparisons of 3 prompts, and 0 without" in str(found)


def test_curves_are_the_accuracies_in_bins_of_the_verdicts():
    margins = [0.1, -0.1, 1.0, 1.0, 3.0, 3.0, 3.0, -3.0, 5.0, 5.0]
    lengths = [-50, -40, -30, -20, -10, 10, 20, 30, 40, 50]
    curves = evaluate_ranker(pointwise(), comparisons(margins, lengths=lengths)).curves
    assert [(one.count, one.accuracy.mean) for one in curves["probability"]] == [(2, 0.5), (2, 1.0), (6, 5 / 6)]
    assert [one.mean for one in curves["probability"]] == pytest.approx(
        [1 / (1 + math.exp(-0.1)), 1 / (1 + math.exp(-1)), (4 / (1 + math.exp(-3)) + 2 / (1 + math.exp(-5))) / 6]
    )
    assert [(one.count, one.mean) for one in curves["length"]] == [(2, -45), (2, -25), (1, -10), (2, 15), (3, 40)]
    assert [one.accuracy.mean for one in curves["length"]] == [0.5, 1.0, 1.0, 1.0, 2 / 3]
    assert [(one.count, one.mean) for one in curves["margin"]] == [(2, 0.1), (2, 1.0), (6, 22 / 6)]


def test_columns_reach_the_ranker_and_comparisons_without_an_opinion_are_counted_and_left_out():
    def sign(prompts, completions, sign):
        return [one and one * float(text) for one, text in zip(sign, completions, strict=True)]

    rows = comparisons([1.0, 1.0, 1.0, 2.0, 5.0], sign=[1, -1, 1, 1, None], source=["b", "b", "a", "a", "a"])
    found = evaluate_ranker(FunctionRanker(sign), rows)
    assert (found.num_comparisons, found.num_prompts, found.num_without_opinion) == (4, 4, 1)
    assert found.estimates["accuracy"].mean == 3 / 4
    assert found.subsets == {"a": Estimate(1.0, 0.0), "b": Estimate(0.5, 0.5)}
    assert "| subset b " in str(found)


def test_conversations_and_transcripts_are_compared_as_they_are():
    def shortest(prompts, completions, **columns):
        return [-float(len(one if isinstance(one, str) else one[0]["content"])) for one in completions]

    pairs = [("Why?", "So.", "Because."), ("How?", "Thus.", "Like that.")]
    turns = "\n\nHuman: {}\n\nAssistant: {}"
    transcripts = [{"chosen": turns.format(p, c), "rejected": turns.format(p, r)} for p, c, r in pairs]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    messages = [
        {name: [{"role": role, "content": text}] for (name, role), text in zip(roles.items(), pair, strict=True)}
        for pair in pairs
    ]
    for rows in (transcripts, messages):
        found = evaluate_ranker(FunctionRanker(shortest), Dataset.from_list(rows))
        assert found.estimates["accuracy"] == Estimate(1.0, 0.0)
        assert found.estimates["longer_by_ranker"] == found.estimates["longer_by_people"] == Estimate(0.0, 0.0)
        assert [one.mean for one in found.curves["length"]] == [-5]


# Planted faults


def people(rng, num_comparisons=400, love=0.0, longer=0.0):
    """Comparisons by people whose noise is that of Bradley-Terry, with the ranker's love of length in nats per 100
    characters; people have it to the extent of `longer`."""
    quality, length = rng.normal(0, 1.5, num_comparisons), rng.integers(-150, 150, num_comparisons)
    chosen = rng.random(num_comparisons) < sigmoid(quality + longer * length / 100)
    margins, sign = quality + love * length / 100, np.where(chosen, 1, -1)
    return comparisons(sign * margins, lengths=(sign * length).tolist())


def test_a_ranker_that_loves_length_is_told_so():
    found = evaluate_ranker(pointwise(), people(np.random.default_rng(0), love=1.0))
    shorter, *_, longer = found.curves["length"]
    assert longer.accuracy.mean > shorter.accuracy.mean + 0.2
    assert found.estimates["right_if_shorter"].mean > found.estimates["right_if_longer"].mean + 0.1
    assert found.warning.startswith("The ranker loves length: it prefers the longer completion in ")
    assert str(found).endswith(found.warning)
    # Of people who mostly prefer the shorter one, with a few verdicts for it by chance
    margins, lengths = [1.0] * 360 + [-1.0] * 440 + [1.0, -1.0] * 2, [9] * 360 + [-9] * 440 + [-9, 9] * 2
    against = comparisons(margins, lengths=lengths)
    assert "in 100% ± 0% of comparisons, people in 45% ± 2%" in evaluate_ranker(pointwise(), against).warning
    always = evaluate_ranker(pointwise(), comparisons([1.0, -1.0] * 20, lengths=[9, -9] * 20))
    assert "in 100% of comparisons, people in 50% ± 8%" in always.warning


@pytest.mark.parametrize("longer", [0.0, 0.8, -0.8])
def test_an_innocent_ranker_is_not_accused(longer):
    accused = 0
    for seed in range(40):
        rows = people(np.random.default_rng(seed), love=longer, longer=longer)
        accused += evaluate_ranker(pointwise(), rows).warning is not None
    assert binom.sf(5, 40, 0.023) < 1e-3  # the chance to fail, if one is accused by the 2 standard errors alone
    assert accused <= 5


def test_errors_alone_are_no_love_of_length():
    # People prefer the shorter one in 3 of 4; a ranker that errs at random prefers the longer one more often than they
    signs = np.sign(np.array([[0.6], [0.25]]) - np.random.default_rng(0).random((2, 2000)))
    found = evaluate_ranker(pointwise(), comparisons(signs[0], lengths=(9 * signs[1]).astype(int)))
    assert found.estimates["longer_by_ranker"].mean > found.estimates["longer_by_people"].mean + 0.15
    assert found.warning is None


def test_an_order_bias_is_measured_and_averaged_away():
    margins = np.array([0.5, -0.5, 2.0, -2.0, 3.0, 3.0])
    ranker = Reader(bias=1.0)
    found = evaluate_ranker(ranker, comparisons(margins))
    assert ranker.num_asked == 6
    bias = (sigmoid(margins + 1) - sigmoid(margins - 1)) / 2
    assert found.estimates["order_bias"].mean == pytest.approx(bias.mean())
    assert found.estimates["order_bias"].standard_error == pytest.approx(bias.std(ddof=1) / math.sqrt(6))
    assert found.estimates["order_flips"].mean == pytest.approx(2 / 6)
    accuracies = {name: found.estimates[name].mean for name in ("chosen_first", "chosen_second", "accuracy")}
    assert accuracies == pytest.approx({"chosen_first": 5 / 6, "chosen_second": 3 / 6, "accuracy": 4 / 6})
    assert evaluate_ranker(Reader(bias=0.0), comparisons(margins)).estimates["order_bias"] == Estimate(0.0, 0.0)


# RewardBench 2


def best_of(*rows):
    """Rows of RewardBench 2: subset, rewards of the chosen and of the rejected completions."""
    subsets, *rewards = zip(*rows, strict=True)
    chosen, rejected = ([list(map(str, row)) for row in side] for side in rewards)
    prompts = [f"{row}?" for row in range(len(rows))]
    return Dataset.from_dict({"prompt": prompts, "subset": subsets, "chosen": chosen, "rejected": rejected})


def test_rows_of_lists_have_the_scores_of_reward_bench():
    rows = best_of(
        ("Math", [2.0], [1.0, 0.0, -1.0]),  # right
        ("Math", [2.0], [1.0, 3.0, -1.0]),  # wrong
        ("Focus", [2.0], [2.0, 2.0, -1.0]),  # three share the largest reward
        ("Focus", [2.0], [1.0, "none", 0.0]),  # left out
        ("Ties", [3.0, 2.5], [1.0, 0.0]),  # each chosen one is above each rejected one
        ("Ties", [3.0, 2.0], [2.5, 0.0]),  # one is not
    )
    found = evaluate_ranker(pointwise(), rows)
    assert {name: one.mean for name, one in found.subsets.items()} == {"Math": 1 / 2, "Focus": 1 / 3, "Ties": 1 / 2}
    assert found.subsets["Math"].standard_error == pytest.approx(1 / 2)
    assert (found.num_comparisons, found.num_prompts, found.num_without_opinion) == (19, 6, 1)
    reader = Reader(bias=1.0)
    assert evaluate_ranker(reader, rows.select([0, 1])).subsets["Math"].mean == 1 / 2
    assert reader.num_asked == 3 + 3
    with pytest.raises(ValueError, match="Row 1 of `comparisons` has no chosen or no rejected completion. Leave it"):
        evaluate_ranker(pointwise(), best_of(("Math", [2.0], [1.0]), ("Math", [2.0], [])))


# The report


@pytest.mark.parametrize("ranker", [pointwise(), Reader(bias=0.5)])
@pytest.mark.parametrize("num_comparisons", [2, 600])
def test_a_report_is_saved(ranker, num_comparisons, tmp_path):
    found = evaluate_ranker(ranker, people(np.random.default_rng(0), num_comparisons))
    found.save(tmp_path / "new")
    saved = json.loads((tmp_path / "new/ranker_quality.json").read_text())
    assert saved["estimates"]["accuracy"] == asdict(found.estimates["accuracy"]) and saved["warning"] == found.warning
    assert (tmp_path / "new/ranker_quality.md").read_text() == f"# Ranker quality\n\n{found}\n"
    height, width, _ = imread(tmp_path / "new/ranker_quality.png").shape
    assert (height, width) == ((1020, 1320) if isinstance(ranker, Reader) else (540, 1800))


def test_without_matplotlib_the_numbers_are_saved(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    evaluate_ranker(pointwise(), comparisons([1.0, 2.0])).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranker_quality.json", "ranker_quality.md"]
    assert "pip install 'prefopt-trl[plots]'" in caplog.text
