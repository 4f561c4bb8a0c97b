"""Inference on rows with a common prefix: the prefix runs once, then the rest of each row.

Unlike in a packed row ([`pack_rows`]), which supports training, attention is computed segment by segment, so its cost
does not grow with the square of all tokens that follow a prompt.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from prefopt_trl.shared_prefix.attention import (
    Scores,
    SharedKeysLayer,
    SoftmaxPart,
    attend_to_prefix,
    check_attended,
    keys_and_values,
    with_cache,
    without_head,
)
from prefopt_trl.shared_prefix.packing import WholeRows, common_length, left_pad
from prefopt_trl.shared_prefix.support import (
    States,
    evaluating,
    hidden_states_reason,
    log_reason,
    probe_rows,
    run_probe,
)

SCORES_AT_ONCE = 2**24  # 64 MiB in float32, so that memory does not grow with the square of a segment

# Largest relative difference of a head's logits that counts as rounding; a wrong one differs by tens of percent
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}


class RowsAfterPrefix:
    """Rows of token ids whose common prefix runs once per group, and then the rest of each row without padding.

    [`reason_not_to_share_prefix`] must be None for the model, which may have any head. `prefixes` and `following` are
    those of [`split_rows`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefixes: list[Sequence[int]],
        following: list[list[Sequence[int]]],
        pad_token_id: int,
    ) -> None:
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
    """Return the common prefix of each group of rows, and the rest of each row. Rows without one become groups.

    Rows with the same `group_ids` must be adjacent. They may end in padding, but need a token other than padding after
    their first.
    """

    def shared_length(group: list[Sequence[int]]) -> int:  # excludes each row's last token that is not padding
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


