"""What a table shows: means over seeds beside the paper's numbers, and which of the paper's claims hold."""

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prefopt_trl.evaluation.metrics import Estimate
from prefopt_trl.evaluation.report import as_html, as_percentage, table, with_error
from prefopt_trl.experiments.runner import Results
from prefopt_trl.experiments.tables import FRONTIER, MAP, ROWS, Table
from prefopt_trl.runtime.settings import plotting, write_text, writing

REWARD, WINS = "truth's reward", "ranker's win_rate"
HEADERS = {WINS: "ranker's wins", "kl": "KL, nats", "bleu": "BLEU"}
FORMS = {WINS: ".1%", "rows": ",.0f", "acceptance": ".3f"}  # others have two decimals
SURE = 0.05  # family-wise chance to claim a difference that is not there


def shown(estimate: Estimate, metric: str, sign: str = "") -> str:
    """Return the mean of a metric and its standard error, or nothing if it is not known."""
    if not estimate.has_error:
        estimate = replace(estimate, standard_error=math.nan)
    return "" if math.isnan(estimate.mean) else with_error(estimate, FORMS.get(metric, ".2f"), sign)


def over_seeds(results: Results, row: str, metric: str) -> np.ndarray:
    """Return a metric of a row by seed, NaN where it is not known."""
    return np.array([np.nan if found.get(metric) is None else found[metric] for found in results[row]], dtype=float)


def difference(results: Results, row: str, other: str, metric: str = REWARD) -> Estimate:
    """Return the metric of a row minus that of another, paired by seed."""
    return Estimate.of(over_seeds(results, row, metric) - over_seeds(results, other, metric))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979); NaN stays.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    known = [place for place in np.argsort(p_values, kind="stable") if not math.isnan(p_values[place])]
    corrected, largest = list(p_values), 0.0
    for rank, place in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p_values[place]))
        corrected[place] = round(largest, 12)
    return corrected


def claims_of(found: Table, results: Results) -> list[list[str]]:
    """Return for each claim the difference of the reward, its p-value and whether the claim holds; and, if there is
    a ranker, the same by its wins. All p-values are corrected for their number."""
    metrics = [metric for metric in (REWARD, WINS) if metric in next(iter(results.values()))[0]]
    gaps = [(metric, difference(results, *claim, metric)) for claim in found.claims for metric in metrics]
    cells: list[str] = []
    for (metric, gap), p in zip(gaps, holm([gap.p_value() for _, gap in gaps]), strict=True):
        verdict = "not decided" if not p < SURE else "holds" if gap.mean > 0 else "the reverse"
        cells += [shown(gap, metric, "+"), "" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "<0.001", verdict]
    width = 3 * len(metrics)
    return [cells[start : start + width] for start in range(0, len(cells), width)]


def conclusion(found: Table, verdicts: Sequence[str]) -> str:
    """Return the sentence that says what the reward decides, and what it cannot say."""
    decided = [
        " > ".join(claim if verdict == "holds" else claim[::-1])
        for claim, verdict in zip(found.claims, verdicts, strict=True)
        if verdict != "not decided"
    ]
    undecided = f"Not decided: {len(verdicts) - len(decided)} of {len(verdicts)}. "
    return (
        f"**Decided by the reward: {'; '.join(decided) or 'nothing'}.** {undecided}A few seeds decide only large "
        "differences, and the order may differ with another ranker, another model or a longer training."
    )


def as_markdown(name: str, found: Table, results: Results, highest: float | None, origin: str) -> str:
    """Return a table of the results, and one of the claims; `origin` says of which world they are, and made how."""
    base, *_ = results
    seeds = ", ".join(str(one["seed"]) for one in results[base])
    rewards = {row: over_seeds(results, row, REWARD) for row in results}
    columns = [one for one in found.columns if any(row[0].get(one) is not None for row in results.values())]
    header = ["", "reward", f"minus {base}"] + ["of the possible"] * (highest is not None)
    header += [HEADERS.get(one, one) for one in columns]
    rows = []
    for row in results:
        gap = rewards[row] - rewards[base]
        cells = [row, shown(Estimate.of(rewards[row]), REWARD)]
        cells.append("" if row == base else shown(Estimate.of(gap), REWARD, "+"))
        if highest is not None:
            cells.append("" if row == base else as_percentage(Estimate.of(gap / (highest - rewards[base]))))
        cells += [shown(Estimate.of(over_seeds(results, row, one)), one) for one in columns]
        rows.append(cells + [found.paper.get(row, "")] * bool(found.paper))
    notes = f"Means ± standard errors over the seeds {seeds}; differences are paired by seed."
    if highest is not None:
        notes += f" The possible gain is that from the {base} to the highest reward, {highest:g}."
    if found.paper:
        notes += f" The paper's numbers: {found.unit}."
    parts = [
        f"# {found.title} ({found.source})",
        f"Fixed: {found.fixed}. {origin}",
        table(header + ["paper"] * bool(found.paper), rows),
        notes,
    ]
    if found.claims:
        verdicts = claims_of(found, results)
        lines = [[f"{better} > {worse}", *row] for (better, worse), row in zip(found.claims, verdicts, strict=True)]
        judges = ("reward", "ranker's wins")[: len(verdicts[0]) // 3]
        num_tests = sum(p != "" for row in verdicts for p in row[1::3])
        parts.append(table(["claim", *(name for judge in judges for name in (judge, "p", "so"))], lines))
        if num_tests:
            parts.append(f"p by Student's t over seeds, corrected for the {num_tests} of them (Holm).")
        parts.append(conclusion(found, [row[2] for row in verdicts]))
    if found.shows_samples:
        for row, [one, *_] in results.items():
            parts.append(table([row, ""], [list(map(as_html, sample)) for sample in one["samples"]]))
    return "\n\n".join([*parts, f"![{name}]({name}.png)"]) + "\n"


def write(name: str, found: Table, results: Results, folder: Path, highest: float | None, origin: str) -> str:
    """Write a table as Markdown, CSV and PNG, and return the first."""
    text = as_markdown(name, found, results, highest, origin)
    write_text(folder / f"{name}.md", text)
    cells = [one for by_seed in results.values() for one in by_seed]
    metrics = dict.fromkeys(name for one in cells for name, value in one.items() if isinstance(value, float | int))
    with writing(folder / f"{name}.csv") as temporary, temporary.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["row", *metrics])
        for row, by_seed in results.items():
            lines.writerows([row, *map(one.get, metrics)] for one in by_seed)
    with plotting(), writing(folder / f"{name}.png") as temporary:
        plot(found, results, temporary)
    return text


