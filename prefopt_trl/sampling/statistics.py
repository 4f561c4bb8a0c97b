"""What a sampled dataset looks like: its statistics (counts, rewards, certainty of labels), plot and card."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from huggingface_hub import DatasetCardData

from prefopt_trl.data.formats import EQUAL_REWARDS_HINT, Completion, Prompt, Row, num_characters
from prefopt_trl.runtime.cards import code, render
from prefopt_trl.runtime.settings import Settings, dataset_fingerprint, read_json
from prefopt_trl.sampling.options import BEST, RANKING, SamplingOptions
from prefopt_trl.sampling.rejection import CERTAINTY_KEPT, effective_sample_size
from prefopt_trl.sampling.selection import SelectedPrompt

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

# Labels the ranker itself gives less than this much above a coin flip, on average, are mostly noise; and it is
# rejection that made them so where the pairs were clearly surer before it.
UNSURE = 0.65
LOST_BY_REJECTION = 0.05

# Of two completions that are one standard deviation apart, logits of people's preferences prefer one with a
# probability between 0.525 and 0.993. Nearly certain or nearly equal ones on most prompts are another scale.
SPREAD = (0.1, 5.0)

# A ranker that is no surer than this of random pairs has learned next to nothing
COIN_FLIP = 0.55

# Chosen completions are too long if they are by this share of the rejected ones' mean, which a reader of two texts
# notices, and by this many standard errors over prompts, which chance does not reach.
MUCH_LONGER = 0.2
SURELY_LONGER = 3.0

# Words of the text and the figure, for names in `statistics.json`
NAMES = {
    "pairs": {"accepted": "kept"},
    "completions": {"accepted": "kept", "chosen": "best", "rejected": "other kept", "pairs made": "pairs kept"},
    "rankings": {"accepted": "kept", "chosen": "ranked first", "rejected": "ranked lower", "pairs made": "pairs kept"},
}

# Okabe and Ito's, which the color-blind tell apart; of candidates, kept, chosen and rejected completions
COLORS = ("0.6", "#0072B2", "#009E73", "#D55E00")

EXAMPLES = 5  # rows of the dataset in its card
EXAMPLE_CHARACTERS = 500  # of a text there

CONFIGS: list[dict[str, Any]] = [
    {"config_name": "pairs", "data_files": "pairs/data-*.arrow", "default": True},
    {"config_name": "candidates", "data_files": "candidates/data-*.arrow"},
]


class Numbers(NamedTuple):
    """What [`plot_statistics`] draws; arrays of shape `(n,)`, by the names in `statistics.json`."""

    rewards: dict[str, np.ndarray]  # of candidates, accepted, chosen and rejected completions, in nats
    lengths: dict[str, np.ndarray]  # of the same completions, in characters
    probabilities: dict[str, np.ndarray]  # that the ranker gives to its own labels, in [0.5, 1]
    acceptance_rates: np.ndarray  # of each prompt not skipped, in [0, 1]


@dataclass(frozen=True)
class SamplingStatistics:
    """Summary of one sampled dataset; written to `statistics.json` beside it."""

    num_prompts: int  # given
    num_skipped: int  # prompts that make nothing, mostly because no two of the candidates kept that met differ
    num_candidates: int
    num_duplicates: int  # candidates whose text another candidate of the same prompt already had
    num_unfinished: int | None  # candidates that reached `max_new_tokens`; None if given without a column `finished`
    num_pairs: int  # or rankings
    acceptance_rate: float | None  # Theorem 1's, averaged over prompts not skipped; None unless by strategy "rso"
    reward_quantiles: dict[str, list[float]]  # of candidates, accepted, chosen and rejected ones, at `QUANTILES`
    label_probability_before: float  # mean probability the ranker gives its own labels, of random pairs of candidates
    label_probability_after: float  # the same of the pairs made, or of first-round pairs of the rankings
    warning: str | None = None  # where beta is too small for this ranker, or it cannot tell completions apart
    made: str = "pairs"  # or "rankings", or "completions", the best of n
    num_short: int = 0  # prompts with fewer than `num_samples` distinct candidates
    num_without_reward: int = 0  # candidates on which the ranker has no opinion
    # Of those with rewards, in characters, and the acceptance rates of prompts; empty in files of earlier versions
    length_quantiles: dict[str, list[float]] = field(default_factory=dict)
    acceptance_quantiles: list[float] = field(default_factory=list)
    effective_size: float | None = None  # of the optimal policy's samples that candidates are worth, mean over prompts
    num_left_out: int = 0  # of the prompts skipped, by a pairing that found no two different rewards
    num_outside_margins: int = 0  # pairs left out by `min_margin` and `max_margin`
    beta_quantiles: list[float] = field(default_factory=list)  # over prompts, of `rejection_beta="auto"`

    def as_dict(self) -> Settings:
        return {**asdict(self), "quantiles": list(QUANTILES)}

    def __str__(self) -> str:
        lines = [
            f"{self.num_pairs} {self.made} from {self.num_prompts - self.num_skipped} of {self.num_prompts} prompts",
            f"candidates: {self.num_candidates}, of which {self.num_duplicates} repeat another"
            + ("" if self.num_unfinished is None else f" and {self.num_unfinished} were cut at max_new_tokens"),
            *([f"candidates without a reward: {self.num_without_reward}"] if self.num_without_reward else []),
            f"prompts skipped, without two different candidates that have a reward: {self.num_skipped}",
            f"prompts with fewer distinct candidates than num_samples: {self.num_short}",
        ]
        if self.num_left_out or self.num_outside_margins:
            lines.append(
                f"left out: {self.num_left_out} prompts by pairing, {self.num_outside_margins} pairs by margins"
            )
        if self.acceptance_rate is not None:
            lines.append(f"acceptance rate: {self.acceptance_rate:.3f}")
            if rates := self.acceptance_quantiles:
                lines[-1] += f", of prompts 5% to 95% {rates[1]:.3f} to {rates[5]:.3f}"
        if betas := self.beta_quantiles:
            lines.append(
                f"rejection_beta of a prompt: median {betas[3]:.2g}, 5% to 95% {betas[1]:.2g} to {betas[5]:.2g}; the "
                f"smallest at which labels keep {CERTAINTY_KEPT:.0%} of their certainty on random candidates, and the "
                "effective sample size without a correction is num_samples or more (64 if none is)"
            )
        if self.effective_size is not None:
            lines.append(f"effective sample size of a prompt's candidates: {self.effective_size:.1f}")
        for what, found, digits in (("reward", self.reward_quantiles, 2), ("characters", self.length_quantiles, 0)):
            for name, values in found.items():
                low, median, high = (f"{values[at]:.{digits}f}" for at in (1, 3, 5))
                lines.append(
                    f"{what} of {NAMES[self.made].get(name, name)}: median {median}, 5% to 95% {low} to {high}"
                )
        lines.append(
            "mean probability the ranker gives to its own labels: "
            f"{self.label_probability_after:.3f} ({self.label_probability_before:.3f} on random candidates)"
        )
        return "\n".join(lines)


def summarize(
    selected: Iterable[tuple[Row, SelectedPrompt]], options: SamplingOptions, temperature: float | None = None
) -> tuple[SamplingStatistics, Numbers]:
    """Summarize what was selected of each row of candidates, with the [`Numbers`] to draw, all that memory holds.

    `temperature` is that of the ranker that gave the rewards, if it is known; 1 if it was not calibrated. Raise
    `ValueError` if all prompts are skipped.
    """
    rewards: dict[str, list[np.ndarray]] = {"candidates": [], "accepted": [], "chosen": [], "rejected": []}
    lengths: dict[str, list[np.ndarray]] = {name: [] for name in rewards}
    certainty: dict[str, list[list[float]]] = {"random candidates": [], "pairs made": []}
    num_distinct: list[int] = []
    first_pass: list[float] = []
    sizes, plain_sizes = list[float](), list[float]()  # the latter without a correction that there is
    betas = list[float]()
    num_equal = num_short = num_candidates = num_left_out = num_outside = 0
    num_unfinished: int | None = None
    is_ranking = options.pairing in (RANKING, BEST)
    for row, prompt in selected:
        of_prompt = prompt.penalized
        characters = np.array(list(map(num_characters, row["completions"])), dtype=float)
        is_known = ~np.isnan(of_prompt)
        num_distinct.append(prompt.num_distinct)
        num_candidates += len(of_prompt)
        if "finished" in row:
            num_unfinished = (num_unfinished or 0) + row["finished"].count(False)
        if "log_ratios" in row and prompt.effective_size is not None and prompt.beta is not None:
            plain_sizes.append(effective_sample_size(of_prompt[is_known], prompt.beta))
        num_left_out, num_outside = num_left_out + prompt.is_left_out, num_outside + prompt.num_outside
        num_equal += not prompt.is_left_out and prompt.num_distinct > 1 and np.ptp(of_prompt[is_known]) == 0
        rewards["candidates"].append(of_prompt[is_known])
        lengths["candidates"].append(characters[is_known])
        if prompt.acceptance_rate is None:  # skipped
            continue
        first_pass.append(prompt.acceptance_rate)
        betas += [] if prompt.beta is None else [prompt.beta]
        sizes += [] if prompt.effective_size is None else [prompt.effective_size]
        num_short += len(prompt.accepted) < options.num_samples
        ranked = sorted(prompt.accepted, key=lambda index: -of_prompt[index])  # in the order of `rank`
        chosen, rejected = (ranked[:1], ranked[1:]) if is_ranking else (prompt.chosen, prompt.rejected)
        for name, indices in (("accepted", prompt.accepted), ("chosen", chosen), ("rejected", rejected)):
            rewards[name].append(of_prompt[indices])
            lengths[name].append(characters[indices])
        certainty["random candidates"].append(prompt.random_probabilities)
        certainty["pairs made"].append(prompt.probabilities)
    if not first_pass:
        raise ValueError(
            f"No prompt has candidates that differ among those kept (the most distinct ones of a prompt are "
            f"{max(num_distinct)}). Raise `num_candidates`, `num_samples`, `temperature` or `max_new_tokens`. (The "
            f"pairing left out {num_left_out} prompts with equal rewards, and the margins {num_outside} pairs.)"
        )
    every = [{name: np.concatenate(values) for name, values in one.items()} for one in (rewards, lengths, certainty)]
    drawn = Numbers(every[0], every[1], every[2], np.array(first_pass))
    means = {name: float(values.mean()) if len(values) else 0.5 for name, values in drawn.probabilities.items()}
    is_automatic = np.isnan(options.effective_beta)
    beta_quantiles = np.quantile(betas, QUANTILES, method="nearest").tolist() if is_automatic else []
    warnings: list[str | None] = []
    if num_equal:
        warnings.append(
            f"All candidates have equal rewards on {num_equal} of {len(num_distinct)} prompts, so their labels are "
            f"arbitrary. Use a ranker that tells completions apart. {EQUAL_REWARDS_HINT}"
        )
    if 2 * num_equal <= len(num_distinct) and options.pairing != "correct-wrong":  # else coin flips have a reason
        spread = float(np.median([of_prompt.std() for of_prompt in rewards["candidates"] if len(of_prompt)]))
        beta = beta_quantiles[3] if beta_quantiles else options.effective_beta
        unlike_logits = scale_warning(beta, spread) if temperature == 1 else None
        warnings.append(label_warning(options, *means.values()) or unlike_logits)
    if plain_sizes:
        warnings.append(correction_warning(options, float(np.mean(sizes)), float(np.mean(plain_sizes))))
    of_prompts = (np.array([values.mean() for values in lengths[name]]) for name in ("chosen", "rejected"))
    warnings.append(length_warning(*of_prompts))
    statistics = SamplingStatistics(
        num_prompts=len(num_distinct),
        num_skipped=len(num_distinct) - len(first_pass),
        num_candidates=num_candidates,
        num_without_reward=num_candidates - len(drawn.rewards["candidates"]),
        num_duplicates=len(drawn.rewards["candidates"]) - sum(num_distinct),
        num_unfinished=num_unfinished,
        num_pairs=len(drawn.rewards["chosen"]),
        acceptance_rate=float(np.mean(first_pass)) if options.strategy == "rso" else None,
        reward_quantiles={name: np.quantile(values, QUANTILES).tolist() for name, values in drawn.rewards.items()},
        label_probability_before=means["random candidates"],
        label_probability_after=means["pairs made"],
        warning=" ".join(filter(None, warnings)) or None,
        made={RANKING: "rankings", BEST: "completions"}.get(options.pairing, "pairs"),
        num_short=num_short,
        length_quantiles={name: np.quantile(values, QUANTILES).tolist() for name, values in drawn.lengths.items()},
        acceptance_quantiles=np.quantile(first_pass, QUANTILES).tolist() if options.strategy == "rso" else [],
        effective_size=float(np.mean(sizes)) if sizes else None,
        num_left_out=num_left_out,
        num_outside_margins=num_outside,
        beta_quantiles=beta_quantiles,
    )
    return statistics, drawn


def label_warning(options: SamplingOptions, before: float, after: float) -> str | None:
    """Say what a user should know about the labels, or return None.

    A small beta keeps only candidates that are all good, so their pairs are close. RSO section 3.2 advises that only
    for a ranker one trusts; the labels of a ranker that is unsure of them are mostly noise.

    `before` and `after` are the mean probability the ranker gives to its own labels, on random candidates and on the
    pairs made.
    """
    beta = options.effective_beta
    if before < COIN_FLIP:
        return (
            f"The ranker gives its own labels a mean probability of only {before:.2f} on random candidates, so they "
            "are near coin flips, whatever the beta. Measure it with `prefopt-trl evaluate-ranker`: rewards that are "
            "too small for logits need a temperature, and a ranker near chance more training or its own template."
        )
    lost_by_rejection = after < UNSURE and before - after >= LOST_BY_REJECTION
    if options.strategy != "rso" or not lost_by_rejection or not np.isfinite(beta):
        return None
    return (
        f"`rejection_beta`={beta:g} is too small for this ranker: it gives its own labels a mean probability of "
        f"{after:.2f} after rejection, against {before:.2f} on random candidates, so many labels are near coin flips. "
        f"Raise it, say to {4 * beta if beta > 0 else 1:g}, or use a ranker that tells good completions apart."
    )


def correction_warning(options: SamplingOptions, effective_size: float, plain: float) -> str | None:
    """Say that the importance correction is mostly noise, or return None; `plain` is the size without it."""
    if effective_size >= min(options.num_samples, 0.8 * plain):
        return None
    return (
        f"Corrected for the policy that was sampled, a prompt's {options.num_candidates} candidates are worth "
        f"{effective_size:.1f} samples of the optimal policy ({plain:.1f} without the correction), so most of the "
        f"`num_samples`={options.num_samples} kept are noise. Raise `rejection_beta`, or set a `proposal_clip`."
    )


def scale_warning(beta: float, spread: float) -> str | None:
    """Say what `rejection_beta` means for rewards that are not on the scale of logits, or return None.

    `beta` is infinite with random samples, and 0 with the top ones. `spread` is the standard deviation of the rewards
    of a prompt's candidates, in nats.
    """
    if beta == 0 or np.isinf(beta) or SPREAD[0] <= spread <= SPREAD[1]:
        return None
    return (
        f"The rewards of a prompt's candidates have a standard deviation of {spread:.2g} (median over prompts), which "
        "is unlike log-odds of preferences, and the ranker is at temperature 1. With "
        f"`rejection_beta`={beta:g}, a candidate one standard deviation below the best is accepted with probability "
        f"{np.exp(-spread / beta):.2g}. Fit the temperature with `calibrate` or `prefopt-trl evaluate-ranker "
        "--calibrate` (docs/ranker_quality.md)."
    )


def length_warning(chosen: np.ndarray, rejected: np.ndarray) -> str | None:
    """Say that chosen completions are much longer, or return None; mean lengths in characters, `(num_prompts,)`."""
    if len(chosen) < 2:
        return None
    standard_error = (chosen - rejected).std(ddof=1) / len(chosen) ** 0.5
    if (chosen - rejected).mean() <= max(MUCH_LONGER * rejected.mean(), SURELY_LONGER * standard_error):
        return None
    return (
        f"The completions that the ranker prefers are much longer than the others: {chosen.mean():.0f} against "
        f"{rejected.mean():.0f} characters on average. A policy trained on them will write more. If that is not what "
        "you want, check whether the ranker loves length with `prefopt-trl evaluate-ranker`, and set `length_penalty`."
    )


def plot_statistics(statistics: SamplingStatistics, numbers: Numbers, options: SamplingOptions, path: Path) -> None:
    """Draw the cumulative distributions of [`summarize`] as a PNG; they need no bins."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, str, str, dict[str, np.ndarray], Callable[[np.ndarray], Any], str]] = [
        ("Rewards", "reward (nats)", "completions", numbers.rewards, np.median, ",.2f"),
        ("Lengths", "length (characters)", "completions", numbers.lengths, np.median, ",.0f"),
        ("Certainty of labels", "probability (0.5: coin flip)", "pairs", numbers.probabilities, np.mean, ".2f"),
    ]
    is_rso = options.strategy == "rso"
    if is_rso:
        rates = {"prompts": numbers.acceptance_rates}
        panels.append(("Acceptance by prompt", "acceptance rate (Theorem 1)", "prompts", rates, np.mean, ".3f"))
    shape, size = ((2, 2), (11, 9.5)) if is_rso else ((1, 3), (15, 5))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(
        f"{statistics.num_pairs:,} {statistics.made} from {statistics.num_prompts - statistics.num_skipped:,} of "
        f"{statistics.num_prompts:,} prompts ({statistics.num_candidates:,} candidates), strategy {options.strategy}"
        + (f" with beta {options.rejection_beta}" if is_rso else "")
    )
    drawn = figure.subplots(*shape).flatten()
    for axes, (title, label, whole, curves, average, digits) in zip(drawn, panels, strict=True):
        for place, (name, values) in enumerate(curves.items()):
            if len(values):  # otherwise the ranker has no opinion on any of these pairs
                shown = f"{NAMES[statistics.made].get(name, name)}: {average.__name__} {average(values):{digits}}"
                # A thousand of the values give the same picture as millions
                thinned = np.sort(values)[np.linspace(0, len(values) - 1, min(len(values), 1000)).round().astype(int)]
                axes.ecdf(thinned, label=shown, color=COLORS[place], linewidth=3.4 - 0.7 * place)  # equal curves show
        axes.set(title=title, xlabel=label, ylabel=f"share of {whole} at or below")
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize="small", frameon=False)
    for axes, curves in zip(drawn, (numbers.rewards, numbers.lengths), strict=False):
        values = curves["candidates"]
        low, high = np.quantile(values, [0.05, 0.95])
        low, high = low - (high - low), high + (high - low)
        # Outliers leave the panel, as they would squeeze the curves into one line. Normal values have none.
        if low < high and (outside := int(np.sum((values < low) | (values > high)))):
            axes.set_xlim(max(low, values.min()), min(high, values.max()))
            axes.set_xlabel(f"{axes.get_xlabel()}, outside: {outside:,} of {len(values):,} candidates")
    drawn[2].set_xlim(0.49, 1.01)
    drawn[2].axvline(0.5, color="black", linestyle=":")
    drawn[-1].set_xlim(left=0 if is_rso else None)
    figure.savefig(path, dpi=120, format="png")


