"""Attention of many rows to one prompt, whose keys and values are computed and held once.

A batch is "prompts, each with n rows", in the order of the prompts. A row's keys are those of its prompt, shared with
the prompt's other rows, and its own. The two parts of its attention are computed apart and then joined: over the
prompt all rows of a prompt are one matrix product, over its own tokens each row is one.
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
except ImportError:  # not a public name: without it the probes find what cannot be shared, and say so
    CacheLayerMixin = object  # type: ignore[assignment, misc]

SHARED_PREFIX = "shared_prefix"  # name of the attention in transformers' `AttentionInterface`


class RowsOfPrompts:
    """Which prompt each row belongs to, as a grid of prompts and places.

    Args:
        counts (`Sequence[int]` of length `num_prompts`):
            Rows of each prompt, which come one prompt after another.
        device (`torch.device`):
            Device of the rows.
    """

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.counts = list(counts)
        self.width = max(self.counts)  # places in the grid
        self.prompt = torch.repeat_interleave(torch.tensor(self.counts, device=device))  # (num_rows,)
        place = torch.cat([torch.arange(count, device=device) for count in self.counts])
        self.slot = self.prompt * self.width + place  # (num_rows,) index into the flat grid
        self.is_full = min(self.counts) == self.width

    def by_prompt(self, rows: torch.Tensor) -> torch.Tensor:
        """From `(num_rows, heads, tokens, size)` to `(num_prompts, heads, width * tokens, size)`; zero where empty."""
        heads, tokens, size = rows.shape[1:]
        if not self.is_full:
            grid = rows.new_zeros(len(self.counts) * self.width, heads, tokens, size)
            rows = grid.index_copy_(0, self.slot.to(rows.device), rows)
        grid = rows.view(-1, self.width, heads, tokens, size).transpose(1, 2)
        return grid.reshape(-1, heads, self.width * tokens, size)

    def by_row(self, grid: torch.Tensor, tokens: int) -> torch.Tensor:
        """The way back."""
        num_prompts, heads, _, size = grid.shape
        rows = grid.view(num_prompts, heads, self.width, tokens, size).transpose(1, 2).flatten(0, 1)
        return rows if self.is_full else rows[self.slot.to(grid.device)]


class SharedKeysLayer(CacheLayerMixin):
    """One layer's keys and values of prompts, which are held once, and how rows attend to them and to their own."""

    is_sliding = False
    was_attended = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.prompt_keys, self.prompt_values = keys, values
        self.is_initialized = True

    def bound(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys that know this layer: the attention function is given them, and nothing else of the cache."""
        keys = keys.view_as(keys)
        keys.prefix_layer = self  # type: ignore[attr-defined]
        return keys

    @abstractmethod
    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: "Scores") -> torch.Tensor:
        """Attention of the queries, of shape `(batch_size, num_queries, num_heads, size)`."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the prompt's keys say device and dtype."""

    def get_seq_length(self) -> int:
        return self.prompt_keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class Scores(NamedTuple):
    """How a model scores keys: times `scaling`, and softly capped where there is a `softcap`."""

    scaling: float
    softcap: float | None

    def of(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """`(..., num_queries, num_keys)` of `(..., num_queries, size)` and `(..., num_keys, size)`, in float32."""
        scores = (queries * self.scaling @ keys.transpose(-1, -2)).to(
            torch.promote_types(queries.dtype, torch.float32)
        )
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


class SoftmaxPart(NamedTuple):
    """A softmax over some of the keys: the `greatest` score `m`, the `total` of `exp(s - m)`, and the values' mean.

    That over other keys can be joined to it. Each ends with a dimension of 1, or of the values' size.
    """

    greatest: torch.Tensor
    total: torch.Tensor
    mean: torch.Tensor

    @classmethod
    def over(cls, scores: torch.Tensor, values: torch.Tensor) -> "SoftmaxPart":
        """Of scores, which are written over."""
        greatest = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(greatest).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        return cls(greatest, total, weights.div_(total).to(values.dtype) @ values)  # a sum would overflow float16

    def mean_with(self, other: "SoftmaxPart") -> torch.Tensor:
        """The mean of the values over the keys of both."""
        greatest = torch.maximum(self.greatest, other.greatest)
        weight, other_weight = (part.total * torch.exp(part.greatest - greatest) for part in (self, other))
        return (self.mean * weight + other.mean * other_weight) / (weight + other_weight)


class PrefixLayer(SharedKeysLayer):
    """For rows that grow by a token at a time: `(num_rows, heads, room, size)` beside the prompts' own.

    The first `length` places of a row's room are taken. The room grows by doubling, so that a row that ends early
    never has the memory of the longest.
    """

    keys: Any  # None until the rows have tokens
    values: Any

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor | None, longest: int) -> None:
        super().__init__(keys, values)
        self.hidden = hidden  # (num_prompts, 1, 1, prompt_length) True at padding; None where there is none
        self.longest = longest
        self.length = 0
        self.rows: RowsOfPrompts

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + key_states.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            self._make_room(key_states, value_states, end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.bound(self.keys[:, :, :end]), self.values[:, :, :end]

    def _make_room(self, keys: torch.Tensor, values: torch.Tensor, end: int) -> None:
        room = min(self.longest, max(2 * end, 32))
        for name, new in (("keys", keys), ("values", values)):
            old = getattr(self, name)
            grown = new.new_empty(new.shape[0], new.shape[1], room, new.shape[3])
            if old is not None:
                grown[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, grown)

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


class PrefixCache(Cache):
    """Keys and values of prompts, held once, and of the rows that follow them.

    Args:
        prompts ([`~transformers.DynamicCache`]):
            Cache after the prompts have run, one row each.
        attention_mask (`torch.Tensor` of shape `(num_prompts, prompt_length)`, *optional*):
            1 for tokens, 0 for padding. None where there is no padding.
        counts (`Sequence[int]` of length `num_prompts`):
            Rows of each prompt, at least 1.
        longest (`int`):
            Most tokens that a row may have after its prompt.
    """

    layers: list[PrefixLayer]  # type: ignore[assignment]

    def __init__(
        self, prompts: DynamicCache, attention_mask: torch.Tensor | None, counts: Sequence[int], longest: int
    ) -> None:
        hidden = None
        if attention_mask is not None and not attention_mask.all():
            hidden = attention_mask[:, None, None] == 0
        of_prompts: list[Any] = prompts.layers
        layers: list[Any] = [
            PrefixLayer(layer.keys, layer.values, None if hidden is None else hidden.to(layer.keys.device), longest)
            for layer in of_prompts
        ]
        super().__init__(layers=layers)
        self._set_rows(counts)

    def _set_rows(self, counts: Sequence[int]) -> None:
        self.rows = RowsOfPrompts(counts, self.layers[0].prompt_keys.device)
        for layer in self.layers:
            layer.rows = self.rows

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Forget all rows but these (`torch.LongTensor`, ascending), and prompts that are left without any."""
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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend to the prompt and to the row's own tokens up to each query.

    The softmax over both is put together from the two parts, in float32 at least, as that of eager attention is.

    Args:
        query (`torch.Tensor` of shape `(batch_size, num_heads, num_queries, size)`):
            Queries.
        key, value (`torch.Tensor` of shape `(batch_size, num_kv_heads, num_own_tokens, size)`):
            The rows' own, as the layer of the cache returns them.
        scaling (`float`, *optional*):
            Of the scores; by default `size ** -0.5`.
        softcap (`float`, *optional*):
            Scores become `softcap * tanh(scores / softcap)`.

    Returns:
        `tuple`: attention of shape `(batch_size, num_queries, num_heads, size)`, and None for its weights.

    Raises:
        ValueError: for keys of another cache, or attention with dropout, sinks or biases.
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
    """While entered, the model's attention is [`shared_prefix_attention`]."""
    from transformers import AttentionInterface  # here, so that a release without it costs the sharing alone

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


def without_head(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its LM or classification head, adapters included."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.base_model


def with_cache(model: PreTrainedModel, cache: Cache) -> dict[str, Any]:
    """Keyword arguments that make the model use this cache: `cache` since transformers 5.24, `past_key_values` before.

    May be inlined once the oldest supported release is 5.24.
    """
    named_cache = "cache" in inspect.signature(without_head(model).forward).parameters
    return {"cache" if named_cache else "past_key_values": cache, "use_cache": True}


def left_pad(ids: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs of a model for rows of ids, padded on the left, with the position of each token in its own row.

    Returns:
        `dict`: `input_ids`, `attention_mask` (1 for tokens, 0 for padding) and `position_ids` (0 at padding), long
        tensors of shape `(num_rows, longest)`.
    """
    length = max(map(len, ids))
    input_ids = torch.tensor([[pad_token_id] * (length - len(row)) + list(row) for row in ids], device=device)
    attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=device)
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
