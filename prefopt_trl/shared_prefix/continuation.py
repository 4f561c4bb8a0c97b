"""Rows that begin alike, run without gradients: their common beginning once, then what follows it in each row.

Unlike a packed row ([`pack_rows`]), which trains, what follows stays one row each, so no row's attention is computed
over the others'.
"""

import weakref
from collections.abc import Hashable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations.fsdp import is_fsdp_managed_module

from prefopt_trl.shared_prefix.attention import PrefixCache, attend_to_prefix, left_pad, without_head
from prefopt_trl.shared_prefix.support import PROBE_TOLERANCE, architecture_reason, log_reason

_probed: weakref.WeakKeyDictionary[torch.nn.Module, str | None] = weakref.WeakKeyDictionary()


class RowInputs(NamedTuple):
    """What a model is called with for some rows, and how many of its `input_ids` each row has.

    Attributes:
        inputs (`dict`):
            Keyword arguments; `input_ids` of shape `(num_rows, length)` is padded on the right.
        lengths (`torch.LongTensor` of shape `(num_rows,)`):
            Tokens of each row in `input_ids`.
    """

    inputs: dict[str, Any]
    lengths: torch.Tensor


def whole_rows(rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> RowInputs:
    """Rows as they are, padded on the right, where no causal model looks.

    Args:
        rows (`Sequence[Sequence[int]]`):
            Token ids.
        pad_token_id (`int`):
            Token id of padding.
        device (`torch.device`):
            Device of the model.
    """
    lengths = torch.tensor([len(row) for row in rows], device=device)
    input_ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_token_id
    ).to(device)
    mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
    return RowInputs({"input_ids": input_ids, "attention_mask": mask}, lengths)


def rows_after_prefix(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], group_ids: Sequence[Hashable], pad_token_id: int
) -> RowInputs:
    """Run the common beginning of each group of rows, and prepare what follows it, for a call of the whole model.

    Call the model inside [`attend_to_prefix`] and `torch.no_grad()`. At least one token of each row that is not
    `pad_token_id` follows the common beginning, so that a head that looks for the last such token finds it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal model, with any head, for which [`reason_not_to_share_prefix`] is None.
        rows (`Sequence[Sequence[int]]`):
            Token ids, at least two in each row.
        group_ids (`Sequence`):
            One for each row; rows of a group are next to each other.
        pad_token_id (`int`):
            Token id of padding.

    Example:

    ```python
    rows, lengths = rows_after_prefix(model, [[5, 6, 7, 1], [5, 6, 7, 2, 3]], [0, 0], pad_token_id=0)
    with torch.no_grad(), attend_to_prefix(model):
        logits = model(**rows).logits[torch.arange(2), lengths - 1]  # after the last token of each row
    ```
    """
    prefixes: list[Sequence[int]] = []
    counts: list[int] = []
    following: list[Sequence[int]] = []
    numbered = list(zip(group_ids, rows, strict=True))
    for _, members in groupby(numbered, key=lambda item: item[0]):
        group = [row for _, row in members]
        common = _common_length(group, pad_token_id)
        # Rows that have nothing in common are groups of their own
        for part in [group] if common else [[row] for row in group]:
            length = common or _common_length(part, pad_token_id)
            prefixes.append(part[0][:length])
            counts.append(len(part))
            following += [row[length:] for row in part]
    prompts = left_pad(prefixes, pad_token_id, model.device)
    cache = DynamicCache()
    with torch.no_grad():
        without_head(model)(**prompts, past_key_values=cache, use_cache=True)
    inputs, lengths = whole_rows(following, pad_token_id, model.device)
    before = prompts["attention_mask"].sum(dim=1).repeat_interleave(torch.tensor(counts, device=model.device))
    longest = inputs["input_ids"].shape[1]
    return RowInputs(
        {
            "input_ids": inputs["input_ids"],
            "position_ids": before[:, None] + torch.arange(longest, device=model.device),
            "past_key_values": PrefixCache(cache, prompts["attention_mask"], counts, longest),
            "use_cache": True,
        },
        lengths,
    )


def _common_length(rows: Sequence[Sequence[int]], pad_token_id: int) -> int:
    """How many tokens all rows begin with, leaving each at least its last token that is not padding."""
    first, last = min(map(list, rows)), max(map(list, rows))  # in lexical order: what these share, all between them do
    agree = next(
        (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other),
        min(len(first), len(last)),
    )
    ends = [
        next((place for place in range(len(row) - 1, 0, -1) if row[place] != pad_token_id), len(row) - 1)
        for row in rows
    ]
    return min(agree, *ends)


def reason_not_to_share_prefix(model: PreTrainedModel, row_length: int) -> str | None:
    """Why rows of this model must not share the keys of a prompt, or None where sharing is exact. Logged once.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal model, with any head.
        row_length (`int`):
            Length in tokens of the longest row, prompt included.

    Returns:
        `str` or `None`: one clause in plain words.
    """
    reason = architecture_reason(model, row_length) or partition_reason(model)
    if reason is None:
        if model not in _probed:
            _probed[model] = probe_prefix_reason(model)
        reason = _probed[model]
    if reason is not None:
        log_reason(model, reason)
    return reason


def partition_reason(model: PreTrainedModel) -> str | None:
    """Why each forward pass of this model needs all processes, which must then make as many; or None."""
    if is_fsdp_managed_module(model):
        return "its weights are sharded by FSDP"
    if any(hasattr(parameter, "ds_id") and parameter.numel() == 0 for parameter in model.parameters()):
        return "its weights are partitioned by ZeRO-3, and not gathered"
    return None


def probe_prefix_reason(model: PreTrainedModel) -> str | None:
    """Run a few random tokens with a shared beginning and without, and say by how much the last hidden states differ
    where that is more than rounding."""
    name = model.config.get_text_config().model_type
    training = [module for module in model.modules() if module.training]
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    # Two groups with beginnings of two lengths, and different ends
    tokens = torch.randint(1, vocab_size, (4, 12), generator=generator)
    tokens[1, :7], tokens[3, :4] = tokens[0, :7], tokens[2, :4]
    rows = [tokens[0, :12].tolist(), tokens[1, :10].tolist(), tokens[2, :9].tolist(), tokens[3, :11].tolist()]
    inner = without_head(model)
    model.eval()  # dropout would differ between the two runs
    try:
        with torch.no_grad():
            plain_inputs, _ = whole_rows(rows, 0, model.device)
            plain = inner(**plain_inputs).last_hidden_state
            try:
                inputs, lengths = rows_after_prefix(model, rows, [0, 0, 1, 1], pad_token_id=0)
                with attend_to_prefix(model):
                    shared = inner(**inputs).last_hidden_state
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
                return f"{name} cannot share a prompt's keys ({type(error).__name__}: {error})"
    finally:
        for module in training:
            module.training = True
    if not all(layer.was_attended for layer in inputs["past_key_values"].layers):
        return f"{name} has an attention of its own, which is not in transformers' `AttentionInterface`"
    of_ends = [
        (plain[row, len(tokens) - int(length) : len(tokens)], shared[row, : int(length)])
        for row, (tokens, length) in enumerate(zip(rows, lengths, strict=True))
    ]
    difference = sum((one.float() - other.float()).abs().sum().item() for one, other in of_ends)
    size = sum(one.float().abs().sum().item() for one, _ in of_ends)
    if not difference <= PROBE_TOLERANCE[plain.dtype] * size:
        return (
            f"hidden states of {name} with a shared prompt differ by {difference / size:.1e} of their size in a probe"
        )
    return None
