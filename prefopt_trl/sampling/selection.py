"""Which candidates are kept, which of them meet, and whom the ranker prefers (RSO sections 3.2 and 5)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset

from prefopt_trl.data.formats import Completion, Prompt, completion_text
from prefopt_trl.rankers.base import Ranker, check_probabilities, check_rewards
from prefopt_trl.sampling.pairing import Pairing, Pairs, first_round, play, round_robin, tournament
from prefopt_trl.sampling.rejection import acceptance_rate, statistical_rejection_sampling
from prefopt_trl.sampling.statistics import SamplingStatistics, label_warning, reward_quantiles

# Beta of Algorithm 1 that each strategy stands for: its own, and the two limits of RSO section 3.2
STRATEGIES: dict[str, Callable[[float], float]] = {"rso": float, "sft": lambda beta: np.inf, "top-k": lambda beta: 0.0}
PAIRINGS = {"first-round": first_round, "tournament": tournament, "all": round_robin}
NUM_PAIRS: dict[str, Callable[[int], int]] = {
    "first-round": lambda n: n // 2,
    "tournament": lambda n: n - 1,
    "all": lambda n: n * (n - 1) // 2,
}
RANKING = "ranking"  # in place of a pairing: the kept candidates are ranked by reward
# Columns of candidates, and of the pairs made of them: any other is the user's, and is kept
OWN_COLUMNS = {"prompt", "completions", "rewards", "finished", "chosen", "rejected"}


@dataclass(frozen=True)
class Selection:
    """Pairs or rankings made of scored candidates, their statistics, and the arrays that the statistics summarise."""

    pairs: Dataset
    statistics: SamplingStatistics
    rewards: dict[str, np.ndarray]
    label_probabilities: dict[str, np.ndarray]


def check_selection(pairing: str, num_samples: int, beta: float, num_candidates: int | None) -> None:
    """Refuse what could not be selected; `num_candidates` is None where prompts come with candidates of their own.

    Raises:
        ValueError: naming the argument.
    """
    if pairing not in (*PAIRINGS, RANKING):
        raise ValueError(f"`pairing` must be one of {', '.join(PAIRINGS)} and {RANKING}, got {pairing!r}.")
    if num_samples < 2 or (num_candidates is not None and num_samples > num_candidates):
        raise ValueError(
            f"`num_samples`={num_samples} must be at least 2, to make a pair, and at most "
            f"`num_candidates`={num_candidates}."
        )
    if not beta >= 0:
        raise ValueError(f"`beta` must be at least 0, got {beta}. The paper uses 0.5.")


def select_and_pair(
    candidates: Dataset, ranker: Ranker, strategy: str, num_samples: int, beta: float, pairing: str, seed: int
) -> Selection:
    """Keep `num_samples` distinct candidates of each prompt, and let the ranker label pairs of them, or rank them.

    Every prompt has a random stream of its own, made from `seed` and its row. Columns of `candidates` other than those
    named below are kept.

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
    distinct = [first_occurrences(row) for row in completions]
    rows = [row for row in range(len(prompts)) if len(distinct[row]) >= num_samples]
    if not rows:
        raise ValueError(
            f"No prompt has `num_samples`={num_samples} distinct candidates (the most is {max(map(len, distinct))}). "
            "Raise `num_candidates`, `temperature` or `max_new_tokens`, or lower `num_samples`."
        )
    streams = [np.random.default_rng([seed, row]) for row in rows]
    label = partial(label_pairs, ranker, [prompts[row] for row in rows], [completions[row] for row in rows])

    at_random = [
        stream.choice(distinct[row], num_samples, replace=False) for row, stream in zip(rows, streams, strict=True)
    ]
    before = label(at_random, first_round, streams)
    select_beta = STRATEGIES[strategy](beta)
    accepted = [
        accept(rewards[row], distinct[row], num_samples, select_beta, stream)
        for row, stream in zip(rows, streams, strict=True)
    ]
    # A ranking needs no labels; those of first-round pairs say how sure the ranker is of it
    after = label(accepted, first_round if pairing == RANKING else PAIRINGS[pairing], streams)

    made: list[dict[str, Any]] = []
    chosen_rewards: list[float] = []
    rejected_rewards: list[float] = []
    others = [name for name in candidates.column_names if name not in OWN_COLUMNS]
    for row, kept, pairs in zip(rows, accepted, after, strict=True):
        kept_columns = {"prompt": prompts[row], **{name: candidates[row][name] for name in others}}
        if pairing == RANKING:
            ranking = rank(completions[row], rewards[row], kept)
            made.append({**kept_columns, **ranking})
            chosen_rewards.append(ranking["rewards"][0])
            rejected_rewards += ranking["rewards"][1:]
            continue
        for chosen, rejected, probability in zip(*pairs, strict=True):
            chosen_rewards.append(float(rewards[row][chosen]))
            rejected_rewards.append(float(rewards[row][rejected]))
            made.append(
                {
                    **kept_columns,
                    "chosen": completions[row][chosen],
                    "rejected": completions[row][rejected],
                    "chosen_reward": chosen_rewards[-1],
                    "rejected_reward": rejected_rewards[-1],
                    "label_probability": float(probability),
                }
            )

    drawn = {
        "candidates": np.concatenate(rewards),
        "accepted": np.concatenate([rewards[row][kept] for row, kept in zip(rows, accepted, strict=True)]),
        "chosen": np.array(chosen_rewards),
        "rejected": np.array(rejected_rewards),
    }
    certainty = {
        "random candidates": np.concatenate([pairs.probability for pairs in before]),
        "pairs made": np.concatenate([pairs.probability for pairs in after]),
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
        num_pairs=len(made),
        acceptance_rate=float(np.mean(first_pass)) if strategy == "rso" else None,
        reward_quantiles={name: reward_quantiles(values) for name, values in drawn.items()},
        label_probability_before=means["random candidates"],
        label_probability_after=means["pairs made"],
        warning=label_warning(strategy, beta, *means.values()),
        made="rankings" if pairing == RANKING else "pairs",
    )
    columns = {name: [row[name] for row in made] for name in made[0]}
    return Selection(Dataset.from_dict(columns), statistics, drawn, certainty)


