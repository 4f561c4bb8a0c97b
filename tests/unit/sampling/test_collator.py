import contextlib
import logging
import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prefopt_trl.data.collators import DataCollatorForRanking
from prefopt_trl.data.tokenization import tokenize_completions
from prefopt_trl.generation.sampler import Candidates
from prefopt_trl.rankers import FunctionRanker
from prefopt_trl.sampling import collator as module
from prefopt_trl.sampling.collator import DataCollatorForRejectionSampling
from prefopt_trl.sampling.rejection import automatic_beta
from tests.unit.known_rankers import number

EXAMPLES = [{"prompt": "The dog"}, {"prompt": "Bread:"}, {"prompt": "What is the capital of France?"}]


def length(prompts, completions, **kwargs):
    return [0.2 * len(completion) for completion in completions]


@pytest.fixture
def texts(monkeypatch):
    """What the policy is made to say for each prompt of a batch."""
    said: list[list[str]] = []

    def say(model, tokenizer, prompt_ids, *how, **settings):
        return [Candidates(row, [True] * len(row)) for row in said[: len(prompt_ids)]]

    monkeypatch.setattr(module, "sample_candidates", say)
    return said


def make(policy, tokenizer, **settings):
    settings = {
        "num_candidates": 6,
        "num_samples": 4,
        "max_new_tokens": 5,
        "ranker": FunctionRanker(number),
    } | settings
    return DataCollatorForRejectionSampling(policy, tokenizer, **settings)


def sampling(policy, tokenizer, **settings):
    return make(policy, tokenizer, ranker=FunctionRanker(length), **settings)


def same(batch, other):
    return batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in batch)


