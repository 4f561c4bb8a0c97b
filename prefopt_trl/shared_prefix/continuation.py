"""Inference on rows with a common prefix: the prefix runs once, then the rest of each row.

Unlike in a packed row ([`pack_rows`]), which supports training, attention is computed segment by segment, so its cost
does not grow with the square of all tokens that follow a prompt.
"""

import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from prefopt_trl.shared_prefix.attention import (
    PrefixCache,
    SharedKeysLayer,
    attend_to_prefix,
    left_pad,
    with_cache,
    without_head,
)
from prefopt_trl.shared_prefix.segments import Segments
from prefopt_trl.shared_prefix.support import PROBE_TOLERANCE, architecture_reason, evaluating, log_reason

# Largest relative difference of a head's logits that counts as rounding; a wrong one differs by tens of percent
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}

_probed: weakref.WeakKeyDictionary[torch.nn.Module, str | None] = weakref.WeakKeyDictionary()
_probed_heads: weakref.WeakKeyDictionary[torch.nn.Module, str | None] = weakref.WeakKeyDictionary()


class WholeRows:
    """Rows of token ids without sharing, padded on the right; `inputs` are the model's keyword arguments."""

    def __init__(self, rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> None:
        self.lengths = torch.tensor([len(row) for row in rows], device=device)
        input_ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_token_id
        ).to(device)
        mask = (torch.arange(input_ids.shape[1], device=device) < self.lengths[:, None]).long()
        self.inputs = {"input_ids": input_ids, "attention_mask": mask}

    def last_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the LM logits after the last token of each row, shape `(num_rows, vocab_size)`."""
        # The LM head runs only at positions where some row ends
        positions, position_of_row = torch.unique(self.lengths - 1, return_inverse=True)
        logits = model(**self.inputs, logits_to_keep=positions, use_cache=False).logits
        if logits.shape[1] != len(positions):  # the model ignores `logits_to_keep`
            logits = logits[:, positions]
        return logits[torch.arange(len(logits), device=logits.device), position_of_row.to(logits.device)]

    def head_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the logits of a classification head, shape `(num_rows, num_labels)`."""
        return model(**self.inputs).logits


class RowsAfterPrefix:
    """Rows of token ids whose common prefix runs once per group, and then the rest of each row without padding.

    [`reason_not_to_share_prefix`] must be None for the model, which may have any head. Rows with the same `group_ids`
    must be adjacent, and each row needs a token after its first that is not padding. Rows may end in padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Sequence[int]],
        group_ids: Sequence[Hashable],
        pad_token_id: int,
    ) -> None:
        prefixes, following = split_rows(rows, group_ids, pad_token_id)
        prompts, device = DynamicCache(), model.device
        with torch.no_grad():
            without_head(model)(**left_pad(prefixes, pad_token_id, device), **with_cache(model, prompts))
        lengths = [[len(row) for row in part] for part in following]
        self.segments = Segments(prompts, list(map(len, prefixes)), lengths, device)
        segments = [row for part in following for row in part]
        self.input_ids = torch.tensor([[token for row in segments for token in row]], device=device)
        # For the model inside `attend_to_prefix`: one row with all segments
        self.inputs = {
            "input_ids": self.input_ids,
            "position_ids": self.segments.position_ids,
            **with_cache(model, self.segments),
        }
        last = [last_of_row(row, pad_token_id) - len(row) for row in segments]  # counted from the end
        self.read_at = self.segments.ends + 1 + torch.tensor(last, device=device)

    def last_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Return what [`WholeRows.last_logits`] returns."""
        with attend_to_prefix(model):
            logits = model(**self.inputs, logits_to_keep=self.segments.ends).logits[0]
        return logits if len(logits) == len(self.segments.ends) else logits[self.segments.ends.to(logits.device)]

    def head_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Return what [`WholeRows.head_logits`] returns."""
        body = without_head(model)
        with attend_to_prefix(model):
            outputs = body(**self.inputs)
        # Call the head on one token per row, with the hidden states that the body has already computed
        at = self.read_at.to(outputs.last_hidden_state.device)
        outputs.last_hidden_state = outputs.last_hidden_state[0, at][:, None]
        with _returning(body, outputs):
            return model(input_ids=self.input_ids[0, self.read_at][:, None]).logits


def split_rows(
    rows: Sequence[Sequence[int]], group_ids: Sequence[Hashable], pad_token_id: int
) -> tuple[list[Sequence[int]], list[list[Sequence[int]]]]:
    """Return the common prefix of each group of rows, and the rest of each row; rows without one become groups."""

    def shared_length(group: list[Sequence[int]]) -> int:  # leaves each row its last token that is not padding
        return min(common_length(group), *(last_of_row(row, pad_token_id) for row in group))

    prefixes: list[Sequence[int]] = []
    following: list[list[Sequence[int]]] = []
    for _, members in groupby(zip(group_ids, rows, strict=True), key=lambda item: item[0]):
        group = [row for _, row in members]
        common = shared_length(group)
        for part in [group] if common else [[row] for row in group]:
            length = common or shared_length(part)
            prefixes.append(part[0][:length])
            following.append([row[length:] for row in part])
    return prefixes, following


@contextmanager
def _returning(module: torch.nn.Module, outputs: ModelOutput) -> Iterator[None]:
    """Make the module return these outputs inside the context."""
    replaced = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: outputs
    try:
        yield
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced


def last_of_row(row: Sequence[int], pad_token_id: int) -> int:
    """Return the index of the last token that is not padding, or 0 if all are padding."""
    return next((place for place in range(len(row) - 1, 0, -1) if row[place] != pad_token_id), 0)


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return the length of the common prefix of all rows."""
    columns = enumerate(zip(*rows, strict=False))
    return next((place for place, tokens in columns if len(set(tokens)) > 1), min(map(len, rows)))


