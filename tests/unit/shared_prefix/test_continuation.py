"""Rows that follow a common beginning have the hidden states of whole rows, and a probe says where they would not."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Qwen3Config,
)

from prefopt_trl.shared_prefix import continuation
from prefopt_trl.shared_prefix.attention import SHARED_PREFIX, attend_to_prefix, shared_prefix_attention, without_head
from prefopt_trl.shared_prefix.continuation import (
    _common_length,
    reason_not_to_share_prefix,
    rows_after_prefix,
    whole_rows,
)

PAD = 0
LLAMA_LIKE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**LLAMA_LIKE),
    "qwen3": Qwen3Config(**LLAMA_LIKE, head_dim=8),
    "mixtral": MixtralConfig(**LLAMA_LIKE, num_local_experts=4),
    "gemma2": Gemma2Config(**LLAMA_LIKE, head_dim=8, attn_logit_softcapping=2.0),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=128, pad_token_id=PAD),
    "gpt_neox": GPTNeoXConfig(**{key: value for key, value in LLAMA_LIKE.items() if key != "num_key_value_heads"}),
    "opt": OPTConfig(
        vocab_size=61,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        pad_token_id=PAD,
    ),
}
A, B, C = [5, 6, 7, 8, 9], [10, 11], [5, 12, 13, 14]
ROWS = {
    "groups of several sizes": ([[*A, 20], [*A, 21, 22], [*A, 23, 24, 25], [*B, 20, 21], [*B, 22]], [0, 0, 0, 1, 1]),
    "nothing in common": ([[20, 21, 22], [23, 24], [25, 26, 27, 28]], [0, 0, 0]),
    "rows of their own": ([[*A, 20], [*B, 21], [*C, 22, 23]], ["a", "b", "c"]),
    "the same group again, further on": ([[*A, 20], [*B, 21], [*A, 22, 23]], [0, 1, 0]),
    "a row that another begins with": ([A, [*A, 20, 21], [*A, 20]], [0, 0, 0]),
    "the same row twice": ([A, A, [*B, 20], [*B, 20]], [0, 0, 1, 1]),
    "rows of two tokens": ([[5, 6], [5, 7], [8, 9]], [0, 0, 1]),
    "all of these": (
        [A, [*A, 20], [20, 21], [22, 23, 24], B, [*B, *A], [*B, 25], [*C, 26], C],
        [0, 0, 1, 1, 2, 2, 2, 3, 4],
    ),
}


def build(config, auto_class=AutoModelForCausalLM):
    """A model whose hidden states depend on all of a row, as those of a freshly initialised one hardly do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto_class.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.2)
    return model


def check_rows(model, rows, group_ids) -> torch.Tensor:
    """Compare what follows the common beginnings with whole rows, one at a time; the lengths of what follows."""
    inner = without_head(model)
    with torch.no_grad():
        inputs, lengths = rows_after_prefix(model, rows, group_ids, PAD)
        with attend_to_prefix(model):
            hidden = inner(**inputs).last_hidden_state
        for row, found, ids, length in zip(rows, hidden, inputs["input_ids"], lengths.tolist(), strict=True):
            assert row[-length:] == ids[:length].tolist()
            expected = inner(input_ids=torch.tensor([row])).last_hidden_state[0, -length:]
            torch.testing.assert_close(found[:length], expected, atol=2e-5, rtol=1e-5)
    return lengths


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ROWS)
def test_hidden_states_are_those_of_whole_rows(family, case):
    check_rows(build(FAMILIES[family]), *ROWS[case])


def test_what_is_common_is_computed_once():
    model, tokens = build(FAMILIES["llama"]), []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[:2]))
    rows = [[*range(20, 50), last] for last in range(5, 15)]
    lengths = check_rows(model, rows, [0] * 10)
    assert lengths.tolist() == [1] * 10
    assert tokens[:2] == [(1, 30), (10, 1)]  # 40 tokens of 310; after them come the whole rows of the check


