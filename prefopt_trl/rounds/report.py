"""The table and the plot that compare rounds."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefopt_trl.evaluation.metrics import Estimate
from prefopt_trl.evaluation.report import as_percentage, rounded, table
from prefopt_trl.runtime.settings import Settings

# Of the start against itself, which needs no judge
OF_START = {"reward": 0.0, "win_rate": 0.5, "lc_win_rate": 0.5}


def estimate(found: Settings | None) -> Estimate:
    """Return an estimate of a record, NaN for null."""
    mean, error = ((found or {}).get(name) for name in ("mean", "standard_error"))
    return Estimate(math.nan if mean is None else mean, math.nan if error is None else error)


def measured(record: Settings, metric: str) -> Estimate:
    """Return a metric of the first judge in the record of a finished round."""
    found = record["phases"]["judge"]
    judged: dict[str, Any] = found["judges"].get(found["first_judge"], {})
    if metric not in judged and record["round"] == 0 and metric in OF_START:
        return Estimate(OF_START[metric], math.nan)
    return estimate(judged.get(metric))


def best_round(records: Sequence[Settings], metric: str) -> int:
    """Return the number of the round with the highest metric; of equal ones, the first."""
    values = [measured(record, metric).mean for record in records]
    return max(range(len(values)), key=lambda number: (not math.isnan(values[number]), values[number], -number))


def report_on_rounds(records: Sequence[Settings], metric: str, best_model: str) -> str:
    """Return the rounds as a Markdown table, and which one is the best."""
    if not records:
        return "No round is finished."
    rows = list(map(_row, records))
    header = [name for name in rows[-1] if any(row.get(name) for row in rows)]
    judge = records[-1]["phases"]["judge"]["first_judge"]
    cells = [[row.get(name, "") for name in header] for row in rows]
    best = best_round(records, metric)
    which = f"round {best}" if best else "the start: no round is better"
    return "\n\n".join(
        [
            f"Judge: {judge}. Means ± standard errors by prompt; the gain is the paired difference to the start.",
            table(header, cells),
            f"The best by {metric} is {which} ({best_model}). It was chosen by these numbers, which flatters it: to "
            "report one, evaluate it on other prompts.",
        ]
    )


def _row(record: Settings) -> dict[str, str]:
    phases = record["phases"]
    row = {"round": str(record["round"])}
    for name, key, form in (
        ("reward", "reward", rounded),
        ("gain", "gain", _signed),
        ("win rate", "win_rate", as_percentage),
        ("length-controlled", "lc_win_rate", as_percentage),
    ):
        found = measured(record, key)
        row[name] = "" if math.isnan(found.mean) else form(found)
    samples = phases["judge"].get("samples", {})
    row |= {name: rounded(estimate(samples[key])) for name, key in COLUMNS.items() if key in samples}
    if "sample" in phases:
        statistics = phases["sample"]["statistics"]
        row[statistics["made"]] = f"{statistics['num_pairs']:,}"
        row["label probability"] = f"{statistics['label_probability_after']:.2f}"
        for name, key in {"acceptance": "acceptance_rate", "effective size": "effective_size"}.items():
            row |= {name: f"{statistics[key]:.3g}"} if statistics[key] is not None else {}
    if "train" in phases and phases["train"]["loss"] is not None:
        row["loss"] = f"{phases['train']['loss']:.4g}"
    row["minutes"] = " + ".join(f"{phases[phase]['seconds'] / 60:.1f}" for phase in phases)
    return row


COLUMNS = {"KL (nats)": "kl", "tokens": "tokens"}


def _signed(found: Estimate) -> str:
    return rounded(found, "+")


def _curves(records: Sequence[Settings]) -> Iterator[tuple[str, list[Estimate]]]:
    """Yield what is drawn over rounds, by its title."""
    for judge in records[-1]["phases"]["judge"]["judges"]:
        found = [record["phases"]["judge"]["judges"].get(judge, {}).get("reward") for record in records]
        yield f"reward by {judge} (nats)", list(map(estimate, found))
    samples = [record["phases"]["judge"].get("samples", {}) for record in records]
    for title, key in {"KL from the start (nats)": "kl", "length (tokens)": "tokens"}.items():
        yield title, [estimate(found.get(key)) for found in samples]
    statistics = [record["phases"].get("sample", {}).get("statistics", {}) for record in records]
    for title, key in {
        "mean probability of the labels": "label_probability_after",
        "acceptance rate (Theorem 1)": "acceptance_rate",
        "effective sample size": "effective_size",
    }.items():
        values = [found.get(key) for found in statistics]
        yield title, [Estimate(math.nan if value is None else value, math.nan) for value in values]


def plot_rounds(records: Sequence[Settings], path: Path) -> None:
    """Draw the reward of each judge, the KL, the length, and how sure labels are, over rounds, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    curves = {title: found for title, found in _curves(records) if not all(math.isnan(one.mean) for one in found)}
    figure = Figure(figsize=(4.2 * len(curves), 3.6), layout="constrained")
    for axes, (title, found) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        errors = [0.0 if math.isnan(one.standard_error) else 1.96 * one.standard_error for one in found]
        axes.errorbar(range(len(found)), [one.mean for one in found], yerr=errors, fmt="o-", capsize=4)
        axes.set(title=title, xlabel="round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.2)
        axes.grid(alpha=0.3)
    figure.suptitle("Error bars are 1.96 standard errors by prompt")
    figure.savefig(path, dpi=120, format="png")
