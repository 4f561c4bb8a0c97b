"""Tables and plots of policies compared."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt_trl.evaluation.metrics import Estimate


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, readable in a terminal too; the first column is left-aligned."""
    widths = [max(len(str(row[column])) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cells[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(aligned) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def json_numbers(values: object) -> Any:
    """Return values as JSON has them: NaN and infinity become None."""
    return json.loads(json.dumps(values), parse_constant=lambda _: None)


def with_error(estimate: Estimate, form: str = ".2f") -> str:
    """`mean ± standard error`, each in a form of Python's `format`; the mean alone if its error is not known."""
    error = "" if math.isnan(estimate.standard_error) else f" ± {estimate.standard_error:{form}}"
    return f"{estimate.mean:{form}}{error}"


def rounded(estimate: Estimate, sign: str = "") -> str:
    """`mean ± standard error`, both with the decimals that leave two digits of the error."""
    error = estimate.standard_error
    if not error > 1e-12 + 1e-6 * abs(estimate.mean):  # NaN, or the rounding of equal values
        return f"{estimate.mean:{sign}.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{estimate.mean:{sign}.{decimals}f} ± {error:.{decimals}f}"


def as_percentage(estimate: Estimate) -> str:
    """`mean ± standard error` of a share, in per cent."""
    return with_error(estimate, ".0%")


def plot_reward_against_kl(
    curves: dict[str, list[dict[str, Estimate]]], chosen: dict[str, int], path: str | Path
) -> None:
    """Draw how each method's rewards change as its policy leaves the reference, as a PNG.

    Args:
        curves (`dict[str, list[dict[str, Estimate]]]`):
            For each method, what [`evaluate_policy`] gave at each checkpoint, in the order of training.
        chosen (`dict[str, int]`):
            For each method, the index of the checkpoint chosen; it gets a large mark.
        path (`str` or `Path`):
            File to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, name, title in zip(
        figure.subplots(1, 2, sharex=True),
        ("true_reward", "ranker_reward"),
        ("True reward", "Ranker's reward, by which the checkpoint is chosen"),
        strict=True,
    ):
        for method, points in curves.items():
            kl, rewards = [[point[key].mean for point in points] for key in ("kl", name)]
            (drawn,) = axes.plot(kl, rewards, marker="o", markersize=3.5, linewidth=1.2, label=method)
            best = points[chosen[method]]
            axes.errorbar(
                best["kl"].mean,
                best[name].mean,
                yerr=best[name].standard_error,
                marker="*",
                markersize=15,
                color=drawn.get_color(),
                capsize=3,
            )
        axes.set(xlabel="KL from the SFT policy (nats per completion)", ylabel="mean reward", title=title)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, title="star: checkpoint chosen")
    figure.savefig(path, dpi=120)
