import math
import re

import numpy as np
import pytest

from prefopt_trl import EnsembleRanker
from prefopt_trl.rankers import PairwiseRanker
from prefopt_trl.rankers.base import PointwiseRanker, check_probabilities, check_rewards, logit, sigmoid

PROMPTS = ["first", "second"]
COMPLETIONS = [["a", "b", "c"], ["d"]]


class TableRanker(PointwiseRanker):
    """Rewards from a table."""

    def __init__(self, table):
        self.table = table

    def rewards(self, prompts, completions):
        rows = zip(prompts, completions, strict=True)
        return [[self.table[prompt, completion] for completion in row] for prompt, row in rows]

    def settings(self):
        return {}


def test_good_values_come_back_in_float64():
    rewards = check_rewards([(1, 2, 3), np.array([4], dtype=np.float32)], PROMPTS, COMPLETIONS, "Mine")
    assert [row.tolist() for row in rewards] == [[1.0, 2.0, 3.0], [4.0]]
    assert [row.tolist() for row in check_rewards([[], [1]], PROMPTS, [[], ["d"]], "Mine")] == [[], [1.0]]
    probabilities = check_probabilities([0, np.float32(0.5)], PROMPTS, "Mine")
    assert probabilities.tolist() == [0.0, 0.5]
    assert {values.dtype for values in (*rewards, probabilities)} == {np.dtype(np.float64)}


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([[1, 2, 3]], r"Mine returned rewards for 1 prompts, 2 were expected\. Return one array per prompt"),
        (
            [[1, 2, 3], [4, 5]],
            r"Mine returned 2 rewards for prompt row 1, 1 were expected\. Return one per completion",
        ),
        ([[1, math.nan, 3], [4]], r"Mine returned nan for completion 1 of prompt row 0, .*or drop the row"),
        ([[1, 2, 3], [None]], r"Mine returned nan for completion 0 of prompt row 1"),
        ([[1, 2, -math.inf], [4]], r"Mine returned -inf for completion 2 of prompt row 0"),
        ([[1, 2, "good"], [4]], r"Mine, prompt row 0: a sequence of numbers was expected, \[1, 2, 'good'\]"),
        ([[1, 2, 3], 4], r"Mine, prompt row 1: a sequence of numbers was expected, 4 was returned"),
    ],
)
def test_bad_rewards_name_the_row_and_the_remedy(rewards, message):
    with pytest.raises(ValueError, match=message):
        check_rewards(rewards, PROMPTS, COMPLETIONS, "Mine")


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ([0.5], r"Mine returned 1 probabilities, 2 were expected\. Return one per prompt"),
        ([0.5, math.nan], r"Mine returned nan for prompt row 1, a probability in \[0, 1\] was expected.*drop the row"),
        ([1.5, 0.5], r"Mine returned 1\.5 for prompt row 0"),
        ([0.5, -0.1], r"Mine returned -0\.1 for prompt row 1"),
        (None, r"Mine: a sequence of numbers was expected, None was returned"),
    ],
)
def test_bad_probabilities_name_the_row_and_the_remedy(probabilities, message):
    with pytest.raises(ValueError, match=message):
        check_probabilities(probabilities, PROMPTS, "Mine")


def test_sigmoid_and_logit_at_known_points_and_in_both_tails():
    assert logit(np.array([0.5, 0.75, 0.2])) == pytest.approx([0.0, math.log(3), -math.log(4)], abs=1e-15)
    with np.errstate(over="raise", invalid="raise"):
        found = sigmoid(np.array([0.0, math.log(3), -1000.0, -40.0, 1000.0]))
    assert found == pytest.approx([0.5, 0.75, 0.0, math.exp(-40), 1.0], rel=1e-12)


def test_pointwise_rewards_compare_by_bradley_terry():
    ranker = TableRanker({("p", "a"): 1.0, ("p", "b"): 1.0 - math.log(3), ("q", "a"): 0.0, ("q", "b"): 2.0})
    forth = ranker.compare(["p", "q", "q"], ["a", "a", "b"], ["b", "b", "b"])
    back = ranker.compare(["p", "q", "q"], ["b", "b", "b"], ["a", "a", "b"])
    assert forth == pytest.approx([0.75, 1 / (1 + math.e**2), 0.5], abs=1e-15)
    assert forth + back == pytest.approx([1, 1, 1], abs=1e-15)


