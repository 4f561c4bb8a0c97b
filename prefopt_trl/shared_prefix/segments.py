"""The continuations of prompts as one row of segments, without padding, each attending to its own prompt."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache

from prefopt_trl.shared_prefix.attention import Scores, SharedKeysLayer, SoftmaxPart

SCORES_AT_ONCE = 2**24  # 64 MiB in float32, so that memory does not grow with the square of a segment


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
        of_prompts: list[Any] = prompts.layers
        super().__init__(layers=[SegmentLayer(layer.keys, layer.values, self) for layer in of_prompts])
