"""Compute log-probabilities of labels under a causal language model without materializing its logits.

The head is applied to all labeled positions and one chunk of the vocabulary at a time, so memory does not grow with
the vocabulary. Sums over the vocabulary are in float32, and the backward pass recomputes each chunk.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from prefopt_trl.shared_prefix.packing import IGNORE_INDEX
from prefopt_trl.shared_prefix.support import PROBE_TOLERANCE, Forward, evaluating, log_once, run_probe

LOGITS_AT_ONCE = 2**25  # 128 MiB in float32
SAME_PRODUCTS = 5e-3  # tolerance in nats if both runs compute the same half-precision products


@dataclass
class LabelStatistics(ModelOutput):
    """Per-token statistics of the labels under a language model, zero where the label is `-100`.

    Attributes:
        log_probs (`torch.Tensor` of shape `(batch_size, length)`):
            Log-probability of each label in nats, with gradient. Float32, or float64 for a float64 model, as are all
            fields but `is_top1`.
        entropy, mean_logits (`torch.Tensor` of shape `(batch_size, length)`):
            Entropy of the distribution in nats, and its mean logit. Without gradient.
        is_top1 (`torch.BoolTensor` of shape `(batch_size, length)`):
            Whether no other token is more likely than the label.
        aux_loss (`torch.Tensor`, *optional*):
            Load-balancing loss of a mixture of experts, with `output_router_logits=True`.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def label_statistics(
    model: PreTrainedModel,
    forward: Forward,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    **inputs: object,
) -> LabelStatistics:
    """Run a model without its head, and apply the head to the labeled positions only.

    Call this inside the forward of the outermost module, so that the hooks of DDP, FSDP2 and ZeRO-3 run. A probe
    compares the result with the model's own logits once. If they differ, because the model transforms its logits in
    some other way, all logits are computed and a warning is logged once.

    `labels` `(batch_size, sequence_length)` are aligned with the input, and `shift_labels`, which replace them, hold
    the label that each position predicts; both ignore `-100`. `inputs` are arguments of `forward`, the model's own.
    The result has length `sequence_length - 1`, or `sequence_length` with `shift_labels`.
    """
    reason = run_probe(_probe_head, model, forward)
    if reason is not None:
        log_once(model, f"All logits of {model.config.model_type} are computed, which takes more memory: {reason}.")
    return _statistics(model, None if reason is None else forward, labels, shift_labels, inputs)


def _statistics(
    model: PreTrainedModel,
    forward: Forward | None,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    inputs: dict[str, Any],
) -> LabelStatistics:
    """Apply the head to hidden states or, if `forward` is given, use the logits that it returns."""
    outputs = (model.base_model if forward is None else forward)(**{**inputs, "use_cache": False})
    states: torch.Tensor = outputs.last_hidden_state if forward is None else outputs.logits
    if shift_labels is None:
        states, shift_labels = states[:, :-1], cast(torch.Tensor, labels)[:, 1:]
    asked = shift_labels != IGNORE_INDEX
    values = (
        _apply_head(model, states, shift_labels, asked) if forward is None else _of_logits(states, shift_labels, asked)
    )
    # `masked_scatter` keeps the graph even without labels, because every process needs a backward pass
    statistics = LabelStatistics(
        *(value.new_zeros(asked.shape).masked_scatter(asked.to(value.device), value) for value in values)
    )
    if inputs.get("output_router_logits"):
        statistics.aux_loss = _router_loss(model, outputs.router_logits, inputs.get("attention_mask"))
    return statistics


def _apply_head(
    model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor, asked: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    head: Any = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    if isinstance(weight, DTensor):  # sharded by FSDP2
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    hidden, labels = (value[asked].to(weight.device) for value in (hidden, labels))  # the head's device may differ
    with _gathered(weight, bias):
        return cast(tuple[torch.Tensor, ...], _ChunkedHead.apply(hidden, weight, bias, labels, *_scaling(model)))


def _of_logits(logits: torch.Tensor, labels: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, ...]:
    log_probs = logits[asked].to(_at_least_float32(logits.dtype)).log_softmax(dim=1)
    of_label = log_probs.gather(1, labels[asked][:, None]).squeeze(1)
    others = log_probs.detach()
    mean_logits = logits[asked].detach().to(others.dtype).mean(dim=1)
    return of_label, -(others.exp() * others).sum(dim=1), mean_logits, of_label >= others.amax(dim=1)


def _probe_head(model: PreTrainedModel, forward: Forward) -> str | None:
    """Compare log-probabilities of a few random tokens with those of the model's own logits."""
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab_size, (2, 8), generator=torch.Generator().manual_seed(0)).to(model.device)
    with evaluating(model), torch.no_grad():
        ours = _statistics(model, None, ids, None, {"input_ids": ids}).log_probs
        theirs = _statistics(model, forward, ids, None, {"input_ids": ids}).log_probs
    difference = (cast(torch.Tensor, ours) - cast(torch.Tensor, theirs)).abs().mean().item()
    mixed = torch.is_autocast_enabled(ids.device.type)
    tolerance = PROBE_TOLERANCE[torch.get_autocast_dtype(ids.device.type) if mixed else model.dtype]
    if _scaling(model) == (1.0, None):
        tolerance = min(tolerance, SAME_PRODUCTS)
    # PEFT's `trainable_token_indices` wraps a tied head, and the weight of the wrapped head lacks the trained tokens
    if difference <= tolerance and not hasattr(model.get_output_embeddings(), "token_adapter"):
        return None
    return (
        f"its head alone does not reproduce the log-probabilities (a difference of {difference:.1e} nats in a probe)"
    )


