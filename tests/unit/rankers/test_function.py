import asyncio
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch

from prefopt_trl.rankers import FunctionRanker

QUESTION = [{"role": "user", "content": "Why?"}]


def brevity(completions, **kwargs):
    return [-len(completion) for completion in completions]


def test_the_function_is_called_once_as_trl_does_with_the_prompt_repeated():
    calls = []

    def record(**kwargs):
        calls.append(kwargs)
        return range(3)

    rewards = FunctionRanker(record).score(["p", "q", "r"], [["a", "b"], [], ["c"]])
    assert calls == [{"prompts": ["p", "p", "r"], "completions": ["a", "b", "c"]}]
    assert [row.tolist() for row in rewards] == [[0.0, 1.0], [], [2.0]]


def test_completions_of_a_conversation_come_as_messages():
    seen = []

    def record(prompts, completions):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    answer = [{"role": "assistant", "content": "Because."}]
    FunctionRanker(record).score([QUESTION, "plain"], [["Because.", answer], ["text"]])
    assert seen == [(QUESTION, answer), (QUESTION, answer), ("plain", "text")]


@pytest.mark.parametrize(
    "rewards", [torch.tensor([1.5, 2.5], dtype=torch.bfloat16), np.array([1.5, 2.5], dtype=np.float32), (1.5, 2.5)]
)
def test_tensors_arrays_and_tuples_are_taken(rewards):
    ranker = FunctionRanker(lambda prompts, completions: rewards)
    assert ranker.score(["p"], [["a", "b"]])[0].tolist() == [1.5, 2.5]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_reward_that_is_no_number_names_the_row_and_the_completion(bad):
    ranker = FunctionRanker(lambda prompts, completions: [bad if text == "bad" else 1.0 for text in completions])
    with pytest.raises(ValueError, match=f"FunctionRanker returned {bad} for completion 2 of prompt row 1"):
        ranker.score(["p", "q"], [["a"], ["b", "c", "bad"]])


def test_none_is_no_opinion():
    ranker = FunctionRanker(lambda prompts, completions: [None if text == "?" else 1.0 for text in completions])
    assert np.array_equal(ranker.score(["p"], [["a", "?"]])[0], [1, np.nan], equal_nan=True)
    assert np.array_equal(ranker.compare(["p", "q"], ["a", "a"], ["a", "?"]), [0.5, np.nan], equal_nan=True)
    reward_func = ranker.as_reward_func()
    assert reward_func(["p", "p"], ["?", "a"]) == [None, 1.0]  # as TRL expects it


def test_columns_are_repeated_for_each_completion_as_trl_does():
    seen = []

    def correct(completions, solution, **others):
        seen.append(others)
        return [float(text == right) for text, right in zip(completions, solution, strict=True)]

    ranker, columns = FunctionRanker(correct), {"solution": ["4", "5"], "level": [1, 2]}
    assert [row.tolist() for row in ranker.score(["p", "q"], [["4", "5"], ["5"]], columns=columns)] == [[1, 0], [1]]
    assert seen == [{"prompts": ["p", "p", "q"], "level": [1, 1, 2]}]
    assert ranker.compare(["p", "q"], ["4", "4"], ["5", "4"], columns)[1] == 0.5
    assert ranker.as_reward_func()(["p", "q"], ["4", "4"], **columns, trainer_state=object()) == [1.0, 0.0]
    with pytest.raises(ValueError, match="needs the column `solution`, and the prompts' dataset has level"):
        ranker.score(["p"], [["4"]], columns={"level": [1]})


def test_a_function_gets_only_the_columns_that_it_names():
    def correct(prompts, completions, solution):
        return [float(text == right) for text, right in zip(completions, solution, strict=True)]

    assert FunctionRanker(correct).score(["p"], [["4"]], columns={"solution": ["4"], "level": [1]})[0].tolist() == [1]


async def judge(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [len(completion) for completion in completions]


def test_an_async_function_runs_beside_the_event_loop_of_a_notebook():
    async def notebook():
        return FunctionRanker(judge).score(["p"], [["a", "bc"]])

    assert (
        asyncio.run(notebook())[0].tolist() == FunctionRanker(partial(judge)).score(["p"], [["a", "bc"]])[0].tolist()
    )
    assert asyncio.run(notebook())[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        ([1.0], "1 rewards"),
        (None, "None"),
        ({0: 1.0, 1: 2.0}, "{0: 1"),
        ({1.0, 2.0}, "{1"),
        ("12", "'12'"),
        (1.0, "1.0"),
    ],
)
def test_a_wrong_number_of_rewards_is_refused(returned, found):
    with pytest.raises(ValueError, match=f"returned {re.escape(found)}.*, 2 rewards were expected. Return a list"):
        FunctionRanker(lambda prompts, completions: returned).score(["p"], [["a", "b"]])


def test_a_function_of_other_arguments_is_refused_at_once():
    with pytest.raises(TypeError, match="it takes responses. Name its arguments as TRL does"):
        FunctionRanker(lambda responses: [])


def test_settings_are_json_and_tell_functions_apart():
    def verbosity(completions, **kwargs):
        return [len(completion) for completion in completions]

    settings = FunctionRanker(brevity).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings == FunctionRanker(brevity).settings() != FunctionRanker(verbosity).settings()
    assert settings["function"].startswith("brevity:")


class Judge:
    """Holds what differs in every process."""

    def __init__(self, factor: float) -> None:
        self.factor, self.handle = factor, object()

    def __call__(self, prompts, completions):
        return [self.factor * len(completion) for completion in completions]


def test_a_version_is_all_that_is_known_of_the_function():
    settings = FunctionRanker(Judge(1.0), version="lengths, 1").settings()
    assert settings == FunctionRanker(Judge(-1.0), version="lengths, 1").settings()
    assert settings == FunctionRanker(brevity, version="lengths, 1").settings()
    assert settings == {"class": "FunctionRanker", "function": "lengths, 1", "temperature": 1.0}
    assert settings != FunctionRanker(Judge(1.0), version="lengths, 2").settings()
    assert FunctionRanker(Judge(1.0), version="").settings()["function"] == ""
    assert FunctionRanker(Judge(2.0), version="v").score(["p"], [["a", "bc"]])[0].tolist() == [2.0, 4.0]


def test_a_function_that_cannot_be_known_needs_a_version():
    function = partial(brevity, unused=(number for number in range(3)))  # which does not pickle
    with pytest.raises(ValueError, match="partial changes between runs"):
        FunctionRanker(function).settings()
    assert FunctionRanker(function, version="7").settings()["function"] == "7"
