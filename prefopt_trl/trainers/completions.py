"""The completions of a batch under the policy: one row per prompt, one column per completion; and their metrics."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoredCompletions:
    """Completions of a batch of prompts, best first, and what the models make of them.

    Attributes:
        logps (`torch.Tensor` of shape `(batch_size, n)`):
            Log-probabilities under the policy, in nats, summed over tokens, with gradient; 0 where there is none.
        num_tokens (`torch.LongTensor` of shape `(batch_size, n)`):
            Tokens of each completion, EOS among them.
        mask (`torch.BoolTensor` of shape `(batch_size, n)`):
            True where a completion exists.
        rewards (`torch.Tensor` of shape `(batch_size, n)`):
            Rewards of the data, from highest to lowest; of chosen and rejected completions 1 and 0.
        ref_logps (`torch.Tensor` of shape `(batch_size, n)`, *optional*):
            As `logps`, under the reference model, without gradient.
    """

    logps: Tensor
    num_tokens: Tensor
    mask: Tensor
    rewards: Tensor
    ref_logps: Tensor | None = None

    def first(self, number: int | None) -> "ScoredCompletions":
        """The first columns alone; all of them for None."""
        kept = slice(number)
        return ScoredCompletions(
            logps=self.logps[:, kept],
            num_tokens=self.num_tokens[:, kept],
            mask=self.mask[:, kept],
            rewards=self.rewards[:, kept],
            ref_logps=None if self.ref_logps is None else self.ref_logps[:, kept],
        )

    @property
    def mean_logps(self) -> Tensor:
        """Log-probabilities under the policy, in nats, averaged over tokens (PRO eq. 6). Shape `(batch_size, n)`."""
        return self.logps / self.num_tokens.clamp(min=1)

    @property
    def logratios(self) -> Tensor:
        """Log-probabilities under the policy minus those under the reference model, in nats, summed over tokens."""
        assert self.ref_logps is not None, "a trainer with `has_reference = False` has no log-ratios"
        return self.logps - self.ref_logps


def columns_of_rows(group_ids: Tensor) -> Tensor:
    """How many rows of the same prompt stand before each row of a batch.

    Args:
        group_ids (`torch.LongTensor` of shape `(num_rows,)`):
            Whose prompt a row has, numbered from 0.

    Returns:
        `torch.LongTensor` of shape `(num_rows,)`.
    """
    same_prompt = group_ids[:, None] == group_ids[None, :]
    return same_prompt.tril(diagonal=-1).sum(dim=1)


def by_prompt(values: Tensor, group_ids: Tensor) -> Tensor:
    """One value per row of a batch, as one row per prompt and one column per completion; 0 (False) where none is.

    Args:
        values (`torch.Tensor` of shape `(num_rows,)`):
            A value of each row.
        group_ids (`torch.LongTensor` of shape `(num_rows,)`):
            Whose prompt a row has, numbered from 0.

    Returns:
        `torch.Tensor` of shape `(num_prompts, n)`, with n that of the prompt with the most rows, in their order.

    Example:

    ```python
    >>> import torch
    >>> by_prompt(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 1]))
    tensor([[1., 0.],
            [2., 3.]])

    ```
    """
    columns = columns_of_rows(group_ids)
    shape = int(group_ids.max()) + 1, int(columns.max()) + 1
    return values.new_zeros(shape).index_put((group_ids, columns), values)


def ranking_metrics(scores: Tensor, completions: ScoredCompletions) -> dict[str, tuple[Tensor, Tensor]]:
    """How the order of the policy's own scores agrees with that of the rewards.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, n)`):
            What the method takes as the policy's reward of a completion.
        completions ([`ScoredCompletions`]):
            The completions.

    Returns:
        `dict[str, tuple[torch.Tensor, torch.Tensor]]`: sum and count, of which the metric is the quotient, so that
        batches add up. Chosen is the best completion, rejected the mean over the others of its prompt.

        - `rewards/chosen`, `rewards/rejected`, `rewards/margins`: scores, in the scores' unit.
        - `rewards/accuracies`: share of the pairs with different rewards that the scores order alike.
        - `ranking/kendall_tau`: of a prompt, the share of such pairs ordered alike minus that ordered otherwise, in
          [-1, 1]; averaged over prompts with such a pair.
        - `ranking/top1`: share of those prompts whose highest score is that of a completion with the highest reward.
        - `logps/chosen`, `logps/rejected`: nats, summed over tokens.
    """
    mask, rewards = completions.mask, completions.rewards
    better = (rewards[:, :, None] > rewards[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    margins = scores[:, :, None] - scores[:, None, :]
    alike = ((margins > 0) & better).sum(dim=(1, 2))
    otherwise = ((margins < 0) & better).sum(dim=(1, 2))
    num_pairs = better.sum(dim=(1, 2))
    ordered = num_pairs > 0

    best = (rewards == rewards[:, :1]) & mask
    best_score = scores.masked_fill(~best, -torch.inf).amax(dim=1)
    other_score = scores.masked_fill(best | ~mask, -torch.inf).amax(dim=1)
    top1 = (best_score > other_score) & ordered

    num_others = (mask.sum(dim=1) - 1).clamp(min=1)
    everyone = torch.tensor(len(scores), device=scores.device)

    def of_others(values: Tensor) -> Tensor:
        return values[:, 1:].masked_fill(~mask[:, 1:], 0).sum(dim=1) / num_others

    return {
        "rewards/chosen": (scores[:, 0].sum(), everyone),
        "rewards/rejected": (of_others(scores).sum(), everyone),
        "rewards/accuracies": (alike.sum(), num_pairs.sum()),
        "rewards/margins": ((scores[:, 0] - of_others(scores)).sum(), everyone),
        "ranking/kendall_tau": (((alike - otherwise) / num_pairs.clamp(min=1)).sum(), ordered.sum()),
        "ranking/top1": (top1.sum(), ordered.sum()),
        "logps/chosen": (completions.logps[:, 0].sum(), everyone),
        "logps/rejected": (of_others(completions.logps).sum(), everyone),
    }