def test_logits_after_the_last_token_as_in_the_example():
    model = build(FAMILIES["llama"])
    rows, lengths = rows_after_prefix(model, [[5, 6, 7, 1], [5, 6, 7, 2, 3]], [0, 0], pad_token_id=0)
    with torch.no_grad(), attend_to_prefix(model):
        logits = model(**rows).logits[torch.arange(2), lengths - 1]
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row])).logits[0, -1] for row in ([5, 6, 7, 1], [5, 6, 7, 2, 3])]
    torch.testing.assert_close(logits, torch.stack(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_that_looks_for_the_last_token_that_is_no_padding_finds_it(family):
    config = FAMILIES[family].__class__(**FAMILIES[family].to_diff_dict() | {"num_labels": 1})
    model = build(config, AutoModelForSequenceClassification)
    # The padding ends rows here, as EOS does where it is padding: what follows a beginning must not be it alone
    rows = [[*A, PAD], [*A, 20, PAD], [*A, PAD, PAD], [*A, 20, 21]]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
        inputs, _ = rows_after_prefix(model, rows, [0] * 4, PAD)
        with attend_to_prefix(model):
            found = model(**inputs).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert expected.std() > 1e-2


def test_an_adapter_and_bfloat16():
    torch.manual_seed(1)
    model = get_peft_model(build(FAMILIES["llama"]), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    check_rows(model, *ROWS["all of these"])
    rows, group_ids = ROWS["groups of several sizes"]
    model = build(FAMILIES["llama"]).bfloat16()
    with torch.no_grad():
        inputs, lengths = rows_after_prefix(model, rows, group_ids, PAD)
        with attend_to_prefix(model):
            found = model(**inputs).logits[torch.arange(5), lengths - 1]
        expected = torch.stack([model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows])
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()


def test_whole_rows_are_padded_on_the_right():
    inputs, lengths = whole_rows([[5, 6, 7], [8]], 9, torch.device("cpu"))
    assert {name: tensor.tolist() for name, tensor in inputs.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert lengths.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([[5, 6, 7], [5, 6, 8]], 2),
        ([[5, 6, 7], [5, 8, 7], [5, 6, 9]], 1),
        ([[5, 6, 7], [8, 6, 7]], 0),
        ([[5, 6, 7]], 2),  # a row's last token follows, also where there are no others
        ([[5, 6, 7], [5, 6, 7]], 2),
        ([[5, 6], [5, 6, 7, 8]], 1),
        ([[5, 6, 7, 8, 9], [5, 6, 7, 8], [5, 6, 7, 8, 1]], 3),
        ([[5, 6, PAD], [5, 6, PAD]], 1),  # as 6 is the last that is no padding
        ([[5, 6, PAD, PAD], [5, 6, 7]], 1),
        ([[5, PAD, 6, 7], [5, PAD, 6, 8]], 3),  # padding inside is a token like others
        ([[5, PAD], [5, PAD]], 1),
        ([[5, 6, 10], [5, 6, 9], [5, 6, 100]], 2),
    ],
)
def test_the_length_of_what_is_common(rows, length):
    assert _common_length(rows, PAD) == length


# The probe


def test_the_probe_runs_once_and_leaves_the_model_as_it_was(monkeypatch):
    model, probes = build(FAMILIES["llama"]), []
    probe = continuation.probe_prefix_reason
    monkeypatch.setattr(continuation, "probe_prefix_reason", lambda model: probes.append(model) or probe(model))
    model.train()
    model.model.layers[0].eval()
    model.config.attention_dropout = 0.9
    training = [module.training for module in model.modules()]
    state, implementation = torch.get_rng_state(), model.config._attn_implementation
    assert [reason_not_to_share_prefix(model, length) for length in (10, 20, 1000)] == [None] * 3
    assert len(probes) == 1
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == implementation != SHARED_PREFIX
    assert reason_not_to_share_prefix(build(FAMILIES["llama"]), 10) is None
    assert len(probes) == 2  # another model, another probe


def test_rows_as_long_as_the_window_share_and_longer_ones_do_not(caplog):
    model = build(MistralConfig(**LLAMA_LIKE, sliding_window=20))
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        assert reason_not_to_share_prefix(model, 20) is None
        for length in (21, 21):
            reason = reason_not_to_share_prefix(model, length)
            assert reason == "rows of up to 21 tokens exceed the attention window of mistral (`sliding_window`=20)"
    assert len(caplog.records) == 1
    # and rightly so: at the window a row is what it was, beyond it is not
    for length in (20, 21):
        rows = [[*range(5, 3 + length), *ends] for ends in ([50, 51], [52, 53])]
        if length == 20:
            check_rows(model, rows, [0, 0])
        else:
            with pytest.raises(AssertionError, match="not close"):
                check_rows(model, rows, [0, 0])


def without_prompt(module, query, key, value, attention_mask, **kwargs):
    key.prefix_layer.was_attended = True
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(2, 3)
    num_queries, num_own = scores.shape[2:]
    later = torch.ones(num_queries, num_own, dtype=torch.bool).triu(num_own - num_queries + 1)
    weights = (scores * query.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)).transpose(1, 2), None


def without_order(module, query, key, value, attention_mask, **kwargs):
    """Every query as if it came last, so that it sees the tokens that follow it."""
    outputs = [
        shared_prefix_attention(module, query[:, :, [place]], key, value, attention_mask, **kwargs)[0]
        for place in range(query.shape[2])
    ]
    return torch.cat(outputs, dim=1), None


def with_another_scale(module, query, key, value, attention_mask, scaling=1.0, **kwargs):
    return shared_prefix_attention(module, query, key, value, attention_mask, scaling=1.05 * scaling, **kwargs)


def of_the_wrong_prompt(module, query, key, value, attention_mask, **kwargs):
    layer = key.prefix_layer
    keys, values = layer.prompt_keys, layer.prompt_values
    layer.prompt_keys, layer.prompt_values = keys.flip(0), values.flip(0)
    result = shared_prefix_attention(module, query, key, value, attention_mask, **kwargs)
    layer.prompt_keys, layer.prompt_values = keys, values
    return result


@pytest.mark.parametrize("wrong", [without_prompt, without_order, with_another_scale, of_the_wrong_prompt])
def test_a_wrong_attention_is_caught(wrong):
    AttentionInterface.register(SHARED_PREFIX, wrong)
    try:
        reason = reason_not_to_share_prefix(build(FAMILIES["llama"]), 20)
    finally:
        AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
    assert reason is not None and "hidden states of llama with a shared prompt differ by" in reason


def test_an_attention_that_fails_is_told():
    def failing(*args, **kwargs):
        raise RuntimeError("no kernel for this")

    AttentionInterface.register(SHARED_PREFIX, failing)
    try:
        model = build(FAMILIES["llama"])
        reason = reason_not_to_share_prefix(model, 20)
    finally:
        AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
    assert reason == "llama cannot share a prompt's keys (RuntimeError: no kernel for this)"
    assert model.config._attn_implementation == "sdpa"


def test_positions_that_are_not_used_are_caught():
    model = build(FAMILIES["gpt2"])
    forward = model.transformer.forward

    def from_zero(input_ids, position_ids=None, **kwargs):
        return forward(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)

    model.transformer.forward = from_zero
    assert "gpt2 with a shared prompt differ by" in reason_not_to_share_prefix(model, 20)


def test_weights_that_zero3_holds_elsewhere_are_a_reason():
    model = build(FAMILIES["llama"])
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id = 7
    model.lm_head.weight = weight
    assert reason_not_to_share_prefix(model, 20) == "its weights are partitioned by ZeRO-3, and not gathered"