def dataset_card(settings: Settings, statistics: SamplingStatistics, dataset: Dataset, has_plot: bool = True) -> str:
    """Write the README.md of a sampled dataset, by which the Hub and `load_dataset(folder, "pairs")` read it.

    `settings` are those of the manifest, `dataset` holds the pairs or rankings, and `has_plot` says whether
    `statistics.png` was drawn. The card depends on the arguments alone.
    """
    # `load_dataset` finds a folder in its cache by these lines, and not by what is in the folder: without the
    # fingerprint, a dataset that was made anew in the same place would be read as it was before
    content = [settings, statistics.as_dict(), dataset_fingerprint(dataset)]
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    metadata = DatasetCardData(
        configs=[{**config, "description": f"Fingerprint {fingerprint}"} for config in CONFIGS],
        tags=["trl", "prefopt-trl", "preference", settings["strategy"], settings["pairing"]],
        pretty_name=f"Sampled preferences ({statistics.made})",
    )
    shown = {"columns": dataset.column_names, "examples": example_rows(dataset), "has_plot": has_plot}
    card = render("dataset", metadata, settings=settings, statistics=statistics, **shown)
    return f"{card}\n"


def example_rows(dataset: Dataset) -> list[list[str]]:
    """Return table rows (what, reward, text) of the first rows of `dataset` with different prompts."""
    first: dict[str, Row] = {}
    for row in dataset:
        first.setdefault(json.dumps(row["prompt"]), row)
        if len(first) == EXAMPLES:
            break
    rows = []
    for row in first.values():
        rows.append(["**prompt**", "", shortened(row["prompt"])])
        if "chosen" in row:
            texts = [(name, row[f"{name}_reward"], row[name]) for name in ("chosen", "rejected")]
        elif "completion" in row:
            texts = [("best", row["reward"], row["completion"])]
        else:
            texts = [(f"rank {at + 1}", reward, row["completions"][at]) for at, reward in enumerate(row["rewards"])]
        rows += [[name, f"{reward:.2f}", shortened(text)] for name, reward, text in texts]
    return rows


def shortened(value: Prompt | Completion) -> str:
    """Format a text as code, with a sign for a line break; of a long one the beginning, and its length."""
    text = value if isinstance(value, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in value)
    text = text.strip()
    shown = code(" ⏎ ".join(text[:EXAMPLE_CHARACTERS].splitlines())) if text else "(empty)"
    return shown if len(text) <= EXAMPLE_CHARACTERS else f"{shown} … ({len(text):,} characters)"


def read_sampled(folder: str | Path) -> tuple[Settings, SamplingStatistics] | None:
    """Return the settings and statistics of a sampled dataset, or None if the folder holds no finished one."""
    manifest = read_json(Path(folder, "manifest.json"))
    if manifest is None or not manifest["finished"]:
        return None
    numbers = read_json(Path(folder, "statistics.json"))
    del numbers["quantiles"]  # the same in all of them
    return manifest["settings"], SamplingStatistics(**numbers)
