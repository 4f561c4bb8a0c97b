"""Attention of many rows to one prompt, whose keys and values are computed and stored once.

A batch holds n rows per prompt, in the order of the prompts. A row attends to the keys of its prompt, shared with the
prompt's other rows, and to the keys of its own tokens. The two parts are computed separately and then merged: one
matrix product per prompt for the shared part, one per row for the rest.
"""

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import Cache, DynamicCache, PreTrainedModel

try:
    from transformers.cache_utils import CacheLayerMixin
except ImportError:  # not a public name: without it the probes fail, log why, and rows run unshared
    CacheLayerMixin = object  # type: ignore[assignment, misc]

SHARED_PREFIX = "shared_prefix"  # name of the attention in transformers' `AttentionInterface`


class RowsOfPrompts:
    """Map rows, `counts[i]` of prompt i and then those of the next, to a grid of prompts and slots, and back."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.counts = list(counts)
        self.width = max(self.counts)  # slots per prompt
        self.prompt = torch.repeat_interleave(torch.tensor(self.counts, device=device))  # (num_rows,)
        place = torch.cat([torch.arange(count, device=device) for count in self.counts])
        self.slot = self.prompt * self.width + place  # (num_rows,) index into the flat grid
        self.is_full = min(self.counts) == self.width

    def by_prompt(self, rows: torch.Tensor) -> torch.Tensor:
        """Reshape `(num_rows, heads, tokens, size)` to `(num_prompts, heads, width * tokens, size)`, zero-padded."""
        heads, tokens, size = rows.shape[1:]
        if not self.is_full:
            grid = rows.new_zeros(len(self.counts) * self.width, heads, tokens, size)
            rows = grid.index_copy_(0, self.slot.to(rows.device), rows)
        grid = rows.view(-1, self.width, heads, tokens, size).transpose(1, 2)
        return grid.reshape(-1, heads, self.width * tokens, size)

    def by_row(self, grid: torch.Tensor, tokens: int) -> torch.Tensor:
        """Invert `by_prompt`."""
        num_prompts, heads, _, size = grid.shape
        rows = grid.view(num_prompts, heads, self.width, tokens, size).transpose(1, 2).flatten(0, 1)
        return rows if self.is_full else rows[self.slot.to(grid.device)]


class SharedKeysLayer(CacheLayerMixin):
    """One layer's cache: the keys and values of the prompts, stored once, and how rows attend to them."""

    is_sliding = False
    was_attended = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.prompt_keys, self.prompt_values = keys, values
        self.is_initialized = True

    def bound(self, keys: torch.Tensor) -> torch.Tensor:
        """Attach this layer to the keys, as the attention function receives nothing else from the cache."""
        keys = keys.view_as(keys)
        keys.prefix_layer = self  # type: ignore[attr-defined]
        return keys

    @abstractmethod
    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: "Scores") -> torch.Tensor:
        """Return the attention output, of shape `(batch_size, num_queries, num_heads, size)`."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the prompt's keys already set device and dtype."""

    def get_seq_length(self) -> int:
        return self.prompt_keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class Scores(NamedTuple):
    """Attention scores: query times key times `scaling`, soft-capped if `softcap` is set."""

    scaling: float
    softcap: float | None

    def of(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Return scores `(..., num_queries, num_keys)`, in float32 at least."""
        scores = (queries * self.scaling @ keys.transpose(-1, -2)).to(
            torch.promote_types(queries.dtype, torch.float32)
        )
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


class SoftmaxPart(NamedTuple):
    """A softmax over some of the keys, in a form that merges with a softmax over other keys.

    Fields: the `greatest` score m, the `total` of exp(s - m), and the weighted `mean` of the values.
    """

    greatest: torch.Tensor
    total: torch.Tensor
    mean: torch.Tensor

    @classmethod
    def over(cls, scores: torch.Tensor, values: torch.Tensor) -> "SoftmaxPart":
        """Compute the softmax of `scores` in place."""
        greatest = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(greatest).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        return cls(greatest, total, weights.div_(total).to(values.dtype) @ values)  # a sum would overflow float16

    def mean_with(self, other: "SoftmaxPart") -> torch.Tensor:
        """Return the weighted mean of the values over the keys of both parts."""
        greatest = torch.maximum(self.greatest, other.greatest)
        weight, other_weight = (part.total * torch.exp(part.greatest - greatest) for part in (self, other))
        return (self.mean * weight + other.mean * other_weight) / (weight + other_weight)


class PrefixLayer(SharedKeysLayer):
    """Cache layer for rows that grow by one token at a time, in buffers of shape `(num_rows, heads, room, size)`.

    The first `length` positions of the buffers are filled. The buffers grow by doubling, so that memory is not
    reserved for the longest row while all are short.
    """

    keys: torch.Tensor | None  # None until the rows have tokens
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor | None, longest: int) -> None:
        super().__init__(keys, values)
        self.hidden = None if hidden is None else hidden.to(keys.device)  # True at padding
        self.longest = longest
        self.length = 0
        self.rows: RowsOfPrompts

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key_states.shape[2]
        if self.keys is None:
            self.keys, self.values = self._grown(key_states, 0, end), self._grown(value_states, 0, end)
        elif end > self.keys.shape[2]:
            self.keys, self.values = (self._grown(own, self.length, end) for own in (self.keys, self.values))
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.bound(self.keys[:, :, :end]), self.values[:, :, :end]

    def _grown(self, old: torch.Tensor, length: int, end: int) -> torch.Tensor:
        room = min(self.longest, max(2 * end, 32))
        grown = old.new_empty(old.shape[0], old.shape[1], room, old.shape[3])
        grown[:, :, :length] = old[:, :, :length]
        return grown

    def keep_rows(self, rows: torch.Tensor, prompts: torch.Tensor | None) -> None:
        if self.keys is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.values = (self._without_others(own, rows) for own in (self.keys, self.values))
        if prompts is not None:
            prompts = prompts.to(self.prompt_keys.device)
            self.prompt_keys, self.prompt_values = self.prompt_keys[prompts], self.prompt_values[prompts]
            self.hidden = None if self.hidden is None else self.hidden[prompts]

    def _without_others(self, own: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        kept = own.new_empty(len(rows), *own.shape[1:])
        kept[:, :, : self.length] = own[rows, :, : self.length]
        return kept

    def get_seq_length(self) -> int:
        return self.prompt_keys.shape[2] + self.length

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: Scores) -> torch.Tensor:
        num_rows, num_heads, num_queries, size = query.shape
        if num_queries > 1:
            raise ValueError("rows grow by one token at a time")
        num_kv_heads = key.shape[1]
        # Heads that share keys are further queries: (num_rows, num_kv_heads, queries, size)
        queries = query.reshape(num_rows, num_kv_heads, -1, size)
        own = score.of(queries, key)
        shared = score.of(self.rows.by_prompt(queries), self.prompt_keys)
        if self.hidden is not None:
            shared.masked_fill_(self.hidden, -torch.inf)
        of_prompts = SoftmaxPart.over(shared, self.prompt_values)
        of_rows = SoftmaxPart(*(self.rows.by_row(part, queries.shape[2]) for part in of_prompts))
        attended = SoftmaxPart.over(own, value).mean_with(of_rows)
        return attended.to(query.dtype).view(num_rows, num_heads, num_queries, -1).transpose(1, 2)


def keys_and_values(prompts: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the keys and values of each layer of a cache that a forward pass has filled."""
    layers: list[Any] = prompts.layers
    return [(layer.keys, layer.values) for layer in layers]


def check_attended(cache: Cache) -> None:
    """Raise `RuntimeError` unless all layers have called [`shared_prefix_attention`] with their keys of the cache."""
    if not all(isinstance(layer, SharedKeysLayer) and layer.was_attended for layer in cache.layers):
        raise RuntimeError("a layer does not use transformers' `AttentionInterface`")


class PrefixCache(Cache):
    """Cache of prompts, stored once, and of the rows that continue them.

    `prompts` is the cache after a forward pass over the prompts, whose padding is 0 in `attention_mask`. Prompt i has
    `counts[i]` rows (at least 1), each of at most `longest` tokens after its prompt.
    """

    layers: list[PrefixLayer]  # type: ignore[assignment]

    def __init__(
        self, prompts: DynamicCache, attention_mask: torch.Tensor | None, counts: Sequence[int], longest: int
    ) -> None:
        hidden = None
        if attention_mask is not None and not attention_mask.all():
            hidden = attention_mask[:, None, None] == 0
        super().__init__(layers=[PrefixLayer(*prompt, hidden, longest) for prompt in keys_and_values(prompts)])
        self._set_rows(counts)

    def _set_rows(self, counts: Sequence[int]) -> None:
        self.rows = RowsOfPrompts(counts, self.layers[0].prompt_keys.device)
        for layer in self.layers:
            layer.rows = self.rows

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Keep only these rows (`torch.LongTensor`, ascending), and the prompts that still have rows."""
        left = torch.bincount(self.rows.prompt[rows], minlength=len(self.rows.counts))
        prompts = None if left.all() else left.nonzero().squeeze(1)
        for layer in self.layers:
            layer.keep_rows(rows, prompts)
        self._set_rows(left[left > 0].tolist())


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attend to the prompt and to the row's own tokens up to each query; the softmax is in float32 at least.

    The signature is that of transformers' `AttentionInterface`: `query` is `(batch_size, num_heads, num_queries,
    size)`, and `key` and `value` are the rows' own, `(batch_size, num_kv_heads, num_own_tokens, size)`, as the cache
    layer returns them. A `ValueError` is raised for keys of another cache, and for dropout, sinks or biases.
    """
    layer: SharedKeysLayer | None = getattr(key, "prefix_layer", None)
    unknown = [name for name in ("s_aux", "sinks", "position_bias") if kwargs.get(name) is not None]
    if layer is None or unknown or dropout:
        raise ValueError(f"attention has {', '.join(unknown) or 'dropout or keys that do not come from the cache'}")
    layer.was_attended = True
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    return layer.attend(query, key, value, scores), None


@contextmanager
def attend_to_prefix(model: PreTrainedModel) -> Iterator[None]:
    """Use [`shared_prefix_attention`] as the model's attention inside the context."""
    from transformers import AttentionInterface  # here, so that a release without it only disables sharing

    AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
    every: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in every if hasattr(config, "_attn_implementation_internal")}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = SHARED_PREFIX
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def without_head(model: PreTrainedModel) -> torch.nn.Module:
    """Return the model without its LM or classification head, with its adapters."""
    return model.get_base_model().base_model if isinstance(model, PeftModel) else model.base_model


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Cache | bool]:
    """Return the keyword arguments that make the model use this cache.

    The argument is `cache` since transformers 5.24 and `past_key_values` before. Inline this once 5.24 is the oldest
    supported release.
    """
    named_cache = "cache" in inspect.signature(without_head(model).forward).parameters
    return {"cache" if named_cache else "past_key_values": cache, "use_cache": True}
