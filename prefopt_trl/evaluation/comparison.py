"""What an evaluation found: the numbers of each policy and judge, their tables, their plot and their files."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from prefopt_trl.data.formats import Prompt, Row, completion_text, num_characters
from prefopt_trl.evaluation.metrics import Estimate, bleu, distinct, length_controlled_win_rate
from prefopt_trl.evaluation.report import (
    as_percentage,
    completions_side_by_side,
    json_numbers,
    rounded,
    table,
)
from prefopt_trl.rankers.base import sigmoid
from prefopt_trl.runtime.settings import Settings, plotting, write_json, write_lines, write_text, writing

logger = logging.getLogger(__name__)

FEW_PROMPTS = 30  # below, 1.96 standard errors hold clearly less than 95%
COLUMNS = {  # of the table of texts
    "kl": "KL from {reference}, nats per completion",
    "entropy": "entropy, nats per token",
    "tokens": "tokens",
    "characters": "characters",
    "finished": "finished",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "bleu": "BLEU",
}


class Samples:
    """The samples of one policy, as columns of length `n`; unknown numbers are NaN."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.prompts = np.array([json.dumps(row["prompt"], sort_keys=True) for row in rows])  # clusters
        self.characters = np.array([num_characters(row["completion"]) for row in rows], dtype=float)
        self.finished, self.tokens, self.logps, self.ref_logps = (
            np.array([row[name] for row in rows], dtype=float)
            for name in ("finished", "num_tokens", "logp", "ref_logp")
        )

    def judged(self, judge: str, what: str) -> np.ndarray:
        """Return the `"rewards"` or `"wins"` of a judge."""
        return np.array([row[what][judge] for row in self.rows], dtype=float)

    def meet(self, opponent: "Samples") -> list[Row]:
        """Return the row of the opponent that each row is compared with."""
        theirs: dict[int, list[Row]] = {}
        for row in opponent.rows:
            theirs.setdefault(row["row"], []).append(row)
        return [(of := theirs[row["row"]])[row["sample"] % len(of)] for row in self.rows]

    def estimate(self, values: np.ndarray) -> Estimate:
        """Return the mean of the values that are known, with its standard error by prompt."""
        known = ~np.isnan(values)
        return Estimate.of(values[known], self.prompts[known])

    def measure(self) -> dict[str, Estimate]:
        """Return the means that need no judge: `kl` and so on, of those in [`COLUMNS`]."""
        per_token = -self.logps.sum() / self.tokens.sum() if len(self.rows) else math.nan
        around = (-self.logps - per_token * self.tokens) / self.tokens.mean()  # the error of a ratio of means
        values = {
            "kl": self.logps - self.ref_logps,
            "entropy": per_token + around,
            "tokens": self.tokens,
            "characters": self.characters,
            "finished": self.finished,
        }
        return {name: found for name, of in values.items() if not math.isnan((found := self.estimate(of)).mean)}

    def measure_by(self, judge: str, opponent: "Samples | None") -> dict[str, Estimate]:
        """Return the means by a judge: `reward`, `sigmoid_reward` (PRO section 4.2) and those of the wins."""
        rewards, won = self.judged(judge, "rewards"), self.judged(judge, "wins")
        found = {"reward": self.estimate(rewards), "sigmoid_reward": self.estimate(sigmoid(rewards))}
        known = ~np.isnan(won)
        if opponent is None or not known.any():
            return found
        longer = self.characters - [num_characters(row["completion"]) for row in self.meet(opponent)]
        outcomes = {"win": won == 1, "tie": won == 0.5, "loss": won == 0, "win_rate": won}
        found |= {name: Estimate.of(of[known], self.prompts[known]) for name, of in outcomes.items()}
        found["lc_win_rate"] = length_controlled_win_rate(won[known], longer[known], self.prompts[known])
        return found

    def minus(self, other: "Samples", judge: str) -> Estimate:
        """Return the paired difference of the mean rewards of each prompt, over prompts where both have one."""
        means = [pd.Series(one.judged(judge, "rewards")).groupby(one.prompts).mean() for one in (self, other)]
        return Estimate.of((means[0] - means[1]).dropna().to_numpy())


