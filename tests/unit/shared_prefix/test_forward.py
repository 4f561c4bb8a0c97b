"""Models with TRL's fused LM head give the same per-token values when they share prompts, and say when they don't."""

import inspect
import logging
import types

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM
from transformers.integrations.neftune import activate_neftune
from trl.trainer.utils import add_fused_lm_head

from prefopt_trl.shared_prefix import support
from prefopt_trl.shared_prefix.forward import add_shared_prefix
from tests.unit.shared_prefix import families

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def build(share_prefix: bool = True) -> LlamaForCausalLM:
    model = families.build(families.SHARING["llama"])
    add_fused_lm_head(model, outputs=FIELDS)
    if share_prefix:
        add_shared_prefix(model)
    return model


def make_rows(prompt_lengths: list[int], lengths: list[int], group_ids: list[int]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to 20, each beginning with the prompt of its group."""
    prompts, input_ids = torch.randint(3, 61, (2, len(lengths), 20), generator=torch.Generator().manual_seed(1))
    place = torch.arange(20)
    attention_mask = (place < torch.tensor(lengths)[:, None]).long()
    is_prompt = place < torch.tensor(prompt_lengths)[:, None]
    input_ids = torch.where(is_prompt, prompts[group_ids], input_ids) * attention_mask
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(is_prompt | (attention_mask == 0), -100),
        "group_ids": torch.tensor(group_ids),
    }


def ragged_batch() -> dict[str, torch.Tensor]:
    """Seven rows, so an odd number: one of a prompt of 9 tokens, four of one of 5, two of one of 7."""
    return make_rows([9, 5, 5, 5, 5, 7, 7], [14, 20, 11, 8, 13, 17, 9], [0, 1, 1, 1, 1, 2, 2])


def without_groups(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if name != "group_ids"}


def batch() -> dict[str, torch.Tensor]:
    """Two pairs of rows with prompts of 9 and 5 tokens."""
    return without_groups(make_rows([9, 5, 9, 5], [20, 13, 15, 20], [0, 1, 0, 1]))


def num_embedded(model: LlamaForCausalLM, **inputs) -> int:
    """Tokens that reach the model, without those of the probe that decides whether to share."""
    with torch.no_grad():
        model(**batch(), fused_lm_head=True)
        counts = []
        hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, ids: counts.append(ids[0].numel()))
        model(**inputs)
    hook.remove()
    return sum(counts)


def reasons(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "not shared" in record.getMessage()]


def test_every_per_token_value_is_the_same_from_fewer_tokens():
    shared, plain = build(), build(share_prefix=False)
    with torch.no_grad():
        found = shared(**batch(), use_cache=False, fused_lm_head=True)
        expected = plain(**batch(), use_cache=False, fused_lm_head=True)
    for name in (*FIELDS, "label_mask"):
        assert found[name].dtype == expected[name].dtype
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-5)
    assert found.loss is None  # a mean over packed positions would count shared tokens once
    # Two packed rows as long as the longer one: 8 + 11 + 6 tokens of the first pair, 4 + 8 + 15 of the second
    assert num_embedded(shared, **batch(), fused_lm_head=True) == 2 * 27
    assert num_embedded(plain, **batch(), fused_lm_head=True) == 4 * 20


def test_a_second_call_changes_nothing():
    model = build()
    forward = model.forward
    add_shared_prefix(model)
    assert model.forward == forward


def test_other_calls_are_the_models_own():
    shared, plain = build(), build(share_prefix=False)
    inputs = batch()
    with torch.no_grad():
        found, expected = shared(**inputs, group_ids=torch.tensor([0, 1, 0, 1])), plain(**inputs)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
        assert torch.equal(shared(inputs["input_ids"]).logits, plain(inputs["input_ids"]).logits)
        prompt = inputs["input_ids"][:2, :5]
        tokens = shared.generate(prompt, max_new_tokens=8, do_sample=False)
        assert torch.equal(tokens, plain.generate(prompt, max_new_tokens=8, do_sample=False))
    assert tokens.shape[1] > 5
    assert inspect.signature(shared.forward) == inspect.signature(plain.forward)


def embedded(input_ids, **others):
    return {**others, "inputs_embeds": torch.randn(4, 20, 32), "position_ids": torch.arange(20).expand(4, -1)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda **inputs: {name: rows.flip(1) for name, rows in inputs.items()}, "the batch is not pairs"),
        (lambda **inputs: {name: rows[:3] for name, rows in inputs.items()}, "the batch is not pairs"),
        (embedded, "called with inputs_embeds, position_ids,"),
        (lambda attention_mask, **others: others, "called with not all of attention_mask"),
    ],
    ids=["padding on the left", "an odd number of rows", "embeddings and positions", "no mask"],
)
def test_what_cannot_be_packed_is_run_as_it_comes_and_said_once(change, reason, caplog):
    shared, plain, inputs = build(), build(share_prefix=False), change(**batch())
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"), torch.no_grad():
        for _ in range(2):
            found = shared(**inputs, fused_lm_head=True)
        expected = plain(**inputs, fused_lm_head=True)
    assert torch.equal(found.log_probs, expected.log_probs) and torch.equal(found.loss, expected.loss)
    assert len(reasons(caplog)) == 1 and reason in reasons(caplog)[0]


@pytest.mark.parametrize(("error", "shares"), [(1e-2, True), (0.5, False)])
def test_half_precision_under_autocast_may_differ_by_its_rounding(error, shares):
    """What accelerate prepares for bfloat16 returns float32; the probe must not hold it to float32's rounding."""
    model = build(share_prefix=False)
    forward = model.forward

    def imprecise(**inputs):
        outputs = forward(**inputs)
        if "position_ids" in inputs:  # the packed rows
            outputs.logits = outputs.logits + error * torch.randn(outputs.logits.shape)
        return outputs

    prepared = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(imprecise))
    assert prepared(input_ids=torch.ones(1, 2, dtype=torch.long)).logits.dtype == torch.float32
    assert (support.probe_reason(model, prepared) is None) == shares
    assert support.probe_reason(model, imprecise) is not None  # in float32 neither is rounding
    assert support.probe_reason(model, forward) is None


