"""The table and the plot that compare rounds."""

import math
from collections.abc import Callable, Sequence
from functools import partial
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
    """Return the rounds as a Markdown table, which one is the best, and whether that may be luck."""
    if not records:
        return "No round is finished."
    rows = list(map(_row, records))
    header = [name for name in rows[-1] if any(row.get(name) for row in rows)]
    best = best_round(records, metric)
    which, gain = f"round {best}" if best else "the start: no round is better", measured(records[best], "gain")
    notes = [f"The best by {metric} is {which} ({best_model})."]
    if best and gain.has_error and gain.mean < 2 * gain.standard_error:
        notes.append("Its reward is not clearly above that of the start: judge on more prompts to know.")
    if best:
        notes.append("It was chosen by these numbers, which flatters it: to report one, evaluate it on other prompts.")
    judge = records[-1]["phases"]["judge"]["first_judge"]
    return (
        f"Judge: {judge}. Means ± standard errors by prompt; the gain is the paired difference to the start.\n\n"
        f"{table(header, [[row.get(name, '') for name in header] for row in rows])}\n\n"
        f"{' '.join(notes)}"
    )


def _row(record: Settings) -> dict[str, str]:
    phases = record["phases"]
    samples, sampled = phases["judge"].get("samples", {}), phases.get("sample", {}).get("statistics", {})
    estimates: dict[str, tuple[Estimate, Callable[[Estimate], str]]] = {
        "reward": (measured(record, "reward"), rounded),
        "gain": (measured(record, "gain"), partial(rounded, sign="+")),
        "win rate": (measured(record, "win_rate"), as_percentage),
        "length-controlled": (measured(record, "lc_win_rate"), as_percentage),
        "KL (nats)": (estimate(samples.get("kl")), rounded),
        "tokens": (estimate(samples.get("tokens")), rounded),
    }
    row = {"round": str(record["round"])}
    row |= {name: "" if math.isnan(found.mean) else form(found) for name, (found, form) in estimates.items()}
    numbers = {
        sampled.get("made", "pairs"): sampled.get("num_pairs"),
        "label probability": sampled.get("label_probability_after"),
        "acceptance": sampled.get("acceptance_rate"),
        "effective size": sampled.get("effective_size"),
        "loss": phases.get("train", {}).get("loss"),
    }
    row |= {name: "" if value is None else f"{value:.4g}" for name, value in numbers.items()}
    seconds = [phases[phase]["seconds"] for phase in ("sample", "train", "judge") if phase in phases]
    return row | {"minutes to sample + train + judge": " + ".join(f"{one / 60:.1f}" for one in seconds)}


def plot_rounds(records: Sequence[Settings], path: Path) -> None:
    """Draw the reward of each judge, the KL, the length, and how sure labels are, over rounds, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    judged = [record["phases"]["judge"] for record in records]
    curves = {
        f"reward by {judge} (nats)": [estimate(one["judges"].get(judge, {}).get("reward")) for one in judged]
        for judge in judged[-1]["judges"]
    }
    for title, key in {"KL from the start (nats)": "kl", "length (tokens)": "tokens"}.items():
        curves[title] = [estimate(one.get("samples", {}).get(key)) for one in judged]
    sampled = [record["phases"].get("sample", {}).get("statistics", {}) for record in records]
    for title, key in {
        "probability of the labels": "label_probability_after",
        "acceptance rate": "acceptance_rate",
    }.items():
        curves[title] = [estimate({"mean": one.get(key)}) for one in sampled]
    curves = {title: found for title, found in curves.items() if not all(math.isnan(one.mean) for one in found)}
    shape = -(-len(curves) // 3), min(len(curves), 3)
    figure = Figure(figsize=(4.2 * shape[1], 3.2 * shape[0] + 0.4), layout="constrained")
    for place, (title, found) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(*shape, place)
        errors = [1.96 * one.standard_error if one.has_error else 0.0 for one in found]
        axes.errorbar(range(len(found)), [one.mean for one in found], yerr=errors, fmt="o-", capsize=4)
        axes.set(title=title, xlabel="round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(y=0.2)
        axes.grid(alpha=0.3)
    figure.suptitle("Error bars are 1.96 standard errors by prompt")
    figure.savefig(path, dpi=120, format="png")
