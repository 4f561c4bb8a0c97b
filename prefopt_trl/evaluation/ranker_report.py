"""What is known of a ranker, as numbers, tables and a picture."""

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefopt_trl.evaluation.policy import Estimate
from prefopt_trl.evaluation.report import as_percentage, json_numbers, table, with_error
from prefopt_trl.rankers.base import sigmoid
from prefopt_trl.runtime.settings import Settings, write_json, write_text, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

LOVES_LENGTH = 0.05  # by this share of comparisons, a ranker prefers longer completions than people do
ESTIMATES = {
    "accuracy": "accuracy, where a tie counts half",
    "brier_score": "Brier score: (1 - P(chosen preferred))^2",
    "log_loss": "log loss: -log P(chosen preferred), in nats",
    "ties": "share of ties",
    "longer_by_ranker": "share in which the ranker prefers the longer completion",
    "longer_by_people": "share in which people prefer it",
    "longer_difference": "difference of these shares",
    "right_if_longer": "accuracy where the ranker prefers the longer completion",
    "right_if_shorter": "accuracy where it prefers the shorter one",
    "order_bias": "order bias: probability of the completion shown first, minus 0.5",
    "order_flips": "share with opposite verdicts in the two orders",
    "chosen_first": "accuracy where the chosen completion is shown first",
    "chosen_second": "accuracy where it is shown second",
}
CURVES = {  # with the form of their values
    "probability": ("probability of the ranker's own verdict", ".2f"),
    "margin": ("absolute log-odds (nats)", ".3g"),
    "length": ("chosen minus rejected completion (characters)", ".0f"),
}


@dataclass(frozen=True)
class Bin:
    """Comparisons with a value in a range: its ends, the mean value, their number, and the ranker's accuracy."""

    low: float
    high: float
    mean: float
    count: int
    accuracy: Estimate


