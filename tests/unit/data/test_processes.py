"""A process that knows of no other, where others were started, would do their work over theirs."""

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
