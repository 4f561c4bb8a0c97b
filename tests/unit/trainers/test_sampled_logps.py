"""`reference_logps="sampled"`: training on the log-probabilities that sampling wrote down."""

import functools

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_trl import FunctionRanker, RSOConfig, RSOTrainer, build_preference_dataset
from prefopt_trl.experiments.tiny import tiny_llama, word_tokenizer
from prefopt_trl.sampling import shards

WORDS = ["ginger", "leek", "cream", "salt", "soup", "rice", "beans", "oil", "onion"]
PROMPTS = ["Take ginger salt", "Add cream", "Boil rice"]
SAMPLING = {"num_candidates": 8, "num_samples": 4, "max_new_tokens": 24, "seed": 1}


def few_vowels(prompts, completions, **kwargs):
    return [-sum(letter in "aeiou" for letter in completion) for completion in completions]  # short ones win


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory):
    """A policy over a dozen words, which ends some completions early: training reads those as they were drawn."""
    folder = str(tmp_path_factory.mktemp("policy"))
    tokenizer = word_tokenizer(["Take", "Add", "Boil", *(f" {word}" for word in WORDS)])
    tiny_llama(tokenizer, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config(tmp_path, **given):
    common = {"use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1, "max_steps": 3}
    return RSOConfig(
        str(tmp_path), per_device_train_batch_size=2, learning_rate=1e-2, **{**common, **SAMPLING, **given}
    )


def train(tmp_path, policy_dir, dataset, **given):
    trainer = RSOTrainer(
        policy_dir, args=config(tmp_path, **given), train_dataset=dataset, ranker=FunctionRanker(few_vowels)
    )
    trainer.train()
    return trainer


def test_sampled_log_probabilities_are_those_of_the_reference_model(tmp_path, policy_dir):
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    computed = train(tmp_path / "computed", policy_dir, prompts)
    sampled = train(tmp_path / "sampled", policy_dir, prompts, reference_logps="sampled")
    assert computed.ref_model is not None and sampled.ref_model is None
    rows, same = sampled.train_dataset, computed.train_dataset
    assert rows["chosen"] == same["chosen"] and rows["rejected"] == same["rejected"]

    # A row of its own through a fresh copy of the policy, in float64
    model = AutoModelForCausalLM.from_pretrained(policy_dir).double()
    for row in rows:
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            expected = logps[len(row["prompt_ids"]) - 1 :].sum().item()
            assert row[f"ref_{side}_logps"] == pytest.approx(expected, abs=1e-3)

    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (computed, sampled)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][0] == pytest.approx(np.log(2), abs=1e-4)
    assert losses[0][-1] != losses[0][0]


def test_pairs_with_log_probabilities_are_taken_as_they_are(tmp_path, policy_dir):
    pairs = build_preference_dataset(
        PROMPTS,
        AutoModelForCausalLM.from_pretrained(policy_dir),
        AutoTokenizer.from_pretrained(policy_dir),
        FunctionRanker(few_vowels),
        output_dir=tmp_path / "pairs",
        keep_logps=True,
        **SAMPLING,
    )
    shifted = pairs.map(lambda row: {"ref_chosen_logps": row["ref_chosen_logps"] + 2.0})
    args = config(tmp_path / "trained", reference_logps="sampled", gamma=0.5, max_steps=1)
    trainer = RSOTrainer(policy_dir, args=args, train_dataset=shifted)
    trainer.train()
    # Each log-ratio is off by 2, and the loss by what that makes of gamma * 2
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.log1p(np.exp(0.5 * 2.0)), abs=1e-4)


def test_some_log_probabilities_are_the_decoders_and_others_are_computed(tmp_path, policy_dir, monkeypatch):
    scored = []

    def count(model, tokenizer, prompts, pairs, max_length):
        scored.extend(pairs)
        return np.zeros((len(pairs), 2))

    monkeypatch.setattr(shards, "pair_logps", count)
    pairs = build_preference_dataset(
        PROMPTS,
        AutoModelForCausalLM.from_pretrained(policy_dir),
        AutoTokenizer.from_pretrained(policy_dir),
        FunctionRanker(few_vowels),
        output_dir=tmp_path,
        keep_logps=True,
        **SAMPLING,
    )
    assert 0 < len(scored) < len(pairs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reference_logps": "saved"}, "`reference_logps` must be one of computed, sampled, got 'saved'"),
        ({"reference_logps": "sampled", "sampling": "online"}, "needs pairs sampled before training"),
        ({"reference_logps": "sampled", "truncation_mode": "keep_end"}, "needs pairs sampled before training"),
    ],
)
def test_what_cannot_be(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **given)


