"""How far to trust a ranker: its verdicts against comparisons that people have made."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from prefopt_trl.evaluation.metrics import Estimate, wins
from prefopt_trl.evaluation.report import as_percentage, json_numbers, table, with_error
from prefopt_trl.rankers.base import Ranker, sigmoid
from prefopt_trl.rankers.comparisons import Compared, ask_comparisons
from prefopt_trl.runtime.settings import Settings, plotting, write_json, write_text, writing

CURVES = {
    "probability": "probability of the ranker's own verdict",
    "margin": "absolute log-odds (nats)",
    "length": "chosen minus rejected completion (characters)",
}


@dataclass(frozen=True)
class Bin:
    """Comparisons with similar values: the mean value, their number, and the ranker's accuracy on them."""

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
        estimates (`dict[str, Estimate]`): Means over comparisons: `accuracy`, in which a tie counts half;
            `brier_score`, (1 - P)^2, and `log_loss`, -log P in nats, of P(chosen preferred); `ties`. If lengths
            differ: how often the longer completion is preferred, `longer_by_ranker` and `longer_by_people`, and the
            accuracy where the ranker prefers it or not, `right_if_longer` and `right_if_shorter`. Of a
            [`ComparativeRanker`], before its temperature: `order_bias`, the probability of the completion shown first
            minus 0.5; `order_flips`, the share with opposite verdicts; and the accuracies `chosen_first` and
            `chosen_second`.
        curves (`dict[str, list[Bin]]`): Accuracy by `"probability"` (calibration curve), `"margin"` and `"length"`.
        subsets (`dict[str, Estimate]`): Accuracy by subset; of rows that hold lists, RewardBench 2's score.
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
        """A sentence on a ranker that prefers long completions more than people do, and is wrong then."""
        found = self.estimates
        if "right_if_longer" not in found:
            return None
        ranker, people, longer = found["longer_by_ranker"], found["longer_by_people"], found["right_if_longer"]
        shorter = found.get("right_if_shorter", Estimate(1.0, 0.0))
        error = np.hypot(longer.standard_error, shorter.standard_error)
        is_less_right = longer.mean + 2 * error < shorter.mean or longer.mean + 2 * longer.standard_error < 0.5
        if ranker.mean <= max(0.5, people.mean + 0.05) or not is_less_right:
            return None
        return (
            f"The ranker loves length: it prefers the longer completion in {as_percentage(ranker)} of comparisons, "
            f"people in {as_percentage(people)}. A policy trained on its preferences will write more. Train the "
            "ranker on pairs of similar length, or subtract a penalty per character from its rewards."
        )

    def __str__(self) -> str:
        """Return the numbers and the curves as Markdown tables."""
        named = self.estimates | {f"subset {name}": estimate for name, estimate in self.subsets.items()}
        numbers = [[name, with_error(estimate, ".3f")] for name, estimate in named.items()]
        curves = [
            [label, f"{one.mean:.4g}", f"{one.count:,}", with_error(one.accuracy)]
            for name, label in CURVES.items()
            for one in self.curves[name]
        ]
        parts = [
            f"{self.ranker} at temperature {self.settings.get('temperature', 1):g}: {self.num_comparisons:,} "
            f"comparisons of {self.num_prompts:,} prompts, and {self.num_without_opinion:,} without an opinion",
            table(["number", "mean ± standard error"], numbers),
            table(["accuracy by", "mean", "comparisons", "accuracy"], curves),
            self.warning,
        ]
        return "\n\n".join(filter(None, parts))

    def save(self, folder: str | Path) -> None:
        """Write `ranker_quality.json` (unknown numbers are null), `.md` and, if matplotlib is installed, `.png`."""
        path = Path(folder, "ranker_quality")
        write_json(path.with_suffix(".json"), json_numbers(asdict(self) | {"warning": self.warning}))
        write_text(path.with_suffix(".md"), f"# Ranker quality\n\n{self}\n")
        with plotting(), writing(path.with_suffix(".png")) as temporary:
            plot_quality(self, temporary)


def evaluate_ranker(ranker: Ranker, comparisons: Dataset) -> RankerQuality:
    """Measure a ranker on comparisons between a chosen and a rejected completion. It is asked about each once.

    Args:
        ranker ([`Ranker`]):
            Any ranker. Its temperature is in effect.
        comparisons ([`~datasets.Dataset`]):
            Columns `prompt`, `chosen` and `rejected`, plain or conversational, or HH-RLHF transcripts. A column
            `subset` or `source` gives accuracies by its values. Other columns are passed to rankers that read them. In
            RewardBench 2's layout, `chosen` and `rejected` are lists of completions, and each chosen one is compared
            to each rejected one.

    Returns:
        [`RankerQuality`]: print it, or `save` it as a report with plots.

    Raises:
        TypeError: if an argument is not a ranker or not a [`~datasets.Dataset`].
        ValueError: if a column is missing, a cell is None or an empty list, or fewer than 2 prompts have a comparison
            on which the ranker has an opinion.

    Example:

    ```python
    quality = evaluate_ranker(RewardModelRanker("my-reward-model"), load_hh_rlhf(split="test"))
    print(quality)
    quality.save("outputs/quality")
    ```
    """
    return measure(ranker, ask_comparisons(ranker, comparisons))