def _scaling(model: PreTrainedModel) -> tuple[float, float | None]:
    """Return the scale of the logits and their soft cap, which models name differently."""
    config = model.config.get_text_config()
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    caps = (getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    scale = next((value for name in names if (value := getattr(config, name, None)) is not None), 1.0)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    return scale, next((cap for cap in caps if cap is not None), None)


def _router_loss(
    model: PreTrainedModel, router_logits: tuple[torch.Tensor], attention_mask: torch.Tensor | None
) -> torch.Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    num_experts = getattr(config, "num_experts", None) or config.num_local_experts
    return cast(
        torch.Tensor,
        load_balancing_loss_func(router_logits, num_experts, config.num_experts_per_tok, attention_mask),
    )


def _gathered(*parameters: torch.Tensor | None) -> AbstractContextManager[object]:
    """Gather parameters partitioned by ZeRO-3, which does so itself only for modules that are called."""
    partitioned: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    to_gather = [parameter for parameter in partitioned if parameter.ds_status.name != "AVAILABLE"]
    if not to_gather:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(to_gather)


class _ChunkedHead(torch.autograd.Function):
    """Compute the fields of [`LabelStatistics`] from hidden states `(n, size)` and a head `(vocab_size, size)`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, ...]:
        device = hidden.device.type
        mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else hidden.dtype  # of the matrix products
        ctx.dtype, ctx.scale, ctx.softcap = dtype, scale, softcap
        greatest = hidden.new_full((len(hidden),), -torch.inf, dtype=_at_least_float32(hidden.dtype))
        total, weighted, summed, of_label = (torch.zeros_like(greatest) for _ in range(4))
        for part in _parts(len(hidden), len(weight)):
            logits = _logits(hidden, weight, bias, part, dtype, scale, softcap)
            before, greatest = greatest, torch.maximum(greatest, logits.amax(dim=1))
            here, place = _labels_in(part, labels)
            of_label = torch.where(here, logits.gather(1, place).squeeze(1), of_label)
            summed += logits.sum(dim=1)
            # Online softmax, relative to the greatest logit so far
            shrunk = (before - greatest).exp()
            exponentials = (logits - greatest[:, None]).exp_()
            total = total * shrunk + exponentials.sum(dim=1)
            weighted = weighted * shrunk + exponentials.mul_(logits).sum(dim=1)
        log_total = greatest + total.log()
        ctx.save_for_backward(hidden, weight, bias, labels, log_total)
        values = of_label - log_total, log_total - weighted / total, summed / len(weight), of_label >= greatest
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, log_total = ctx.saved_tensors
        of_hidden = torch.zeros_like(hidden, dtype=log_total.dtype) if ctx.needs_input_grad[0] else None
        with _gathered(weight, bias):
            of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
            of_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
            for part in _parts(len(hidden), len(weight)):
                logits = _logits(hidden, weight, bias, part, ctx.dtype, ctx.scale, ctx.softcap)
                bend = ctx.scale if ctx.softcap is None else ctx.scale * (1 - (logits / ctx.softcap).square_())
                # d log p(label) / d logits = 1 at the label, minus the probabilities
                of_logits = logits.sub_(log_total[:, None]).exp_().neg_()
                here, place = _labels_in(part, labels)
                of_logits.scatter_add_(1, place, here[:, None].to(of_logits.dtype))
                of_logits.mul_(gradients[0][:, None]).mul_(bend)
                if of_bias is not None:
                    of_bias[part] = of_logits.sum(dim=0)
                products = of_logits.to(ctx.dtype)
                if of_hidden is not None:
                    _add_product(of_hidden, products, weight[part].to(ctx.dtype))
                if of_weight is not None:
                    of_weight[part] = products.T @ hidden.to(ctx.dtype)
        return None if of_hidden is None else of_hidden.to(hidden.dtype), of_weight, of_bias, None, None, None


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _parts(num_positions: int, vocab_size: int) -> list[slice]:
    """Split the vocabulary into chunks of at most [`LOGITS_AT_ONCE`] logits."""
    size = max(LOGITS_AT_ONCE // max(num_positions, 1), 1)
    return [slice(start, min(start + size, vocab_size)) for start in range(0, vocab_size, size)]


def _logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    part: slice,
    dtype: torch.dtype,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    with torch.autocast(hidden.device.type, enabled=False):  # `dtype` is already the autocast dtype
        logits = hidden.to(dtype) @ weight[part].to(dtype).T
        if bias is not None:
            logits += bias[part].to(dtype)
    logits = logits.to(_at_least_float32(dtype))
    if scale != 1:
        logits *= scale
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _labels_in(part: slice, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether each label is in this part of the vocabulary, and its index there, shape `(n, 1)`."""
    place = labels - part.start
    size = part.stop - part.start
    return (place >= 0) & (place < size), place.clamp(0, size - 1)[:, None]


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a matrix product to a float32 total without rounding the product to half precision."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        total += torch.mm(left, right, out_dtype=torch.float32)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
