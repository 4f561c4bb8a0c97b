"""Rows that follow a common beginning have the hidden states of whole rows, and a probe says where they would not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, MistralConfig

from prefopt_trl.shared_prefix import attention, continuation, support
from prefopt_trl.shared_prefix.attention import SHARED_PREFIX, PrefixLayer
from prefopt_trl.shared_prefix.continuation import (
    RowsAfterPrefix,
    SegmentLayer,
    probe_segments,
    reason_not_to_share_head,
    split_rows,
)
from prefopt_trl.shared_prefix.packing import WholeRows
from prefopt_trl.shared_prefix.support import probe_steps, reason_not_to_share_prefix
from tests.unit.shared_prefix.families import LLAMA_LIKE, SHARING, build

PAD = 0
FAMILIES = ["llama", "qwen3", "mixtral", "gemma2", "cohere", "granite", "gpt2", "gpt_neox", "opt"]
WITH_HEAD = ["llama", "mistral below its window", "qwen3", "mixtral", "gemma2", "gpt2", "gpt_neox", "opt"]
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


CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def logits_of_single_rows(model, rows) -> torch.Tensor:
    """Slow reference: one row without padding at a time, and its logits after the last token, or those of its head."""
    lengths = [max(place for place, token in enumerate(row) if token != PAD) + 1 for row in rows]
    inputs = [torch.tensor([row[:length]]) for row, length in zip(rows, lengths, strict=True)]
    with torch.no_grad():
        return torch.stack([model(input_ids=ids, use_cache=False).logits.flatten(0, -2)[-1] for ids in inputs])


def check_logits(model, rows, group_ids, method: str = "last_logits") -> torch.Tensor:
    """Compare the logits after shared beginnings, and of rows in a batch, with those of one row at a time."""
    expected = logits_of_single_rows(model, rows)
    with torch.no_grad():
        found = getattr(RowsAfterPrefix(model, *split_rows(rows, group_ids, PAD), PAD), method)(model)
        whole = getattr(WholeRows(rows, PAD, model.device), method)(model)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(whole, expected, **CLOSE)
    return expected


def record_tokens(model) -> list[torch.Tensor]:
    """Return a list that collects the token ids of every run of the body."""
    calls: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", ROWS)
def test_logits_are_those_of_whole_rows(family, case):
    assert check_logits(build(SHARING[family]), *ROWS[case]).std() > 0.1


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_that_knows_no_logits_to_keep_gives_the_same(family):
    model, calls = build(SHARING[family]), []
    forward = model.forward

    def without_logits_to_keep(logits_to_keep=None, **kwargs):
        outputs = forward(**kwargs)
        calls.append((logits_to_keep is not None, outputs.logits.shape[1]))
        return outputs

    model.forward = without_logits_to_keep
    check_logits(model, *ROWS["all of these"])
    # What follows in each group; rows as long as the longest
    assert calls[-2:] == [(True, 3 + 2 + 9 + 1 + 1), (True, 7)]


def test_beginnings_and_what_follows_them_are_run_once_without_padding_and_the_head_where_rows_end():
    model, num_logits = build(SHARING["llama"]), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: num_logits.append(output.shape[:2]))
    calls = record_tokens(model)
    rows = [[*range(20, 50), *range(5, 6 + length)] for length in range(10)]
    rows += [[*A, 20, 21], [*A, 22], [*B, 23]]
    with torch.no_grad():
        RowsAfterPrefix(model, *split_rows(rows, [0] * 10 + [1, 1, 2], PAD), PAD).last_logits(model)
    prefixes, tokens = calls
    # All ten rows go on with 5, of which the first has nothing else: it stays with them
    assert [row[row != PAD].tolist() for row in prefixes] == [[*range(20, 50)], A, B]
    assert prefixes.shape == (3, 30)
    ends = [*(row[30:] for row in rows[:10]), [20, 21], [22], [23]]
    assert tokens.tolist() == [[token for end in ends for token in end]]
    assert num_logits == [(1, 13)]


# Classification heads


def with_head(family: str, **options):
    config = SHARING[family]
    options |= {"num_labels": 2, "attn_implementation": config._attn_implementation}
    return build(type(config)(**config.to_diff_dict() | options), auto_class=AutoModelForSequenceClassification)


# Padding ends rows here, as EOS does where it is padding: what follows a beginning must not be it alone
WITH_PADDING = ([[*A, PAD], [*A, 20, PAD], [*A, PAD, PAD], [*A, 20, 21], [*B, PAD, 22, PAD]], [0, 0, 0, 0, 1])


@pytest.mark.parametrize("family", WITH_HEAD)
def test_a_head_that_looks_for_the_last_token_that_is_no_padding_finds_it(family):
    model = with_head(family)
    assert reason_not_to_share_head(model, PAD) is None
    assert reason_not_to_share_head(with_head(family, pad_token_id=2), 2) is None
    for rows, group_ids in [*ROWS.values(), WITH_PADDING]:
        assert check_logits(model, rows, group_ids, "head_logits").std() > 1e-2


def test_a_head_runs_the_body_once_and_reads_one_token_of_each_row():
    model, read = with_head("llama"), []
    calls = record_tokens(model)
    model.score.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape))
    rows, group_ids = WITH_PADDING
    with torch.no_grad():
        RowsAfterPrefix(model, *split_rows(rows, group_ids, PAD), PAD).head_logits(model)
    assert [call.shape for call in calls] == [(2, 4), (1, 13)]
    assert calls[1].tolist() == [[9, PAD, 9, 20, PAD, 9, PAD, PAD, 9, 20, 21, 22, PAD]]
    assert read == [(5, 1, 32)]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_body_is_as_before_also_after_an_error(fails, wrapped):
    model = with_head("llama")
    rows, group_ids = WITH_PADDING
    expected, body = logits_of_single_rows(model, rows), model.model
    if wrapped:  # as a library that prepares a model does
        inner = body.forward
        body.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    before, implementation = vars(body).get("forward"), model.config._attn_implementation
    with torch.no_grad():
        following = RowsAfterPrefix(model, *split_rows(rows, group_ids, PAD), PAD)
        if fails:
            with pytest.raises(TypeError):
                model.score, score = torch.nn.Bilinear(32, 32, 2), model.score
                following.head_logits(model)
            model.score = score
        else:
            torch.testing.assert_close(following.head_logits(model), expected, **CLOSE)
    assert vars(body).get("forward") is before
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(logits_of_single_rows(model, rows), expected, atol=0, rtol=0)


# Adapters and half precision


def test_an_adapter_of_a_language_model_counts_and_only_while_it_is_active():
    base, case = build(SHARING["llama"]), ROWS["all of these"]
    plain = check_logits(base, *case)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    assert (check_logits(model, *case) - plain).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(check_logits(model, *case), plain, **CLOSE)


def test_an_adapter_of_a_classifier_counts():
    base = with_head("llama")
    plain = check_logits(base, *WITH_PADDING, "head_logits")
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    assert reason_not_to_share_prefix(model, 20, probe_segments) is None
    assert (check_logits(model, *WITH_PADDING, "head_logits") - plain).abs().max() > 0.01


# The probes

PROBE_OF = {SegmentLayer: probe_segments, PrefixLayer: probe_steps}
probes = pytest.mark.parametrize("probe", PROBE_OF.values())


@probes
def test_a_probe_runs_once_and_leaves_the_model_unchanged(probe, monkeypatch):
    model, probed, compare = build(SHARING["llama"]), [], support.hidden_states_reason
    for module in (support, continuation):
        monkeypatch.setattr(module, "hidden_states_reason", lambda *args: probed.append(args) or compare(*args))
    model.train()
    model.model.layers[0].eval()
    model.config.attention_dropout = 0.9
    training = [module.training for module in model.modules()]
    state, implementation = torch.get_rng_state(), model.config._attn_implementation
    assert [reason_not_to_share_prefix(model, length, probe) for length in (10, 20, 1000)] == [None] * 3
    assert len(probed) == 1
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == implementation != SHARED_PREFIX
    assert reason_not_to_share_prefix(build(SHARING["llama"]), 10, probe) is None
    assert len(probed) == 2  # each model is probed


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize(
    ("owner", "method"), [(SegmentLayer, "attend"), (PrefixLayer, "attend"), (RowsAfterPrefix, "head_logits")]
)
def test_a_probe_that_runs_out_of_memory_is_repeated(monkeypatch, owner, method):
    model, reason, arguments = with_head("llama"), reason_not_to_share_head, [PAD]
    if method == "attend":
        model, reason, arguments = build(SHARING["llama"]), reason_not_to_share_prefix, [20, PROBE_OF[owner]]
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, out_of_memory)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                reason(model, *arguments)
    assert reason(model, *arguments) is None


def test_rows_as_long_as_the_window_share_and_longer_ones_do_not(caplog):
    model = build(MistralConfig(**LLAMA_LIKE, sliding_window=20))
    assert reason_not_to_share_prefix(model, 20) is None
    for length in (21, 21):
        reason = reason_not_to_share_prefix(model, length)
        assert reason == "rows of up to 21 tokens exceed the attention window of mistral (`sliding_window`=20)"
    assert len(caplog.records) == 1
    # and rightly so: at the window a row is what it was, beyond it is not
    for length in (20, 21):
        rows = [[*range(5, 3 + length), *ends] for ends in ([50, 51], [52, 53])]
        if length == 20:
            check_logits(model, rows, [0, 0])
        else:
            with pytest.raises(AssertionError, match="not close"):
                check_logits(model, rows, [0, 0])


def with_prompts(change):
    def wrong(layer, *arguments):
        layer.prompt_keys, layer.prompt_values = change(layer.prompt_keys), change(layer.prompt_values)
        return arguments

    return wrong


def with_another_scale(layer, query, key, value, score):
    return query, key, value, score._replace(scaling=1.05 * score.scaling)


def with_the_token_that_follows(layer, query, key, value, score):
    return query, key.roll(-1, dims=2), value.roll(-1, dims=2), score


def with_another_row(layer, query, key, value, score):
    return query, key.flip(0), value.flip(0), score


OF_BOTH = with_another_scale, with_prompts(torch.zeros_like), with_prompts(lambda part: part.flip(0))


@pytest.mark.parametrize(
    ("layer", "wrong"),
    [
        *[(layer, wrong) for layer in (SegmentLayer, PrefixLayer) for wrong in OF_BOTH],
        (SegmentLayer, with_the_token_that_follows),
        (PrefixLayer, with_another_row),
    ],
)
def test_a_wrong_attention_in_segments_or_in_steps_is_caught(monkeypatch, layer, wrong):
    attend = layer.attend
    monkeypatch.setattr(layer, "attend", lambda layer, *arguments: attend(layer, *wrong(layer, *arguments)))
    reason = reason_not_to_share_prefix(build(SHARING["llama"]), 20, PROBE_OF[layer])
    assert reason is not None and "hidden states of llama with a shared prompt differ by" in reason


@probes
def test_an_attention_that_fails_is_a_reason(monkeypatch, probe):
    def failing(*args, **kwargs):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(attention, "shared_prefix_attention", failing)
    model = build(SHARING["llama"])
    assert reason_not_to_share_prefix(model, 20, probe) == (
        "llama fails in a probe (RuntimeError: no kernel for this)"
    )
    assert model.config._attn_implementation == "sdpa"


@probes
def test_a_layer_with_another_attention_is_a_reason(probe):
    model = build(SHARING["llama"])

    def another(hidden_states, cache=None, past_key_values=None, **kwargs):
        cache = cache if past_key_values is None else past_key_values  # its name before transformers 5.24
        if cache is not None:
            cache.update(hidden_states[:, None], hidden_states[:, None], 1)
        return hidden_states, None

    model.model.layers[1].self_attn.forward = another
    reason = reason_not_to_share_prefix(model, 20, probe)
    assert reason is not None and "a layer does not use transformers' `AttentionInterface`" in reason


@probes
def test_positions_that_are_not_used_are_caught(probe):
    model = build(SHARING["gpt2"])
    forward = model.transformer.forward

    def from_zero(input_ids, position_ids=None, **kwargs):
        return forward(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **kwargs)

    model.transformer.forward = from_zero
    assert "gpt2 with a shared prompt differ by" in reason_not_to_share_prefix(model, 20, probe)


def test_weights_that_zero3_holds_elsewhere_are_a_reason():
    model = build(SHARING["llama"])
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_id = 7
    model.lm_head.weight = weight
    assert reason_not_to_share_prefix(model, 20) == "its weights are partitioned by ZeRO-3, and not gathered"
