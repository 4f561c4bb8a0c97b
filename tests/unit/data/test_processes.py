"""A process that knows of no other, where others were started, would do their work over theirs."""

import os
from types import SimpleNamespace

import pytest

from prefopt_trl.data import processes


@pytest.mark.parametrize(("started", "known"), [(None, 1), ("1", 1), ("2", 2), ("16", 16)])
def test_processes_that_know_of_each_other(started, known, monkeypatch):
    state = SimpleNamespace(num_processes=known)
    monkeypatch.setattr(processes, "PartialState", lambda cpu: state)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if started is not None:
        monkeypatch.setenv("WORLD_SIZE", started)
    assert processes.process_state() is state


def test_a_process_that_knows_of_no_other_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"2 processes were started, and this one knows of no other.*cpu=True"):
        processes.process_state()


@pytest.mark.parametrize("before", ["true", None])
def test_models_are_loaded_whole_whatever_fsdp_asks_for(before, monkeypatch):
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # transformers leaves the weights of other processes empty where it is on
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with processes.whole_on_every_process():
        assert name not in os.environ
    assert os.environ.get(name) == before
