"""The numbers of an evaluation: means with standard errors by prompt, win rates, and statistics of texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LENGTH_PENALTY = 0.01  # of phi^2: it keeps the regression finite if length separates all wins from all losses
UNDETERMINED = 3.0  # nats of theta's standard error by the likelihood


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error over prompts."""

    mean: float
    standard_error: float
    num_prompts: int = field(default=0, compare=False, repr=False)

    @classmethod
    def of(cls, values: np.ndarray, prompts: np.ndarray | None = None) -> "Estimate":
        """Return the mean of `values`, shape `(n,)`, one per prompt.

        With `prompts`, shape `(n,)`, values of equal prompts may depend on each other: the standard error is that of
        independent clusters. It is NaN for a single prompt, and both are NaN without values.
        """
        values = np.asarray(values, dtype=np.float64)
        if len(values) == 0:
            return cls(math.nan, math.nan)
        deviations = values - values.mean()
        if prompts is not None:
            deviations = np.bincount(np.unique(prompts, return_inverse=True)[1], weights=deviations)
        num_prompts = len(deviations)
        correction = num_prompts / (num_prompts - 1) if num_prompts > 1 else np.nan
        error = np.sqrt(correction * np.sum(deviations**2)) / len(values)
        return cls(float(values.mean()), float(error), num_prompts)

    @property
    def has_error(self) -> bool:
        """Whether the standard error is known, and more than the rounding of equal values."""
        return self.standard_error > 1e-12 + 1e-6 * abs(self.mean)

    def p_value(self, expected: float = 0.0) -> float:
        """Return the two-sided p-value of `expected` as the true mean, or NaN without a standard error.

        It is that of Student's t with `num_prompts - 1` degrees of freedom, integrated over the arctangent of t.
        """
        if not self.has_error:
            return math.nan
        degrees = self.num_prompts - 1
        angle = math.atan(abs(self.mean - expected) / self.standard_error / math.sqrt(degrees))
        end = max(angle, min(math.pi / 2, 40 / math.sqrt(degrees)))  # nearly all of a narrow density is below it
        grids = (np.linspace(start, end, 10_001) for start in (angle, 0.0))
        tail, whole = (np.trapezoid(np.cos(grid) ** (degrees - 1), grid) for grid in grids)
        return float(tail / whole)


def wins(advantages: np.ndarray) -> np.ndarray:
    """Return 1 where positive, 0 where negative, 0.5 for a tie, and NaN for NaN."""
    return np.where(advantages == 0, 0.5, advantages > 0) + 0 * advantages


def length_controlled_win_rate(won: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Estimate the win rate that the policy would have with completions as long as its opponent's.

    Fit the logistic regression of AlpacaEval 2 (arXiv 2404.04475, eq. 2) by maximum likelihood,

        P(win) = sigmoid(theta + phi * tanh(d / std(d)))

    where `d` is the length of the policy's completion minus that of the opponent's, and return `sigmoid(theta)`, the
    prediction at `d = 0`. AlpacaEval's term for the difficulty of its 805 instructions and its penalty towards
    annotations of gamed baselines are left out: both belong to its own prompts. `LENGTH_PENALTY * phi**2` is added
    to the summed loss instead.

    Args:
        won, lengths, prompts (`np.ndarray` of shape `(n,)`):
            For each comparison, 1, 0.5 or 0; the difference in characters; and the number of its prompt.

    Returns:
        [`Estimate`], with the standard error of the delta method, by prompt. It is `won`'s own mean if all lengths
        are equal or all verdicts are the same, and NaN if the lengths separate wins from losses.
    """
    if len(won) == 0 or np.ptp(lengths) == 0 or np.ptp(won) == 0:
        return Estimate.of(won, prompts)
    features = np.column_stack([np.ones(len(won)), np.tanh(lengths / lengths.std(ddof=1))])
    penalty = np.diag([0.0, 2 * LENGTH_PENALTY])
    weights = np.zeros(2)
    for _ in range(100):  # Newton's method; the loss is convex and smooth
        predicted = 1 / (1 + np.exp(-features @ weights))
        hessian = (features.T * predicted * (1 - predicted)) @ features + penalty
        step = np.linalg.solve(hessian, features.T @ (won - predicted) - penalty @ weights)
        weights += step * min(1.0, 2.0 / np.abs(step).max(initial=1e-12))  # at most 2, where the loss is nearly flat
        if np.abs(step).max() < 1e-10:
            break
    inverse = np.linalg.inv(hessian)
    if inverse[0, 0] > UNDETERMINED**2:
        return Estimate(math.nan, math.nan)
    _, cluster = np.unique(prompts, return_inverse=True)
    scores = np.column_stack([np.bincount(cluster, weights=column) for column in (features.T * (won - predicted))])
    num_prompts = len(scores)
    correction = num_prompts / (num_prompts - 1) if num_prompts > 1 else np.nan
    variance = correction * (inverse @ scores.T @ scores @ inverse)[0, 0]
    rate = 1 / (1 + math.exp(-weights[0]))
    return Estimate(rate, rate * (1 - rate) * math.sqrt(variance), num_prompts)


def distinct(texts: Sequence[str], n: int) -> float:
    """Return distinct-n (arXiv 1510.03055): the share of different ones among all n-grams of words of all texts."""
    words = [text.split() for text in texts]
    ngrams = [tuple(one[start : start + n]) for one in words for start in range(len(one) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def bleu(texts: Sequence[str], targets: Sequence[str]) -> float:
    """Return the corpus BLEU of texts against one target each, in [0, 100], by sacrebleu (PRO section 4.2).

    Raises:
        ImportError: without sacrebleu, naming the extra `evaluation`.
    """
    try:
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: `pip install 'prefopt-trl[evaluation]'`.") from error
    return float(corpus_bleu(texts, [targets], force=True).score)  # `force`: texts may be tokenized, unasked
