"""What a ranker says about comparisons that people have made."""

import json
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from prefopt_trl.data.formats import Completion, are_candidates, check_columns
from prefopt_trl.data.loading import normalize_rows
from prefopt_trl.rankers.base import (
    Ranker,
    ask_probabilities,
    ask_rewards,
    check_inputs,
    check_probabilities,
    check_ranker,
    logit,
)
from prefopt_trl.rankers.comparative import ComparativeRanker

SMALLEST_PROBABILITY = 1e-6  # closer to 0 and 1, log-odds are those of this one


@dataclass(frozen=True)
class Compared:
    """A ranker's view of `n` comparisons between a chosen and a rejected completion, as arrays of shape `(n,)`.

    Attributes:
        prompts: The number of the prompt. Equal prompts have equal numbers.
        log_odds: Log-odds that the chosen completion is preferred, in nats, before the ranker's temperature; NaN if
            the ranker has no opinion.
        lengths: Characters of the chosen completion minus those of the rejected one.
        subsets: The value of the column `subset` or `source`. None without one.
        orders: P(chosen preferred) if the chosen completion is shown first, and if it is shown second, before the
            temperature, shape `(n, 2)`. None unless the ranker is a [`ComparativeRanker`].
        places: The row, and the index of the chosen and of the rejected completion in its lists, shape `(n, 3)`.
        names: The column `id` of rows that hold lists of completions, one for each row. None for other rows.
        temperature: The ranker's, one number.
    """

    prompts: np.ndarray
    log_odds: np.ndarray
    lengths: np.ndarray
    subsets: np.ndarray | None
    orders: np.ndarray | None
    places: np.ndarray
    names: list[str] | None
    temperature: float


def ask_comparisons(ranker: Ranker, comparisons: Dataset) -> Compared:
    """Ask a ranker about each comparison once; of lists, about each chosen with each rejected completion.

    Raise the errors of [`evaluate_ranker`].
    """
    check_ranker(ranker)
    rows = normalize_rows(comparisons, "`comparisons`")
    check_columns(rows, ["prompt", "chosen", "rejected"], "`comparisons`")
    are_lists = are_candidates(rows.features["chosen"])
    cells = {name: list(rows[name]) for name in rows.column_names}
    for name in () if are_lists else ("chosen", "rejected"):
        cells[name] = [[completion] for completion in cells[name]]
    places = []
    for row, (chosen, rejected) in enumerate(zip(cells["chosen"], cells["rejected"], strict=True)):
        if not (chosen and rejected):
            raise ValueError(f"Row {row} of `comparisons` has no chosen or no rejected completion. Leave it out.")
        places += [(row, i, j) for i in range(len(chosen)) for j in range(len(rejected))]
    first = [cells["chosen"][row][i] for row, i, _ in places]
    second = [cells["rejected"][row][j] for row, _, j in places]
    columns = {name: [of_rows[row] for row, _, _ in places] for name, of_rows in cells.items()}
    prompts, _, _ = (columns.pop(name) for name in ("prompt", "chosen", "rejected"))

    temperature, orders = getattr(ranker, "temperature", 1.0), None
    if not ranker.draws_baselines:  # rewards do not saturate, as probabilities do
        pairs = list(zip(first, second, strict=True))
        rewards, _ = ask_rewards(ranker, prompts, pairs, columns=columns, may_abstain=True)
        log_odds = temperature * -np.diff(rewards, axis=1)[:, 0]
    elif isinstance(ranker, ComparativeRanker):
        check_inputs(prompts, chosen=first, rejected=second)
        orders = ranker.both_orders(prompts, first, second)
        source = f"{type(ranker).__name__}.both_orders"
        log_odds = _log_odds(check_probabilities(orders.mean(axis=1), prompts, source, ranker.may_abstain))
    else:
        log_odds = temperature * _log_odds(ask_probabilities(ranker, prompts, first, second, columns))

    numbers: dict[str, int] = {}
    number_of_pair = np.array([numbers.setdefault(json.dumps(prompt), len(numbers)) for prompt in prompts])
    if (num_prompts := len(set(number_of_pair[~np.isnan(log_odds)]))) < 2:
        raise ValueError(
            f"The ranker has an opinion on comparisons of {num_prompts} prompts in `comparisons`. Give at least 2, as "
            "standard errors are over prompts."
        )
    subsets = columns.get("subset", columns.get("source"))
    return Compared(
        prompts=number_of_pair,
        log_odds=log_odds,
        lengths=np.array([_length(one) - _length(other) for one, other in zip(first, second, strict=True)]),
        subsets=None if subsets is None else np.array(subsets, dtype=str),
        orders=orders,
        places=np.array(places),
        names=list(map(str, cells.get("id", cells["prompt"]))) if are_lists else None,
        temperature=temperature,
    )


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    return logit(probabilities.clip(SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY))


def _length(completion: Completion) -> int:
    if isinstance(completion, str):
        return len(completion)
    return sum(len(message["content"] or "") for message in completion)