def reason_not_to_share_prefix(model: PreTrainedModel, row_length: int) -> str | None:
    """Say why rows of this model must not share the keys of a prompt, or return None if sharing is exact.

    The model may have any head; `row_length` is that of the longest row in tokens, prompt included. The reason is
    logged once per model.
    """
    reason = architecture_reason(model, row_length) or partition_reason(model)
    if reason is None and getattr(model.config.get_text_config(), "attn_temperature_tuning", False):
        reason = "its attention temperature depends on a token's index in the cache (`attn_temperature_tuning`)"
    if reason is None:
        if model not in _probed:
            _probed[model] = probe_prefix_reason(model)
        reason = _probed[model]
    if reason is not None:
        log_reason(model, reason)
    return reason


def partition_reason(model: torch.nn.Module) -> str | None:
    """Say why all processes must take part in each forward pass of this model, or return None."""
    is_fsdp1 = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if is_fsdp1 or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "its weights are sharded by FSDP"
    if any(hasattr(parameter, "ds_id") and parameter.numel() == 0 for parameter in model.parameters()):
        return "its weights are partitioned by ZeRO-3, and not gathered"
    return None


def probe_prefix_reason(model: PreTrainedModel) -> str | None:
    """Run a few random tokens with and without a shared prefix, and report a difference in the last hidden states."""
    name, rows = model.config.get_text_config().model_type, _probe_rows(model)
    inner = without_head(model)
    with evaluating(model), torch.no_grad():  # dropout would differ between the two runs
        try:
            plain = inner(**WholeRows(rows, 0, model.device).inputs).last_hidden_state
            pairs = [*_probe_segments(model, rows, plain), *_probe_steps(model, rows, plain)]
        except torch.OutOfMemoryError:  # not a property of the model
            raise
        except NotAttended:
            return f"{name} does not use transformers' `AttentionInterface`"
        except Exception as error:  # any: a later transformers may break assumptions made here
            return f"{name} cannot share a prompt's keys ({type(error).__name__}: {error})"
    difference = sum((one.float() - other.float()).abs().sum().item() for one, other in pairs)
    size = sum(one.float().abs().sum().item() for one, _ in pairs)
    if not difference <= PROBE_TOLERANCE[plain.dtype] * size:
        return (
            f"hidden states of {name} with a shared prompt differ by {difference / size:.1e} of their size in a probe"
        )
    return None


