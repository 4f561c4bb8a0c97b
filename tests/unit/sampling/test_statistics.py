import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from prefopt_trl import SamplingOptions
from prefopt_trl.sampling.selection import SelectedPrompt
from prefopt_trl.sampling.statistics import (
    QUANTILES,
    SamplingStatistics,
    label_warning,
    plot_statistics,
    scale_warning,
    summarize,
)

QUANTILES_OF_REWARDS = {
    "candidates": [-4.0, -3.125, -1.0, 0.5, 1.0, 2.25, 3.0],
    "accepted": [0.0, 0.5, 1.0, 1.5, 2.0, 2.75, 3.0],
}
STATISTICS = SamplingStatistics(
    num_prompts=10,
    num_skipped=2,
    num_candidates=640,
    num_duplicates=33,
    num_unfinished=7,
    num_pairs=32,
    acceptance_rate=0.12345,
    reward_quantiles=QUANTILES_OF_REWARDS,
    label_probability_before=0.81,
    label_probability_after=0.625,
    warning="Beware.",
    num_short=3,
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (0.9, 0.65),  # sure enough
        (0.99, 0.7),
        (0.6, 0.56),  # unsure before rejection too: that is the ranker, not beta
        (0.55, 0.62),  # surer than before
    ],
)
def test_no_warning_where_labels_are_sure_or_rejection_is_not_to_blame(before: float, after: float) -> None:
    assert label_warning(SamplingOptions(), before, after) is None


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.649), (0.7, 0.64), (0.56, 0.509)])
def test_a_warning_where_rejection_left_labels_unsure(before: float, after: float) -> None:
    warning = label_warning(SamplingOptions(), before, after)
    assert warning is not None
    assert warning.startswith("`rejection_beta`=0.5 is too small for this ranker: ")
    assert f"a mean probability of {after:.2f} after rejection, against {before:.2f} on random candidates" in warning
    assert "Raise it, say to 2, or use a ranker" in warning


def test_the_warning_names_a_beta_to_try() -> None:
    assert "say to 0.04," in str(label_warning(SamplingOptions(rejection_beta=0.01), 0.9, 0.6))
    assert "say to 1," in str(label_warning(SamplingOptions(rejection_beta=0.0), 0.9, 0.6))
    assert label_warning(SamplingOptions(rejection_beta=math.inf), 0.9, 0.6) is None  # there is no larger one


def test_the_text_says_it_all() -> None:
    assert str(STATISTICS).splitlines() == [
        "32 pairs from 8 of 10 prompts",
        "candidates: 640, of which 33 repeat another and 7 were cut at max_new_tokens",
        "prompts skipped, without two different candidates that have a reward: 2",
        "prompts with fewer distinct candidates than num_samples: 3",
        "acceptance rate: 0.123",
        "reward of candidates: median 0.50, 5% to 95% -3.12 to 2.25",
        "reward of accepted: median 1.50, 5% to 95% 0.50 to 2.75",
        "mean probability the ranker gives to its own labels: 0.625 (0.810 on random candidates)",
    ]


def test_the_text_leaves_out_what_is_not_known() -> None:
    known = str(STATISTICS).splitlines()
    values = {**vars(STATISTICS), "num_unfinished": None, "acceptance_rate": None, "reward_quantiles": {}}
    candidates = "candidates: 640, of which 33 repeat another"
    assert str(SamplingStatistics(**values)).splitlines() == [known[0], candidates, *known[2:4], known[-1]]


def test_the_dictionary_says_which_quantiles_they_are_and_survives_json() -> None:
    content = json.loads(json.dumps(STATISTICS.as_dict()))
    assert content.pop("quantiles") == [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0] == list(QUANTILES)
    assert SamplingStatistics(**content) == STATISTICS


