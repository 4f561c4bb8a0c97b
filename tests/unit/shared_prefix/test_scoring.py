"""Shared log-probabilities equal those of one row per completion wherever a family can share; others fall back."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPTNeoConfig, Llama4TextConfig

from prefopt_trl.shared_prefix import support
from prefopt_trl.shared_prefix.scoring import completion_logps
from tests.unit.shared_prefix.families import (
    LLAMA_LIKE,
    NEO_LIKE,
    NOT_SHARING,
    SHARING,
    SHARING_IN_PACKED_ROWS,
    build,
)

FAMILIES = "llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "phi3", "mixtral", "mistral below its window", "gemma"
ATTENTIONS = [(family, name) for family in (*FAMILIES, "falcon") for name in ("sdpa", "eager")]
ATTENTIONS += [("gpt_neo", "eager"), ("gptj", "eager")]  # these have no other


def pairs_batch():
    """Three prompts (lengths 20, 1 and 30), two completions each, one of them empty."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 61, (6, 40), generator=generator)
    prompt_lengths, lengths = torch.tensor([20, 1, 30] * 2), torch.tensor([40, 33, 38, 25, 20, 30])
    for group, length in enumerate([20, 1, 30]):
        rows[group + 3, :length] = rows[group, :length]
    place = torch.arange(40)
    attention_mask = (place < lengths[:, None]).long()
    completion_mask = attention_mask * (place >= prompt_lengths[:, None])
    return {
        "input_ids": rows * attention_mask,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
    }


def reference_logps(model, batch):
    """One row at a time, without padding: the plainest computation there is."""
    results = []
    for ids, mask, completion in zip(*batch.values(), strict=True):
        ids, completion = ids[mask.bool()], completion[mask.bool()]
        logps = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        results.append((logps.gather(1, ids[1:, None]).squeeze(1) * completion[1:]).sum())
    return torch.stack(results)


@pytest.mark.parametrize(("family", "attn_implementation"), ATTENTIONS)
def test_sharing_is_exact(family, attn_implementation):
    config = (SHARING | SHARING_IN_PACKED_ROWS)[family]
    model = build(config, attn_implementation=attn_implementation)
    batch = pairs_batch()
    with torch.no_grad():
        assert support.reason_not_to_share(model, model, row_length=40) is None
        logps, counts = completion_logps(model, **batch)
        torch.testing.assert_close(logps.double(), reference_logps(model, batch), atol=1e-4, rtol=1e-6)
    assert counts.tolist() == batch["completion_mask"].sum(dim=1).tolist()
    assert counts[5] == 0 and logps[5] == 0


@pytest.mark.parametrize(("config", "reason"), NOT_SHARING.values(), ids=NOT_SHARING)
def test_others_fall_back_with_one_logged_reason(config, reason, caplog):
    model = build(config)
    batch = pairs_batch()
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        for _ in range(2):
            logps, _ = completion_logps(model, **batch)
        torch.testing.assert_close(logps.double(), reference_logps(model, batch), atol=1e-4, rtol=1e-6)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("prefopt_trl")]
    assert len(messages) == 1 and reason in messages[0]


FEW_PLACES = {"max_position_embeddings": 40}
LLAMA4 = {**LLAMA_LIKE, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "no_rope_layers": [1, 0]}
BY_PLACE = {
    "temperature": (Llama4TextConfig(**LLAMA4 | FEW_PLACES, floor_scale=40, attn_scale=1.0), "`floor_scale`"),
    "mask": (
        GPTNeoConfig(**NEO_LIKE | FEW_PLACES, attention_types=[[["global"], 2]]),
        "gpt_neo takes rows of at most 40 tokens",
    ),
}


@pytest.mark.parametrize(("config", "reason"), BY_PLACE.values(), ids=BY_PLACE)
def test_no_more_tokens_are_packed_than_a_model_has_places_for(config, reason, caplog):
    model = build(config)
    rows = torch.randint(3, 61, (4, 20), generator=torch.Generator().manual_seed(5))
    rows[:, :12] = rows[0, :12]
    completion_mask = (torch.arange(20) >= 12).long().expand(4, -1)
    # Four completions make a packed row of 11 + 4 * 8 tokens, three one of 35, and no row is longer than 20
    for num_rows, expected in ((3, []), (4, [reason])):
        batch = {"input_ids": rows[:num_rows], "attention_mask": torch.ones_like(rows[:num_rows])}
        batch["completion_mask"] = completion_mask[:num_rows]
        with torch.no_grad(), caplog.at_level(logging.WARNING, logger="prefopt_trl"):
            logps, _ = completion_logps(model, **batch, group_ids=torch.zeros(num_rows, dtype=torch.long))
            torch.testing.assert_close(logps.double(), reference_logps(model, batch), atol=1e-4, rtol=1e-6)
        messages = [record.getMessage() for record in caplog.records if record.name.startswith("prefopt_trl")]
        assert len(messages) == len(expected) and all(map(str.__contains__, messages, expected))
    assert "43" in messages[0]


@pytest.mark.parametrize("family", [family for family in NOT_SHARING if family != "falcon, ALiBi"])
def test_the_probe_alone_would_notice(family):
    model = build(NOT_SHARING[family][0])
    assert support.run_probe(support.probe_reason, model, model) is not None


def test_probe_leaves_the_model_as_it_was():
    model = build(SHARING["llama"]).train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    assert support.probe_reason(model, model) is None
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert torch.equal(state, torch.get_rng_state())


def gradients(model, share_prefix):
    model.zero_grad()
    logps, _ = completion_logps(model, **pairs_batch(), share_prefix=share_prefix)
    (logps * torch.tensor([1.0, -2.0, 3.0, -1.0, 2.0, 1.0])).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("how", ["plain", "gradient checkpointing", "LoRA"])
def test_gradients_are_exact(how):
    model = build(SHARING["llama"]).train()
    if how == "gradient checkpointing":
        # Its name is another before transformers 5.23
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    if how == "LoRA":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    unshared = gradients(copy.deepcopy(model), share_prefix=False)
    shared = gradients(model, share_prefix=True)
    assert shared.keys() == unshared.keys() and len(shared) > 0
    assert support.reason_not_to_share(model, model, row_length=40) is None
    for name, gradient in unshared.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-4 * float(gradient.abs().max()) + 1e-6, rtol=1e-4)


def test_bfloat16_is_as_close_as_its_rounding_and_summed_in_float32():
    exact = build(SHARING["llama"])
    model = copy.deepcopy(exact).to(torch.bfloat16)
    exact = exact.to(torch.bfloat16).float()  # the same rounded weights
    batch = pairs_batch()
    with torch.no_grad():
        shared, _ = completion_logps(model, **batch)
        unshared, _ = completion_logps(model, **batch, share_prefix=False)
        truth = reference_logps(exact, batch)
    assert shared.dtype == torch.float32
    assert support.reason_not_to_share(model, model, row_length=40) is None
    rounding = (unshared - truth).abs().max()
    assert (shared - truth).abs().max() < 3 * rounding


def test_left_padding_is_refused():
    batch = pairs_batch()
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="Pad on the right"):
        completion_logps(build(SHARING["llama"]), **batch)
