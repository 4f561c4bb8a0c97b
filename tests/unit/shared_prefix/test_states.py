"""Models with recurrent layers are sampled from the state after their prompt, exactly or not at all."""

from typing import Any

import pytest
import torch
import transformers

from prefopt_trl import GenerationOptions
from prefopt_trl.generation.generators import SharedPrefixGenerator
from prefopt_trl.generation.sampler import sample_candidates
from prefopt_trl.shared_prefix import states
from tests.unit.generation.test_sampler import TINY, law_of_texts, letter_tokenizer
from tests.unit.laws import CHANCE, p_value
from tests.unit.shared_prefix import families

HYBRID = {**TINY, "bos_token_id": None, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
HYBRID |= {"num_hidden_layers": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")}
MODELS = {
    "qwen3_next": transformers.Qwen3NextConfig(
        **HYBRID, **EXPERTS, **LINEAR, head_dim=8, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "nemotron_h": transformers.NemotronHConfig(
        **HYBRID, head_dim=8, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8
    ),
    "lfm2": transformers.Lfm2Config(**HYBRID, layer_types=["conv", "full_attention"] * 2),
    "mamba": transformers.MambaConfig(**TINY, bos_token_id=None, hidden_size=16, num_hidden_layers=2, state_size=4),
}


@pytest.mark.parametrize("family", MODELS)
def test_a_state_is_repeated_exactly_or_not_at_all(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer, prompts = families.build(MODELS[family]), letter_tokenizer(), ["abcgh", "d", "fed", "ifg"]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    settings = SharedPrefixGenerator(model, tokenizer).settings(GenerationOptions(max_new_tokens=2))
    shapes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    before = torch.random.get_rng_state()
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    drawn = sample_candidates(model, tokenizer, prompt_ids, 2000, GenerationOptions(max_new_tokens=2), seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert settings["prompts_are_shared"] == states.repeats_states(model) == (family != "mamba")
    assert any("mamba has recurrent layers" in record.message for record in caplog.records) == (family == "mamba")
    whole = [(1, 4), (2, 2)]  # prompts but for their last token, of equal lengths
    assert [shape for shape in shapes if shape[1] > 1] == (whole if family != "mamba" else [(8000, 5)])
    for ids, row in zip(prompt_ids, drawn, strict=True):
        assert p_value(row.texts, law_of_texts(model, tokenizer, ids)) > CHANCE


def test_a_release_that_repeats_states_otherwise_costs_the_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_another_order(model: Any, prompt_ids: torch.Tensor, num_completions: int) -> dict[str, Any]:
        (named,) = real(model, prompt_ids, num_completions).items()
        named[1].reorder_cache(torch.arange(8).flip(0))
        return dict([named])

    real = states.repeated_states
    monkeypatch.setattr(states, "repeated_states", in_another_order)
    assert not states.repeats_states(families.build(MODELS["lfm2"]))