def measure(ranker: Ranker, compared: Compared) -> RankerQuality:
    """Measure what a ranker said, as [`evaluate_ranker`] describes."""
    known = ~np.isnan(compared.log_odds)
    prompts, lengths = compared.prompts[known], compared.lengths[known]
    log_odds = compared.log_odds[known] / getattr(ranker, "temperature", 1.0)
    right, margins = wins(log_odds), np.abs(log_odds)

    def estimate(values: np.ndarray, where: np.ndarray | slice = slice(None)) -> Estimate:
        return Estimate.of(values[where], prompts[where])

    estimates = {
        "accuracy": estimate(right),
        "brier_score": estimate(sigmoid(-log_odds) ** 2),
        "log_loss": estimate(np.logaddexp(0, -log_odds)),
        "ties": estimate(log_odds == 0),
    }
    if compared.orders is not None:
        first, second = compared.orders[known].T - 0.5  # P(chosen preferred) - 0.5 if it is shown first, and second
        estimates["order_bias"] = estimate((first - second) / 2)
        estimates["order_flips"] = estimate(first * second < 0)
        estimates["chosen_first"], estimates["chosen_second"] = estimate(wins(first)), estimate(wins(second))
    if (unequal := lengths != 0).any():
        people = lengths > 0  # prefer the longer completion
        itself = np.where(people, right, 1 - right)
        estimates["longer_by_ranker"] = estimate(itself, unequal)
        estimates["longer_by_people"] = estimate(people, unequal)
        for name, verdict in {"right_if_longer": 1, "right_if_shorter": 0}.items():
            if (given := unequal & (itself == verdict)).any():
                estimates[name] = estimate(right, given)

    def bins(values: np.ndarray, edges: np.ndarray) -> list[Bin]:
        numbers = np.searchsorted(edges[1:-1], values, side="right")
        masks = [numbers == number for number in np.unique(numbers)]
        return [Bin(float(values[one].mean()), int(one.sum()), estimate(right, one)) for one in masks]

    quantiles = np.linspace(0, 1, 11 if len(log_odds) >= 500 else 6)
    curves = {
        "probability": bins(sigmoid(margins), 0.5 + quantiles / 2),
        "margin": bins(margins, np.quantile(margins, quantiles, method="nearest")),
        "length": bins(lengths, np.quantile(lengths, quantiles, method="nearest")),
    }
    return RankerQuality(
        ranker=type(ranker).__name__,
        settings=ranker.settings(),
        num_comparisons=len(log_odds),
        num_prompts=len(np.unique(prompts)),
        num_without_opinion=int((~known).sum()),
        estimates=estimates,
        curves=curves,
        subsets=_row_scores(compared),
    )


def _row_scores(compared: Compared) -> dict[str, Estimate]:
    """Return the mean score of each subset's rows, of those on which the ranker has all opinions.

    A row scores 1 if each chosen completion is above each rejected one, divided by 1 plus the number of ties among
    them. With one chosen completion this is RewardBench 2's score (arXiv 2506.01937).
    """
    _, starts = np.unique(compared.rows, return_index=True)
    smallest = np.minimum.reduceat(compared.log_odds, starts)
    scores = (smallest >= 0) / (1 + np.add.reduceat(compared.log_odds == 0, starts, dtype=int))
    known = ~np.isnan(smallest)
    scores, prompts, subsets = scores[known], compared.prompts[starts][known], compared.subsets[starts][known]
    return {str(one): Estimate.of(scores[subsets == one], prompts[subsets == one]) for one in np.unique(subsets)}


def plot_quality(quality: RankerQuality, path: str | Path) -> None:
    """Draw the calibration curve and the accuracy by margin, by length and, if it is known, by order, as a PNG."""
    from matplotlib.figure import Figure

    estimates = quality.estimates
    panels: list[tuple[str, str, list[Any], list[Estimate]]] = []
    for name, label in CURVES.items():
        curve = quality.curves[name]
        panels.append((f"By {name}", label, [one.mean for one in curve], [one.accuracy for one in curve]))
    if "order_bias" in estimates:
        bias = f"order bias {with_error(estimates['order_bias'])}, flips {as_percentage(estimates['order_flips'])}"
        shown = {"chosen_first": "chosen first", "chosen_second": "chosen second", "accuracy": "both orders"}
        panels.append(("By order", bias, list(shown.values()), [estimates[name] for name in shown]))
    shape, size = ((2, 2), (11, 8.5)) if len(panels) == 4 else ((1, 3), (15, 4.5))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{quality.ranker}, {quality.num_comparisons:,} comparisons of {quality.num_prompts:,} prompts")
    drawn = figure.subplots(*shape).flatten()
    for axes, (title, label, places, accuracies) in zip(drawn, panels, strict=True):
        means, errors = [one.mean for one in accuracies], [one.standard_error for one in accuracies]
        axes.errorbar(places, means, errors, fmt="o", capsize=3)
        axes.set(title=title, xlabel=label, xmargin=0.15, ylabel="accuracy ± standard error", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    margins = np.linspace(0, quality.curves["margin"][-1].mean, 100)
    drawn[0].plot([0.5, 1], [0.5, 1], "--", color="gray", label="calibrated")
    drawn[1].plot(margins, sigmoid(margins), "--", color="gray", label="calibrated")
    drawn[2].axhline(estimates["accuracy"].mean, linestyle="--", color="gray", label="all comparisons")
    for axes in drawn[:3]:
        axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120, format="png")