def accept(
    rewards: np.ndarray, distinct: np.ndarray, num_samples: int, beta: float, stream: np.random.Generator
) -> np.ndarray:
    """Indices of `num_samples` candidates of one prompt, kept by rejection sampling among the distinct ones."""
    return distinct[statistical_rejection_sampling(rewards[distinct], num_samples, beta, rng=stream)]


def rank(completions: Sequence[Completion], rewards: np.ndarray, kept: np.ndarray) -> dict[str, list[Any]]:
    """Columns `completions` and `rewards` of one prompt's kept candidates, best first."""
    best_first = kept[np.argsort(-rewards[kept], kind="stable")]
    return {"completions": [completions[index] for index in best_first], "rewards": rewards[best_first].tolist()}


def label_pairs(
    ranker: Ranker,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    members: Sequence[np.ndarray],
    make_pairing: Callable[..., Pairing],
    streams: Sequence[np.random.Generator],
) -> list[Pairs]:
    """Pairs of each prompt's `members` (indices into its completions), as such indices too, labelled by the ranker."""

    def compare(position: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        matched = [prompts[at] for at in position]
        firsts = [completions[at][members[at][one]] for at, one in zip(position, first, strict=True)]
        seconds = [completions[at][members[at][one]] for at, one in zip(position, second, strict=True)]
        source = f"{type(ranker).__name__}.compare"
        return check_probabilities(ranker.compare(matched, firsts, seconds), matched, source)

    played = play(
        [make_pairing(len(member), stream) for member, stream in zip(members, streams, strict=True)], compare
    )
    return [
        pairs._replace(chosen=member[pairs.chosen], rejected=member[pairs.rejected])
        for member, pairs in zip(members, played, strict=True)
    ]


def first_occurrences(completions: Sequence[Completion]) -> np.ndarray:
    """Indices of the distinct completions: Algorithm 1 counts equal texts once, and rankers do not see outer space."""
    first: dict[str, int] = {}
    for index, completion in enumerate(completions):
        first.setdefault(completion_text(completion).strip(), index)
    return np.array(list(first.values()))
