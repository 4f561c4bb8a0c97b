"""Candidates of another policy than the reference, corrected so that what is accepted follows RSO's target again."""

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM

from prefopt_trl import FunctionRanker, SamplingOptions, build_preference_dataset
from prefopt_trl.data.tokenization import tokenize_prompts
from prefopt_trl.generation.sampler import sample_candidates
from prefopt_trl.sampling.logps import pair_logps, row_logps
from prefopt_trl.sampling.rejection import acceptance_rate, automatic_beta, effective_sample_size
from prefopt_trl.sampling.selection import select_and_pair
from prefopt_trl.sampling.shards import clipped, shard_seed
from prefopt_trl.sampling.statistics import correction_warning
from tests.unit.known_rankers import vowels

BETA = 0.7
REFERENCE = np.array([0.3, 0.25, 0.2, 0.15, 0.1])
REWARDS = np.array([0.0, 0.4, -0.3, 1.2, 0.9])
TARGET = REFERENCE * np.exp(REWARDS / BETA) / np.sum(REFERENCE * np.exp(REWARDS / BETA))
PROPOSAL = np.array([0.1, 0.1, 0.4, 0.1, 0.3])  # far from both


TEXTS = np.array(["ab", "eb", "ib", "ob", "ub"])


def reward(prompts, completions, **columns):
    return [REWARDS[list(TEXTS).index(one)] for one in completions]


@pytest.mark.parametrize("proposal", [PROPOSAL, TARGET], ids=["far", "target"])
def test_the_first_accepted_follow_the_target_whatever_the_proposal(proposal):
    """Total variation of the first accepted of 64 candidates, over 6,000 prompts, texts repeated.

    Its mean is 0.01 and its standard deviation below 0.005, so it exceeds 0.035 in fewer than one of 10,000 seeds.
    """
    rng = np.random.default_rng(0)
    drawn = rng.choice(5, size=(6000, 64), p=proposal)
    log_ratios = list(np.log(proposal / REFERENCE)[drawn])
    options = SamplingOptions(num_samples=2, rejection_beta=BETA)
    distances = {}
    for name, ratios in {"corrected": log_ratios, "plain": None}.items():
        given = (["?"] * len(drawn), TEXTS[drawn].tolist(), list(REWARDS[drawn]), FunctionRanker(reward), options)
        selected = select_and_pair(*given, seed=1, log_ratios=ratios)
        first = [row[one.accepted[0]] for row, one in zip(drawn, selected, strict=True)]
        distances[name] = np.abs(np.bincount(first, minlength=5) / len(first) - TARGET).sum() / 2
    assert distances["corrected"] < 0.035 < distances["plain"]


def test_an_automatic_beta_weighs_the_log_ratios_too():
    drawn = np.random.default_rng(1).choice(5, size=(1, 64), p=PROPOSAL)
    given = (["?"], TEXTS[drawn].tolist(), list(REWARDS[drawn]), FunctionRanker(reward))
    ratios = list(np.log(PROPOSAL / REFERENCE)[drawn])
    beta = automatic_beta(REWARDS[np.unique(drawn)], 2)
    (chosen,), (alike,) = (
        select_and_pair(*given, SamplingOptions(num_samples=2, rejection_beta=one), seed=1, log_ratios=ratios)
        for one in ("auto", beta)
    )
    assert chosen == alike and chosen.beta == beta


def test_an_automatic_beta_corrects_also_where_no_beta_leaves_enough_candidates():
    drawn = np.random.default_rng(1).choice(5, size=(1, 64), p=PROPOSAL)  # five texts, of which eight are asked for
    given = (["?"], TEXTS[drawn].tolist(), list(REWARDS[drawn]), FunctionRanker(reward))
    options = SamplingOptions(num_samples=8, rejection_beta="auto")
    (one,) = select_and_pair(*given, options, seed=1, log_ratios=list(np.log(PROPOSAL / REFERENCE)[drawn]))
    assert one.beta == 64 and 0 < one.acceptance_rate < 1 and 8 <= one.effective_size <= 64


def test_acceptance_rises_as_the_policy_nears_the_target():
    outcomes, rates, sizes = np.arange(5), [], []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        policy = REFERENCE ** (1 - share) * TARGET**share
        policy /= policy.sum()
        corrected = REWARDS - BETA * np.log(policy / REFERENCE)
        counts = np.repeat(outcomes, np.round(1000 * policy).astype(int))  # as many of each as expected
        rates.append(acceptance_rate(corrected[counts], BETA))
        sizes.append(effective_sample_size(corrected[counts], BETA) / len(counts))
    assert np.all(np.diff(rates) > 0.05) and np.all(np.diff(sizes) > 0)
    assert rates[-1] == pytest.approx(1) and sizes[-1] == pytest.approx(1)


def test_the_effective_sample_size_by_hand():
    assert effective_sample_size(np.array([0.0, 0.0, 0.0]), 1.0) == pytest.approx(3)
    assert effective_sample_size(np.array([0.0, -np.log(3)]), 1.0) == pytest.approx((4 / 3) ** 2 / (10 / 9))
    assert effective_sample_size(np.array([1000.0, 0.0]), 0.5) == pytest.approx(1)