# Rows that say whose prompt they have


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [4, 5, 0, 2, 6, 1, 3], [1, 2, 3], [5, 6, 0]])
def test_ragged_groups_share_their_prompts(order, caplog):
    shared, plain = build(), build(share_prefix=False)
    inputs = {name: value[order] for name, value in ragged_batch().items()}
    numbers = {group: number for number, group in enumerate(dict.fromkeys(inputs["group_ids"].tolist()))}
    inputs["group_ids"] = torch.tensor([numbers[group] for group in inputs["group_ids"].tolist()])
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"), torch.no_grad():
        found = shared(**inputs, use_cache=False, fused_lm_head=True)
        expected = plain(**without_groups(inputs), use_cache=False, fused_lm_head=True)
    for name in (*FIELDS, "label_mask"):
        assert found[name].shape == expected[name].shape
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-5)
    assert reasons(caplog) == []
    assert num_embedded(shared, **inputs, fused_lm_head=True) < 0.8 * num_embedded(
        plain, **without_groups(inputs), fused_lm_head=True
    )


def test_the_gradients_of_ragged_groups_are_the_same():
    gradients = []
    for share_prefix in (True, False):
        model, inputs = build(share_prefix).train(), ragged_batch()
        outputs = model(**(inputs if share_prefix else without_groups(inputs)), fused_lm_head=True)
        (outputs.log_probs * torch.arange(1.0, 8.0)[:, None]).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_groups_are_shared_under_peft():
    models = []
    for share_prefix in (True, False):
        model = build(share_prefix)
        torch.manual_seed(3)
        models.append(get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)))
    shared, plain = (model.eval() for model in models)
    inputs, rows = ragged_batch(), []
    shared.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda _, ids: rows.append(len(ids[0])))
    with torch.no_grad():
        found = shared(**inputs, fused_lm_head=True)
        expected = plain(**without_groups(inputs), fused_lm_head=True)
        with shared.disable_adapter():
            off = shared(**inputs, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, expected.log_probs, atol=1e-4, rtol=1e-5)
    assert rows[-1] == 3 and not torch.allclose(off.log_probs, found.log_probs, atol=0.1)


def test_a_model_that_cannot_share_is_run_without_groups(caplog):
    model, inputs = families.build(families.NOT_SHARING["mistral"][0]), ragged_batch()
    add_fused_lm_head(model, outputs=FIELDS)
    with torch.no_grad():
        expected = model(**without_groups(inputs), fused_lm_head=True)
        add_shared_prefix(model)
        with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
            found = model(**inputs, fused_lm_head=True)
    assert torch.equal(found.log_probs, expected.log_probs) and torch.equal(found.loss, expected.loss)
    assert len(reasons(caplog)) == 1 and "sliding" in reasons(caplog)[0]


def test_a_head_that_takes_no_packed_rows_is_given_plain_ones(caplog):
    shared, inputs = build(share_prefix=False), ragged_batch()
    fused_forward = shared.forward.__func__

    def of_another_trl(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if "shift_labels" in kwargs:
            raise TypeError("unexpected keyword argument 'shift_labels'")
        return fused_forward(self, *args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)

    shared.forward = types.MethodType(of_another_trl, shared)
    add_shared_prefix(shared)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        found = [shared(**inputs, fused_lm_head=True).log_probs for _ in range(2)]
        expected = build(share_prefix=False)(**without_groups(inputs), fused_lm_head=True).log_probs
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)
    assert len(reasons(caplog)) == 1 and "the fused LM head of this TRL takes no packed rows" in reasons(caplog)[0]


def test_the_noise_of_neftune_is_that_of_rows_of_their_own(caplog):
    model, inputs, noise = build().train(), ragged_batch(), []
    activate_neftune(model, 5.0)
    embed = model.get_input_embeddings()
    embed.register_forward_hook(lambda _, ids, noisy: noise.append((noisy - embed.weight[ids[0]]).abs().max()))
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"), torch.no_grad():
        model(**inputs, fused_lm_head=True)
        assert len(reasons(caplog)) == 1 and "`neftune_noise_alpha`" in reasons(caplog)[0]
        model.eval()(**inputs, fused_lm_head=True)  # without noise prompts are shared
    # Uniform up to alpha / sqrt(20 * 32); that none of 4480 draws comes within 1% of it has probability e^-45
    assert noise[0].item() == pytest.approx(5 / (20 * 32) ** 0.5, rel=0.01) and noise[-1] == 0
    assert len(reasons(caplog)) == 1


def test_a_packed_probe_that_runs_out_of_memory_says_nothing_of_the_model():
    model = build(share_prefix=False)

    def forward(**inputs):
        if "position_ids" in inputs:  # the packed rows
            raise torch.OutOfMemoryError("out of memory")
        return model(**inputs)

    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            support.reason_not_to_share(model, forward, row_length=20)
    assert support.reason_not_to_share(model, model, row_length=20) is None
