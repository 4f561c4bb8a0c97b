"""
The papers' losses on rankings of any length, one function per equation.

Arguments:

- `logratios` (`torch.Tensor` of shape `(batch_size, n)`, `n >= 2`): log-probabilities under the policy minus those
  under the reference model, in nats, summed over tokens. One row per prompt, one column per completion, best first.
  Floating point; computed in float32 at least.
- `mean_logps` (`torch.Tensor` of shape `(batch_size, n)`): log-probabilities under the policy, averaged over tokens.
- `rewards` (`torch.Tensor` of shape `(batch_size, n)`): rewards of the completions, finite.
- `mask` (bool `torch.Tensor` of shape `(batch_size, n)`): True where a completion exists, by default everywhere. The
  values of missing completions, NaN included, reach neither the loss nor its gradient.

Returns: `torch.Tensor` of shape `(batch_size,)`, one loss per prompt, at least 0; 0 for a prompt with fewer than two
completions.

Raises: `ValueError` if a tensor has another shape, `beta` is not positive and finite, or a row of `rewards` is not as
required, `TypeError` if log-probabilities are not floating point or `mask` is not bool.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt_trl.losses.checks import as_float, check_positive


def plackett_luce(logratios: Tensor, beta: float, mask: Tensor | None = None) -> Tensor:
    """
    Return the negative log-likelihood of a ranking under the Plackett-Luce model: DPO for more than two completions.

    `-sum_k log [exp(beta * logratio_k) / sum_{j >= k} exp(beta * logratio_j)]` (DPO eq. 20). `beta > 0` is the
    strength of the KL penalty; DPO uses 0.1 and 0.5. It is `ln n!` where policy and reference agree. On two
    completions it equals [`sigmoid_norm`] with `gamma=beta`, TRL's `loss_type="sigmoid"`; TRL has no loss for more.

    >>> logratios = torch.tensor([[0.0, 0.0, 0.0], [3.0, -1.0, 0.0]])
    >>> plackett_luce(logratios, beta=0.5, mask=torch.tensor([[True, True, True], [True, True, False]]))
    tensor([1.7918, 0.1269])
    """
    check_positive("beta", beta)
    logratios, mask = _completions("logratios", logratios, mask)
    margins = beta * _differences(logratios)
    return _contrast_each_with_worse(margins, _worse(mask)).sum(dim=1)


def lipo_lambda(logratios: Tensor, rewards: Tensor, beta: float, mask: Tensor | None = None) -> Tensor:
    """
    Return the lambda loss of LiPO: each pair of completions counts as much as swapping the two changes the ranking.

    `sum_{reward_i > reward_j} |G_i - G_j| |1 / D_i - 1 / D_j| log(1 + exp(-(s_i - s_j)))` (LiPO, arXiv 2402.01878,
    section 3), where `s = beta * logratio`, the gain is `G = 2^reward - 1` and the discount `D = ln(1 + rank)`. `rank`
    counts from 1 in the order of `s`; equal scores keep the order of the columns. The weights carry no gradient, and
    gains grow exponentially: scale rewards to the order of 1. On two completions it is [`sigmoid_norm`] with
    `gamma=beta` times `(2^reward_1 - 2^reward_2) (1 / ln 2 - 1 / ln 3)`. Equal rewards are not compared.

    >>> lipo_lambda(torch.tensor([[0.5, -1.0, 0.0]]), rewards=torch.tensor([[1.0, 0.5, 0.0]]), beta=1.0)
    tensor([0.4403])
    """
    check_positive("beta", beta)
    logratios, mask = _completions("logratios", logratios, mask)
    _check_shape("rewards", rewards, mask)
    gains = rewards.to(logratios.dtype).masked_fill(~mask, 0.0).exp2()
    _check_rewards(rewards, gains.isfinite().all(dim=1), "finite, as well as 2 to its power: scale the rewards down")
    scores = beta * logratios
    order = scores.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = order.argsort(dim=1).to(gains.dtype) + 1
    weights = _differences(gains) * _differences(1 / ranks.log1p()).abs()
    compared = (weights > 0) & _both_exist(mask)
    return -(weights * logsigmoid(_differences(scores))).masked_fill(~compared, 0.0).sum(dim=(1, 2))


def pro(mean_logps: Tensor, rewards: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """
    Return the ranking term of Preference Ranking Optimization: each completion in turn against all that are worse.

    `-sum_{k < n} log [exp(p_k / T_k^k) / sum_{i >= k} exp(p_i / T_k^i)]` (PRO eq. 9), where `p` are the mean
    log-probabilities (PRO eq. 6). Without rewards every temperature `T` is 1 (PRO eq. 8). With them
    `1 / T_k^i = reward_k - reward_i` (PRO eq. 10) and `1 / T_k^k` is the largest of these over the worse completions
    (PRO eq. 11), so a completion hardly worse than `k` is hardly pushed away, and doubling the rewards doubles every
    margin. Rewards must be sorted from highest to lowest. We multiply by the differences rather than divide by their
    inverses, so equal rewards need no special case: their terms are constants.

    Without rewards it is [`plackett_luce`] on mean log-probabilities with `beta=1`. On two completions that is TRL's
    experimental CPO loss `"simpo"` with `beta=1` and `simpo_gamma=0`; TRL has no loss for more. The supervised term of
    PRO eq. 7 belongs to the trainer.

    >>> pro(torch.tensor([[-1.0, -2.0, -1.5]]), rewards=torch.tensor([[2.0, 1.0, 0.0]]))
    tensor([1.8361])
    """
    return pro_terms(mean_logps, rewards, mask).sum(dim=1)


def pro_terms(mean_logps: Tensor, rewards: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """
    Return the terms of [`pro`], of shape `(batch_size, n - 1)`: column `k` is completion `k` against all worse ones.

    A term is 0 where no completion is worse. The first column alone is the ablation of PRO section 4.7.

    >>> pro_terms(torch.tensor([[-1.0, -2.0, -1.5]]))
    tensor([[0.6803, 0.9741]])
    """
    mean_logps, mask = _completions("mean_logps", mean_logps, mask)
    worse = _worse(mask)
    if rewards is None:
        return _contrast_each_with_worse(_differences(mean_logps), worse)

    _check_shape("rewards", rewards, mask)
    rewards = rewards.to(mean_logps.dtype)
    inverse_temperatures = _differences(rewards).masked_fill(~worse, 0.0)  # 1 / T_k^i, eq. 10
    _check_rewards(
        rewards,
        ((inverse_temperatures >= 0).all(dim=2) & (rewards.isfinite() | ~mask)).all(dim=1),
        "finite and sorted from highest to lowest: order the completions best to worst",
    )
    own_inverse_temperatures = inverse_temperatures.amax(dim=2, keepdim=True)  # 1 / T_k^k, eq. 11
    margins = mean_logps.unsqueeze(2) * own_inverse_temperatures - mean_logps.unsqueeze(1) * inverse_temperatures
    return _contrast_each_with_worse(margins, worse)


def rrhf(mean_logps: Tensor, rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """
    Return the ranking term of RRHF: how far worse completions are likelier than better ones, summed over pairs.

    `sum_{reward_i < reward_j} max(0, p_i - p_j)` (RSO section 1), where `p` are mean log-probabilities, RRHF's own
    score; RSO writes the probabilities themselves. Only the order of the rewards counts, columns may be in any order,
    and completions with equal rewards are not compared. On two completions it is [`slic`] with `delta=0`, on mean
    log-probabilities. TRL has no such loss. RRHF's supervised term belongs to the trainer.

    >>> rrhf(torch.tensor([[-1.0, -2.0, -1.5]]), rewards=torch.tensor([[0.0, 2.0, 1.0]]))
    tensor([2.])
    """
    mean_logps, mask = _completions("mean_logps", mean_logps, mask)
    _check_shape("rewards", rewards, mask)
    _check_rewards(rewards, (rewards.isfinite() | ~mask).all(dim=1), "finite: drop the completion or score it again")
    excess = torch.relu(_differences(mean_logps))
    lower_reward = rewards.unsqueeze(2) < rewards.unsqueeze(1)
    return excess.masked_fill(~(lower_reward & _both_exist(mask)), 0.0).sum(dim=(1, 2))


def _differences(values: Tensor) -> Tensor:
    """`(batch_size, n, n)`: at `[row, k, i]` the value of completion `k` minus that of `i`."""
    return values.unsqueeze(2) - values.unsqueeze(1)


def _contrast_each_with_worse(margins: Tensor, worse: Tensor) -> Tensor:
    # log(1 + sum_{i worse than k} exp(-margin_ki)) of each k, with logsigmoid to keep its digits when it is small.
    # The fill is finite because the gradient of logsumexp over nothing but -inf is NaN.
    log_odds_against = (-margins).masked_fill(~worse, torch.finfo(margins.dtype).min).logsumexp(dim=2)
    return -logsigmoid(-log_odds_against)[:, :-1]


def _worse(mask: Tensor) -> Tensor:
    """`(batch_size, n, n)`: True at `[row, k, i]` where completions `k` and `i` exist and `i` is ranked after `k`."""
    return _both_exist(mask).triu(diagonal=1)


def _both_exist(mask: Tensor) -> Tensor:
    return mask.unsqueeze(2) & mask.unsqueeze(1)


def _completions(name: str, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(
            f"`{name}` must have shape (batch_size, n) with n >= 2, but has {tuple(values.shape)}: give each prompt "
            "one row and each of its completions one column."
        )
    values = as_float(name, values)
    if mask is None:
        return values, torch.ones_like(values, dtype=torch.bool)
    _check_shape("mask", mask, values)
    if mask.dtype != torch.bool:
        raise TypeError(f"`mask` must be bool, True where a completion exists, but is {mask.dtype}: use mask.bool().")
    # Before any arithmetic, so that no step below has to be safe, forwards and backwards, against NaN.
    return values.masked_fill(~mask, 0.0), mask


def _check_shape(name: str, values: Tensor, like: Tensor) -> None:
    if values.shape != like.shape:
        raise ValueError(
            f"`{name}` must have shape {tuple(like.shape)}, one value per completion, but has {tuple(values.shape)}: "
            "pad rows that are shorter and mask them."
        )


def _check_rewards(rewards: Tensor, valid: Tensor, requirement: str) -> None:
    if not valid.all():
        row = int(valid.logical_not().nonzero()[0])
        raise ValueError(f"`rewards[{row}]` must be {requirement}; it is {rewards[row].tolist()}.")