def test_pointwise_scores_are_rewards_or_their_difference_from_the_baseline():
    ranker = TableRanker({("p", "a"): 1.0, ("p", "b"): 3.5, ("q", "a"): -2.0})
    rewards = ranker.score(["p", "q"], [["a", "b"], ["a"]])
    assert [row.tolist() for row in rewards] == [[1.0, 3.5], [-2.0]]
    relative = ranker.score(["p", "q"], [["a", "b"], ["a"]], baselines=["b", "a"])
    assert [row.tolist() for row in relative] == [[-2.5, 0.0], [0.0]]
    # RSO eq. 9: the score against a baseline is the logit of the preference over it
    assert relative[0][0] == pytest.approx(float(logit(ranker.compare(["p"], ["a"], ["b"]))[0]), abs=1e-12)


def test_a_subclass_that_returns_nonsense_is_refused():
    class Broken(TableRanker):
        def rewards(self, prompts, completions):
            return [[0.0] for _ in prompts]

    with pytest.raises(ValueError, match="Broken returned 1 rewards for prompt row 0, 2 were expected"):
        Broken({}).compare(["p"], ["a"], ["b"])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda ranker: ranker.compare(["p", "q"], ["a"], ["b", "b"]), "first"),
        (lambda ranker: ranker.compare(["p", "q"], ["a", "a"], ["b"]), "second"),
        (lambda ranker: ranker.score(["p", "q"], [["a"]]), "completions"),
        (lambda ranker: ranker.score(["p", "q"], [["a"], ["a"]], baselines=["a"]), "baselines"),
    ],
)
def test_an_argument_of_another_length_is_named(call, name):
    ranker = TableRanker({(prompt, completion): 0.0 for prompt in "pq" for completion in "ab"})
    with pytest.raises(ValueError, match=f"`{name}` has 1 entries for 2 prompts. Give one per prompt."):
        call(ranker)


ASKED, REPLY = [{"role": "user", "content": "p"}], [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("kind", ["pointwise", "pairwise", "ensemble"])
@pytest.mark.parametrize(
    ("method", "given", "name", "found"),
    [
        ("score", (["p", "q"], ["yes", "no"]), "completions[0]", "text"),
        ("score", (["p", "q"], "ab"), "completions", "text"),
        ("score", (["p", "q"], [["a"], ["b"]], "ab"), "baselines", "text"),
        ("score", ([ASKED], [REPLY]), "completions[0]", "list of messages"),
        ("score", (ASKED, [[REPLY]]), "prompts", "list of messages"),
        ("compare", ("What?", "yes", "no!"), "prompts", "text"),
        ("compare", (["p", "q", "r"], "yes", "no!"), "first", "text"),
        ("compare", ([ASKED], [REPLY], REPLY), "second", "list of messages"),
        ("reward", ("pq", "ab"), "prompts", "text"),
        ("reward", (["p", "q"], "ab"), "completions", "text"),
    ],
)
def test_a_single_text_or_conversation_is_no_list_of_them(kind, method, given, name, found, tiny_llama_dir):
    ranker = TableRanker({}) if kind != "pairwise" else PairwiseRanker(tiny_llama_dir)
    ranker = EnsembleRanker([ranker, ranker]) if kind == "ensemble" else ranker
    call = ranker.as_reward_func() if method == "reward" else getattr(ranker, method)
    with pytest.raises(TypeError, match=re.escape(f"`{name}` is a single {found}. Give a list ")):
        call(*given)


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (["p", None], [["a"], ["a"]], "Prompt row 1 is NoneType; give it as text"),
        ([[]], [["a"]], "Prompt row 0 is an empty list; give it as text"),
        (["p", "q"], [["a"], ["b", None]], "Completion 1 of prompt row 1 in `completions` is NoneType"),
        (["p"], [[REPLY]], "Completion 0 of prompt row 0 in `completions` is a list of messages, and its prompt text"),
    ],
)
def test_a_row_that_is_neither_text_nor_messages_is_named(prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        TableRanker({}).score(prompts, completions)
