"""Samples, their log-probabilities, and what judges say of them, against values known beforehand."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_trl import FunctionRanker
from prefopt_trl.evaluation.samples import SamplingPlan, best_of, given_samples, sample, verdicts
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.rankers.base import logit
from tests.unit.known_rankers import Reader, number, pointwise

ROWS = [{"prompt": "a?"}, {"prompt": "b?"}]


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


def samples(**texts):
    return {name: list(map(given_samples, of)) for name, of in texts.items()}


SAMPLES = samples(one=[["3", "0", "2"], ["none"]], two=[["1"], ["5", "7"]], them=[["1", "2"], ["5"]])


def test_a_judge_of_rewards_is_asked_once_about_each_prompt():
    calls = []

    def rewards(prompts, completions, level=None):
        calls.append(list(zip(prompts, completions, level or "12121212", strict=False)))
        return number(prompts, completions)

    found = verdicts(
        FunctionRanker(rewards), [{**row, "level": level} for level, row in enumerate(ROWS, 1)], SAMPLES, "them"
    )
    first, second = (["3", "0", "2", "1", "1", "2"], ["none", "5", "7", "5"])
    assert calls == [[("a?", text, 1) for text in first] + [("b?", text, 2) for text in second]]
    assert found == {
        "one": [{"rewards": [3, 0, 2], "wins": [1, 0, 1]}, {"rewards": [None], "wins": [None]}],  # 2 meets 1
        "two": [{"rewards": [1], "wins": [0.5]}, {"rewards": [5, 7], "wins": [0.5, 1]}],
        "them": [{"rewards": [1, 2], "wins": [0.5, 0.5]}, {"rewards": [5], "wins": [0.5]}],
    }
    known = {"them": [np.array([9.0, 2]), np.array([5.0])]}  # not asked again
    found = verdicts(FunctionRanker(rewards), ROWS, SAMPLES, "them", known)
    assert found["one"][0]["wins"] == [0, 0, 0] and found["them"][0]["rewards"] == [9, 2]
    assert len(calls) == 2 and len(calls[1]) == 7
    alone = verdicts(pointwise(), ROWS, SAMPLES, None)
    assert alone["one"][0] == {"rewards": [3, 0, 2], "wins": [None] * 3}


def test_a_judge_of_pairs_compares_with_the_opponent():
    judge = Counting(bias=1.0)
    found = verdicts(judge, ROWS, SAMPLES, "them")
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

    found = verdicts(Fickle(0.0), ROWS, samples(us=[["y"], ["x"]], them=[["y", "z", "z"], ["x"]]), "them")
    assert found["us"] == [{"rewards": [0], "wins": [0.5]}, {"rewards": [None], "wins": [None]}]


def test_the_best_of_n_by_hand():
    texts = [["1", "4", "3", "none", "none", "2", "8"], ["none", "none", "0"]]
    for n, best in (3, [["4", "2"], ["0"]]), (2, [["4", "3", "2"], ["none"]]):
        kept = best_of(pointwise(), ROWS, list(map(given_samples, texts)), n)
        assert [[one["completion"] for one in of] for of in kept] == best


STOP = {"stop_strings": ["e", "o"]}


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_log_probabilities_are_of_the_tokens_drawn_up_to_a_stop_string(tiny_llama_dir, share_prefix, pad):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir, pad_token=pad)
    options = GenerationOptions(max_new_tokens=40, share_prefix=share_prefix)
    [sampled] = sample(model, tokenizer, [{"prompt": "The fox"}], SamplingPlan(12, options, STOP), seed=0)
    assert sum(one["finished"] for one in sampled) > 6
    prompt = tokenizer("The fox")["input_ids"]
    for one in sampled:
        before, text = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (one["ids"][:-1], one["ids"]))
        assert one["completion"] == re.split("e|o", text)[0] and not re.search("e|o", before)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + one["ids"]])).logits[0, len(prompt) - 1 : -1].double()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(one["ids"])[:, None]).sum().item()
        assert one["logp"] == pytest.approx(expected, abs=1e-3)


def test_samples_of_a_narrowed_distribution_estimate_no_kl():
    def plan(kwargs=None, **options):
        return SamplingPlan(2, GenerationOptions(**options), kwargs or {})

    assert all(one.is_of_policy for one in (plan(), plan(STOP), plan(max_new_tokens=9)))
    narrow = plan(temperature=0.7), plan(top_p=0.9), plan(top_k=5), plan({"min_p": 0.1})
    assert not any(one.is_of_policy for one in narrow) and narrow[-1].settings()["min_p"] == 0.1
    with pytest.raises(ValueError, match="`num_completions` must be a whole number, at least 1, got True"):
        SamplingPlan(True, GenerationOptions(), {})
