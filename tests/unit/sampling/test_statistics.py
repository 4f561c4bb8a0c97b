import json
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from prefopt_trl import SamplingOptions
from prefopt_trl.sampling.selection import SelectedPrompt
from prefopt_trl.sampling.statistics import (
    QUANTILES,
    Numbers,
    SamplingStatistics,
    label_warning,
    length_warning,
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
    length_quantiles={"accepted": [0.0, 2.0, 9.0, 16.4, 20.0, 40.0, 41.0]},
    acceptance_quantiles=[0.0, 0.1, 0.11, 0.12, 0.13, 0.25, 0.3],
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
        "acceptance rate: 0.123, of prompts 5% to 95% 0.100 to 0.250",
        "reward of candidates: median 0.50, 5% to 95% -3.12 to 2.25",
        "reward of kept: median 1.50, 5% to 95% 0.50 to 2.75",
        "characters of kept: median 16, 5% to 95% 2 to 40",
        "mean probability the ranker gives to its own labels: 0.625 (0.810 on random candidates)",
    ]


def test_the_text_leaves_out_what_is_not_known() -> None:
    known = str(STATISTICS).splitlines()
    values = {**vars(STATISTICS), "num_unfinished": None, "acceptance_rate": None, "reward_quantiles": {}}
    del values["length_quantiles"], values["acceptance_quantiles"]  # as files of earlier versions
    candidates = "candidates: 640, of which 33 repeat another"
    assert str(SamplingStatistics(**values)).splitlines() == [known[0], candidates, *known[2:4], known[-1]]


def test_the_dictionary_says_which_quantiles_they_are_and_survives_json() -> None:
    content = json.loads(json.dumps(STATISTICS.as_dict()))
    assert content.pop("quantiles") == [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0] == list(QUANTILES)
    assert SamplingStatistics(**content) == STATISTICS


def test_lengths_are_in_characters_of_candidates_with_a_reward() -> None:
    row = {"completions": ["", "a", "three", [{"role": "assistant", "content": "four"}]]}
    prompts = [
        SelectedPrompt([0.0, 1.0, 2.0, 3.0], 4, [1, 3, 0, 2], 0.5, [0.7], [3, 2], [1, 0], [0.7, 0.9]),
        SelectedPrompt([0.0, None, 2.0, None], 2, [0, 2], 0.5, [0.7], [2], [0], [0.7]),
    ]
    lengths = summarize([(row, prompt) for prompt in prompts], SamplingOptions())[1].lengths
    assert {name: values.tolist() for name, values in lengths.items()} == {
        "candidates": [0, 1, 5, 4, 0, 5],
        "accepted": [1, 4, 0, 5, 0, 5],
        "chosen": [4, 5, 5],
        "rejected": [1, 0, 0],
    }
    ranked = summarize([(row, prompts[0])], SamplingOptions(pairing="ranking"))[1].lengths
    assert (ranked["chosen"].tolist(), ranked["rejected"].tolist()) == ([4], [5, 1, 0])


@pytest.mark.parametrize(
    ("chosen", "warned"),
    [
        ([119.0, 121.0] * 50, False),  # not over 20% longer
        ([121.0, 122.0] * 50, True),
        ([50.0, 200.0] * 50, True),  # 25 longer: 3.3 standard errors of 7.5
        ([50.0, 200.0] * 40, False),  # 2.96 of 8.4
        ([900.0], False),  # a single prompt
    ],
)
def test_much_longer_chosen_completions_are_warned_of(chosen: list[float], warned: bool) -> None:
    warning = length_warning(np.array(chosen), np.full(len(chosen), 100.0))
    assert (warning is not None) == warned
    if warning:
        assert f"longer than the others: {np.mean(chosen):.0f} against 100 characters on average. A" in warning


def drawn(num: int, seed: int = 0) -> Numbers:
    rng = np.random.default_rng(seed)
    rewards = {name: rng.normal(size=num) for name in ("candidates", "accepted", "chosen", "rejected")}
    lengths = {name: rng.gamma(3, 60, num).round() for name in rewards}
    certainty = {name: rng.uniform(0.5, 1, num) for name in ("random candidates", "pairs made")}
    return Numbers(rewards, lengths, certainty, rng.uniform(0, 1, num))


def equal(reward: float) -> Numbers:
    same = {name: np.full(5, reward) for name in ("candidates", "accepted", "chosen", "rejected")}
    return Numbers(same, same, {"pairs made": np.ones(5), "random candidates": np.array([])}, np.ones(5))


def panels_of(numbers: Numbers, made: str = "pairs", **options: Any) -> list[Axes]:
    with patch.object(Figure, "savefig", autospec=True) as saved:
        plot_statistics(replace(STATISTICS, made=made), numbers, SamplingOptions(**options), Path("plot.png"))
    figure = saved.call_args.args[0]
    figure.draw_without_rendering()  # but with the layout
    return figure.axes


