"""Which candidates are kept, which of them meet, and whom the ranker prefers (RSO sections 3.2 and 5)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from prefopt_trl.data.formats import Completion, completion_text
from prefopt_trl.rankers.base import Ranker, check_probabilities, check_rewards
from prefopt_trl.sampling.pairing import Pairing, Pairs, first_round, play, round_robin, tournament
from prefopt_trl.sampling.rejection import acceptance_rate, statistical_rejection_sampling
from prefopt_trl.sampling.statistics import SamplingStatistics, label_warning, reward_quantiles

# Beta of Algorithm 1 that each strategy stands for: its own, and the two limits of RSO section 3.2
STRATEGIES: dict[str, Callable[[float], float]] = {"rso": float, "sft": lambda beta: np.inf, "top-k": lambda beta: 0.0}
PAIRINGS = {"first-round": first_round, "tournament": tournament, "all": round_robin}


@dataclass(frozen=True)
class Selection:
    """Pairs made of scored candidates, their statistics, and the arrays that the statistics summarise."""

    pairs: Dataset
    statistics: SamplingStatistics
    rewards: dict[str, np.ndarray]
    label_probabilities: dict[str, np.ndarray]


def select_and_pair(
    candidates: Dataset, ranker: Ranker, strategy: str, num_samples: int, beta: float, pairing: str, seed: int
) -> Selection:
    """Keep `num_samples` distinct candidates of each prompt, and let the ranker label pairs of them.

    Every prompt has a random stream of its own, made from `seed` and its row.

    Args:
        candidates ([`~datasets.Dataset`]):
            Columns `prompt`, `completions`, `rewards` and optionally `finished`.
        ranker, strategy, num_samples, beta, pairing, seed:
            As in [`build_preference_dataset`].

    Returns:
        [`Selection`].

    Raises:
        ValueError: if no prompt has `num_samples` distinct candidates.
    """
    prompts, completions = list(candidates["prompt"]), list(candidates["completions"])
    rewards = check_rewards(list(candidates["rewards"]), prompts, completions, "The column `rewards`")
    distinct = [_first_occurrences(row) for row in completions]
    rows = [row for row in range(len(prompts)) if len(distinct[row]) >= num_samples]
    if not rows:
        raise ValueError(
            f"No prompt has `num_samples`={num_samples} distinct candidates (the most is {max(map(len, distinct))}). "
            "Raise `num_candidates`, `temperature` or `max_new_tokens`, or lower `num_samples`."
        )
    streams = [np.random.default_rng([seed, row]) for row in rows]

    def play_among(members: list[np.ndarray], make_pairing: Callable[..., Pairing]) -> list[Pairs]:
        """Pairs of each row's members, as indices into the row's candidates, labelled by the ranker."""

        def compare(position: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
            row = [rows[index] for index in position]
            matched = [prompts[index] for index in row]
            firsts = [
                completions[index][members[at][one]] for index, at, one in zip(row, position, first, strict=True)
            ]
            seconds = [
                completions[index][members[at][one]] for index, at, one in zip(row, position, second, strict=True)
            ]
            source = f"{type(ranker).__name__}.compare"
            return check_probabilities(ranker.compare(matched, firsts, seconds), matched, source)

        played = play([make_pairing(num_samples, stream) for stream in streams], compare)
        return [
            pairs._replace(chosen=member[pairs.chosen], rejected=member[pairs.rejected])
            for member, pairs in zip(members, played, strict=True)
        ]

    at_random = [
        stream.choice(distinct[row], num_samples, replace=False) for row, stream in zip(rows, streams, strict=True)
    ]
    before = play_among(at_random, first_round)
    select_beta = STRATEGIES[strategy](beta)
    accepted = [
        distinct[row][
            statistical_rejection_sampling(rewards[row][distinct[row]], num_samples, select_beta, rng=stream)
        ]
        for row, stream in zip(rows, streams, strict=True)
    ]
    after = play_among(accepted, PAIRINGS[pairing])

    columns: dict[str, list[Any]] = {
        name: [] for name in ("prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "label_probability")
    }
    for row, pairs in zip(rows, after, strict=True):
        columns["prompt"] += [prompts[row]] * len(pairs.chosen)
        columns["chosen"] += [completions[row][index] for index in pairs.chosen]
        columns["rejected"] += [completions[row][index] for index in pairs.rejected]
        columns["chosen_reward"] += rewards[row][pairs.chosen].tolist()
        columns["rejected_reward"] += rewards[row][pairs.rejected].tolist()
        columns["label_probability"] += pairs.probability.tolist()

    drawn = {
        "candidates": np.concatenate(rewards),
        "accepted": np.concatenate([rewards[row][kept] for row, kept in zip(rows, accepted, strict=True)]),
        "chosen": np.array(columns["chosen_reward"]),
        "rejected": np.array(columns["rejected_reward"]),
    }
    certainty = {
        "random candidates": np.concatenate([pairs.probability for pairs in before]),
        "pairs made": np.array(columns["label_probability"]),
    }
    means = {name: float(values.mean()) for name, values in certainty.items()}
    first_pass = [acceptance_rate(rewards[row][distinct[row]], select_beta) for row in rows]
    finished = list(candidates["finished"]) if "finished" in candidates.column_names else None
    statistics = SamplingStatistics(
        num_prompts=len(prompts),
        num_skipped=len(prompts) - len(rows),
        num_candidates=sum(map(len, completions)),
        num_duplicates=sum(map(len, completions)) - sum(map(len, distinct)),
        num_unfinished=None if finished is None else sum(row.count(False) for row in finished),
        num_pairs=len(columns["prompt"]),
        acceptance_rate=float(np.mean(first_pass)) if strategy == "rso" else None,
        reward_quantiles={name: reward_quantiles(values) for name, values in drawn.items()},
        label_probability_before=means["random candidates"],
        label_probability_after=means["pairs made"],
        warning=label_warning(strategy, beta, *means.values()),
    )
    return Selection(Dataset.from_dict(columns), statistics, drawn, certainty)


def _first_occurrences(completions: list[Completion]) -> np.ndarray:
    """Indices of the distinct completions: Algorithm 1 counts equal texts once, and rankers do not see outer space."""
    first: dict[str, int] = {}
    for index, completion in enumerate(completions):
        first.setdefault(completion_text(completion).strip(), index)
    return np.array(list(first.values()))
