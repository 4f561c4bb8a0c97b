"""Samples, their log-probabilities, and what judges say of them, against values known beforehand."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_trl import FunctionRanker
from prefopt_trl.evaluation.samples import SamplingPlan, as_rows, best_of, given_samples, length, sample, verdicts
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.rankers.base import logit
from tests.unit.known_rankers import Reader, number, pointwise

PROMPTS = ["a?", "b?"]


class Counting(Reader):
    """Has no opinion on "none" and, as a judge may, calls small margins a tie."""

    may_abstain = True
    asked: tuple = ()

    def both_orders(self, prompts, first, second, rows=None):
        self.asked += tuple(zip(prompts, first, second, strict=True))
        margins = np.array([float(a.replace("none", "nan")) - float(b) for a, b in zip(first, second, strict=True)])
        return 1 / (1 + np.exp(-np.stack([margins + self.bias, margins - self.bias], axis=1)))

    def verdicts(self, probabilities):
        return np.where(abs(probabilities - 0.5) > 0.35, probabilities > 0.5, 0.5 + 0 * probabilities)


COMPLETIONS = {"one": [["3", "0", "2"], ["none"]], "two": [["1"], ["5", "7"]], "them": [["1", "2"], ["5"]]}


def test_a_judge_of_rewards_is_asked_once_about_each_prompt():
    calls = []

    def rewards(prompts, completions, level=None):
        calls.append(list(zip(prompts, completions, level or "12121212", strict=False)))
        return number(prompts, completions)

    found = verdicts(FunctionRanker(rewards), PROMPTS, COMPLETIONS, "them", {"level": [1, 2]})
    first, second = (["3", "0", "2", "1", "1", "2"], ["none", "5", "7", "5"])
    assert calls == [[("a?", text, 1) for text in first] + [("b?", text, 2) for text in second]]
    assert found == {
        "one": [{"rewards": [3, 0, 2], "wins": [1, 0, 1]}, {"rewards": [None], "wins": [None]}],  # 2 meets 1
        "two": [{"rewards": [1], "wins": [0.5]}, {"rewards": [5, 7], "wins": [0.5, 1]}],
        "them": [{"rewards": [1, 2], "wins": [0.5, 0.5]}, {"rewards": [5], "wins": [0.5]}],
    }
    known = {"them": [np.array([9.0, 2]), np.array([5.0])]}  # not asked again
    found = verdicts(FunctionRanker(rewards), PROMPTS, COMPLETIONS, "them", {}, known)
    assert found["one"][0]["wins"] == [0, 0, 0] and found["them"][0]["rewards"] == [9, 2]
    assert len(calls) == 2 and len(calls[1]) == 7
    alone = verdicts(pointwise(), PROMPTS, COMPLETIONS, None, {})
    assert alone["one"][0] == {"rewards": [3, 0, 2], "wins": [None] * 3}


def test_a_judge_of_pairs_compares_with_the_opponent():
    judge = Counting(bias=1.0)
    found = verdicts(judge, PROMPTS, COMPLETIONS, "them", {})
    asked = "a? 3 1, a? 0 2, a? 2 1, a? 1 1, b? none 5, b? 5 5, b? 7 5"
    assert sorted(judge.asked) == sorted(tuple(one.split()) for one in asked.split(", "))
    odds = logit(Reader(1.0).compare(["a?"] * 3, ["3", "0", "2"], ["1", "2", "1"]))
    assert found["one"][0] == {"rewards": pytest.approx(odds), "wins": [0.5] * 3}  # all are within its margin
    assert found["one"][1] == {"rewards": [None], "wins": [None]} and found["two"][1]["rewards"][0] == 0
    assert found["them"] == [{"rewards": [0, 0], "wins": [0.5, 0.5]}, {"rewards": [0], "wins": [0.5]}]


def test_equal_texts_are_a_tie_and_prompts_without_a_question_are_not_asked():
    class Fickle(Counting):
        def score(self, prompts, completions, baselines=None, columns=None):
            assert all(completions)
            return [np.full(len(of), np.nan if "x" in of else 2.0) for of in completions]

    found = verdicts(Fickle(0.0), PROMPTS, {"us": [["y"], ["x"]], "them": [["y", "z", "z"], ["x"]]}, "them", {})
    assert found["us"] == [{"rewards": [0], "wins": [0.5]}, {"rewards": [None], "wins": [None]}]


def test_the_best_of_n_by_hand():
    texts = [["1", "4", "3", "none", "none", "2", "8"], ["none", "none", "0"]]
    kept = best_of(pointwise(), PROMPTS, [given_samples(of) for of in texts], 3, {})
    assert [[one["completion"] for one in of] for of in kept] == [["4", "2"], ["0"]]
    kept = best_of(pointwise(), PROMPTS, [given_samples(of) for of in texts], 2, {})
    assert [[one["completion"] for one in of] for of in kept] == [["4", "3", "2"], ["none"]]


def test_rows_and_lengths():
    judged = {"judge": [{"rewards": [1.5], "wins": [None]}, {"rewards": [None], "wins": [0.5]}]}
    sampled = [[{"completion": "x", "finished": True, "ids": [5, 6], "logp": -2.0}], given_samples([""])]
    rows = as_rows("us", 7, PROMPTS, sampled, [[-3.0], [None]], judged)
    assert [rows[0], {**rows[1], "prompt": "a?"}] == [
        {**{"row": row, "sample": 0, "policy": "us", "prompt": "a?", "completion": text, "rewards": {"judge": reward}},
         **{"num_tokens": tokens, "finished": end, "logp": logp, "ref_logp": ref, "wins": {"judge": won}}}
        for row, text, tokens, end, logp, ref, reward, won in [
            (7, "x", 2, True, -2.0, -3.0, 1.5, None), (8, "", None, None, None, None, None, 0.5),
        ]
    ]  # fmt: skip
    messages = [{"role": "assistant", "content": "four"}]
    turns = [{"role": "user", "content": "More"}, *messages]
    assert (length("four"), length(messages), length(messages + turns)) == (4, 4, 35)


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_dir), AutoTokenizer.from_pretrained(tiny_llama_dir)


STOPS = ["e", "o", "the", "q"]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_log_probabilities_are_of_the_tokens_drawn_up_to_a_stop_string(tiny, tiny_llama_dir, share_prefix, pad):
    model, tokenizer = tiny[0], AutoTokenizer.from_pretrained(tiny_llama_dir, pad_token=pad)
    options = GenerationOptions(max_new_tokens=40, share_prefix=share_prefix)
    plan = SamplingPlan.of(6, options, {"stop_strings": STOPS})
    rows = [{"prompt": "The fox"}, {"prompt": "What is"}]
    sampled = sample(model, tokenizer, rows, plan, seed=0)
    assert sum(one["finished"] for of in sampled for one in of) > 6
    for row, of in zip(rows, sampled, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        for one in of:
            text = tokenizer.decode(one["ids"], skip_special_tokens=True)
            assert one["completion"] == text[: min(text.find(stop) % (len(text) + 1) for stop in STOPS)]
            if one["finished"] and one["ids"][-1] != tokenizer.eos_token_id:
                before = tokenizer.decode(one["ids"][:-1], skip_special_tokens=True)
                assert not any(stop in before for stop in STOPS)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + one["ids"]])).logits[0, len(prompt) - 1 : -1].double()
            expected = logits.log_softmax(-1).gather(1, torch.tensor(one["ids"])[:, None]).sum().item()
            assert one["logp"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "is_of_policy"),
    [
        *[({}, True), ({"generation_kwargs": {"stop_strings": ["x"]}}, True), ({"max_new_tokens": 9}, True)],
        *[({"temperature": 0.7}, False), ({"temperature": 0}, False), ({"top_p": 0.9}, False), ({"top_k": 5}, False)],
        ({"generation_kwargs": {"min_p": 0.1}}, False),
    ],
)
def test_samples_of_a_narrowed_distribution_have_no_log_probability(tiny, change, is_of_policy):
    kwargs = change.pop("generation_kwargs", None)
    plan = SamplingPlan.of(2, GenerationOptions(**{"max_new_tokens": 3, **change}), kwargs)
    sampled = sample(*tiny, [{"prompt": "The fox"}], plan, seed=0)
    assert [one["logp"] is not None for one in sampled[0]] == [is_of_policy] * 2
    assert set(plan.settings()) >= {"num_completions", "temperature", *(kwargs or {})}
    with pytest.raises(ValueError, match="`num_completions` must be a whole number, at least 1, got True"):
        SamplingPlan.of(True, GenerationOptions(), None)
