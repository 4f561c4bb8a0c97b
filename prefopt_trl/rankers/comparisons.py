"""What a ranker says about comparisons that people have made."""

import json
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from prefopt_trl.data.formats import are_candidates, check_columns, num_characters
from prefopt_trl.data.loading import normalize_rows
from prefopt_trl.rankers.base import (
    Ranker,
    ask_rewards,
    check_inputs,
    check_probabilities,
    check_ranker,
)
from prefopt_trl.rankers.comparative import ComparativeRanker


@dataclass(frozen=True)
class Compared:
    """A ranker's view of `n` comparisons between a chosen and a rejected completion, as arrays of shape `(n,)`.

    Attributes:
        log_odds: Log-odds that the chosen completion is preferred, in nats, before the ranker's temperature; NaN if
            the ranker has no opinion.
        prompts: The number of the prompt. Equal prompts have equal numbers.
        rows: The number of the dataset's row. A row of lists has several comparisons.
        lengths: Characters of the chosen completion minus those of the rejected one.
        subsets: The value of the column `subset` or `source`. `"all"` without one.
        orders: P(chosen preferred) if the chosen completion is shown first, and if it is shown second, before the
            temperature, shape `(n, 2)`. None unless the ranker is a [`ComparativeRanker`].
    """

    log_odds: np.ndarray
    prompts: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    subsets: np.ndarray
    orders: np.ndarray | None


def ask_comparisons(ranker: Ranker, comparisons: Dataset) -> Compared:
    """Ask a ranker about each chosen and rejected completion of a row once. Raise as [`evaluate_ranker`] does."""
    check_ranker(ranker)
    dataset = normalize_rows(comparisons, "`comparisons`")
    check_columns(dataset, ["prompt", "chosen", "rejected"], "`comparisons`")
    are_lists, pairs = are_candidates(dataset.features["chosen"]), []
    for row, cells in enumerate(zip(dataset["chosen"], dataset["rejected"], strict=True)):
        chosen, rejected = cells if are_lists else ([cell] for cell in cells)
        if not (chosen and rejected):
            raise ValueError(f"Row {row} of `comparisons` has no chosen or no rejected completion. Leave it out.")
        pairs += [(row, one, other) for one in chosen for other in rejected]
    rows, first, second = map(list, zip(*pairs, strict=True))
    others = dataset.remove_columns(["chosen", "rejected"]).select(rows)
    columns = {name: list(others[name]) for name in others.column_names}
    prompts = columns.pop("prompt")

    temperature, orders = getattr(ranker, "temperature", 1.0), None
    if not ranker.draws_baselines:  # rewards do not saturate, as probabilities do
        both = [[one, other] for _, one, other in pairs]
        rewards, _ = ask_rewards(ranker, prompts, both, columns=columns, may_abstain=True)
        log_odds = temperature * -np.diff(rewards, axis=1)[:, 0]
    elif isinstance(ranker, ComparativeRanker):
        check_inputs(prompts, chosen=first, rejected=second)
        orders = ranker.both_orders(prompts, first, second)
        source = f"{type(ranker).__name__}.both_orders"
        check_probabilities(orders.mean(axis=1), prompts, source, ranker.may_abstain)
        log_odds = ranker.log_odds(orders)
    else:
        alone = [[one] for one in first]
        rewards, _ = ask_rewards(ranker, prompts, alone, baselines=second, columns=columns, may_abstain=True)
        log_odds = temperature * np.concatenate(rewards)

    number_of: dict[str, int] = {}
    numbers = np.array([number_of.setdefault(json.dumps(prompt), len(number_of)) for prompt in prompts])
    if (num_prompts := len(set(numbers[~np.isnan(log_odds)]))) < 2:
        raise ValueError(
            f"The ranker has an opinion on comparisons of {num_prompts} prompts in `comparisons`. Give at least 2, as "
            "standard errors are over prompts."
        )
    lengths = np.array([num_characters(one) - num_characters(other) for _, one, other in pairs])
    subsets = np.array(columns.get("subset", columns.get("source", ["all"] * len(rows))), dtype=str)
    return Compared(log_odds, numbers, np.array(rows), lengths, subsets, orders)
