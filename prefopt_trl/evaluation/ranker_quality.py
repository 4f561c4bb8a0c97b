"""How far to trust a ranker: its verdicts against comparisons that people have made."""

import numpy as np
from datasets import Dataset

from prefopt_trl.evaluation.policy import Estimate
from prefopt_trl.evaluation.ranker_report import Bin, RankerQuality
from prefopt_trl.rankers.base import Ranker, sigmoid
from prefopt_trl.rankers.comparisons import Compared, ask_comparisons

NUM_BINS = 5
MANY_COMPARISONS = 500  # from which there are twice as many bins


def evaluate_ranker(ranker: Ranker, comparisons: Dataset) -> RankerQuality:
    """Measure a ranker on comparisons between a chosen and a rejected completion. It is asked about each once.

    Args:
        ranker ([`Ranker`]):
            Any ranker. Its temperature is in effect.
        comparisons ([`~datasets.Dataset`]):
            Columns `prompt`, `chosen` and `rejected`, plain or conversational, or HH-RLHF transcripts; at least 2
            prompts, with any number of rows each. A column `subset` or `source` gives accuracies by its values. Other
            columns are passed to rankers that read them. In RewardBench 2's layout, `chosen` and `rejected` are lists
            of completions, and each chosen one is compared to each rejected one.

    Returns:
        [`RankerQuality`]: print it, or `save` it as a report with plots. Comparisons on which the ranker has no
        opinion are counted and left out.

    Raises:
        TypeError: if an argument is not a ranker or not a [`~datasets.Dataset`].
        ValueError: if a column is missing, a cell is None or an empty list, or fewer than 2 prompts have a comparison
            on which the ranker has an opinion.

    Example:

    ```python
    quality = evaluate_ranker(RewardModelRanker("my-reward-model"), load_hh_rlhf(split="test"))
    print(quality)
    quality.save("outputs/quality")
    ```
    """
    return measure(ranker, ask_comparisons(ranker, comparisons))


def measure(ranker: Ranker, compared: Compared) -> RankerQuality:
    """Measure what a ranker said, as [`evaluate_ranker`] describes."""
    known = ~np.isnan(compared.log_odds)
    prompts, lengths = compared.prompts[known], compared.lengths[known]
    log_odds = compared.log_odds[known] / compared.temperature
    right, margins = _wins(log_odds), np.abs(log_odds)

    def estimate(values: np.ndarray, where: np.ndarray | slice = slice(None)) -> Estimate:
        return Estimate.of(values[where], prompts[where])

    estimates = {
        "accuracy": estimate(right),
        "brier_score": estimate(sigmoid(-log_odds) ** 2),
        "log_loss": estimate(np.logaddexp(0, -log_odds)),
        "ties": estimate(log_odds == 0),
    }
    if compared.orders is not None:
        first, second = compared.orders[known].T - 0.5  # P(chosen preferred) - 0.5 if it is shown first, and second
        estimates["order_bias"] = estimate((first - second) / 2)
        estimates["order_flips"] = estimate(first * second < 0)
        estimates["chosen_first"], estimates["chosen_second"] = estimate(_wins(first)), estimate(_wins(second))
    if (unequal := lengths != 0).any():
        people = lengths > 0  # prefer the longer completion
        itself = np.where(people, right, 1 - right)
        estimates["longer_by_ranker"] = estimate(itself, unequal)
        estimates["longer_by_people"] = estimate(people, unequal)
        estimates["longer_difference"] = estimate(itself - people, unequal)
        for name, verdict in {"right_if_longer": 1, "right_if_shorter": 0}.items():
            if (given := unequal & (itself == verdict)).any():
                estimates[name] = estimate(right, given)

    def bins(values: np.ndarray, edges: np.ndarray) -> list[Bin]:
        edges = np.unique(edges)  # of many equal values, some quantiles are equal
        numbers = np.searchsorted(edges[1:-1], values, side="right")
        found = []
        for number in np.unique(numbers):
            inside = numbers == number
            low, high, mean = edges[number], edges[min(number + 1, len(edges) - 1)], values[inside].mean()
            found.append(Bin(float(low), float(high), float(mean), int(inside.sum()), estimate(right, inside)))
        return found

    quantiles = np.linspace(0, 1, (2 * NUM_BINS if len(log_odds) >= MANY_COMPARISONS else NUM_BINS) + 1)
    curves = {
        "probability": bins(sigmoid(margins), 0.5 + quantiles / 2),
        "margin": bins(margins, np.quantile(margins, quantiles, method="nearest")),
        "length": bins(lengths, np.quantile(lengths, quantiles, method="nearest")),
    }
    if compared.names is not None:
        subsets = reward_bench_scores(compared, compared.names)
    else:
        names = np.array([]) if compared.subsets is None else compared.subsets[known]
        subsets = {str(name): estimate(right, names == name) for name in np.unique(names)}
    return RankerQuality(
        ranker=type(ranker).__name__,
        settings=ranker.settings(),
        num_comparisons=len(log_odds),
        num_prompts=len(np.unique(prompts)),
        num_without_opinion=int((~known).sum()),
        estimates=estimates,
        curves=curves,
        subsets=subsets,
    )


def _wins(log_odds: np.ndarray) -> np.ndarray:
    """Return 1 where positive, 0 where negative, and 0.5 for a tie."""
    return (np.sign(log_odds) + 1) / 2


def reward_bench_scores(compared: Compared, names: list[str]) -> dict[str, Estimate]:
    """Return RewardBench 2's score of each subset (arXiv 2506.01937), of rows on which the ranker has all opinions.

    A row scores 1 if no rejected completion is above its best chosen one, divided by the number of completions on top.

    The subset Ties has for each number a row `tied:NUMBER` with several correct completions and a row `ref:NUMBER`
    with one; numbers without both are left out. A number scores 0.3 for each row whose correct completions are all
    above the others; 0.2 if the gap between them in `tied` exceeds the spread of the correct ones; 0.2 if the smaller
    gap of both rows does; and 0.01 times tanh(smaller gap / spread - 1).
    """
    rows, chosen, _ = compared.places.T
    scores: dict[str, list[float]] = {}
    ties: dict[str, tuple[float, float]] = {}  # gap and spread, by the row's name
    for row in np.unique(rows):
        inside = rows == row
        above = compared.log_odds[inside].reshape(chosen[inside].max() + 1, -1)  # of each chosen one over each other
        subset = "all" if compared.subsets is None else str(compared.subsets[inside][0])
        if np.isnan(above).any():
            continue
        if subset.lower() == "ties":
            ties[names[row]] = above.min(), np.ptp(above[:, 0])
        else:
            best = above[above.min(axis=1).argmax()]
            scores.setdefault(subset, []).append((best.min() >= 0) / (1 + np.sum(best == 0)))
    for name, (gap, spread) in ties.items():
        kind, _, number = name.partition(":")
        if kind == "tied" and f"ref:{number}" in ties:
            single, _ = ties[f"ref:{number}"]
            smaller = min(gap, single)
            with np.errstate(divide="ignore", invalid="ignore"):
                score = 0.01 * np.nan_to_num(np.tanh(smaller / spread - 1))
            score += 0.3 * (gap > 0) + 0.3 * (single > 0) + 0.2 * (gap > spread) + 0.2 * (smaller > spread)
            scores.setdefault("Ties", []).append(score)
    return {subset: Estimate.of(np.array(values)) for subset, values in sorted(scores.items())}
