"""Attention over a prompt's keys and a row's own equals softmax attention over both, written one query at a time."""

import itertools

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from prefopt_trl.shared_prefix import continuation
from prefopt_trl.shared_prefix.attention import (
    SHARED_PREFIX,
    PrefixCache,
    Scores,
    attend_to_prefix,
    shared_prefix_attention,
)
from prefopt_trl.shared_prefix.continuation import Segments
from tests.unit.shared_prefix.families import SHARING, build

LENGTHS = [7, 4, 6]  # of the prompts, padded on the left to 7
SIZE = 8
heads = pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 1)], ids=["MHA", "GQA", "MQA"])


def attend_naively(query, keys, values, scaling: float = SIZE**-0.5, softcap: float | None = None) -> torch.Tensor:
    """Softmax attention in float64: of `(num_heads, num_queries, size)` to the tokens up to each query.

    Keys and values are `(num_kv_heads, num_tokens, size)`; the queries are the last tokens.
    """
    num_heads, num_queries = query.shape[:2]
    out = torch.zeros(num_queries, num_heads, values.shape[-1], dtype=torch.float64)
    for head in range(num_heads):
        kv_head = head // (num_heads // len(keys))
        for place in range(num_queries):
            end = keys.shape[1] - num_queries + place + 1
            scores = keys[kv_head, :end].double() @ query[head, place].double() * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[place, head] = torch.softmax(scores, dim=0) @ values[kv_head, :end].double()
    return out


