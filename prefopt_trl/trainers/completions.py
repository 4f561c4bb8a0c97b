"""Trainers with a loss over all completions of a prompt: one row per prompt, one column per completion."""

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollator
from transformers.utils import ModelOutput

from prefopt_trl.shared_prefix.packing import IGNORE_INDEX, pair_groups
from prefopt_trl.trainers.base import PreferenceTrainer


@dataclass(frozen=True)
class ScoredCompletions:
    """Completions of a batch of prompts, best first, with their log-probabilities and rewards.

    Attributes:
        logps (`torch.Tensor` of shape `(batch_size, n)`):
            Log-probabilities under the policy, in nats, summed over tokens, with gradient; 0 for a missing completion.
        num_tokens (`torch.LongTensor` of shape `(batch_size, n)`):
            Tokens of each completion, EOS among them.
        mask (`torch.BoolTensor` of shape `(batch_size, n)`):
            True where a completion exists.
        rewards (`torch.Tensor` of shape `(batch_size, n)`):
            Rewards of the data, from highest to lowest; 1 for chosen and 0 for rejected completions.
        ref_logps (`torch.Tensor` of shape `(batch_size, n)`, *optional*):
            As `logps`, under the reference model, without gradient.
        target_logps (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            As `logps`, for an additional completion of each prompt that is not compared with the others.
        labels (`dict`):
            Arguments of [`losses.with_labels`] that the configuration asks for.
    """

    logps: Tensor
    num_tokens: Tensor
    mask: Tensor
    rewards: Tensor
    ref_logps: Tensor | None = None
    target_logps: Tensor | None = None
    labels: dict[str, Tensor] = field(default_factory=dict)

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
    """Return how many rows of the same prompt stand before each row; `group_ids` and the result are `(num_rows,)`."""
    same_prompt = group_ids[:, None] == group_ids[None, :]
    return same_prompt.tril(diagonal=-1).sum(dim=1)


def by_prompt(values: Tensor, group_ids: Tensor) -> Tensor:
    """Return one value per row, shape `(num_rows,)`, as one row per prompt and one column per completion.

    `group_ids` are the indices of the rows' prompts. Columns follow the order of a prompt's rows, and missing
    completions are 0 (False).
    """
    columns = columns_of_rows(group_ids)
    shape = int(group_ids.max()) + 1, int(columns.max()) + 1
    return values.new_zeros(shape).index_put((group_ids, columns), values)


def ranking_metrics(scores: Tensor, completions: ScoredCompletions) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure how the policy's scores, shape `(batch_size, n)`, order completions compared with their rewards.

    Each metric is returned as a sum and a count, so that batches add up. Chosen is the best completion, rejected the
    mean over the other completions of its prompt.

    - `rewards/chosen`, `rewards/rejected`, `rewards/margins`: scores, in the scores' unit.
    - `rewards/accuracies`: share of the pairs with different rewards that the scores order correctly.
    - `ranking/kendall_tau`: share of a prompt's pairs with different rewards ordered correctly minus incorrectly, in
      [-1, 1]; averaged over prompts with such a pair.
    - `ranking/top1`: share of these prompts whose highest score is that of a completion with the highest reward.
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