@dataclass(frozen=True)
class PolicyEvaluation:
    """What [`evaluate_policy`] found. Standard errors are by prompt.

    Attributes:
        samples (`list[dict]`): One row per completion, as in `samples.jsonl`: `row` (of the prompts), `sample` (of the
            policy on this prompt), `policy`, `prompt`, `completion`, `num_tokens`, `finished`, `logp` and `ref_logp`
            (summed, in nats), and by judge `rewards` (nats) and `wins` (1, 0.5 for a tie, 0).
        judges (`list[str]`): Names of the judges.
        against (`str` or `None`): The policy that is the opponent.
        reference (`str` or `None`): The model from which the KL is measured.
        settings (`dict`): What the evaluation depends on: fingerprints, seed, options.
    """

    samples: list[Row] = field(repr=False)
    judges: list[str]
    against: str | None
    reference: str | None
    settings: Settings = field(repr=False)

    @cached_property
    def num_prompts(self) -> int:
        return len({prompt for of in self.policies.values() for prompt in of.prompts})

    @cached_property
    def policies(self) -> dict[str, Samples]:
        """The samples of each policy."""
        rows: dict[str, list[Row]] = {}
        for row in self.samples:
            rows.setdefault(row["policy"], []).append(row)
        return {name: Samples(of) for name, of in rows.items()}

    @property
    def base(self) -> str | None:
        """The policy whose reward is subtracted from that of the others: the reference, or the opponent."""
        return self.reference if self.reference in self.policies else self.against

    @cached_property
    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """Of each policy, the means of its samples: `kl` (nats per completion), `entropy` (nats per token), `tokens`,
        `characters`, `finished` (share that ended by itself)."""
        return {name: of.measure() for name, of in self.policies.items()}

    @cached_property
    def judged(self) -> dict[str, dict[str, dict[str, Estimate]]]:
        """By judge and policy: `reward` (nats), `sigmoid_reward`, and against the opponent `win`, `tie`, `loss`,
        `win_rate` (a tie counts half) and `lc_win_rate` ([`length_controlled_win_rate`])."""
        opponent = self.policies.get(self.against or "")
        return {
            judge: {
                name: of.measure_by(judge, None if of is opponent else opponent) for name, of in self.policies.items()
            }
            for judge in self.judges
        }

    @cached_property
    def texts(self) -> dict[str, dict[str, float]]:
        """Of each policy, over all its texts, `distinct_1` and `distinct_2`; and if the opponent has one completion
        per prompt, `bleu` against it."""
        found: dict[str, dict[str, float]] = {}
        opponent = self.policies.get(self.against or "")
        targets = {row["row"]: completion_text(row["completion"]) for row in opponent.rows} if opponent else {}
        for name, of in self.policies.items():
            texts = [completion_text(row["completion"]) for row in of.rows]
            found[name] = {f"distinct_{n}": distinct(texts, n) for n in (1, 2)}
            if opponent and of is not opponent and len(targets) == len(opponent.rows):
                try:
                    found[name]["bleu"] = bleu(texts, [targets[row["row"]] for row in of.rows])
                except ImportError as error:
                    logger.warning("BLEU is left out. %s", error)
                    opponent = None
        return found

    def difference(self, policy: str, other: str, judge: str | None = None) -> Estimate:
        """Return the mean reward of a policy minus that of another, paired by prompt; by default of the first judge.

        Its `p_value()` tests whether they are equal.
        """
        return self.policies[policy].minus(self.policies[other], judge or self.judges[0])

    def __str__(self) -> str:
        """Return the numbers as Markdown tables."""
        prompts = self.num_prompts
        parts = [f"{prompts:,} prompts, {len(self.samples):,} completions. Means ± standard errors by prompt."]
        parts += ["So few prompts make standard errors too small."] if prompts < FEW_PROMPTS else []
        base = self.base
        for judge, by_policy in self.judged.items():
            rows = []
            for name, found in by_policy.items():
                wins = " / ".join(f"{100 * found[key].mean:.0f}" for key in ("win", "tie", "loss") if key in found)
                rates = (found.get(key, Estimate(math.nan, math.nan)) for key in ("win_rate", "lc_win_rate"))
                cells = ["" if math.isnan(rate.mean) else as_percentage(rate) for rate in rates]
                cells += [rounded(found["reward"]), rounded(found["sigmoid_reward"])]
                if base:
                    difference = self.difference(name, base, judge)
                    cells += ["", ""] if name == base else [rounded(difference, "+"), _p(difference)]
                rows.append([name, *cells[:1], wins, *cells[1:]])
            header = ["policy", "win rate", "win / tie / loss, %", "length-controlled", "reward", "sigmoid(reward)"]
            header += [f"reward minus {base}", "p"] if base else []
            title = f"Judge: {judge}" + (f", against: {self.against}" if self.against else ", without an opponent")
            parts += [f"## {title}", _without_empty(header, rows)]
            if len(by_policy) > 2:
                pairs = {(one, two): self.difference(one, two, judge) for one, two in permutations(by_policy, 2)}
                printed = {pair: rounded(difference, "+") for pair, difference in pairs.items()}
                matrix = [[one, *(printed.get((one, two), "") for two in by_policy)] for one in by_policy]
                caption = "Reward of the row minus that of the column, paired by prompt:"
                parts += [caption, table(["", *by_policy], matrix)]
        header = ["policy", *(label.format(reference=self.reference) for label in COLUMNS.values())]
        return "\n\n".join([*parts, "## Texts", _without_empty(header, list(map(self._row_of_texts, self.policies)))])

    def _row_of_texts(self, policy: str) -> list[str]:
        cells = {name: rounded(found) for name, found in self.estimates[policy].items()}
        cells |= {name: f"{found:.3g}" for name, found in self.texts[policy].items()}
        if "finished" in cells:
            cells["finished"] = as_percentage(self.estimates[policy]["finished"])
        return [policy, *(cells.get(name, "") for name in COLUMNS)]

    def save(self, folder: str | Path) -> None:
        """Write `evaluation.json` (unknown numbers are null), `.md` and, if matplotlib is installed, `.png`;
        `samples.jsonl`; and the outputs and annotations of each policy in AlpacaEval's layout, in `alpaca_eval/`."""
        folder = Path(folder)
        for name, of in self.policies.items():
            # Another folder for any other name
            of_policy = folder / "alpaca_eval" / quote(name, safe=" ").replace("..", "%2E%2E")
            write_json(of_policy / "model_outputs.json", self._alpaca_outputs(of))
            for judge in self.judges if self.against not in (None, name) else ():
                write_json(
                    of_policy / f"annotations by {quote(judge, safe=' ')}.json", self._alpaca_annotations(of, judge)
                )
        numbers = {
            "against": self.against,
            "reference": self.reference,
            "policies": {
                name: {
                    **{key: asdict(found) for key, found in self.estimates[name].items()},
                    **self.texts[name],
                    "judges": {
                        judge: {
                            **{key: asdict(found) for key, found in by_policy[name].items()},
                            "minus": {other: asdict(self.difference(name, other, judge)) for other in self.policies},
                        }
                        for judge, by_policy in self.judged.items()
                    },
                }
                for name in self.policies
            },
            "settings": self.settings,
        }
        write_json(folder / "evaluation.json", json_numbers(numbers))
        base = self.policies.get(self.base or "")
        ordered = sorted(self.policies.items(), key=lambda policy: policy[1] is not base)  # the base is the first
        shown = completions_side_by_side({name: [*of.rows] for name, of in ordered}) if len(ordered) > 1 else ()
        write_text(folder / "evaluation.md", "\n\n".join([f"# Evaluation\n\n{self}", *shown]) + "\n")
        with plotting(), writing(folder / "evaluation.png") as temporary:
            plot_policies(self, temporary)
        write_lines(folder / "samples.jsonl", self.samples)

    def _alpaca_outputs(self, of: Samples) -> list[Row]:
        return [
            {
                "instruction": instruction(row["prompt"]),
                "output": completion_text(row["completion"]),
                "generator": row["policy"],
            }
            for row in of.rows
        ]

    def _alpaca_annotations(self, of: Samples, judge: str) -> list[Row]:
        """Return annotations with `preference` from 1 (the opponent's `output_1`) to 2 (the policy's `output_2`)."""
        return [
            {
                "instruction": instruction(row["prompt"]),
                "output_1": completion_text(other["completion"]),
                "generator_1": self.against,
                "output_2": completion_text(row["completion"]),
                "generator_2": row["policy"],
                "annotator": judge,
                "preference": None if row["wins"][judge] is None else 1 + row["wins"][judge],
            }
            for row, other in zip(of.rows, of.meet(self.policies[str(self.against)]), strict=True)
        ]


