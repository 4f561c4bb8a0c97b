"""Log-probabilities kept from sampling are those of TRL's reference model, wherever training reads the same tokens."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, BloomConfig
from trl import DPOConfig, DPOTrainer

from prefopt_trl import GenerationOptions
from prefopt_trl.data.formats import wrap_completion
from prefopt_trl.data.tokenization import tokenize_completions
from prefopt_trl.generation.sampler import Candidates, Sampled, sample_candidates, tokenize_prompts
from prefopt_trl.sampling.logps import pair_logps, sampled_logps
from tests.unit.trainers.conftest import with_large_weights

PROMPTS = ["What is the capital of France?", "Bake", "Tell me how to bake bread.", "Why?", "The dog sleeps", "A fox."]
PAIRS = [
    (" Paris.", " The dog sleeps on, and on."),
    (" bread, then wait.", ""),
    (" Mix the flour.", " Mix the flour."),
    (" So.", " So. And so on."),  # one begins with the other
    (" on.", " on"),
    (" No.", " The quick brown fox jumps over the lazy dog."),
]


@pytest.fixture
def model(policy):
    return with_large_weights(policy)


def as_message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def logp_of(model, tokenizer, prompt: str, completion: str, max_length: int | None = None) -> float:
    """Slow reference: one unpadded row, log-softmax in float64, summed over the completion and its EOS."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = (prompt_ids + tokenizer(completion + "</s>", add_special_tokens=False)["input_ids"])[:max_length]
    with torch.no_grad():
        logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logps[place - 1, ids[place]].item() for place in range(len(prompt_ids), len(ids)))


# Pairs


@pytest.mark.parametrize("max_length", [None, 20])
@pytest.mark.parametrize("num_pairs", [1, 4, 5, 6])
def test_logps_of_pairs_are_those_of_single_rows(model, tokenizer, num_pairs, max_length):
    found = pair_logps(model, tokenizer, PROMPTS[:num_pairs], PAIRS[:num_pairs], max_length)
    expected = [
        [logp_of(model, tokenizer, prompt, completion, max_length) for completion in pair]
        for prompt, pair in zip(PROMPTS[:num_pairs], PAIRS[:num_pairs], strict=True)
    ]
    assert found.shape == (num_pairs, 2) and found.dtype == np.float64
    assert found == pytest.approx(np.array(expected), abs=1e-3)
    assert found.min() < -20


def test_logps_know_the_arguments_of_the_template_and_one_eos(model, tokenizer, appending_tokenizer):
    expected = pair_logps(model, tokenizer, PROMPTS, PAIRS, None)
    assert pair_logps(model, appending_tokenizer, PROMPTS, PAIRS, None) == pytest.approx(expected, abs=1e-6)
    prompt, said = as_message("user", "Why?"), as_message("assistant", " So.")
    fixed = pair_logps(model, tokenizer, [prompt], [(said, said)], None)
    tokenizer.chat_template = "{{ style }}" + tokenizer.chat_template
    assert pair_logps(model, tokenizer, [prompt], [(said, said)], None) == pytest.approx(fixed, abs=1e-6)
    styled = pair_logps(model, tokenizer, [prompt], [(said, said)], None, style="terse")
    assert abs(styled - fixed).min() > 0.1


def test_no_pairs_have_no_logps(model, tokenizer):
    assert pair_logps(model, tokenizer, [], [], None).shape == (0, 2)


@pytest.mark.parametrize("conversational", [False, True], ids=["plain", "conversational"])
@pytest.mark.parametrize("max_length", [None, 20])
def test_logps_of_pairs_are_those_of_trls_reference_model(
    model, tokenizer, tmp_path: Path, conversational: bool, max_length: int | None
):
    prompts, pairs = list(PROMPTS), list(PAIRS)
    if conversational:
        prompts = [as_message("user", prompt) for prompt in PROMPTS]
        pairs = [tuple(as_message("assistant", text) for text in pair) for pair in PAIRS]
    # TRL leaves out rows whose prompt fills `max_length`
    kept = [row for row, ids in enumerate(tokenize_prompts(tokenizer, prompts)) if len(ids) < (max_length or 1000)]
    prompts, pairs = ([column[row] for row in kept] for column in (prompts, pairs))
    assert len(kept) >= 5
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, (chosen, rejected) in zip(prompts, pairs, strict=True)
    ]
    found = pair_logps(model, tokenizer, prompts, pairs, max_length)
    arguments = DPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        max_length=max_length,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=3,
    )
    trainer = DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    columns = [trainer.train_dataset[name][:] for name in ("ref_chosen_logps", "ref_rejected_logps")]
    assert found == pytest.approx(np.array(columns).T, abs=1e-3)
    assert np.ptp(found) > 10


def test_a_model_that_shares_nothing_gives_its_own_logps(tokenizer):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=2, n_head=2)
    bloom = with_large_weights(AutoModelForCausalLM.from_config(config))
    expected = [[logp_of(bloom, tokenizer, PROMPTS[row], text) for text in PAIRS[row]] for row in range(2)]
    assert pair_logps(bloom, tokenizer, PROMPTS[:2], PAIRS[:2], None) == pytest.approx(np.array(expected), abs=1e-3)


