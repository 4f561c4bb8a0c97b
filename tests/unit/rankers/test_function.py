import json
import math
from functools import partial

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


def test_tensors_are_numbers():
    ranker = FunctionRanker(lambda prompts, completions: torch.tensor([1.5, 2.5], dtype=torch.bfloat16))
    assert ranker.score(["p"], [["a", "b"]])[0].tolist() == [1.5, 2.5]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_a_missing_reward_names_the_row_and_the_completion(missing):
    ranker = FunctionRanker(lambda prompts, completions: [missing if text == "bad" else 1.0 for text in completions])
    with pytest.raises(ValueError, match="FunctionRanker returned nan for completion 2 of prompt row 1"):
        ranker.score(["p", "q"], [["a"], ["b", "c", "bad"]])


@pytest.mark.parametrize(("returned", "found"), [([1.0], "1 rewards"), (None, "None")])
def test_a_wrong_number_of_rewards_is_refused(returned, found):
    with pytest.raises(ValueError, match=f"FunctionRanker returned {found}, 2 rewards were expected. Return a list"):
        FunctionRanker(lambda prompts, completions: returned).score(["p"], [["a", "b"]])


async def judge(prompts, completions):
    return []


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, solution, **kwargs: [], r"missing a required argument: 'solution'.*functools\.partial"),
        (judge, "coroutine function. Wrap it in a plain one"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_at_once(function, message):
    with pytest.raises(TypeError, match=message):
        FunctionRanker(function)


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
    assert settings == {"class": "FunctionRanker", "function": "lengths, 1"}
    assert settings != FunctionRanker(Judge(1.0), version="lengths, 2").settings()
    assert FunctionRanker(Judge(1.0), version="").settings()["function"] == ""
    assert FunctionRanker(Judge(2.0), version="v").score(["p"], [["a", "bc"]])[0].tolist() == [2.0, 4.0]


def test_a_function_that_cannot_be_known_needs_a_version():
    function = partial(brevity, unused=(number for number in range(3)))  # which does not pickle
    with pytest.raises(ValueError, match="partial changes between runs"):
        FunctionRanker(function).settings()
    assert FunctionRanker(function, version="7").settings()["function"] == "7"