@dataclass(frozen=True)
class RankerQuality:
    """What [`evaluate_ranker`] measures. The standard errors are over prompts.

    Attributes:
        ranker, settings (`str`, `dict`): The ranker's class and settings.
        num_comparisons, num_prompts (`int`): Comparisons on which the ranker has an opinion, and their prompts.
        num_without_opinion (`int`): Other comparisons, which are left out.
        estimates (`dict[str, Estimate]`): Means over comparisons, as [`ESTIMATES`] describes them. Those of the longer
            completion need one, and those of the order a [`ComparativeRanker`] that compares pairs; its bias is
            measured before the temperature.
        curves (`dict[str, list[Bin]]`): The accuracy by the values of [`CURVES`]; `"probability"` is the calibration
            curve. The other bins have about equal counts.
        subsets (`dict[str, Estimate]`): Accuracy by subset, or RewardBench 2's scores if the rows hold lists.
    """

    ranker: str
    settings: Settings
    num_comparisons: int
    num_prompts: int
    num_without_opinion: int
    estimates: dict[str, Estimate]
    curves: dict[str, list[Bin]]
    subsets: dict[str, Estimate]

    @property
    def warning(self) -> str | None:
        """A sentence on a ranker that prefers long completions, or None.

        It prefers the longer one clearly more often than people do and more often than not, and is wrong more often
        where it does. A larger share alone can be innocent: random errors move it towards one half, and verdicts are
        more one-sided than the probabilities behind them.
        """
        if "right_if_longer" not in self.estimates:
            return None
        ranker, people, more = (self.estimates[f"longer_{name}"] for name in ("by_ranker", "by_people", "difference"))
        longer = self.estimates["right_if_longer"]
        shorter = self.estimates.get("right_if_shorter", Estimate(1.0, 0.0))
        error = math.hypot(longer.standard_error, shorter.standard_error)
        prefers = more.mean > max(LOVES_LENGTH, 2 * more.standard_error) and ranker.mean > 0.5
        if not (prefers and longer.mean + 2 * error < shorter.mean):
            return None
        return (
            f"The ranker loves length: it prefers the longer completion in {as_percentage(ranker)} of comparisons, "
            f"people in {as_percentage(people)}. A policy trained on its preferences will write more. Train the "
            "ranker on pairs of similar length, or subtract a penalty per character from its rewards."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON has it. A number that is not known, as the error of one prompt, is None."""
        return json_numbers(asdict(self) | {"warning": self.warning})

    def __str__(self) -> str:
        """Return the numbers as Markdown tables."""
        named = {ESTIMATES[name]: estimate for name, estimate in self.estimates.items()} | self.subsets
        rows = [[name, with_error(estimate, ".3f")] for name, estimate in named.items()]
        parts = [
            f"{self.ranker} at temperature {self.settings.get('temperature', 1):g}: {self.num_comparisons:,} "
            f"comparisons of {self.num_prompts:,} prompts, and {self.num_without_opinion:,} without an opinion",
            table(["", "mean ± standard error"], rows),
        ]
        for name, bins in self.curves.items():
            label, form = CURVES[name]
            rows = [
                [f"{one.low:{form}} to {one.high:{form}}", f"{one.count:,}", with_error(one.accuracy)] for one in bins
            ]
            parts.append(table([label, "comparisons", "accuracy"], rows))
        return "\n\n".join([*parts, *filter(None, [self.warning])])

    def save(self, folder: str | Path) -> None:
        """Write `ranker_quality.json`, `ranker_quality.md` and, if matplotlib is installed, `ranker_quality.png`."""
        path = Path(folder, "ranker_quality")
        write_json(path.with_suffix(".json"), self.as_dict())
        write_text(path.with_suffix(".md"), f"# Ranker quality\n\n{self}\n")
        try:
            with writing(path.with_suffix(".png")) as temporary:
                plot_quality(self, temporary)
        except ImportError:
            logger.warning("No plot was drawn: install matplotlib, with `pip install 'prefopt-trl[plots]'`.")


def plot_quality(quality: RankerQuality, path: str | Path) -> None:
    """Draw the calibration curve and the accuracy by margin, by length and, if it is known, by order, as a PNG."""
    from matplotlib.figure import Figure

    estimates, bins = quality.estimates, quality.curves["probability"]
    has_orders = "order_bias" in estimates
    figure = Figure(figsize=(11, 8.5) if has_orders else (15, 4.5), layout="constrained")
    compared = f"{quality.num_comparisons:,} comparisons of {quality.num_prompts:,} prompts"
    figure.suptitle(f"{quality.ranker}: accuracy ± standard error on {compared}")
    calibration, by_margin, by_length, *by_order = figure.subplots(*((2, 2) if has_orders else (1, 3))).flat

    middles, widths = [(one.low + one.high) / 2 for one in bins], [0.9 * (one.high - one.low) for one in bins]
    counts, most = np.array([one.count for one in bins]), max(one.count for one in bins)
    calibration.bar(middles, counts / (5 * most), widths, color="lightgray", label=f"up to {most:,} comparisons")
    calibration.plot([0.5, 1], [0.5, 1], "--", color="gray", label="calibrated")
    margins = np.linspace(0, max(one.mean for one in quality.curves["margin"]), 100)
    by_margin.plot(margins, sigmoid(margins), "--", color="gray", label="calibrated")
    by_length.axhline(estimates["accuracy"].mean, linestyle="--", color="gray", label="all comparisons")
    by_length.axvline(0, color="lightgray", linewidth=1)
    for axes, (name, (label, _)) in zip((calibration, by_margin, by_length), CURVES.items(), strict=True):
        curve = quality.curves[name]
        _draw(axes, [one.mean for one in curve], [one.accuracy for one in curve], label="ranker")
        axes.set(title=f"By {name}", xlabel=label)
        # Above the largest accuracy
        axes.legend(frameon=False, loc="upper left", ncols=3, fontsize="small", columnspacing=1)
    for axes in by_order:
        shown = {"chosen_first": "chosen first", "chosen_second": "chosen second", "accuracy": "mean of both orders"}
        _draw(axes, range(3), [estimates[name] for name in shown], linestyle="none")
        axes.set_xticks(range(3), shown.values())
        bias = f"order bias {with_error(estimates['order_bias'])}, flips {as_percentage(estimates['order_flips'])}"
        axes.set(title="By order", xlabel=bias, xlim=(-0.5, 2.5))
    figure.savefig(path, dpi=120, format="png")


def _draw(axes: "Axes", places: Any, accuracies: list[Estimate], **options: Any) -> None:
    means, errors = [one.mean for one in accuracies], [one.standard_error for one in accuracies]
    axes.errorbar(places, means, errors, marker="o", markersize=4, capsize=3, **options)
    axes.set(ylabel="accuracy", ylim=(0, 1.2), yticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.grid(alpha=0.3)
