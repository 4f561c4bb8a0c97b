"""The ensemble's rewards by hand: three members, their weights, votes and disagreement."""

import math

import numpy as np
import pytest
import torch

from prefopt_trl import EnsembleRanker, FunctionRanker
from prefopt_trl.rankers import ensemble
from prefopt_trl.rankers.base import PointwiseRanker
from prefopt_trl.rankers.comparative import ComparativeRanker

REWARDS = {"a": (1.0, 4.0, -2.0), "b": (0.0, 2.0, 4.0), "c": (-1.0, None, 1.0)}


def members(num: int = 3) -> list[FunctionRanker]:
    def of(member):
        return lambda prompts, completions: [REWARDS[text][member] for text in completions]

    return [FunctionRanker(of(member), version=str(member)) for member in range(num)]


@pytest.mark.parametrize(
    ("combine", "weights", "of_a", "of_b"),
    [
        ("mean", None, 1.0, 2.0),
        ("mean", [1, 2, 1], 7 / 4, 2.0),
        ("min", None, -2.0, 0.0),
        ("mean-std", None, 1 - math.sqrt(6), 2 - math.sqrt(8 / 3)),  # standard deviations of the population
    ],
)
def test_rewards_by_hand(combine, weights, of_a, of_b):
    ranker = EnsembleRanker(members(), combine, weights)
    assert ranker.score(["p"], [["a", "b"]])[0] == pytest.approx([of_a, of_b])
    assert ranker.score(["p"], [["a", "b"]], baselines=["b"])[0][1] == pytest.approx(0)
    assert ranker.compare(["p", "p"], ["a", "b"], ["b", "a"]) == pytest.approx(
        [1 / (1 + math.exp(of_b - of_a)), 1 / (1 + math.exp(of_a - of_b))]
    )


def test_the_disagreement_is_the_standard_deviation_over_members():
    _, columns = EnsembleRanker(members(), weights=[1, 2, 1]).score_with_columns(["p"], [["a", "b"]])
    of_a = math.sqrt((0.75**2 + 2 * 2.25**2 + 3.75**2) / 4)
    assert columns["disagreement"][0] == pytest.approx([of_a, math.sqrt(2)])


def test_a_member_is_left_out_of_a_prompt_and_a_completion_of_the_others():
    ranker = EnsembleRanker(members())
    assert ranker.score(["p"], [["c"]])[0] == pytest.approx([0.0])  # the second member is silent
    # It has an opinion on a alone, and its scale is not that of the others: c leaves
    rewards, columns = ranker.score_with_columns(["p"], [["a", "c"]])
    assert rewards[0] == pytest.approx([1, np.nan], nan_ok=True)
    assert np.isnan(columns["disagreement"][0]).tolist() == [False, True]
    assert np.isnan(ranker.compare(["p"], ["a"], ["c"])).all()
    only = EnsembleRanker([members()[1], members()[1]])
    assert np.isnan(only.score(["p"], [["a", "c"]])[0]).tolist() == [False, True]
    assert np.isnan(only.compare(["p"], ["a"], ["c"])).all()


def test_votes_by_hand():
    ranker = EnsembleRanker(members(), "vote")
    assert ranker.compare(["p"] * 2, ["a", "a"], ["b", "a"]) == pytest.approx([2.5 / 4, 1 / 2])
    assert ranker.score(["p"], [["b"]], baselines=["c"])[0] == pytest.approx([math.log(2.5 / 0.5)])  # of two votes
    two = EnsembleRanker([members()[0], members()[2]], "vote")
    # a wins one vote against b and one against c, b one and two, c one and none
    shares = np.array([1 / 2, 3 / 4, 1 / 4])
    expected = np.log((2 * shares + 0.5) / (2 * (1 - shares) + 0.5))
    assert two.score(["p"], [["a", "b", "c"]])[0] == pytest.approx(expected)
    weighted = EnsembleRanker(members(), "vote", [2, 1, 1])
    assert weighted.compare(["p"], ["a"], ["b"]) == pytest.approx([(3 * 3 / 4 + 0.5) / 4])


