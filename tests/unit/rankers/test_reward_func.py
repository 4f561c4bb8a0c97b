"""Rankers as reward functions of TRL's online trainers."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from prefopt_trl import FunctionRanker, PairwiseRanker, RewardModelRanker
from prefopt_trl.rankers import Ranker
from prefopt_trl.rankers import base as rankers_base
from tests.unit.trainers.conftest import _fast_collection, with_large_weights  # noqa: F401


class Lengths(Ranker):
    """Writes down what it is asked for; the reward is the length, less that of the baseline, or of the first."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def compare(self, prompts, first, second):
        raise NotImplementedError

    def settings(self):
        return {}

    def score(self, prompts, completions, baselines=None):
        self.calls.append((prompts, completions, baselines))
        zeros = [row[0] for row in completions] if baselines is None else baselines
        return [np.array([len(text) - len(zeros[index]) for text in row]) for index, row in enumerate(completions)]


@pytest.mark.parametrize(
    ("prompts", "completions", "grouped", "rewards"),
    [
        # As GRPO and RLOO repeat a prompt, and as online DPO does
        (["p", "p", "q", "q"], ["a", "bbb", "cc", "d"], (["p", "q"], [["a", "bbb"], ["cc", "d"]]), [0, 2, 0, -1]),
        (["p", "q", "p", "q"], ["a", "cc", "bbb", "d"], (["p", "q"], [["a", "bbb"], ["cc", "d"]]), [0, 0, 2, -1]),
        # The last batch of a process may hold a part of a prompt's completions
        (["p", "p", "q"], ["a", "bbb", "cc"], (["p", "q"], [["a", "bbb"], ["cc"]]), [0, 2, 0]),
    ],
)
def test_a_ranker_is_given_each_prompt_once(prompts, completions, grouped, rewards):
    ranker = Lengths()
    function = ranker.as_reward_func()
    found = function(prompts=prompts, completions=completions, completion_ids=[[1]] * len(prompts), trainer_state=None)
    assert found == rewards and all(type(reward) is float for reward in found)
    assert ranker.calls == [(*grouped, None)]
    assert function.__name__ == "Lengths"


def test_a_column_has_the_baseline():
    ranker = Lengths()
    given = {"prompts": ["p", "p", "p"], "completions": ["a", "bb", "ccc"], "chosen": ["", "", "four"]}
    assert ranker.as_reward_func("chosen")(**given) == [1, 2, -1]
    assert ranker.calls == [(["p", "p"], [["a", "bb"], ["ccc"]], ["", "four"])]  # one row more of the same prompt


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="is 'chosen', .* was given completion_ids, answer. Name one"):
        Lengths().as_reward_func("chosen")(prompts=["p"], completions=["a"], completion_ids=[[1]], answer=["a"])


def test_what_the_ranker_returns_is_checked():
    ranker = Lengths()
    ranker.score = lambda *given: [np.array([1.0, math.nan])]
    with pytest.raises(ValueError, match="Lengths returned nan for completion 1 of prompt row 0"):
        ranker.as_reward_func()(prompts=["p", "p"], completions=["a", "b"])


def test_processes_do_not_each_choose_a_baseline(monkeypatch):
    monkeypatch.setattr(rankers_base, "process_state", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="A Lengths chooses a baseline .* `as_reward_func"):
        Lengths().as_reward_func()
    assert Lengths().as_reward_func("chosen")(prompts=["p"], completions=["abc"], chosen=["a"]) == [2]
    # Rewards of their own are the same on every process
    assert FunctionRanker(lambda prompts, completions: [7.0]).as_reward_func()(prompts=["p"], completions=["a"]) == [7]


# TRL's own trainers


def make_ranker(kind: str, model_dir: str) -> Ranker:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if kind == "reward model":
        model = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)
        return RewardModelRanker(with_large_weights(model), tokenizer)
    return PairwiseRanker(with_large_weights(AutoModelForCausalLM.from_pretrained(model_dir)), tokenizer)


TEXT = {"prompt": ["The sky is", "Why?"], "chosen": [" blue.", " Because."]}
MESSAGES = {
    "prompt": [[{"role": "user", "content": text}] for text in TEXT["prompt"]],
    "chosen": [[{"role": "assistant", "content": text}] for text in TEXT["chosen"]],
}
GENERATIONS = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 4}
TRAINERS = {
    "GRPO": (GRPOTrainer, GRPOConfig, GENERATIONS),
    "RLOO": (RLOOTrainer, RLOOConfig, GENERATIONS),
    "online DPO": (OnlineDPOTrainer, OnlineDPOConfig, {"per_device_train_batch_size": 2, "max_new_tokens": 4}),
}
SETTINGS = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1}


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("kind", ["reward model", "pairwise", "pairwise, baseline"])
@pytest.mark.parametrize("data", [TEXT, MESSAGES], ids=["text", "messages"])
def test_a_step_of_trl_is_rewarded_as_the_ranker_scores(name, kind, data, tiny_llama_dir, tmp_path):
    trainer_class, config_class, settings = TRAINERS[name]
    ranker = make_ranker(kind, tiny_llama_dir)
    baseline_column = "chosen" if "baseline" in kind else None
    function, calls = ranker.as_reward_func(baseline_column), []

    def record(prompts: list, completions: list, **columns: Any) -> list[float]:
        calls.append((prompts, completions, columns.get("chosen"), function(prompts, completions, **columns)))
        return calls[-1][-1]

    record.__name__ = function.__name__
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama_dir),
        args=config_class(str(tmp_path), **SETTINGS, **settings),
        train_dataset=Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama_dir),
        reward_funcs=record,
    )
    trainer.train()

    ((prompts, completions, chosen, rewards),) = calls
    num_rows = 4 if name == "online DPO" else 8
    assert len(rewards) == len(prompts) == num_rows and len({round(reward, 4) for reward in rewards}) > 2
    for prompt in data["prompt"]:
        rows = [row for row in range(num_rows) if prompts[row] == prompt]
        assert len(rows) == num_rows // 2
        candidates = [completions[row] for row in rows]
        if baseline_column is None:
            (expected,) = ranker.score([prompt], [candidates])
        else:  # RSO eq. 9
            baselines = [chosen[row] for row in rows]
            assert baselines == [data["chosen"][data["prompt"].index(prompt)]] * len(rows)
            probabilities = ranker.compare([prompt] * len(rows), candidates, baselines)
            expected = np.log(probabilities / (1 - probabilities))
        assert [rewards[row] for row in rows] == pytest.approx(expected.tolist(), abs=1e-4)
    if name != "online DPO":
        log = trainer.state.log_history[0]
        assert log[f"rewards/{type(ranker).__name__}/mean"] == pytest.approx(np.mean(rewards), abs=1e-4)


def test_each_row_has_its_own_columns():
    def correct(prompts, completions, solution):
        return [float(text == right) for text, right in zip(completions, solution, strict=True)]

    reward_func = FunctionRanker(correct).as_reward_func()
    tokens = {"completion_ids": [[1], [2], [3]], "trainer_state": object()}  # TRL's own
    assert reward_func(["p", "p", "p"], ["a", "b", "c"], solution=["a", "b", "b"], **tokens) == [1, 1, 0]
