"""Statistical rejection sampling: from the samples of one policy to samples of a better one (RSO section 3.2)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

BETAS = 2.0 ** np.arange(-6, 6.5, 0.5)  # those that `automatic_beta` chooses from
CERTAINTY_KEPT = 0.98  # of its value on random candidates


def statistical_rejection_sampling(
    rewards: ArrayLike,
    num_samples: int,
    beta: float,
    *,
    rng: np.random.Generator | int | None = None,
) -> NDArray[np.int64]:
    """
    Accept `num_samples` of a prompt's candidates so that they look drawn from the optimal policy.

    With candidates drawn from the SFT policy, the accepted ones follow, as the number of candidates grows, the policy
    that maximizes reward under a KL penalty of `beta` (RSO eq. 4): `pi_sft(y | x) * exp(reward(x, y) / beta)`,
    normalized. No candidate is favored for its position, and equal rewards are equally likely.

    RSO Algorithm 1 for one prompt:

        remaining, accepted = all candidates, []
        while len(accepted) < num_samples:
            best = max(reward[c] for c in remaining)
            for c in remaining, in random order:
                accept c if uniform(0, 1) < exp((reward[c] - best) / beta)
            move those accepted from remaining to accepted
        return the first num_samples of accepted

    The paper's listing proposes candidates in the order they are given, may return more than `num_samples`, and takes
    equal texts for one candidate.

    A candidate is an index: whether two of them have the same text is for the caller to look at.

    Args:
        rewards (array of shape `(num_candidates,)` or `(num_prompts, num_candidates)`):
            Rewards of one prompt's candidates, or of many prompts at once, which is faster than one by one; finite,
            computed in float64.
        num_samples (`int`):
            How many candidates of each prompt to accept, from 1 to `num_candidates`.
        beta (`float`):
            Weight of the KL penalty, in units of reward, from 0 (the `num_samples` highest rewards, ties broken at
            random) to `inf` (uniform without replacement). A small value trusts the rewards.
        rng (`numpy.random.Generator` or `int`, *optional*):
            Source of randomness, or the seed of a new one.

    Returns:
        int64 array of shape `(num_samples,)` or `(num_prompts, num_samples)`: distinct indices of candidates, in the
        order of their acceptance.

    Raises:
        ValueError: if `rewards` has another shape, no element or one that is not finite, if `num_samples` is out of
            range, or if `beta` is negative or NaN.
        TypeError: if `num_samples` is not an integer.

    Example:

    ```python
    >>> statistical_rejection_sampling([0.1, 2.0, -1.0, 1.5], num_samples=2, beta=0.0)
    array([1, 3])
    ```
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim not in (1, 2) or values.size == 0:
        raise ValueError(
            "`rewards` must have the shape (num_candidates,) or (num_prompts, num_candidates), with one candidate or "
            f"more, got {values.shape}."
        )
    finite = np.isfinite(values)
    if not finite.all():
        index = np.argwhere(~finite)[0]
        raise ValueError(
            f"`rewards` must be finite, got {values[tuple(index)]} at [{', '.join(map(str, index))}]. Leave the "
            "candidate out."
        )
    if not beta >= 0:  # `beta < 0` would let NaN pass
        raise ValueError(f"`beta` must be 0 (the highest rewards), positive, or infinite (uniform), got {beta}.")
    if not isinstance(num_samples, (int, np.integer)):
        raise TypeError(f"`num_samples` must be a whole number, got {num_samples!r}.")
    if not 1 <= num_samples <= values.shape[-1]:
        raise ValueError(
            f"`num_samples` must be from 1 to the number of candidates, {values.shape[-1]}, got {num_samples}. Lower "
            "it, or sample more candidates."
        )
    return accept(values, int(num_samples), beta, np.random.default_rng(rng))


def accept(rewards: NDArray[np.float64], num_samples: int, beta: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Run Algorithm 1 as [`statistical_rejection_sampling`] does, without its checks."""
    num_rejections = np.zeros(rewards.shape, dtype=np.int64)  # passes that reject each candidate
    remaining = np.ones(rewards.shape, dtype=bool)
    while (remaining.sum(axis=-1) > rewards.shape[-1] - num_samples).any():
        best = np.where(remaining, rewards, -np.inf).max(axis=-1, keepdims=True)
        # u < exp((reward - best) / beta) in its logarithm: -log(u) is standard exponential. Multiplying by beta where
        # the paper divides makes 0 and infinity ordinary values. The best itself always passes.
        remaining &= best - rewards > beta * rng.standard_exponential(rewards.shape)
        num_rejections += remaining
    # Fewest rejections first. Equal ones come in random order, so nobody gains by position when the last pass is cut
    # short.
    return np.lexsort((rng.random(rewards.shape), num_rejections))[..., :num_samples]


def automatic_beta(rewards: NDArray[np.float64], num_samples: int) -> float:
    """
    Return the smallest beta that leaves labels to learn from, and candidates to keep (`rejection_beta="auto"`).

    As beta falls, the accepted candidates get better and closer to each other. Rewards are log-odds of preferences:
    the label of candidates i and j is right with probability `sigmoid(|r_i - r_j|)`. What this has above 1/2, averaged
    over pairs with the weights `w_i w_j`, `w = exp(reward / beta)`, must stay above a share of its value on random
    pairs, and [`effective_sample_size`] at or above `num_samples`. It is the largest one tried, 64, if none does.

    Args:
        rewards (float64 array of shape `(num_candidates,)`):
            Rewards of a prompt's distinct candidates, in nats.
        num_samples (`int`):
            How many of them are accepted.

    Example:

    ```python
    >>> rewards = np.array([0.0, 1.0, 2.0, 3.0])
    >>> automatic_beta(rewards, 2), automatic_beta(2 * rewards, 2)
    (2.8284271247461903, 4.0)

    ```
    """
    certainty = np.tanh(np.abs(rewards[:, None] - rewards) / 2)  # 2 sigmoid(gap) - 1
    weights = np.exp((rewards - rewards.max()) / BETAS[:, None])
    total, squares = weights.sum(axis=1) ** 2, (weights**2).sum(axis=1)
    accepted = ((weights @ certainty) * weights).sum(axis=1)
    least = CERTAINTY_KEPT * certainty.sum() / (len(rewards) * (len(rewards) - 1))
    fits = (accepted >= least * (total - squares)) & (total >= min(num_samples, len(rewards)) * squares)
    return float(BETAS[fits.argmax() if fits.any() else -1])


def effective_sample_size(rewards: NDArray[np.float64], beta: float) -> float:
    """
    Return the number of samples of the optimal policy that a prompt's candidates are worth, from 1 to their count.

    It is `sum(w)^2 / sum(w^2)` of the weights `w = exp(reward / beta)`. With fewer than `num_samples`, those that are
    accepted fill up with candidates that the optimal policy rarely produces. `beta` is greater than 0.
    """
    weights = np.exp((rewards - rewards.max()) / beta)
    return float(weights.sum() ** 2 / (weights**2).sum())


def acceptance_rate(rewards: NDArray[np.float64], beta: float) -> float:
    """
    Return the expected share of a prompt's candidates that the first pass of Algorithm 1 accepts (RSO Theorem 1).

    It is the mean of `exp((reward - max) / beta)`, in (0, 1]. Where it is below `num_samples / num_candidates`, later
    passes fill up with candidates that the optimal policy rarely produces.
    """
    gap = rewards.max() - rewards
    if beta == 0:
        return float(np.mean(gap == 0))
    with np.errstate(over="ignore"):
        return float(np.mean(np.exp(-gap / beta)))