class CompletionTrainer(PreferenceTrainer):
    """A trainer with a loss over all completions of a prompt, in place of TRL's over pairs.

    Subclasses write [`loss_per_prompt`] and [`scores`].
    """

    has_own_loss = True

    def loss_per_prompt(self, completions: ScoredCompletions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of each prompt, and the parts of it that are logged; each of shape `(batch_size,)`."""
        raise NotImplementedError

    def scores(self, completions: ScoredCompletions) -> torch.Tensor:
        """Return what the method takes as the policy's reward of each completion, shape `(batch_size, n)`."""
        raise NotImplementedError

    def _set_up(self, *arguments: Any) -> None:
        if self.args.label_columns:
            owner: Any = self.data_collator if self.args.sampling == "online" else self
            owner.data_collator = partial(collate_with_labels, owner.data_collator, self.args.margin_weight)

    def compute_ref_log_probs(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return super().compute_ref_log_probs(model, {name: inputs[name] for name in inputs.keys() - LABELS})

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        if not self.has_own_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        completion_mask = inputs["completion_mask"]
        group_ids = inputs.get("group_ids")
        if group_ids is None:  # TRL's pairs: chosen rows, then rejected rows
            group_ids = pair_groups(len(completion_mask), completion_mask.device)
        model_inputs: dict[str, object] = {name: value for name, value in inputs.items() if name not in OWN_INPUTS}
        model_inputs["use_cache"] = False
        if self.aux_loss_enabled:
            model_inputs["output_router_logits"] = True
        labels = inputs["input_ids"].masked_fill(completion_mask == 0, IGNORE_INDEX)
        asking: dict[str, object] = {"labels": labels, "label_statistics": True}
        if self.args.share_prefix:
            asking["group_ids"] = group_ids
        outputs = model(**model_inputs, **asking)

        asked = completion_mask[:, 1:].bool()
        logps = _of_tokens(outputs.log_probs, asked).sum(dim=1)
        is_target = inputs.get("is_target", torch.zeros_like(group_ids, dtype=torch.bool))
        groups = group_ids[~is_target]
        rewards = inputs.get("rewards")
        if rewards is None:  # 1 for chosen, 0 for rejected
            rewards = (torch.arange(len(groups), device=groups.device) < len(groups) // 2).float()
        completions = ScoredCompletions(
            logps=by_prompt(logps[~is_target], groups),
            num_tokens=by_prompt(asked[~is_target].sum(dim=1), groups),
            mask=by_prompt(torch.ones_like(groups, dtype=torch.bool), groups),
            rewards=by_prompt(rewards, groups),
            ref_logps=by_prompt(self._ref_logps(inputs, asking, asked), groups) if self.has_reference else None,
            target_logps=logps[is_target] if "is_target" in inputs else None,
            labels={name: inputs[name] for name in LABELS & inputs.keys()},
        )
        losses, parts = self.loss_per_prompt(completions)
        loss = losses.mean()
        everyone = torch.tensor(len(losses), device=losses.device)
        metrics = {f"loss/{name}": (part.sum(), everyone) for name, part in parts.items()}
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = (outputs.aux_loss, torch.ones_like(outputs.aux_loss))
        with torch.no_grad():
            metrics |= ranking_metrics(self.scores(completions), completions)
            columns = torch.full_like(group_ids, -1).masked_scatter(~is_target, columns_of_rows(groups))
            metrics |= _token_metrics(outputs, asked, columns)
        self._record(metrics, inputs["attention_mask"])
        if not return_outputs:
            return loss
        with torch.no_grad():  # `label_statistics` builds no logits
            return loss, model(**model_inputs)

    def _ref_logps(self, inputs: dict[str, Tensor], asking: dict[str, object], asked: Tensor) -> Tensor:
        """Return the log-probability of each row under the reference model, in nats, summed over tokens."""
        if self.args.precompute_ref_log_probs:
            return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        model = self.model if self.ref_model is None else self.ref_model
        rows = {name: value for name, value in inputs.items() if name not in OWN_INPUTS}
        with warnings.catch_warnings(), torch.no_grad(), self._as_reference(), self.accelerator.autocast():
            warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # of reentrant checkpointing
            return _of_tokens(model(**rows, **asking, use_cache=False).log_probs, asked).sum(dim=1)


# What a batch has beside the model's own inputs
LABELS = {"label_probabilities", "margins"}
REF_LOGPS = {"ref_chosen_logps", "ref_rejected_logps"}
OWN_INPUTS = {"completion_mask", "group_ids", "is_target", "rewards"} | REF_LOGPS | LABELS


def collate_with_labels(collate: DataCollator, margin_weight: float, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate pairs with their `margins` if these have a weight, or else with their `label_probabilities`."""
    if margin_weight:
        gaps = torch.tensor([float(example["chosen_reward"] - example["rejected_reward"]) for example in examples])
        return {**collate(examples), "margins": margin_weight * gaps}
    probabilities = torch.tensor([float(example["label_probability"]) for example in examples])
    return {**collate(examples), "label_probabilities": probabilities}


def _of_tokens(per_token: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Return the values without those of the virtual tokens that prompt-learning adapters prepend."""
    return per_token[:, -asked.shape[1] :]


def _token_metrics(
    outputs: ModelOutput, asked: torch.Tensor, columns: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Compute TRL's metrics over the tokens of completions; the best completions count as chosen.

    `columns`, shape `(num_rows,)`, are the ranks of the rows' completions from 0; -1 for a target.
    """
    best = asked & (columns == 0)[:, None]
    others = asked & (columns > 0)[:, None]
    mean_logits = _of_tokens(outputs["mean_logits"], asked)
    return {
        "entropy": ((_of_tokens(outputs["entropy"], asked) * asked).sum(), asked.sum()),
        "mean_token_accuracy": ((_of_tokens(outputs["is_top1"], asked) & best).sum(), best.sum()),
        "logits/chosen": ((mean_logits * best).sum(), best.sum()),
        "logits/rejected": ((mean_logits * others).sum(), others.sum()),
    }