def test_there_is_no_dropout_and_no_gradient(model, tokenizer):
    expected = pair_logps(model, tokenizer, PROMPTS, PAIRS, None)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert pair_logps(model, tokenizer, PROMPTS, PAIRS, None) == pytest.approx(expected, abs=1e-4)
    assert model.training and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_part_of_the_model_is_left_in_its_mode(model, tokenizer):
    model.train()
    model.model.layers[0].eval()  # frozen
    before = [module.training for module in model.modules()]
    assert any(before) and not all(before)
    pair_logps(model, tokenizer, PROMPTS, PAIRS, None)
    assert [module.training for module in model.modules()] == before


# What was summed while sampling


def sample(model, tokenizer, prompts, num_completions: int, **options) -> list[Candidates]:
    kwargs = {"stop_strings": options.pop("stop_strings", None)}
    prompt_ids, how = tokenize_prompts(tokenizer, prompts), GenerationOptions(**{"max_new_tokens": 12} | options)
    return sample_candidates(
        model, tokenizer, prompt_ids, num_completions, how, seed=0, generation_kwargs=kwargs, keep_logps=True
    )


def ending_model(model, tokenizer, bias: float = 3.0):
    """The model, ending early often, and of the other tokens saying those of plain letters and no special ones."""
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    head.weight.data.copy_(model.lm_head.weight.data)
    head.bias.data.fill_(-30.0)
    plain = [tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyzĠ"]
    head.bias.data[plain] = 0.0
    head.bias.data[tokenizer.eos_token_id] = bias
    model.lm_head = head
    return model


@pytest.mark.parametrize("conversational", [False, True], ids=["plain", "conversational"])
def test_sampled_logps_are_those_of_pairs_where_training_reads_the_same_tokens(model, tokenizer, conversational):
    model = ending_model(model, tokenizer)
    prompts = [as_message("user", prompt) for prompt in PROMPTS] if conversational else PROMPTS
    num_kept, num_other = 0, 0
    for prompt, candidates in zip(prompts, sample(model, tokenizer, prompts, 10), strict=True):
        completions = [wrap_completion(prompt, text) if conversational else text for text in candidates.texts]
        found = sampled_logps(tokenizer, prompt, completions, candidates, None)
        pairs = [(completion, completion) for completion in completions]
        expected = pair_logps(model, tokenizer, [prompt] * 10, pairs, None)[:, 0]
        for row, logp in enumerate(found):
            # By hand: the tokens of prompt and completion, as training has them
            prompt_ids, (ids,) = tokenize_completions(tokenizer, prompt, [completions[row]])
            assert prompt_ids == tokenize_prompts(tokenizer, [prompt])[0]
            same = candidates.sampled[row].ids == ids
            assert (logp is not None) == same
            if same:
                assert candidates.finished[row] and ids[-1] == tokenizer.eos_token_id
                assert logp == pytest.approx(expected[row], abs=1e-3)
                num_kept += 1
            else:
                num_other += 1
    assert num_kept > 10 and num_other > 0  # letters that the tokenizer would have joined, and no end


def test_a_completion_that_was_cut_has_none(model, tokenizer):
    candidates = sample(ending_model(model, tokenizer, bias=-30.0), tokenizer, ["Bake"], 4)[0]
    assert candidates.finished == [False] * 4 and all(logp < 0 for _, logp in candidates.sampled)
    assert sampled_logps(tokenizer, "Bake", candidates.texts, candidates, None) == [None] * 4


def test_a_completion_whose_stop_string_was_cut_off_has_none(model, tokenizer):
    model = ending_model(model, tokenizer, bias=-30.0)
    candidates = sample(model, tokenizer, ["Bake"], 8, stop_strings=["e", "o"], max_new_tokens=60)[0]
    assert all(candidates.finished) and not any(set("eo") & set(text) for text in candidates.texts)
    assert sampled_logps(tokenizer, "Bake", candidates.texts, candidates, None) == [None] * 8


def test_a_row_that_max_length_cuts_has_none(tokenizer):
    prompt, text = "The dog", " sleeps on."
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    whole = len(tokenizer(prompt)["input_ids"]) + len(ids)
    candidates = Candidates([text], [True], [Sampled(ids, -7.5)])
    for max_length, expected in ((None, -7.5), (whole + 1, -7.5), (whole, -7.5), (whole - 1, None)):
        assert sampled_logps(tokenizer, prompt, [text], candidates, max_length) == [expected]


def test_other_tokens_of_the_same_text_have_none(tokenizer):
    text = " sleeps on."
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "Ġsleeps"]
    others = [*letters, *tokenizer(" on.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(others) == tokenizer.decode(ids) and others != ids
    candidates = Candidates(
        [text] * 3, [True] * 3, [Sampled(ids, -1.0), Sampled(others, -2.0), Sampled(ids[:-1], -3.0)]
    )
    assert sampled_logps(tokenizer, "The dog", [text] * 3, candidates, None) == [-1.0, None, None]


def test_where_nothing_was_shared_nothing_was_summed(model, tokenizer, caplog):
    model = ending_model(model, tokenizer)
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        candidates = sample(model, tokenizer, ["Bake"], 6, share_prefix=False)[0]
    assert any(candidates.finished)
    assert sampled_logps(tokenizer, "Bake", candidates.texts, candidates, None) == [None] * 6
