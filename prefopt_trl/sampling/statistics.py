"""What a sampled dataset looks like: its statistics (counts, rewards, certainty of labels), plot and card."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from huggingface_hub import DatasetCardData

from prefopt_trl.data.formats import EQUAL_REWARDS_HINT
from prefopt_trl.runtime.cards import render
from prefopt_trl.runtime.hub import push_folder
from prefopt_trl.runtime.settings import Settings, dataset_fingerprint, read_json
from prefopt_trl.sampling.options import RANKING, SamplingOptions
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

PUSHED = ["README.md", "manifest.json", "statistics.json", "statistics.png"]
# Not every Arrow file: `Dataset.map` leaves caches beside the data
PUSHED += [f"{folder}/{files}" for folder in ("candidates", "pairs") for files in ("data-*.arrow", "*.json")]

CONFIGS: list[dict[str, Any]] = [
    {"config_name": "pairs", "data_files": "pairs/data-*.arrow", "default": True},
    {"config_name": "candidates", "data_files": "candidates/data-*.arrow"},
]

Numbers = dict[str, np.ndarray]


@dataclass(frozen=True)
class SamplingStatistics:
    """Summary of one sampled dataset; written to `statistics.json` beside it."""

    num_prompts: int  # given
    num_skipped: int  # prompts left out, because no two of the candidates kept that met differ
    num_candidates: int
    num_duplicates: int  # candidates whose text another candidate of the same prompt already had
    num_unfinished: int | None  # candidates that reached `max_new_tokens`; None if given without a column `finished`
    num_pairs: int  # or rankings
    acceptance_rate: float | None  # Theorem 1's, averaged over prompts not skipped; None unless by strategy "rso"
    reward_quantiles: dict[str, list[float]]  # of candidates, accepted, chosen and rejected ones, at `QUANTILES`
    label_probability_before: float  # mean probability the ranker gives its own labels, of random pairs of candidates
    label_probability_after: float  # the same of the pairs made, or of first-round pairs of the rankings
    warning: str | None = None  # where beta is too small for this ranker, or it cannot tell completions apart
    made: str = "pairs"  # or "rankings"
    num_short: int = 0  # prompts with fewer than `num_samples` distinct candidates
    num_without_reward: int = 0  # candidates on which the ranker has no opinion

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
        if self.acceptance_rate is not None:
            lines.append(f"acceptance rate: {self.acceptance_rate:.3f}")
        for name, values in self.reward_quantiles.items():
            lines.append(f"reward of {name}: median {values[3]:.2f}, 5% to 95% {values[1]:.2f} to {values[5]:.2f}")
        lines.append(
            "mean probability the ranker gives to its own labels: "
            f"{self.label_probability_after:.3f} ({self.label_probability_before:.3f} on random candidates)"
        )
        return "\n".join(lines)


def summarize(
    selected: Iterable[SelectedPrompt],
    num_unfinished: int | None,
    options: SamplingOptions,
    temperature: float | None = None,
) -> tuple[SamplingStatistics, Numbers, Numbers]:
    """Summarize what was selected, of one prompt after the other; only their numbers are held in memory.

    `temperature` is that of the ranker that gave the rewards, if it is known; 1 if it was not calibrated.

    Returns:
        [`SamplingStatistics`]; the rewards of candidates, accepted, chosen and rejected completions; and the
        probabilities that the ranker gives to its own labels, in [0.5, 1], on random candidates and on the pairs made.

    Raises:
        ValueError: if all prompts are skipped.
    """
    rewards: dict[str, list[np.ndarray]] = {"candidates": [], "accepted": [], "chosen": [], "rejected": []}
    certainty: dict[str, list[list[float]]] = {"random candidates": [], "pairs made": []}
    num_distinct: list[int] = []
    first_pass: list[float] = []
    num_equal = num_short = num_candidates = 0
    is_ranking = options.pairing == RANKING
    for prompt in selected:
        of_prompt = np.array(prompt.rewards, dtype=float)
        known = of_prompt[~np.isnan(of_prompt)]
        num_distinct.append(prompt.num_distinct)
        num_candidates += len(of_prompt)
        num_equal += prompt.num_distinct > 1 and np.ptp(known) == 0
        rewards["candidates"].append(known)
        if prompt.acceptance_rate is None:  # skipped
            continue
        first_pass.append(prompt.acceptance_rate)
        num_short += len(prompt.accepted) < options.num_samples
        accepted = of_prompt[prompt.accepted]
        ranked = -np.sort(-accepted)
        rewards["accepted"].append(accepted)
        rewards["chosen"].append(ranked[:1] if is_ranking else of_prompt[prompt.chosen])
        rewards["rejected"].append(ranked[1:] if is_ranking else of_prompt[prompt.rejected])
        certainty["random candidates"].append(prompt.random_probabilities)
        certainty["pairs made"].append(prompt.probabilities)
    if not first_pass:
        raise ValueError(
            f"No prompt has candidates that differ among those kept (the most distinct ones of a prompt are "
            f"{max(num_distinct)}). Raise `num_candidates`, `num_samples`, `temperature` or `max_new_tokens`."
        )
    drawn = {name: np.concatenate(values) for name, values in rewards.items()}
    probabilities = {name: np.concatenate(values) for name, values in certainty.items()}
    means = {name: float(values.mean()) if len(values) else 0.5 for name, values in probabilities.items()}
    warnings = []
    if num_equal:
        warnings.append(
            f"All candidates have equal rewards on {num_equal} of {len(num_distinct)} prompts, so their labels are "
            f"arbitrary. Use a ranker that tells completions apart. {EQUAL_REWARDS_HINT}"
        )
    if 2 * num_equal <= len(num_distinct):  # else near coin flips have been explained
        spread = float(np.median([of_prompt.std() for of_prompt in rewards["candidates"] if len(of_prompt)]))
        unlike_logits = scale_warning(options, spread) if temperature == 1 else None
        warnings += filter(None, [label_warning(options, *means.values()) or unlike_logits])
    statistics = SamplingStatistics(
        num_prompts=len(num_distinct),
        num_skipped=len(num_distinct) - len(first_pass),
        num_candidates=num_candidates,
        num_without_reward=num_candidates - len(drawn["candidates"]),
        num_duplicates=len(drawn["candidates"]) - sum(num_distinct),
        num_unfinished=num_unfinished,
        num_pairs=len(drawn["chosen"]),
        acceptance_rate=float(np.mean(first_pass)) if options.strategy == "rso" else None,
        reward_quantiles={name: np.quantile(values, QUANTILES).tolist() for name, values in drawn.items()},
        label_probability_before=means["random candidates"],
        label_probability_after=means["pairs made"],
        warning=" ".join(warnings) or None,
        made="rankings" if is_ranking else "pairs",
        num_short=num_short,
    )
    return statistics, drawn, probabilities


def label_warning(options: SamplingOptions, before: float, after: float) -> str | None:
    """Say what a user should know about the labels, or return None.

    A small beta keeps only candidates that are all good, so their pairs are close. RSO section 3.2 advises that only
    for a ranker one trusts; the labels of a ranker that is unsure of them are mostly noise.

    Args:
        options ([`SamplingOptions`]):
            How completions were kept; a larger `rejection_beta` is a remedy for `"rso"` only.
        before, after (`float`):
            Mean probability the ranker gives to its own labels on random candidates, and on the pairs made.
    """
    beta = options.rejection_beta
    if before < COIN_FLIP:
        return (
            f"The ranker gives its own labels a mean probability of only {before:.2f} on random candidates, so they "
            "are near coin flips, whatever the beta. Measure it with `prefopt-trl evaluate-ranker`: rewards that are "
            "too small for logits need a temperature, and a ranker near chance more training or its own template."
        )
    lost_by_rejection = after < UNSURE and before - after >= LOST_BY_REJECTION
    if options.strategy != "rso" or not lost_by_rejection or np.isinf(beta):
        return None
    return (
        f"`rejection_beta`={beta:g} is too small for this ranker: it gives its own labels a mean probability of "
        f"{after:.2f} after rejection, against {before:.2f} on random candidates, so many labels are near coin flips. "
        f"Raise it, say to {4 * beta if beta > 0 else 1:g}, or use a ranker that tells good completions apart."
    )


def scale_warning(options: SamplingOptions, spread: float) -> str | None:
    """Say what `rejection_beta` means for rewards that are not on the scale of logits, or return None.

    `spread` is the standard deviation of the rewards of a prompt's candidates, in nats.
    """
    beta = options.rejection_beta
    if options.strategy != "rso" or beta == 0 or np.isinf(beta) or SPREAD[0] <= spread <= SPREAD[1]:
        return None
    return (
        f"The rewards of a prompt's candidates have a standard deviation of {spread:.2g} (median over prompts), which "
        "is unlike log-odds of preferences, and the ranker is at temperature 1. With "
        f"`rejection_beta`={beta:g}, a candidate one standard deviation below the best is accepted with probability "
        f"{np.exp(-spread / beta):.2g}. Fit the temperature with `calibrate` or `prefopt-trl evaluate-ranker "
        "--calibrate` (docs/ranker_quality.md)."
    )


def plot_statistics(rewards: Numbers, probabilities: Numbers, path: str | Path) -> None:
    """Draw the rewards and probabilities of [`summarize`] as a PNG."""
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    everything = np.concatenate(list(rewards.values()))
    low, high = np.quantile(everything, [0.001, 0.999])
    bins = np.linspace(low, high if high > low else low + 1, 41).tolist()
    step = partial(Axes.hist, density=True, histtype="step", linewidth=1.8)
    for name, values in rewards.items():
        step(left, values.clip(low, high), bins=bins, label=f"{name} ({len(values):,})")
    left.set(xlabel="reward", ylabel="density", title="Rewards given by the ranker")
    left.legend(frameon=False)
    for name, values in probabilities.items():
        if len(values):  # otherwise the ranker has no opinion on any of these pairs
            step(right, values, bins=np.linspace(0.5, 1, 26).tolist(), label=f"{name}: mean {values.mean():.2f}")
    right.set(xlabel="probability", ylabel="density", title="Probability the ranker gives to its own labels")
    right.set(xlim=(0.5, 1))
    right.legend(frameon=False, loc="upper center")
    figure.savefig(path, dpi=120, format="png")


def dataset_card(settings: Settings, statistics: SamplingStatistics, dataset: Dataset) -> str:
    """Write the README.md of a sampled dataset, by which the Hub and `load_dataset(folder, "pairs")` read it.

    `settings` are those of the manifest, and `dataset` holds the pairs or rankings. The card depends on the arguments
    alone.
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
    card = render("dataset", metadata, settings=settings, statistics=statistics, columns=dataset.column_names)
    return f"{card}\n"


