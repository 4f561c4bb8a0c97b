import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from torch import nn

from prefopt_trl.sampling.weights import gathered


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list:
    """What a stand-in for DeepSpeed was asked to gather and to let go."""
    seen: list = []

    @contextmanager
    def gather(parameters):
        seen.append(list(parameters))
        yield
        seen.append("let go")

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gather)))
    return seen


def test_partitioned_weights_are_gathered_once_and_together(events: list) -> None:
    policy, ranker = nn.Linear(2, 2), nn.Linear(3, 1)
    for number, parameter in enumerate([*policy.parameters(), *ranker.parameters()]):
        parameter.ds_id = number  # as DeepSpeed marks what it has partitioned
    with gathered(policy, ranker):
        [parameters] = events
        assert [parameter.ds_id for parameter in parameters] == [0, 1, 2, 3]
    assert events[1:] == ["let go"]


def test_whole_weights_and_no_model_are_left_alone(events: list) -> None:
    whole, partitioned = nn.Linear(2, 2), nn.Linear(2, 2)
    with gathered(None, whole), gathered():
        assert events == []
    partitioned.weight.ds_id = 7
    with gathered(whole, partitioned, None):
        assert [parameter.ds_id for parameter in events[0]] == [7]
