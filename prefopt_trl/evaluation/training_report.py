"""What a run leaves behind: its evaluations by step, its curves, and completions of its start and its end."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefopt_trl.evaluation.metrics import Estimate
from prefopt_trl.evaluation.report import as_html, as_percentage, completions_side_by_side, rounded, table
from prefopt_trl.runtime.settings import plotting, read_lines, write_text, writing

logger = logging.getLogger(__name__)
COLUMNS = {  # of the table of evaluations: titles by metric
    "eval_win_rate": "win rate",
    "eval_lc_win_rate": "length-controlled",
    "eval_reward": "reward",
    "eval_kl": "KL (nats)",
    "eval_length": "length (tokens)",
    "eval_finished": "finished",
}
SHARES = ("eval_win_rate", "eval_lc_win_rate", "eval_finished")
PANELS = [  # title, unit, and metrics by label
    ("Loss", "loss", {"training": "loss", "evaluation": "eval_loss"}),
    ("Margins", "nats", {"training": "rewards/margins", "evaluation": "eval_rewards/margins"}),
    ("Accuracies", "share", {"training": "rewards/accuracies", "evaluation": "eval_rewards/accuracies"}),
    ("Reward of fresh samples", "reward", {"evaluation": "eval_reward"}),
    ("Win rate", "share", {"all": "eval_win_rate", "length-controlled": "eval_lc_win_rate"}),
    ("KL from the reference", "nats per completion", {"evaluation": "eval_kl"}),
    ("Length", "tokens", {"training": "completions/mean_length", "evaluation": "eval_length"}),
]
FEW_POINTS, MANY_POINTS = 40, 100  # few have markers, many are smoothed


def write_training_report(output_dir: str | Path, log_history: Sequence[dict[str, Any]]) -> None:
    """Write `report.md`, `curves.png` and `frontier.png` (reward against KL) into `output_dir`, in one process.

    `log_history` is `trainer.state.log_history` of any Trainer of transformers or TRL. The figures need matplotlib,
    and the frontier and the completions shown need two evaluations. Equal arguments give equal files. An error is
    logged and not raised, because the trained model is worth more than its report.
    """
    try:
        _write(Path(output_dir), [entry for entry in log_history if "step" in entry])
    except Exception:
        logger.warning("No report could be written into %s.", output_dir, exc_info=True)


def _write(folder: Path, log_history: Sequence[dict[str, Any]]) -> None:
    series = defaultdict[str, dict[int, float]](dict)  # by metric and step
    for entry in sorted(log_history, key=lambda entry: entry["step"]):
        for name, value in entry.items():
            if isinstance(value, int | float) and np.isfinite(value):
                series[name][entry["step"]] = value
    steps = sorted({step for name in COLUMNS for step in series[name]})
    parts = [f"# {as_html(folder.absolute().name)}", *(_evaluations(series, steps) if steps else [])]
    with plotting():
        figures = {"curves": plot_curves(series)} if series["loss"] or series["eval_loss"] or steps else {}
        if len(series["eval_kl"].keys() & series["eval_reward"].keys()) > 1:
            figures["frontier"] = plot_frontier(series["eval_kl"], series["eval_reward"], series["eval_reward_se"])
        for name, figure in figures.items():
            with writing(folder / f"{name}.png") as temporary:
                figure.savefig(temporary, dpi=120, format="png")
            parts.append(f"![{name}]({name}.png)")
    files = {f"step {step}": folder / "evaluations" / f"step-{step:06}.jsonl" for step in steps}
    if len(there := [policy for policy, file in files.items() if file.is_file()]) > 1:
        parts += completions_side_by_side({policy: read_lines(files[policy]) for policy in (there[0], there[-1])})
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")


def _evaluations(series: dict[str, dict[int, float]], steps: list[int]) -> list[str]:
    """Return a table of about 20 evaluations, with the first of the highest reward and the last."""
    best = max(series["eval_reward"], key=series["eval_reward"].__getitem__, default=None)
    shown = [step for step in steps if step in {*steps[:: len(steps) // 20 + 1], best, steps[-1]}]
    columns = [["step", *(f"{step} (best reward)" if step == best else f"{step}" for step in shown)]]
    for name, title in COLUMNS.items():
        if values := series[name]:
            found = [Estimate(values.get(s, np.nan), series[f"{name}_se"].get(s, np.nan)) for s in shown]
            form = as_percentage if name in SHARES else rounded
            columns.append([title, *("" if np.isnan(one.mean) else form(one) for one in found)])
    header, *rows = zip(*columns, strict=True)
    return [f"{len(shown)} of {len(steps)} evaluations, means ± standard errors over prompts:", table(header, rows)]


def plot_curves(series: dict[str, dict[int, float]]) -> Any:
    """Draw each quantity that was logged, by step, with legends above the axes, where they cover no curve."""
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if any(series[name] for name in panel[2].values())]
    width = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    height = -(-len(panels) // width)  # rounded up
    figure = Figure(figsize=(max(5 * width, 7), 3.7 * height), layout="constrained")
    for number, (title, unit, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(
            height, width, number, xlabel="step", ylabel=unit, sharex=next(iter(figure.axes), None)
        )
        for label, name in filter(lambda named: series[named[1]], names.items()):
            steps, values = list(series[name]), np.array(list(series[name].values()))
            color = "C0" if label in ("training", "all") else "C1"
            if label == "training" and len(steps) > MANY_POINTS:
                axes.plot(steps, values, alpha=0.3, linewidth=0.7, color=color)
                window = np.ones(len(steps) // 50 * 2 + 1)  # centered, 4% of the run
                values = np.convolve(values, window, "same") / np.convolve(np.ones(len(steps)), window, "same")
                label += " (smoothed)"
            errors = [series[f"{name}_se"].get(step, np.nan) for step in steps] if series[f"{name}_se"] else None
            form, cap, bar = (f"{color}o-", 3, 1) if len(steps) <= FEW_POINTS else (f"{color}-", 0, 0.4)
            axes.errorbar(steps, values, errors, fmt=form, markersize=4, capsize=cap, elinewidth=bar, label=label)
        if title == "Win rate":
            axes.axhline(0.5, linestyle="--", color="gray", linewidth=1)
        axes.set_title(title, loc="left")
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncols=2, columnspacing=1, frameon=False)
    return figure


def plot_frontier(kl: dict[int, float], rewards: dict[int, float], errors: dict[int, float]) -> Any:
    """Draw the rewards of fresh samples, with their standard errors, against their KL, by step."""
    from matplotlib.figure import Figure

    places = {step: (kl[step], rewards[step]) for step in rewards if step in kl}
    best = max(places, key=rewards.__getitem__)
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="KL from the reference (nats per completion)", ylabel="reward of fresh samples")
    axes.plot(*zip(*places.values(), strict=True), "o-", markersize=5 if len(places) <= FEW_POINTS else 2, linewidth=1)
    axes.errorbar(*places[best], errors.get(best), fmt="*", color="C1", markersize=15, capsize=4)
    axes.set(title="Reward against KL by step (star: highest reward ± standard error)", xmargin=0.15, ymargin=0.1)
    axes.grid(alpha=0.3)
    figure.draw_without_rendering()  # sets the layout, on which it depends which labels overlap
    labeled: list[np.ndarray] = []
    for step in [best, max(places), *list(places)[:: len(places) // 10 + 1]]:
        pixel = axes.transData.transform(places[step])
        if all(abs(pixel - other).max() > 40 for other in labeled):
            labeled.append(pixel)
            axes.annotate(f"{step}", places[step], (-7, 7), textcoords="offset points", ha="right")
    return figure
