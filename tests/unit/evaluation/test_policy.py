"""What is measured of a policy's samples, against values known beforehand."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_trl import FunctionRanker
from prefopt_trl.data.tokenization import chat_options
from prefopt_trl.evaluation.policy import Estimate, evaluate_policy

PROMPTS = [f"The fox number {number}" for number in range(40)]


def length(prompts, completions, **kwargs):
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_dir):
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


def load(folder, end_bias=None):
    """The policy or, with a bias, one for which all other tokens are equally likely."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    if end_bias is not None:
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
        model.lm_head.bias.data[model.config.eos_token_id] = end_bias
    return model


def evaluate(policy, reference, tokenizer, targets, **kwargs):
    return evaluate_policy(
        policy, reference, tokenizer, FunctionRanker(length), PROMPTS, targets, max_new_tokens=6, **kwargs
    )


def test_estimate_is_the_mean_and_its_standard_error():
    assert Estimate.of(np.array([1, 2, 3, 6])) == Estimate(3.0, pytest.approx(np.sqrt(14 / 3 / 4)))


def test_a_policy_is_at_distance_zero_from_itself(tiny_llama_dir, tokenizer):
    policy = load(tiny_llama_dir)
    assert evaluate(policy, policy, tokenizer, ["a"] * 40)["kl"] == Estimate(0.0, 0.0)


def test_kl_of_a_policy_that_always_says_one_token(tiny_llama_dir, tokenizer):
    # A policy that must end at once, against one for which every token is equally likely: KL = ln(vocabulary)
    policy, reference = load(tiny_llama_dir, end_bias=100.0), load(tiny_llama_dir, end_bias=0.0)
    result = evaluate(policy, reference, tokenizer, ["a"] * 40)
    assert result["kl"].mean == pytest.approx(np.log(len(tokenizer)), abs=1e-4)
    assert result["ranker_reward"].mean == -1.0  # the empty text, against a target of one letter


def test_wins_count_ties_as_half(tiny_llama_dir, tokenizer):
    policy = load(tiny_llama_dir, end_bias=100.0)  # every sample is empty
    targets = [""] * 20 + ["longer"] * 20
    result = evaluate(policy, policy, tokenizer, targets, true_reward=lambda prompts, completions: [0.0] * 40)
    assert result["ranker_win_rate"].mean == 0.25
    assert result["true_win_rate"].mean == 0.5
    assert result["true_reward"] == Estimate(0.0, 0.0)


def test_kl_is_that_of_the_tokens_drawn(tiny_llama_dir, tokenizer):
    # Many of a random model's tokens are parts of a character, which a text does not keep
    policy, reference = load(tiny_llama_dir), load(tiny_llama_dir)
    generator = torch.Generator().manual_seed(0)
    for model in (policy, reference):
        model.lm_head.weight.data.normal_(0, 0.3, generator=generator)
    ids = tokenizer("The fox", return_tensors="pt")["input_ids"]
    logps, ref_logps = (model(ids).logits[0, -1].detach().double().log_softmax(-1) for model in (policy, reference))
    exact = (logps.exp() * (logps - ref_logps)).sum().item()
    kl = evaluate_policy(
        policy, reference, tokenizer, FunctionRanker(length), ["The fox"] * 2000, ["a"] * 2000, max_new_tokens=1
    )["kl"]
    assert exact > 0.1
    assert abs(kl.mean - exact) < 5 * kl.standard_error < 0.5 * exact  # by chance wrong once in a million


def test_conversations_are_written_with_the_tools_and_arguments_of_their_row(tiny_llama_dir):
    reads, says = (AutoTokenizer.from_pretrained(tiny_llama_dir) for _ in range(2))
    reads.chat_template = "{{ style }}{{ tools[0]['name'] }}" + reads.chat_template
    says.chat_template = "tersesum" + says.chat_template
    policy, reference = load(tiny_llama_dir), load(tiny_llama_dir)
    reference.lm_head.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    targets = [[{"role": "assistant", "content": "a"}]] * 40
    ranker = FunctionRanker(lambda prompts, completions: [float(len(said[0]["content"])) for said in completions])

    def measured(tokenizer, **given):
        return evaluate_policy(policy, reference, tokenizer, ranker, prompts, targets, max_new_tokens=6, **given)

    rows = [{"tools": json.dumps([{"name": "sum"}]), "chat_template_kwargs": {"style": "terse"}}] * 40
    found = measured(reads, chat=list(map(chat_options, rows)))
    assert found == measured(says) != measured(reads, chat=[{"style": "", "tools": [{"name": ""}]}] * 40)


def test_samples_without_a_reward_are_left_out_and_columns_are_read(tiny_llama_dir, tokenizer):
    def odd(prompts, completions, level):
        return [1.0 if one % 2 else None for one in level]

    policy = load(tiny_llama_dir)
    given = (policy, policy, tokenizer, FunctionRanker(odd), ["a"] * 4, ["b"] * 4)
    measured = evaluate_policy(*given, max_new_tokens=2, columns={"level": [1, 2, 3, 4]})
    assert (measured["ranker_reward"].mean, measured["ranker_win_rate"].mean) == (0, 0.5)  # of two samples
    with pytest.raises(ValueError, match="has an opinion on fewer than 2 of the samples"):
        evaluate_policy(*given, max_new_tokens=2, columns={"level": [1, 2, 4, 4]})