@pytest.mark.parametrize("numbers", [drawn(200), drawn(1), equal(0.0), equal(-3.7), equal(1e6)])
def test_the_plot_is_a_png_and_drawing_leaves_nothing_behind(numbers: Numbers, tmp_path: Path) -> None:
    pictures = [tmp_path / "one.png", tmp_path / "two.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for picture in pictures:
            plot_statistics(STATISTICS, numbers, SamplingOptions(), picture)
    assert pictures[0].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(pictures[0])
    assert pixels.shape == (1140, 1320, 4)
    assert (pixels[..., :3] < 0.5).any(axis=-1).mean() > 0.005  # something is drawn
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


@pytest.mark.parametrize("num", [3, 48, 5000])
@pytest.mark.parametrize(("strategy", "shown"), [("rso", "rso with beta 0.5"), ("sft", "sft")])
@pytest.mark.parametrize(
    ("made", "ends", "met"), [("pairs", "chosen rejected", "made"), ("rankings", "ranked first ranked lower", "kept")]
)
def test_panels_are_named_and_their_legends_cover_nothing(num, strategy, shown, made, ends, met) -> None:
    panels = panels_of(drawn(num), made, strategy=strategy)
    titles = ["Rewards", "Lengths", "Certainty of labels", "Acceptance by prompt"]
    assert [axes.get_title() for axes in panels] == titles[: 4 if strategy == "rso" else 3]
    assert f"32 {made} from 8 of 10 prompts (640 candidates), strategy {shown}" == panels[0].figure.get_suptitle()
    for axes, units in zip(panels, ("(nats)", "(characters)", "(0.5: coin flip)", "(Theorem 1)"), strict=False):
        assert units in axes.get_xlabel() and axes.get_ylabel().startswith("share of ")
        names = " ".join(text.get_text().split(":")[0] for text in axes.get_legend().get_texts())
        assert names in (f"candidates kept {ends}", f"random candidates pairs {met}", "prompts")
    legends = [axes.get_legend().get_window_extent() for axes in panels]
    for legend in legends:
        assert not any(legend.overlaps(axes.get_window_extent()) for axes in panels)  # with all curves
        assert not any(legend.overlaps(axes.xaxis.label.get_window_extent()) for axes in panels)
        assert not any(legend.overlaps(other) for other in legends if other is not legend)
        assert legend.x0 >= 0 and legend.x1 <= panels[0].figure.bbox.x1 and legend.y0 >= 0


def test_curves_are_the_cumulative_distributions_thinned_if_many() -> None:
    few = drawn(4)
    few.rewards["chosen"][:] = [3.0, 1.0, 1.0, 2.0]
    curve = panels_of(few)[0].lines[2]
    assert curve.get_label() == "chosen: median 1.50" and curve.get_drawstyle() == "steps-post"
    assert (curve.get_xdata().tolist(), curve.get_ydata().tolist()) == ([1, 1, 1, 2, 3], [0, 0.25, 0.5, 0.75, 1])
    many = drawn(100_000)
    x, share = panels_of(many)[0].lines[0].get_data()
    assert len(x) == 1001
    exact = np.searchsorted(np.sort(many.rewards["candidates"]), x, side="right") / 100_000
    np.testing.assert_allclose(share[1:], exact[1:], atol=0.0011)


@pytest.mark.parametrize("outlier", [1e6, -1e6])
def test_outliers_leave_the_panel_and_are_counted(outlier: float) -> None:
    numbers = drawn(200)
    numbers.rewards["candidates"][:2] = outlier
    rewards, lengths, *_ = panels_of(numbers)
    assert rewards.get_xlabel().endswith(", outside: 2 of 200 candidates") and "outside" not in lengths.get_xlabel()
    assert -6 < rewards.get_xlim()[0] < -2 and 2 < rewards.get_xlim()[1] < 6


@pytest.mark.parametrize("strategy", ["rso", "sft", "top-k"])
def test_a_ranker_that_flips_coins_is_named_for_every_strategy(strategy):
    options = SamplingOptions(strategy=strategy)
    assert "0.52 on random candidates" in str(label_warning(options, 0.52, 0.51))
    assert label_warning(options, 0.56, 0.56) is None
    assert (label_warning(options, 0.8, 0.6) is None) == (strategy != "rso")  # which alone a larger beta helps


@pytest.mark.parametrize(("spread", "accepted"), [(0.05, "0.9"), (8.0, "1.1e-07")])
def test_a_scale_unlike_that_of_logits_is_named_with_what_beta_means(spread: float, accepted: str) -> None:
    warning = str(scale_warning(0.5, spread))
    assert f"a standard deviation of {spread:.2g} (median over prompts)" in warning
    assert f"is accepted with probability {accepted}. Fit the temperature with `calibrate`" in warning
    for options in ({"strategy": "sft"}, {"rejection_beta": 0.0}, {"rejection_beta": math.inf}):
        assert scale_warning(SamplingOptions(**options).effective_beta, spread) is None
    for usual in (0.1, 1.0, 5.0):
        assert scale_warning(0.5, usual) is None


@pytest.mark.parametrize(("temperature", "warned"), [(1.0, True), (2.0, False), (None, False)])
def test_only_an_uncalibrated_ranker_is_warned_of(temperature: float | None, warned: bool) -> None:
    far = SelectedPrompt([9.0, -9.0], 2, [0, 1], 0.5, [0.99], [0], [1], [0.99])
    row = {"completions": ["long " * 20, "short"]}
    warning = str(summarize([(row, far)] * 3, SamplingOptions(), temperature)[0].warning)
    assert ("a standard deviation of 9 " in warning) == warned
    assert "are much longer than the others: 100 against 5 characters" in warning  # beside it