def _probe_rows(model: PreTrainedModel) -> list[list[int]]:
    """Return two groups of random rows with prefixes of different lengths, the same for each vocabulary size."""
    vocab_size = model.config.get_text_config().vocab_size
    tokens = torch.randint(1, vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    tokens[1, :7], tokens[3, :4] = tokens[0, :7], tokens[2, :4]
    return [tokens[0, :12].tolist(), tokens[1, :10].tolist(), tokens[2, :9].tolist(), tokens[3, :11].tolist()]


def reason_not_to_share_head(model: PreTrainedModel, pad_token_id: int) -> str | None:
    """Say why the head of this model cannot run on rows without their prefix, or return None. Logged once per model.

    A head that reads only the last token before padding can. A probe detects one that averages over the row or looks
    for a special token.
    """
    if model not in _probed_heads:
        _probed_heads[model] = _probe_head_reason(model, pad_token_id)
    if (reason := _probed_heads[model]) is not None:
        log_reason(model, reason)
    return reason


def _probe_head_reason(model: PreTrainedModel, pad_token_id: int) -> str | None:
    name = type(model).__name__
    rows = [[*row, *[pad_token_id] * (number % 2)] for number, row in enumerate(_probe_rows(model))]
    with evaluating(model), torch.no_grad():
        whole = WholeRows(rows, pad_token_id, model.device).head_logits(model).float()
        try:
            after = RowsAfterPrefix(model, rows, [0, 0, 1, 1], pad_token_id).head_logits(model).float()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"the head of {name} does not take one token of a row ({type(error).__name__}: {error})"
    if whole.shape == after.shape:
        difference, size = (whole - after).abs().max().item(), whole.abs().max().item()
        if difference <= HEAD_TOLERANCE[model.dtype] * size:
            return None
    return f"the head of {name} reads more of a row than its last token"


class NotAttended(Exception):
    """Raised if a layer did not call [`shared_prefix_attention`]."""


def _probe_segments(
    model: PreTrainedModel, rows: list[list[int]], plain: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return hidden states from whole rows, and of the same tokens run as segments in two groups of two."""
    following = RowsAfterPrefix(model, rows, [0, 0, 1, 1], pad_token_id=0)
    with attend_to_prefix(model):
        shared = without_head(model)(**following.inputs).last_hidden_state[0]
    _check_attended(following.segments)
    lengths = following.segments.exists.sum(dim=1).tolist()
    return [
        (plain[row, len(tokens) - length : len(tokens)], part)
        for row, (tokens, length, part) in enumerate(zip(rows, lengths, shared.split(lengths), strict=True))
    ]


def _probe_steps(
    model: PreTrainedModel, rows: list[list[int]], plain: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return hidden states from whole rows, and of the same tokens decoded one by one after two prompts."""
    prompts = left_pad([rows[0][:7], rows[2][:4]], 0, model.device)
    cache, inner = DynamicCache(), without_head(model)
    inner(**prompts, **with_cache(model, cache))
    steps = PrefixCache(cache, prompts["attention_mask"], [2, 2], longest=3)
    before = torch.tensor([7, 7, 4, 4], device=model.device)
    pairs = []
    with attend_to_prefix(model):
        for step in range(3):
            tokens = torch.tensor([[row[start + step]] for row, start in zip(rows, before.tolist(), strict=True)])
            positions = before[:, None] + step
            hidden = inner(
                input_ids=tokens.to(model.device), position_ids=positions, **with_cache(model, steps)
            ).last_hidden_state
            pairs.append((plain[torch.arange(4, device=plain.device), positions[:, 0]], hidden[:, 0]))
    _check_attended(steps)
    return pairs


def _check_attended(cache: Cache) -> None:
    if not all(isinstance(layer, SharedKeysLayer) and layer.was_attended for layer in cache.layers):
        raise NotAttended