def test_ratios_are_clipped_around_their_median():
    ratios = np.array([10.0, 20.0, 12.0])
    assert clipped(ratios, None) is ratios
    assert clipped(ratios, 3.0).tolist() == [-2, 3, 0]


def test_a_sentence_says_when_the_correction_is_noise():
    options = SamplingOptions()
    assert correction_warning(options, 8.0, 40.0) is None
    assert correction_warning(options, 2.3, 2.4) is None  # not the correction's
    said = correction_warning(options, 2.5, 40.0)
    assert "64 candidates are worth 2.5 samples of the optimal policy (40.0 without the correction)" in said


PROMPTS = ["The capital of", "Mix the", "Tell me how"]
RANKER = FunctionRanker(vowels)
SAMPLING = {"num_candidates": 6, "num_samples": 4, "max_new_tokens": 6, "rejection_beta": 0.5}


@pytest.fixture
def proposal(tiny_llama_dir):
    """Another policy than `policy`, the reference model."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def build(policy, tokenizer, tmp_path):
    """Make pairs of prompts, of their samples with `policy` unless they are candidates."""

    def call(folder, prompts=PROMPTS, **options):
        models, how = (policy, tokenizer) if prompts is PROMPTS else (None, None), {**SAMPLING, "seed": 3, **options}
        return build_preference_dataset(prompts, *models, RANKER, tmp_path / folder, **how)

    return call


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_log_ratios_of_the_tokens_drawn_correct_the_rewards(
    build, policy, proposal, tokenizer, tmp_path, share_prefix
):
    pairs = build("pairs", proposal=proposal, keep_logps=True, share_prefix=share_prefix)
    candidates = load_from_disk(str(tmp_path / "pairs/candidates"))
    of = SamplingOptions(**SAMPLING, share_prefix=share_prefix)
    prompt_ids = tokenize_prompts(tokenizer, PROMPTS)
    drawn = sample_candidates(proposal, tokenizer, prompt_ids, 6, of, seed=shard_seed(3, 0), keep_logps=True)
    for ids, row, again in zip(prompt_ids, candidates, drawn, strict=True):
        assert row["completions"] == again.texts
        rows = [(ids, one.ids) for one in again.sampled]
        by_hand = [np.array([row_logps(model, [one])[0] for one in rows]) for model in (proposal, policy)]
        np.testing.assert_allclose(row["log_ratios"], by_hand[0] - by_hand[1], atol=1e-4)
        assert np.std(row["log_ratios"]) > 0.1

    rewards = [np.array(row) for row in candidates["rewards"]]
    ratios = [np.array(row) for row in candidates["log_ratios"]]
    selected = select_and_pair(PROMPTS, candidates["completions"], rewards, RANKER, of, seed=3, log_ratios=ratios)
    kept = [set(np.array(row)[one.accepted]) for row, one in zip(candidates["completions"], selected, strict=True)]
    assert any(kept)
    for row in pairs:
        assert {row["chosen"], row["rejected"]} <= kept[PROMPTS.index(row["prompt"])]
    both = list(zip(pairs["chosen"], pairs["rejected"], strict=True))
    ref_logps = pair_logps(policy, tokenizer, pairs["prompt"], both, None)
    saved = np.stack([pairs["ref_chosen_logps"], pairs["ref_rejected_logps"]], axis=1)
    np.testing.assert_allclose(saved, ref_logps, atol=1e-3)

    assert len(build("again", candidates, proposal_clip=0.01, rejection_beta=2.0))  # the ratios serve another beta
    with pytest.raises(ValueError, match="needs a `proposal`, or candidates with `log_ratios`, strategy='rso'"):
        build("no", candidates, proposal_clip=1.0, strategy="sft")
    for beta in (0.0, np.inf):  # and these have no use for them
        assert build(str(beta), candidates, rejection_beta=beta)


def test_a_proposal_that_is_the_policy_corrects_nothing(build, policy, tmp_path):
    build("pairs", proposal=AutoModelForCausalLM.from_pretrained(policy.name_or_path))
    ratios = np.array(load_from_disk(str(tmp_path / "pairs/candidates"))["log_ratios"])
    np.testing.assert_allclose(ratios, 0, atol=1e-4)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"strategy": "sft"}, "`proposal` corrects Algorithm 1: set strategy='rso'"),
        ({"rejection_beta": 0.0}, "a `rejection_beta` above 0"),
        ({"temperature": 0.7}, "samples of its own distribution"),
        ({"generation_kwargs": {"min_p": 0.1}}, "samples of its own distribution"),
        ({"proposal_clip": 0.0}, "`proposal_clip` is 0.0. It must be above 0"),
        ({"proposal": None, "proposal_clip": 1.0}, "needs a `proposal`"),
    ],
)
def test_what_cannot_be_corrected_is_refused(build, proposal, given, message):
    with pytest.raises(ValueError, match=message):
        build("pairs", **{"proposal": proposal, **given})
