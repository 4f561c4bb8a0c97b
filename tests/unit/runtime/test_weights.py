import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from prefopt_trl import FunctionRanker
from prefopt_trl.rankers import PointwiseRanker
from prefopt_trl.runtime.processes import gathered
from prefopt_trl.shared_prefix.support import partition_reason
from prefopt_trl.trainers.prepare import TrainingData


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


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("trained_before", [False, True])
def test_weights_sharded_by_fsdp2_are_whole_within_and_sharded_again_after(
    trained_before: bool, tiny_llama_dir: str, one_process: None
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    ids = torch.tensor([[1, 7, 9, 30]])
    expected = model(ids, labels=ids)
    expected.loss.backward()
    gradient = model.model.layers[1].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    if trained_before:
        model(ids, labels=ids).loss.backward()
        model.zero_grad()
    weight = model.model.layers[1].mlp.up_proj
    assert partition_reason(model) == "its weights are sharded by FSDP"

    with gathered(model), torch.no_grad():
        assert partition_reason(model) is None
        hidden = model.model(ids).last_hidden_state  # of a part: FSDP wants the whole to run first
        for _ in range(2):  # after a forward pass, too, they are there
            torch.testing.assert_close(model(ids).logits, expected.logits)
        torch.testing.assert_close(model.lm_head(hidden), expected.logits)
        assert not isinstance(weight.weight, DTensor)

    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    outputs = model(ids, labels=ids)
    torch.testing.assert_close(outputs.logits, expected.logits)
    outputs.loss.backward()
    torch.testing.assert_close(weight.weight.grad.full_tensor(), gradient)


def test_only_hooks_of_engines_are_off_within(events: list) -> None:
    model, called = nn.Linear(2, 2), []
    model.weight.ds_id = 0

    def of_an_engine(*args):
        called.append("engine")

    def of_another(*args):
        called.append("another")

    of_an_engine.__module__ = "deepspeed.runtime.zero.parameter_offload"
    for hook in (of_an_engine, of_another):
        model.register_forward_pre_hook(hook)
        model.register_forward_hook(hook)
    with gathered(model):
        model(torch.zeros(1, 2))
        assert called == ["another", "another"]
    model(torch.zeros(1, 2))
    assert called[2:] == ["engine", "another", "engine", "another"]


class OwnRanker(PointwiseRanker):
    """A ranker of the user's own, with a model that ZeRO-3 has partitioned."""

    def __init__(self, events: list) -> None:
        self.model, self.events = nn.Linear(1, 1), events
        self.model.weight.ds_id = 7

    def rewards(self, prompts, completions):
        self.gathered = [parameter.ds_id for parameter in self.events[-1]]
        return [[0.0 for _ in row] for row in completions]

    def settings(self):
        return {"gathered": [parameter.ds_id for parameter in self.events[-1]]}


def test_the_model_of_a_users_own_ranker_is_gathered(events: list) -> None:
    ranker = OwnRanker(events)
    assert ranker.as_reward_func()(prompts=["Hi"], completions=[" you"]) == [0.0]
    assert ranker.gathered == [7] and events[-1] == "let go"
    given = Dataset.from_dict({"prompt": ["Hi"], "completions": [[" you", " there"]]})
    assert TrainingData.of(given, ranker).ranker == {"gathered": [7]}
    assert FunctionRanker(lambda prompts, completions: [0.0 for _ in completions]).model is None