def test_pairs_without_log_probabilities_are_refused(tmp_path, policy_dir):
    pairs = Dataset.from_dict({"prompt": ["Take"], "chosen": [" salt"], "rejected": [" leek"]})
    with pytest.raises(ValueError, match="reads `ref_chosen_logps` and `ref_rejected_logps`, which the train dataset"):
        RSOTrainer(policy_dir, args=config(tmp_path, reference_logps="sampled"), train_dataset=pairs)


# Where training cuts rows


@pytest.fixture(scope="module")
def pairs_cut_at(policy_dir, tmp_path_factory):
    """Pairs sampled with log-probabilities of completions cut at `max_length`; by its value."""

    def build(max_length):
        return build_preference_dataset(
            PROMPTS,
            AutoModelForCausalLM.from_pretrained(policy_dir),
            AutoTokenizer.from_pretrained(policy_dir),
            FunctionRanker(few_vowels),
            output_dir=tmp_path_factory.mktemp("pairs") / "made",
            keep_logps=True,
            max_length=max_length,
            **SAMPLING,
        )

    return functools.cache(build)


def tokens_of(pairs, policy_dir):
    """Tokens of each pair's longer row."""
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    texts = ([row["prompt"] + row[side] + tokenizer.eos_token for side in ("chosen", "rejected")] for row in pairs)
    return [max(len(ids) for ids in tokenizer(both)["input_ids"]) for both in texts]


def take(pairs, tmp_path, policy_dir, max_length):
    args = config(tmp_path, reference_logps="sampled", max_length=max_length)
    return RSOTrainer(policy_dir, args=args, train_dataset=pairs)


@pytest.mark.parametrize(("built", "trained"), [(10, 1024), (1024, 10), (10, 11), (11, 10), (10, None), (None, 10)])
def test_log_probabilities_of_rows_cut_elsewhere_are_refused(built, trained, tmp_path, policy_dir, pairs_cut_at):
    pairs = pairs_cut_at(built)
    assert pairs["ref_max_length"] == [built] * len(pairs)
    lengths = tokens_of(pairs, policy_dir)
    row = next(row for row, length in enumerate(lengths) if length > 10)
    message = f"Row {row} of the train dataset has {lengths[row]} tokens, .*`ref_max_length`={built}, where training "
    with pytest.raises(ValueError, match=message + f"cuts at `max_length`={trained}. Make the pairs with the same"):
        take(pairs, tmp_path, policy_dir, trained)


@pytest.mark.parametrize(("built", "trained"), [(10, 10), (11, 11), (40, 1024), (1024, 40), (40, None), (None, 40)])
def test_log_probabilities_of_rows_that_are_cut_alike_or_not_at_all_are_taken(
    built, trained, tmp_path, policy_dir, pairs_cut_at
):
    pairs = pairs_cut_at(built)
    longest = max(tokens_of(pairs, policy_dir))
    assert 11 < longest <= 40
    trainer = take(pairs, tmp_path, policy_dir, trained)
    assert trainer.ref_model is None and len(trainer.train_dataset) == len(pairs)
    trainer.train()  # the policy is the reference model, so that each log-ratio is 0
    assert trainer.state.log_history[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_log_probabilities_of_unknown_length_are_taken_as_those_of_whole_rows(tmp_path, policy_dir, pairs_cut_at):
    pairs = pairs_cut_at(None).remove_columns("ref_max_length")
    longest = max(tokens_of(pairs, policy_dir))
    assert len(take(pairs, tmp_path, policy_dir, longest).train_dataset) == len(pairs)
    with pytest.raises(ValueError, match=f"has {longest} tokens, .*`ref_max_length`=None"):
        take(pairs, tmp_path, policy_dir, longest - 1)