class SlowPrompts:
    """A cache of two layers after prompts have run, and beside it every prompt's keys and values without padding."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, *, lengths=LENGTHS, dtype=torch.float32, value_size: int = SIZE
    ):
        self.generator = torch.Generator().manual_seed(0)
        self.num_heads, self.num_kv_heads, self.value_size, self.dtype = num_heads, num_kv_heads, value_size, dtype
        self.prompts, self.of_prompts = DynamicCache(), []
        place = torch.arange(max(lengths))
        self.mask = (place >= max(lengths) - torch.tensor(lengths)[:, None]).long()
        for layer in range(2):
            # What stands at padding is no token and must not be seen: make it as large as can be
            shapes = [(len(lengths), num_kv_heads, max(lengths), size) for size in (SIZE, value_size)]
            padding = self.mask[:, None, :, None] == 0
            keys, values = (self.random(*shape).masked_fill(padding, 50.0) for shape in shapes)
            self.prompts.update(keys, values, layer)
            self.of_prompts.append(
                [(keys[row][:, visible], values[row][:, visible]) for row, visible in enumerate(self.mask == 1)]
            )

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def attend(
        self, layer: int, num_rows: int, num_tokens: int, magnitude: float, **score
    ) -> tuple[torch.Tensor, ...]:
        """Draw queries, keys and values of further tokens, and return them behind the attention of the cache."""
        query = self.random(num_rows, self.num_heads, num_tokens, SIZE) * magnitude
        keys = self.random(num_rows, self.num_kv_heads, num_tokens, SIZE)
        values = self.random(num_rows, self.num_kv_heads, num_tokens, self.value_size)
        updated = self.cache.update(keys, values, layer)
        found, weights = shared_prefix_attention(None, query.clone(), *updated, None, **score)
        assert weights is None and found.dtype == self.dtype
        assert found.shape == (num_rows, num_tokens, self.num_heads, self.value_size)
        return found.double(), query, keys, values


class SlowRows(SlowPrompts):
    """Rows that grow, and beside their cache every row's keys and values in a list of their own."""

    def __init__(self, counts, num_heads, num_kv_heads, *, longest, lengths=LENGTHS, **options):
        super().__init__(num_heads, num_kv_heads, lengths=lengths, **options)
        self.rows = [
            [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
            for prompts in self.of_prompts
        ]
        self.cache = PrefixCache(self.prompts, self.mask if len(set(lengths)) > 1 else None, counts, longest)

    def keep(self, rows: list[int]) -> None:
        self.cache.keep_rows(torch.tensor(rows))
        self.rows = [[layer[row] for row in rows] for layer in self.rows]

    def check(self, num_tokens: int, atol: float = 2e-6, magnitude: float = 1.0, **score) -> None:
        """Append as many tokens to each row, one by one, and compare their attention with the naive one."""
        for _, (layer, rows) in itertools.product(range(num_tokens), enumerate(self.rows)):
            found, query, keys, values = self.attend(layer, len(rows), 1, magnitude, **score)
            rows[:] = [
                (torch.cat([row[0], key], dim=1), torch.cat([row[1], value], dim=1))
                for row, key, value in zip(rows, keys, values, strict=True)
            ]
            expected = [attend_naively(one, *row, **score) for one, row in zip(query, rows, strict=True)]
            torch.testing.assert_close(found, torch.stack(expected), atol=atol, rtol=0)


@heads
@pytest.mark.parametrize("counts", [[1, 1, 1], [3, 3, 3], [4, 1, 2]], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_every_step_equals_naive_attention(num_heads, num_kv_heads, counts, softcap):
    rows = SlowRows(counts, num_heads, num_kv_heads, longest=80)
    # The room grows from 32 places to 80 at the 36th
    for num_queries in (1, 5, 1, 28, 1, 40, 1):
        rows.check(num_queries, softcap=softcap)
    assert [layer.get_seq_length() for layer in rows.cache.layers] == [7 + 77] * 2
    assert rows.cache.layers[0].keys.shape[2] == 80


def test_all_tokens_take_the_room_of_the_longest_and_values_may_have_another_size_than_keys():
    rows = SlowRows([4, 1, 2], 4, 4, longest=5, value_size=5)
    rows.check(5, scaling=0.7)
    assert rows.cache.layers[0].keys.shape[2] == 5


def test_prompts_of_one_length_need_no_mask():
    rows = SlowRows([2, 3], 4, 2, longest=6, lengths=[5, 5])
    assert rows.cache.layers[0].hidden is None
    rows.check(6)


def test_scores_of_thousands_neither_overflow_nor_vanish():
    # exp of a score of 89 overflows in float32, and a part may lie that far below the other
    SlowRows([4, 1, 2], 4, 2, longest=9).check(6, atol=1e-3, magnitude=1000.0)
    SlowSegments(SEGMENTS, 4, 2).check(atol=1e-3, magnitude=1000.0)


def test_rows_and_prompts_leave():
    rows = SlowRows([3, 1, 2], 4, 2, longest=80)
    rows.check(3)
    rows.keep([0, 2, 4, 5])  # of the second prompt none
    assert rows.cache.rows.counts == [2, 2]
    assert rows.cache.layers[1].prompt_keys.shape[0] == 2
    rows.check(41)
    rows.keep([1, 2, 3])
    assert rows.cache.rows.counts == [1, 2]
    rows.check(5)
    rows.keep([2])
    assert rows.cache.rows.counts == [1]
    rows.check(3)
    rows = SlowRows([3, 1, 2], 4, 2, longest=8)
    rows.keep([1, 3])  # before they have tokens
    assert rows.cache.rows.counts == [1, 1]
    rows.check(6)


def test_bfloat16_is_close_and_its_softmax_is_in_float32():
    # Summed in bfloat16, with 8 bits, a softmax over 300 tokens would be wrong by several percent
    SlowRows([4, 1, 2], 4, 2, longest=301, dtype=torch.bfloat16).check(301, atol=0.03)
    SlowSegments([[300, 2], [1], [4]], 4, 2, dtype=torch.bfloat16).check(atol=0.03)


def test_keys_of_another_cache_sinks_and_dropout_are_refused():
    rows = SlowRows([1, 1, 1], 4, 2, longest=4)
    query, new = rows.random(3, 4, 1, SIZE), rows.random(3, 2, 1, SIZE)
    with pytest.raises(ValueError, match="keys that do not come from the cache"):
        shared_prefix_attention(None, query, new, new, None)
    keys, values = rows.cache.update(new, new, 0)
    for name, value in {"s_aux": torch.zeros(4), "position_bias": torch.zeros(1), "dropout": 0.1}.items():
        with pytest.raises(ValueError, match=f"attention has {name}"):
            shared_prefix_attention(None, query, keys, values, None, **{name: value})
    assert not rows.cache.layers[0].was_attended
    shared_prefix_attention(None, query, keys, values, None, s_aux=None)
    assert [layer.was_attended for layer in rows.cache.layers] == [True, False]


# Segments in one row

SEGMENTS = [[3, 1, 5], [2], [4, 4]]  # tokens of what follows each prompt


class SlowSegments(SlowPrompts):
    def __init__(self, segment_lengths, num_heads, num_kv_heads, *, lengths=LENGTHS, **options):
        super().__init__(num_heads, num_kv_heads, lengths=lengths, **options)
        self.lengths = [length for own in segment_lengths for length in own]
        self.prompt_of = [prompt for prompt, own in enumerate(segment_lengths) for _ in own]
        self.cache = Segments(self.prompts, lengths, segment_lengths, torch.device("cpu"))

    def check(self, atol: float = 2e-6, magnitude: float = 1.0, **score) -> None:
        """Run all tokens in one row, and compare their attention with the naive one, a segment at a time."""
        for layer, prompts in enumerate(self.of_prompts):
            found, *own = self.attend(layer, 1, sum(self.lengths), magnitude, **score)
            expected = []
            segments_of = [part[0].split(self.lengths, dim=1) for part in own]
            for prompt, query, *segment in zip(self.prompt_of, *segments_of, strict=True):
                row = (torch.cat(parts, dim=1) for parts in zip(prompts[prompt], segment, strict=True))
                expected.append(attend_naively(query, *row, **score))
            torch.testing.assert_close(found[0], torch.cat(expected), atol=atol, rtol=0)


@heads
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    ("lengths", "segment_lengths"),
    [
        (LENGTHS, SEGMENTS),
        (LENGTHS, [[1], [1], [1]]),
        (LENGTHS, [[1, 1, 1], [9, 1], [2]]),
        ([5, 5], [[2, 3], [4]]),
        ([1, 6], [[3, 3], [1, 2]]),
        ([4], [[30, 1, 2]]),
    ],
    ids=str,
)
def test_segments_equal_naive_attention(num_heads, num_kv_heads, softcap, lengths, segment_lengths):
    slow = SlowSegments(segment_lengths, num_heads, num_kv_heads, lengths=lengths)
    slow.check(softcap=softcap)
    assert [layer.was_attended for layer in slow.cache.layers] == [True, True]


@heads
@pytest.mark.parametrize("most", [1, 150, 300])
def test_segments_in_parts_equal_naive_attention(monkeypatch, num_heads, num_kv_heads, most):
    numbers, of = [], Scores.of
    monkeypatch.setattr(continuation, "SCORES_AT_ONCE", most)
    monkeypatch.setattr(Scores, "of", lambda *given: numbers.append((scores := of(*given)).numel()) or scores)
    cases = [SEGMENTS, [[1, 1, 1], [4, 1], [2]], [[5, 5], [1] * 9, [3, 2, 1]]]
    for segment_lengths in cases:
        SlowSegments(segment_lengths, num_heads, num_kv_heads).check()
    # A segment of 5 tokens and a token's prompt are the least: 6 heads x 5 x 5
    assert max(numbers) <= max(most, 25 * num_heads)
    assert len(numbers) > 2 * len(cases) * (1 + 3)  # without parts: two layers, all segments and each prompt


def test_segments_with_values_of_another_size_and_another_scaling():
    SlowSegments(SEGMENTS, 4, 2, value_size=5).check(scaling=0.7)


# The model's own attention


@pytest.mark.parametrize("fails", [False, True])
def test_the_attention_of_every_config_is_put_back(fails):
    model = build(SHARING["llama"])
    model.set_attn_implementation("eager")
    other = LlamaConfig(attn_implementation="sdpa")
    model.model.layers[1].self_attn.config = other  # as a model of several parts has several configs
    try:
        with attend_to_prefix(model):
            assert model.config._attn_implementation == other._attn_implementation == SHARED_PREFIX
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert (model.config._attn_implementation, other._attn_implementation) == ("eager", "sdpa")


def test_the_values_of_thousands_of_tokens_do_not_overflow_float16():
    prompts, new = DynamicCache(), torch.zeros(1, 1, 1, 8, dtype=torch.float16)
    prompts.update(torch.zeros(1, 1, 4096, 8).half(), torch.full((1, 1, 4096, 8), 20.0).half(), 0)
    cache = PrefixCache(prompts, None, [1], 4)
    keys, values = cache.update(new, new + 20, 0)
    assert shared_prefix_attention(None, new, keys, values, None)[0].flatten().tolist() == [20.0] * 8
