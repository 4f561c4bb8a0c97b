"""Log-probabilities from hidden states, against the logits in float64; and the models whose heads do more."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from prefopt_trl.shared_prefix import label_statistics as module
from prefopt_trl.shared_prefix.forward import add_shared_prefix
from tests.unit.shared_prefix.families import LLAMA_LIKE, SHARING, SHARING_IN_PACKED_ROWS, build

CONFIGS: dict[str, Any] = {
    "llama": SHARING["llama"],
    "tied": LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "soft cap": SHARING["gemma2"],
    "scale": SHARING["cohere"],
    "divisor": SHARING["granite"],
    "bias": SHARING_IN_PACKED_ROWS["gptj"],
}


@pytest.fixture(autouse=True)
def _several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary of 61 in parts of 7 or so."""
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 80)


def large(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model whose logits differ by whole nats, with a bias in the head where it has one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model = model.to(dtype).eval()
    add_shared_prefix(model)
    return model


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 61, (3, 8), generator=torch.Generator().manual_seed(1))
    return ids, ids.masked_fill(torch.rand(3, 8, generator=torch.Generator().manual_seed(2)) < 0.4, -100)


def log_probs_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each label, 0 where there is none, from the logits before it."""
    labels = labels[:, 1:]
    return logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0].masked_fill(labels == -100, 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_the_logits(name, caplog):
    model = large(name)
    ids, labels = rows()
    mask = torch.ones_like(ids)
    found = model(input_ids=ids, attention_mask=mask, labels=labels, label_statistics=True)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    asked, targets = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    log_probs, expected = logits.log_softmax(-1), log_probs_of(logits, labels)
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-7, atol=1e-7)  # gpt-j has a part in float32
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(found.entropy, entropy.masked_fill(~asked, 0).detach(), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.mean_logits, logits.mean(-1).masked_fill(~asked, 0).detach())
    assert torch.equal(found.is_top1, (logits.argmax(-1) == targets) & asked)
    assert not found.entropy.requires_grad and not found.mean_logits.requires_grad

    weights = torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad((found.log_probs * weights).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    assert max(gradient.abs().max() for gradient in theirs if gradient is not None) > 0.1
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert not [record for record in caplog.records if "All logits" in record.getMessage()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_in_float32(dtype):
    """Of logits that are rounded to `dtype`, as the model's own head rounds them, nothing more is lost."""
    model = large("llama", dtype)
    ids, labels = rows()
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, label_statistics=True).log_probs
    logits = model(input_ids=ids).logits[:, :-1].double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), log_probs_of(logits, labels), rtol=1e-5, atol=1e-5)


def test_autocast_computes_the_products_in_its_precision():
    model = large("llama", torch.float32)
    ids, labels = rows()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, label_statistics=True)
        logits = model(input_ids=ids).logits[:, :-1]
    found.log_probs.sum().backward()
    assert logits.dtype == torch.bfloat16 and found.log_probs.dtype == torch.float32
    expected = log_probs_of(logits.double(), labels)
    torch.testing.assert_close(found.log_probs.double(), expected, rtol=1e-5, atol=1e-5)


# By less than what a packed row may differ by, of which every token of a completion has as much
@pytest.mark.parametrize(("dtype", "factor"), [(torch.float64, 3.0), (torch.bfloat16, 1.03)])
def test_a_head_that_does_more_is_found_out_and_its_logits_are_read(dtype, factor, caplog):
    """A multiplier by a name that nothing here knows."""
    model = large("llama", dtype)
    original = model.forward

    def scaled(*args, **kwargs):
        outputs = original(*args, **kwargs)
        outputs.logits = outputs.logits.to(torch.promote_types(dtype, torch.float32)) * factor
        return outputs

    ids, labels = rows()
    for _ in range(2):
        found = module.label_statistics(model, scaled, labels, input_ids=ids)
    torch.testing.assert_close(found.log_probs, log_probs_of(scaled(input_ids=ids).logits[:, :-1], labels))
    assert [record.getMessage()[:32] for record in caplog.records] == ["All logits of llama are computed"]


def test_rows_without_labels_still_have_a_backward_pass():
    model = large("llama")
    ids, _ = rows()
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids * 0 - 100, label_statistics=True)
    found.log_probs.sum().backward()
    assert found.log_probs.abs().sum() == 0 and model.lm_head.weight.grad.abs().sum() == 0


def test_the_load_balancing_loss_is_the_models_own():
    model = build(SHARING["mixtral"])
    add_shared_prefix(model)
    ids, labels = rows()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "output_router_logits": True}
    ours = model(**given, labels=labels, label_statistics=True).aux_loss
    torch.testing.assert_close(ours, model(**given).aux_loss)