def instruction(prompt: Prompt) -> str:
    """Return the prompt as AlpacaEval has it: the text of a single message, and of several all of them in turn."""
    if isinstance(prompt, str):
        return prompt
    form = "{content}" if len(prompt) == 1 else "{role}: {content}"
    return "\n\n".join(form.format(**message) for message in prompt)


def _p(difference: Estimate) -> str:
    p = difference.p_value()
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _without_empty(header: list[str], rows: list[list[str]]) -> str:
    """Return the table without the columns that are empty in all rows."""
    kept = [place for place in range(len(header)) if any(row[place] for row in rows)]
    return table([header[place] for place in kept], [[row[place] for place in kept] for row in rows])


def plot_policies(evaluation: PolicyEvaluation, path: str | Path) -> None:
    """Draw for each judge the wins, the paired differences of the reward, and its trade against the KL, as a PNG."""
    from matplotlib.figure import Figure

    names, against = list(evaluation.policies), evaluation.against
    base, kl = evaluation.base, [name for name in names if "kl" in evaluation.estimates[name]]
    kinds = [*(["wins"] if against else []), "difference" if base else "reward", *(["kl"] if len(kl) > 1 else [])]
    height = max(2.4, 0.5 * len(names) + 1.2)
    size = (5 * len(kinds), 0.7 + height * len(evaluation.judges))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{evaluation.num_prompts:,} prompts; error bars are 1.96 standard errors by prompt")
    grid = figure.subplots(len(evaluation.judges), len(kinds), squeeze=False)
    for panels, (judge, found) in zip(grid, evaluation.judged.items(), strict=True):
        for axes, kind in zip(panels, kinds, strict=True):
            axes.set_title(judge)
            axes.grid(alpha=0.3)
            if kind == "wins":
                _plot_wins(axes, {name: of for name, of in found.items() if "win_rate" in of}, str(against))
                continue
            for number, name in enumerate(names):
                reward, color = found[name]["reward"], f"C{number % 10}"
                if kind == "difference":
                    reward = evaluation.difference(name, str(base), judge)
                if kind != "kl":
                    axes.errorbar(
                        reward.mean, name, xerr=1.96 * reward.standard_error, fmt="o", capsize=4, color=color
                    )
                elif name in kl:
                    distance = evaluation.estimates[name]["kl"]
                    errors = {"xerr": 1.96 * distance.standard_error, "yerr": 1.96 * reward.standard_error}
                    axes.errorbar(distance.mean, reward.mean, fmt="o", capsize=3, color=color, label=name, **errors)
            if kind == "kl":
                axes.set(xlabel=f"KL from {evaluation.reference} (nats per completion)", ylabel="mean reward (nats)")
                axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
            else:
                axes.invert_yaxis()
                axes.margins(x=0.15, y=0.3)
                axes.set_xlabel(
                    f"reward minus that of {base} (nats)" if kind == "difference" else "mean reward (nats)"
                )
                if kind == "difference":
                    axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
    figure.savefig(path, dpi=120, format="png")


def _plot_wins(axes: Any, found: dict[str, dict[str, Estimate]], against: str) -> None:
    names = list(found)
    start = np.zeros(len(names))
    for key, color in {"win": "#3b75af", "tie": "0.85", "loss": "#eaa9a0"}.items():
        shares = np.array([100 * of[key].mean for of in found.values()])
        axes.barh(names, shares, left=start, color=color, height=0.55, label=key, zorder=2)
        start += shares
    rates = [of["win_rate"] for of in found.values()]
    errors = [196 * rate.standard_error for rate in rates]
    style = {"fmt": "o", "color": "black", "capsize": 4, "markersize": 4, "zorder": 3, "label": "win rate"}
    axes.errorbar([100 * rate.mean for rate in rates], names, xerr=errors, **style)
    axes.axvline(50, color="black", linewidth=0.8, linestyle="--", zorder=2)
    axes.set(xlim=(0, 100), ylim=(len(names) - 0.4, -0.6), xlabel=f"% of comparisons with {against}")
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.08), fontsize="small")