def plot(found: Table, results: Results, path: Path) -> None:
    """Draw the rewards and wins of all rows, or the frontier of reward and KL, or the map of differences, as a PNG."""
    from matplotlib.figure import Figure

    sizes = {MAP: (11.0, 3.6), FRONTIER: (8.0, 5.0), ROWS: (9.5, 0.3 * len(results) + 1.4)}
    figure = Figure(figsize=sizes[found.kind], layout="constrained")
    {MAP: _plot_map, FRONTIER: _plot_frontier, ROWS: _plot_rows}[found.kind](figure, results)
    figure.suptitle(f"{found.title} ({found.source}); ± one standard error over seeds", fontsize=10)
    figure.savefig(path, dpi=120, format="png")


def _plot_rows(figure: Any, results: Results) -> None:
    places = range(len(results))[::-1]
    for number, (metric, name) in enumerate({REWARD: "true reward", WINS: "wins by the ranker"}.items(), start=1):
        axes = figure.add_subplot(1, 2, number)
        estimates = [Estimate.of(over_seeds(results, row, metric)) for row in results]
        errors = [one.standard_error for one in estimates]
        axes.errorbar([one.mean for one in estimates], places, xerr=errors, fmt="o", capsize=3)
        axes.set_yticks(places, list(results) if number == 1 else [])
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)


def _plot_frontier(figure: Any, results: Results) -> None:
    axes = figure.add_subplot()
    kinds = {row: row.rstrip("0123456789.").strip() for row in results}
    for kind in dict.fromkeys(kinds.values()):
        rows = [row for row in results if kinds[row] == kind]
        rewards, kls = ([Estimate.of(over_seeds(results, row, name)) for row in rows] for name in (REWARD, "kl"))
        means = ([one.mean for one in of] for of in (kls, rewards))
        errors = {f"{axis}err": [one.standard_error for one in of] for axis, of in (("x", kls), ("y", rewards))}
        axes.errorbar(*means, **errors, fmt="o", capsize=3, label=kind)
        for row, kl, reward in zip(rows, kls, rewards, strict=True):
            place = {"xytext": (5, -11), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(row.removeprefix(kind), (kl.mean, reward.mean), **place)
    axes.set(xlabel="KL from the SFT policy (nats)", ylabel="true reward")
    axes.legend()
    axes.grid(alpha=0.3)


def _plot_map(figure: Any, results: Results) -> None:
    """Draw rejection sampling minus plain samples over beta and the length of training, a panel for each ranker.

    Differences of less than two standard errors have no color.
    """
    parts = [row.split(", ") for row in results if ", " in row]
    rankers, sources, lengths = (list(dict.fromkeys(part[place] for part in parts)) for place in range(3))
    plain, *betas = sources
    gaps = {
        (ranker, length, beta): difference(results, f"{ranker}, {beta}, {length}", f"{ranker}, {plain}, {length}")
        for ranker in rankers
        for length in lengths
        for beta in betas
    }
    limit = np.quantile([abs(gap.mean) for gap in gaps.values()], 0.9)  # a policy that collapses would pale the others
    for number, ranker in enumerate(rankers, start=1):
        axes = figure.add_subplot(1, len(rankers), number)
        panel = [[gaps[ranker, length, beta] for beta in betas] for length in lengths]
        colored = [[gap.mean * (abs(gap.mean) >= 2 * gap.standard_error) for gap in row] for row in panel]
        image = axes.imshow(colored, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for row in range(len(lengths)):
            for column, gap in enumerate(panel[row]):
                color = "white" if abs(colored[row][column]) > 0.6 * limit else "black"
                text = with_error(gap, sign="+").replace(" ± ", "\n± ")
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(betas)), betas)
        axes.set_yticks(range(len(lengths)), lengths if number == 1 else [])
        accuracy = np.nanmean(
            [over_seeds(results, row, "ranker accuracy").mean() for row in results if row.startswith(ranker)]
        )
        axes.set_title(f"{ranker} ({accuracy:.0%} right)", fontsize=9)
    label = "reward, rejection minus plain samples\n(white: less than two standard errors)"
    figure.colorbar(image, ax=figure.axes, label=label, extend="both")