def read_sampled(folder: str | Path) -> tuple[Settings, SamplingStatistics] | None:
    """Return the settings and statistics of a sampled dataset, or None if the folder holds no finished one."""
    manifest = read_json(Path(folder, "manifest.json"))
    if manifest is None or not manifest["finished"]:
        return None
    numbers = read_json(Path(folder, "statistics.json"))
    del numbers["quantiles"]  # the same in all of them
    return manifest["settings"], SamplingStatistics(**numbers)


def push_preference_dataset(
    output_dir: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a finished dataset of [`build_preference_dataset`] to the Hub: pairs, candidates, statistics and card.

    Only what the pipeline has written is uploaded. The card then says how to load it from there. Call it in one
    process.

    Args:
        output_dir (`str` or `Path`):
            Folder of the dataset.
        repo_id (`str`):
            Dataset repository, such as `"my-org/my-pairs"`. It is created if it is missing.
        private (`bool`, *optional*):
            Whether a repository created here is private. By default as the organization has set it.
        token (`str`, *optional*):
            Access token. By default the one you are logged in with.

    Returns:
        `str`: address of the repository.

    Raises:
        ValueError: if `output_dir` holds no finished dataset.
        PushError: if the upload fails, with the command that retries it. The folder stays complete.

    Example:

    ```python
    push_preference_dataset("outputs/pairs", "my-org/my-pairs", private=True)
    ```
    """
    if read_sampled(output_dir) is None:
        raise ValueError(
            f"{output_dir} holds no finished dataset. Give `build_preference_dataset` the same settings and "
            f"output_dir={str(output_dir)!r} to finish it, then push again."
        )

    def write_card(repo_id: str) -> None:
        card = Path(output_dir, "README.md")
        # The first place is the snippet's: settings, which come later, may hold the same words
        place, named = r'load_dataset\("[^"]*", "pairs"', f'load_dataset("{repo_id}", "pairs"'
        card.write_text(re.sub(place, named, card.read_text(encoding="utf-8"), count=1), encoding="utf-8")

    return push_folder(
        output_dir,
        repo_id,
        write_card,
        repo_type="dataset",
        allow_patterns=PUSHED,
        delete_patterns=["candidates/*", "pairs/*"],  # files of an earlier dataset that had more of them
        private=private,
        token=token,
        commit_message="Upload sampled preferences",
    )