def test_pairs_are_what_trls_collator_makes_of_them(policy, tokenizer, texts):
    texts += [["3", "1", "7", "9", "5", "7"], ["2", "4", "6", "8", "0", "1"]]
    batch = make(policy, tokenizer, strategy="top-k", num_samples=2)(EXAMPLES[:2])
    pairs = []
    for example, chosen, rejected in zip(EXAMPLES, ("9", "8"), ("7", "6"), strict=False):
        prompt_ids, (chosen_ids, rejected_ids) = tokenize_completions(tokenizer, example["prompt"], [chosen, rejected])
        pairs.append({"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids})
    assert same(batch, DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(pairs))


def test_an_automatic_beta_is_that_of_the_prompts_rewards(policy, tokenizer, texts):
    texts += [["3", "1", "7", "9", "5", "7"]]
    beta = automatic_beta(np.array([3.0, 1.0, 7.0, 9.0, 5.0]), 4)
    batches = {one: make(policy, tokenizer, rejection_beta=one)(EXAMPLES[:1]) for one in ("auto", beta, 0.01)}
    assert same(batches["auto"], batches[beta]) and not same(batches["auto"], batches[0.01])


def test_pairs_by_reward_are_one_a_prompt_and_margins_and_penalties_hold(policy, tokenizer, texts):
    texts += [["3", "1", "7", "9.00000", "5", "7"], ["5", "5.1", "5.2", "5.3", "5.4", "5.5"]]
    how = {"pairing": "best-worst", "strategy": "sft", "num_samples": 6, "length_penalty": 1.0, "min_margin": 4.0}
    # Less their lengths the rewards are 2, 0, 6, 2, 4 and 6, and at most 5.5 - 3 and at least 5.1 - 3
    batch = make(policy, tokenizer, **how)(EXAMPLES[:2])
    ids = [tokenize_completions(tokenizer, "The dog", [text])[1][0] for text in ("7", "1")]
    completions = [
        row[mask == 1].tolist() for row, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
    ]
    assert [completions[0], completions[2]] == ids
    assert len(completions) == 4
    assert completions[1] == completions[3]  # no pair of the second prompt is within the margin: a constant loss


@pytest.mark.parametrize("pairing", ["correct-wrong", "best"])
def test_pairings_that_are_not_for_batches_are_refused(policy, tokenizer, pairing):
    with pytest.raises(ValueError, match=f"`pairing` must be one of ranking, .*best-quantile, got '{pairing}'"):
        make(policy, tokenizer, pairing=pairing)


@pytest.mark.parametrize("pairing", ["first-round", "ranking"])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_rows_are_cut_and_padded_as_asked(policy, tokenizer, texts, pairing, mode):
    texts.append(["1 and no more", "2", "3", "4", "5", "6"])
    tokenizer.pad_token = None
    given = {"ranker": FunctionRanker(length), "strategy": "top-k", "num_samples": 2, "pairing": pairing}
    batch = make(policy, tokenizer, **given, max_length=9, truncation_mode=mode, pad_to_multiple_of=4)(EXAMPLES[:1])
    prompt_ids, (long_ids, short_ids) = tokenize_completions(tokenizer, "The dog", ["1 and no more", "2"])
    whole = prompt_ids + long_ids
    assert len(whole) > 9 > len(prompt_ids + short_ids)
    assert batch["input_ids"].shape[1] == 12
    assert batch["input_ids"][0, :9].tolist() == (whole[:9] if mode == "keep_start" else whole[-9:])
    assert (batch["input_ids"][:, 9:] == tokenizer.eos_token_id).all()  # in place of the token for padding


def test_rankings_are_what_our_collator_makes_of_them(policy, tokenizer, texts):
    texts += [["3", "1", "7", "9", "5", "7"], ["2", "4", "6", "8", "0", "1"]]
    batch = make(policy, tokenizer, rejection_beta=0.0, num_samples=3, pairing="ranking")(EXAMPLES[:2])
    rankings = []
    for example, kept in zip(EXAMPLES, (["9", "7", "5"], ["8", "6", "4"]), strict=False):
        prompt_ids, completion_ids = tokenize_completions(tokenizer, example["prompt"], kept)
        rewards = [float(text) for text in kept]
        rankings.append({"prompt_ids": prompt_ids, "completion_ids": completion_ids, "rewards": rewards})
    assert same(batch, DataCollatorForRanking(pad_token_id=tokenizer.pad_token_id)(rankings))


@pytest.mark.parametrize(("pairing", "pairs"), [("first-round", 2), ("tournament", 3), ("all", 6)])
def test_a_prompt_makes_as_many_pairs_as_the_pairing_has_matches(policy, tokenizer, pairing, pairs):
    batch = sampling(policy, tokenizer, pairing=pairing)(EXAMPLES)
    assert len(batch["input_ids"]) == 2 * 3 * pairs


def test_the_ranker_prefers_what_is_chosen(policy, tokenizer):
    batch = sampling(policy, tokenizer)(EXAMPLES)
    ids = [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    lengths = [len(tokenizer.decode(row, skip_special_tokens=True)) for row in ids]
    chosen, rejected = np.split(np.array(lengths), 2)
    assert (chosen >= rejected).all() and (chosen > rejected).any()


def test_a_batch_depends_on_seed_epoch_and_prompts_alone(policy, tokenizer):
    collator = sampling(policy, tokenizer)
    batch = collator(EXAMPLES)
    state = torch.random.get_rng_state()
    assert not same(collator(EXAMPLES[:2]), batch)  # whatever came between
    assert same(collator(EXAMPLES), batch)
    assert same(sampling(policy, tokenizer)(EXAMPLES), batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    collator.epoch = 1
    assert not same(collator(EXAMPLES), batch)
    assert not same(sampling(policy, tokenizer, seed=1)(EXAMPLES), batch)


def test_tokenised_examples_are_collated_as_they_are(policy, tokenizer):
    examples = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}]
    collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
    assert same(sampling(policy, tokenizer)(examples), collate(examples))


def test_sampling_happens_in_the_given_context(policy, tokenizer, monkeypatch):
    events = []

    @contextlib.contextmanager
    def context():
        events.append("in")
        yield
        events.append("out")

    real = module.sample_candidates
    monkeypatch.setattr(module, "sample_candidates", lambda *a, **k: events.append("sample") or real(*a, **k))
    sampling(policy, tokenizer, while_sampling=context)(EXAMPLES)
    assert events == ["in", "sample", "out"]


def test_conversations_are_sampled_as_messages(policy, tokenizer, texts):
    texts.append([" yes", " no", " maybe"])
    prompt = [{"role": "user", "content": "Will it rain?"}]

    def content(prompts, completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    settings = {"ranker": FunctionRanker(content), "strategy": "top-k", "num_samples": 2}
    batch = make(policy, tokenizer, **settings)([{"prompt": prompt}])
    texts_in = tokenizer.batch_decode(batch["input_ids"])
    assert "<|user|>Will it rain?</s><|assistant|> maybe</s>" in texts_in[0]
    assert "<|assistant|> yes</s>" in texts_in[1]


# Few distinct candidates


@pytest.mark.parametrize("pairing", ["first-round", "ranking"])
def test_the_template_of_each_example_decides_what_is_distinct(policy, tokenizer, texts, pairing):
    texts += [["1</think>a", "2</think>a", "3</think>a", "1</think>b", "2</think>b", "3</think>b"]] * 2
    tokenizer.chat_template = "{{ style }}" + tokenizer.chat_template.replace("ent']", "ent'].split('</think>')[-1]")
    content = FunctionRanker(lambda prompts, completions, **kwargs: [float(c[0]["content"][0]) for c in completions])
    collator = make(policy, tokenizer, ranker=content, strategy="top-k", num_samples=2, pairing=pairing)
    examples = [{"prompt": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"style": s}} for s in "xy"]
    rows = tokenizer.batch_decode(collator(examples)["input_ids"])
    assert [row[0] for row in rows] == (["x", "y"] * 2 if pairing == "first-round" else ["x", "x", "y", "y"])
    assert len(set(rows)) == 4 and collator.num_short == 0


def test_a_prompt_with_few_distinct_candidates_keeps_those_it_has(policy, tokenizer, texts, caplog):
    texts += [["1", "2", "1", " 2", "1", "2"], ["5"] * 6, ["1", "2", "3", "4", "5", "6"]]
    collator = make(policy, tokenizer)
    with caplog.at_level(logging.WARNING):
        batch = collator(EXAMPLES)
        collator(EXAMPLES)
    pairs = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    chosen, rejected = pairs[:6], pairs[6:]  # two pairs of each prompt: as many as of another batch
    assert chosen[:2] == ["The dog2"] * 2 and rejected[:2] == ["The dog1"] * 2
    assert chosen[2:4] == rejected[2:4] == ["Bread:5"] * 2
    assert all(text.startswith("What is") for text in chosen[4:]) and chosen[4] != chosen[5]
    assert collator.num_short == 4
    (message,) = caplog.messages
    assert "2 of 3 prompts" in message and "`num_samples`=4" in message and "`temperature`" in message


@pytest.mark.parametrize(("pairing", "rows"), [("first-round", 4), ("tournament", 6), ("all", 12), ("ranking", 2)])
def test_a_single_candidate_meets_itself(policy, tokenizer, texts, pairing, rows):
    texts += [["5"] * 6, ["6"] * 6]
    batch = make(policy, tokenizer, pairing=pairing)(EXAMPLES[:2])
    decoded = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert sorted(decoded) == ["Bread:6"] * rows + ["The dog5"] * rows
    assert batch["input_ids"].shape == batch["completion_mask"].shape


@pytest.mark.parametrize("strategy", ["rso", "sft"])
@pytest.mark.parametrize("pairing", ["first-round", "tournament", "all"])
@pytest.mark.parametrize("num_samples", [2, 3, 5, 6])
def test_every_batch_has_as_many_pairs(policy, tokenizer, texts, pairing, num_samples, strategy):
    texts += [["1", "2", "3", "4", "5", "6"], ["1", "2", "3", "1", "2", "3"], ["7"] * 6]
    matches = {"first-round": num_samples // 2, "tournament": num_samples - 1, "all": math.comb(num_samples, 2)}
    collator = make(policy, tokenizer, pairing=pairing, num_samples=num_samples, strategy=strategy)
    assert len(collator(EXAMPLES)["input_ids"]) == 2 * 3 * matches[pairing]
    assert collator.num_short == (0 if strategy == "sft" else sum(distinct < num_samples for distinct in (6, 3, 1)))


def test_a_policy_that_always_says_the_same_meets_itself(policy, tokenizer):
    collator = sampling(policy, tokenizer, top_k=1)
    chosen, rejected = collator(EXAMPLES)["input_ids"].chunk(2)
    assert torch.equal(chosen, rejected) and len(chosen) == 6 and collator.num_short == 3


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "best"}, "`strategy` must be one of rso, sft, top-k, got 'best'"),
        ({"num_samples": 7}, "`num_samples`=7 completions cannot be kept out of `num_candidates`=6"),
    ],
)
def test_settings_out_of_range_are_refused(policy, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        make(policy, tokenizer, **settings)


@pytest.mark.parametrize(
    "example", ["The dog", {"text": "The dog"}, {"prompt": "The dog", "completions": [" is", " was"]}]
)
def test_what_is_no_prompt_is_refused(policy, tokenizer, example):
    with pytest.raises(ValueError, match="Example 1 of the batch is .* Give prompts without completions"):
        sampling(policy, tokenizer)([EXAMPLES[0], example])


def test_a_function_is_no_ranker(policy, tokenizer):
    with pytest.raises(TypeError, match="`ranker` is a function, not a ranker. Wrap a function in `FunctionRanker`"):
        make(policy, tokenizer, ranker=number)


def test_a_tokenizer_without_eos_is_refused(policy, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`tokenizer` has no EOS token.* Set `tokenizer.eos_token`"):
        make(policy, tokenizer)


def test_a_prompt_that_fills_max_length_is_refused(policy, tokenizer):
    with pytest.raises(ValueError, match="row 0 has .* tokens and fills `max_length`=5 .1 of 1 .* Raise `max_length`"):
        sampling(policy, tokenizer, max_length=5)([EXAMPLES[2]])


def test_a_ranker_that_returns_nan_is_refused(policy, tokenizer):
    broken = FunctionRanker(lambda prompts, completions, **kwargs: [float("nan")] * len(prompts))
    with pytest.raises(ValueError, match="nan for completion 0 of prompt row 0"):
        make(policy, tokenizer, ranker=broken)(EXAMPLES)


def test_workers_of_a_dataloader_are_refused(policy, tokenizer):
    loader = DataLoader(EXAMPLES, batch_size=3, num_workers=1, collate_fn=sampling(policy, tokenizer))
    with pytest.raises(RuntimeError, match="Set `dataloader_num_workers=0`"):
        next(iter(loader))