def drawn(num_rewards: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    rewards = {name: rng.normal(size=num_rewards) for name in ("candidates", "accepted", "chosen", "rejected")}
    certainty = {name: rng.uniform(0.5, 1, num_rewards) for name in ("random candidates", "pairs made")}
    return rewards, certainty


def equal(reward: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    return {name: np.full(5, reward) for name in ("candidates", "chosen")}, {"pairs made": np.ones(5)}


@pytest.mark.parametrize("numbers", [drawn(200), drawn(1), equal(0.0), equal(-3.7), equal(1e6)])
def test_the_plot_is_a_png_and_drawing_leaves_nothing_behind(numbers: tuple, tmp_path: Path) -> None:
    pictures = [tmp_path / "one.png", tmp_path / "two.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for picture in pictures:
            plot_statistics(*numbers, picture)
    assert pictures[0].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(pictures[0])
    assert pixels.shape == (480, 1200, 4)
    assert (pixels[..., :3] < 0.5).any(axis=-1).mean() > 0.005  # something is drawn
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_the_plot_shows_each_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    rewards = {"candidates": np.array([*[0.0] * 3, *[4.0] * 1]), "chosen": np.array([4.0] * 1234)}
    plot_statistics(rewards, {"pairs made": np.array([0.5, 0.75, 1.0, 1.0])}, tmp_path / "plot.png")
    left, right = figures[0].axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["candidates (4)", "chosen (1,234)"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["pairs made: mean 0.81"]
    # Densities: 3/4 and 1/4 of the candidates in the first and last of 40 bins of width 4 / 40, and so on
    heights = {patch.get_label(): patch.get_xy()[:, 1] for patch in left.patches}
    np.testing.assert_allclose(sorted(set(heights["candidates (4)"])), [0, 2.5, 7.5])
    np.testing.assert_allclose(sorted(set(heights["chosen (1,234)"])), [0, 10])
    np.testing.assert_allclose(sorted(set(right.patches[0].get_xy()[:, 1])), [0, 12.5, 25])


def test_rare_extremes_are_drawn_at_the_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: figures.append(figure))
    rewards = {"candidates": np.array([0.0, 1.0] * 2000), "chosen": np.array([-50.0, 1e6, 1e6])}
    plot_statistics(rewards, {"pairs made": np.array([0.5])}, tmp_path / "plot.png")
    axes = figures[0].axes[0]
    low, high = axes.get_xlim()
    assert -0.1 < low < 0 < 1 < high < 1.1
    heights = axes.patches[1].get_xy()[:, 1]
    np.testing.assert_allclose(sorted(set(heights)), [0, 40 / 3, 80 / 3])


@pytest.mark.parametrize("strategy", ["rso", "sft", "top-k"])
def test_a_ranker_that_flips_coins_is_named_for_every_strategy(strategy):
    options = SamplingOptions(strategy=strategy)
    assert "0.52 on random candidates" in str(label_warning(options, 0.52, 0.51))
    assert label_warning(options, 0.56, 0.56) is None


@pytest.mark.parametrize("strategy", ["sft", "top-k"])
def test_a_larger_beta_is_advised_for_rso_only(strategy):
    assert label_warning(SamplingOptions(strategy=strategy), 0.8, 0.6) is None


@pytest.mark.parametrize(("spread", "accepted"), [(0.05, "0.9"), (8.0, "1.1e-07")])
def test_a_scale_unlike_that_of_logits_is_named_with_what_beta_means(spread: float, accepted: str) -> None:
    warning = str(scale_warning(SamplingOptions(), spread))
    assert f"a standard deviation of {spread:.2g} (median over prompts)" in warning
    assert f"is accepted with probability {accepted}. Fit the temperature with `calibrate`" in warning
    for options in ({"strategy": "sft"}, {"rejection_beta": 0.0}, {"rejection_beta": math.inf}):
        assert scale_warning(SamplingOptions(**options), spread) is None
    for usual in (0.1, 1.0, 5.0):
        assert scale_warning(SamplingOptions(), usual) is None


@pytest.mark.parametrize(("temperature", "warned"), [(1.0, True), (2.0, False), (None, False)])
def test_only_an_uncalibrated_ranker_is_warned_of(temperature: float | None, warned: bool) -> None:
    far = SelectedPrompt([9.0, -9.0], 2, [0, 1], 0.5, [0.99], [0], [1], [0.99])
    warning = summarize([far] * 3, None, SamplingOptions(), temperature)[0].warning
    assert (warning is not None and "a standard deviation of 9 " in warning) == warned