@pytest.mark.parametrize("combine", ["mean", "vote"])
def test_the_temperature_divides_rewards_and_log_odds_alike(combine):
    ranker = EnsembleRanker(members(), combine)
    ranker.temperature = 2.0
    reward = ranker.score(["p"], [["a"]], baselines=["b"])[0]
    assert ranker.compare(["p"], ["a"], ["b"]) == pytest.approx(1 / (1 + np.exp(-reward)))
    ranker.temperature = 1.0
    assert ranker.score(["p"], [["a"]], baselines=["b"])[0] == pytest.approx(2 * reward)


class Table(ComparativeRanker):
    """Prefers by fixed log-odds between two texts."""

    def both_orders(self, prompts, first, second, rows=None):
        odds = [REWARDS[one][0] - REWARDS[two][0] for one, two in zip(first, second, strict=True)]
        return np.repeat(1 / (1 + np.exp(-np.array(odds)))[:, None], 2, axis=1)

    def settings(self):
        return {"class": "Table"}


def test_a_baseline_that_a_member_draws_does_not_matter():
    ranker = EnsembleRanker([Table(), members()[2]], "min")
    # Centered: 0.5 and -0.5 by the first, -3 and 3 by the second
    assert ranker.draws_baselines
    assert ranker.score(["p"], [["a", "b"]])[0] == pytest.approx([-3, -0.5])
    assert ranker.score(["p"], [["a", "b"]], baselines=["b"])[0] == pytest.approx([-6, 0])
    assert EnsembleRanker([Table(), Table()]).compare(["p"], ["a"], ["b"]) == pytest.approx([1 / (1 + math.exp(-1))])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rankers": members(1)}, ValueError, "`rankers` has 1 members. Give at least two"),
        ({"rankers": members(), "combine": "max"}, ValueError, "`combine` is 'max'. Give one of 'mean', 'min'"),
        ({"rankers": members(), "weights": [1, 1]}, ValueError, "`weights` is .* each of 3 members"),
        ({"rankers": members(), "weights": [0, 0, 0]}, ValueError, "`weights` is"),
        ({"rankers": members(), "weights": [1, math.nan, 1]}, ValueError, "`weights` is"),
        ({"rankers": members(), "k": -1}, ValueError, "`k` is -1"),
        ({"rankers": ["path/a", "path/b"]}, TypeError, "`ranker` is a str, not a ranker"),
    ],
)
def test_a_wrong_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        EnsembleRanker(**arguments)


def test_settings_are_those_of_the_members_and_of_their_combination():
    settings = EnsembleRanker(members(), "mean-std", k=2).settings()
    assert settings["rankers"] == [member.settings() for member in members()]
    assert settings != EnsembleRanker(members(), "mean-std", k=1).settings()


class Held(PointwiseRanker):
    def __init__(self, moves):
        self.model = torch.nn.Linear(1, 1)
        self.model.to = lambda device: moves.append((self.model, str(device)))
        self.moves = moves

    def rewards(self, prompts, completions):
        self.moves.append((self.model, "runs"))
        return [[0.0] * len(row) for row in completions]

    def settings(self):
        return {}


def test_members_take_turns_on_an_accelerator(monkeypatch):
    moves = []
    device = type("State", (), {"device": torch.device("cuda")})
    monkeypatch.setattr(ensemble, "process_state", lambda: device)
    ranker = EnsembleRanker([lambda: Held(moves), lambda: Held(moves)])
    one, two = (member.model for member in ranker.rankers)
    assert moves == [(one, "cuda"), (one, "cpu"), (two, "cuda"), (two, "cpu")]
    assert set(ranker.model.parameters()) == {*one.parameters(), *two.parameters()}  # gathered together
    moves.clear()
    ranker.score(["p"], [["a"]])
    assert moves == [(one, "cuda"), (one, "runs"), (one, "cpu"), (two, "cuda"), (two, "runs"), (two, "cpu")]
