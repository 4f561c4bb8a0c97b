"""The temperature that turns a ranker's rewards into log-odds of people's preferences."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from prefopt_trl.rankers.base import Ranker, sigmoid
from prefopt_trl.rankers.comparisons import Compared, ask_comparisons


@dataclass(frozen=True)
class Calibration:
    """A ranker's temperature, which [`calibrate`] has fitted.

    Attributes:
        temperature (`float`): Divides the rewards and log-odds that the ranker has without any temperature.
        interval (`tuple[float, float]`): 95% confidence interval. Its upper end is infinite where the comparisons do
            not exclude that the ranker knows nothing.
        num_comparisons, num_prompts (`int`): Comparisons on which the ranker has an opinion, and their prompts.
        log_loss_before, log_loss_after (`float`): Mean of -log P(chosen preferred) over them, in nats, at
            temperature 1 and at the one fitted.
    """

    temperature: float
    interval: tuple[float, float]
    num_comparisons: int
    num_prompts: int
    log_loss_before: float
    log_loss_after: float

    def apply(self, ranker: Ranker) -> None:
        """Set the ranker's temperature, which is then in its settings. Raise `TypeError` if it has none."""
        if not hasattr(ranker, "temperature"):
            raise TypeError(
                f"A {type(ranker).__name__} has no temperature. Derive it from `PointwiseRanker` or "
                "`ComparativeRanker`, or divide its rewards yourself."
            )
        ranker.temperature = self.temperature

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"temperature {self.temperature:.3g} (95% interval {low:.3g} to {high:.3g}) by "
            f"{self.num_comparisons:,} comparisons of {self.num_prompts:,} prompts\n"
            f"log loss {self.log_loss_after:.3f} nats, against {self.log_loss_before:.3f} at temperature 1"
            + (
                "\nThe ranker may be no better than chance: use more comparisons, or another one."
                if high == np.inf
                else ""
            )
        )


def calibrate(ranker: Ranker, comparisons: Dataset) -> Calibration:
    """Fit the temperature T with which P(chosen preferred) = sigmoid(d / T), by maximum likelihood.

    d is the difference of the rewards, or the log-odds of a ranker that draws baselines. Comparisons of a prompt may
    depend on each other: the interval is Wald's on 1 / T, with a sandwich estimator of its error by prompt.

    Args:
        ranker ([`Ranker`]):
            Ranker, whose own temperature has no effect.
        comparisons ([`~datasets.Dataset`]):
            As in [`evaluate_ranker`]. Take some that the ranker was not trained on.

    Raises:
        TypeError, ValueError: as [`evaluate_ranker`].
        ValueError: if the ranker is no better than chance or never wrong.

    Example:

    ```python
    >>> calibration = calibrate(ranker, comparisons)
    >>> print(calibration)
    temperature 2.31 (95% interval 2.05 to 2.63) by 1,200 comparisons of 400 prompts
    log loss 0.571 nats, against 0.612 at temperature 1
    >>> calibration.apply(ranker)
    ```
    """
    return fit_temperature(ask_comparisons(ranker, comparisons))


def fit_temperature(compared: Compared) -> Calibration:
    """Fit the temperature to what a ranker said, as [`calibrate`] describes."""
    known = ~np.isnan(compared.log_odds)
    log_odds, prompts = compared.log_odds[known], np.unique(compared.prompts[known], return_inverse=True)[1]
    where = f"the {len(log_odds):,} comparisons"
    if log_odds.sum() <= 0:
        raise ValueError(
            f"The ranker is no better than chance on {where}: it gives the chosen completion mean log-odds of "
            f"{log_odds.mean():.3g}. Check its template and that `chosen` and `rejected` are not swapped, give more "
            "comparisons, or use another ranker."
        )
    if log_odds.min() >= 0:
        raise ValueError(f"The ranker is never wrong in {where}, so any temperature fits. Give more comparisons.")

    def scores(inverse: float) -> np.ndarray:  # derivatives of the log-likelihood by 1 / T, one per comparison
        return log_odds * sigmoid(-inverse * log_odds)

    low, high = 0.0, float(1 / np.abs(log_odds).max())
    while scores(high).sum() > 0:
        low, high = high, 2 * high
    while low < (inverse := (low + high) / 2) < high:  # by bisection, as the log-likelihood is concave
        low, high = (inverse, high) if scores(inverse).sum() > 0 else (low, inverse)
    num_prompts, probabilities = int(prompts.max()) + 1, sigmoid(inverse * log_odds)
    information = np.sum(log_odds**2 * probabilities * (1 - probabilities))
    by_prompt = np.bincount(prompts, weights=scores(inverse))
    error = np.sqrt(num_prompts / (num_prompts - 1) * np.sum(by_prompt**2)) / information
    least, most = inverse - 1.96 * error, inverse + 1.96 * error
    return Calibration(
        temperature=1 / inverse,
        interval=(float(1 / most), float(1 / least) if least > 0 else np.inf),
        num_comparisons=len(log_odds),
        num_prompts=num_prompts,
        log_loss_before=float(np.logaddexp(0, -log_odds).mean()),
        log_loss_after=float(np.logaddexp(0, -inverse * log_odds).mean()),
    )