class SegmentLayer(SharedKeysLayer):
    """Cache layer for segments that run in one forward pass, side by side in a batch of one row.

    `keys` and `values` are those of the left-padded prompts, `(num_prompts, num_kv_heads, prompt_length, size)`.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, segments: "Segments") -> None:
        super().__init__(keys, values)
        self.segments = segments

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.bound(key_states), value_states

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: Scores) -> torch.Tensor:
        num_heads, num_tokens, size = query.shape[1:]
        num_kv_heads = key.shape[1]
        # Heads that share keys are further queries: (num_kv_heads, heads of each, num_tokens, size)
        queries = query[0].reshape(num_kv_heads, -1, num_tokens, size)
        own, shared = self._own_part(queries, key[0], value[0], score), self._shared_part(queries, score)
        return own.mean_with(shared).to(query.dtype).reshape(1, num_tokens, num_heads, -1)

    def _own_part(self, queries: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: Scores) -> SoftmaxPart:
        """Attend within each segment; return `(num_tokens, num_kv_heads, heads of each, ...)`.

        Segments are padded on the right, where the causal mask hides the padding.
        """
        all_places, all_exist = (part.to(key.device) for part in (self.segments.places, self.segments.exists))
        num_heads, longest = queries.shape[:2], all_places.shape[1]
        later = torch.ones(longest, longest, dtype=torch.bool, device=key.device).triu(1)
        at_once = max(SCORES_AT_ONCE // (num_heads.numel() * longest**2), 1)
        parts = []
        for places, exists in zip(all_places.split(at_once), all_exist.split(at_once), strict=True):
            padded_queries = queries[:, :, places].permute(2, 0, 1, 3, 4).flatten(2, 3)
            padded_keys, padded_values = (part[:, places].transpose(0, 1) for part in (key, value))
            scores = score.of(padded_queries, padded_keys).view(len(places), *num_heads, longest, longest)
            part = SoftmaxPart.over(scores.masked_fill_(later, -torch.inf), padded_values[:, :, None])
            parts.append([values.permute(0, 3, 1, 2, 4)[exists] for values in part])
        return SoftmaxPart(*(torch.cat(one) for one in zip(*parts, strict=True)))

    def _shared_part(self, queries: torch.Tensor, score: Scores) -> SoftmaxPart:
        """Attend to the prompts: all segments of a prompt are adjacent and form one matrix product."""
        num_heads = queries.shape[:2].numel()
        parts = []
        of_prompts = queries.split([num_tokens for num_tokens, _ in self.segments.prompts], dim=2)
        for prompt, (_, length) in enumerate(self.segments.prompts):
            keys, values = (
                part[prompt, :, part.shape[2] - length :] for part in (self.prompt_keys, self.prompt_values)
            )
            for some in of_prompts[prompt].split(max(SCORES_AT_ONCE // (num_heads * length), 1), dim=2):
                part = SoftmaxPart.over(score.of(some.flatten(1, 2), keys), values)
                parts.append([one.unflatten(1, some.shape[1:3]).permute(2, 0, 1, 3) for one in part])
        return SoftmaxPart(*(torch.cat(one) for one in zip(*parts, strict=True)))


class Segments(Cache):
    """Cache of prompts, stored once, for the segments that continue them.

    `prompts` is the cache after a forward pass over the left-padded prompts; lengths are in tokens. `ends`, of shape
    `(num_segments,)`, is the index of the last token of each segment, and `position_ids`, of shape `(1, num_tokens)`,
    the position of each token in its own row, prompt included.
    """

    def __init__(
        self,
        prompts: DynamicCache,
        prompt_lengths: Sequence[int],
        segment_lengths: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        self.prompts = [(sum(own), length) for own, length in zip(segment_lengths, prompt_lengths, strict=True)]
        lengths = torch.tensor([length for own in segment_lengths for length in own], device=device)
        place = torch.arange(int(lengths.max()), device=device)
        self.exists = place < lengths[:, None]  # (num_segments, longest)
        self.ends = lengths.cumsum(dim=0) - 1
        starts = self.ends - lengths + 1
        self.places = torch.where(self.exists, starts[:, None] + place, 0)
        before = [length for own, length in zip(segment_lengths, prompt_lengths, strict=True) for _ in own]
        self.position_ids = (torch.tensor(before, device=device)[:, None] + place)[self.exists][None]
        super().__init__(layers=[SegmentLayer(keys, values, self) for keys, values in keys_and_values(prompts)])


def probe_segments(model: PreTrainedModel) -> str | None:
    """Compare hidden states of segments with those of whole rows; pass this to [`reason_not_to_share_prefix`]."""
    return hidden_states_reason(model, _run_segments)


def _run_segments(model: PreTrainedModel, rows: list[list[int]]) -> list[States]:
    following = RowsAfterPrefix(model, *split_rows(rows, [0, 0, 1, 1], 0), 0)
    with attend_to_prefix(model):
        states = without_head(model)(**following.inputs).last_hidden_state[0]
    check_attended(following.segments)
    parts = states.split(following.segments.exists.sum(dim=1).tolist())
    return [(len(row) - len(part), part) for row, part in zip(rows, parts, strict=True)]


def reason_not_to_share_head(model: PreTrainedModel, pad_token_id: int) -> str | None:
    """Say why the head of this model cannot run on rows without their prefix, or return None. Logged once per model.

    A head that reads only the last token before padding can. A probe detects one that averages over the row or looks
    for a special token.
    """
    return log_reason(model, run_probe(_probe_head, model, pad_token_id))


def _probe_head(model: PreTrainedModel, pad_token_id: int) -> str | None:
    rows = [[*row, *[pad_token_id] * (number % 2)] for number, row in enumerate(probe_rows(model))]
    with evaluating(model), torch.no_grad():
        whole = WholeRows(rows, pad_token_id, model.device).head_logits(model).float()
        after = RowsAfterPrefix(model, *split_rows(rows, [0, 0, 1, 1], pad_token_id), pad_token_id)
        found = after.head_logits(model).float()
    if whole.shape == found.shape:
        difference, size = (whole - found).abs().max().item(), whole.abs().max().item()
        if difference <= HEAD_TOLERANCE[model.dtype] * size:
            return None
    return f"the head of {type(model).__name__} reads more of a row than its last token"
