"""A process that knows of no other, where others were started, would do their work over theirs; and how a run ends."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from prefopt_trl.runtime import processes


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


def test_ctrl_c_says_what_is_saved_once():
    outer, inner = (processes.interruptible(lambda name=name: name) for name in ("the outer", "the inner"))
    with pytest.raises(KeyboardInterrupt, match="^the inner$"), outer, inner:
        raise KeyboardInterrupt
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_error_has_what_is_saved_as_its_note():
    with pytest.raises(ValueError, match="a bug") as raised, processes.interruptible(lambda: "3 of 4 are saved"):
        raise ValueError("a bug")
    assert raised.value.__notes__ == ["3 of 4 are saved"]


@pytest.mark.parametrize(("rank", "said"), [("0", "3 of 4 are saved\n"), ("1", "")])
def test_sigterm_says_it_and_ends_the_process_as_before(rank, said):
    code = f"""
import os
os.environ["RANK"] = "{rank}"
from prefopt_trl.runtime.processes import interruptible
with interruptible(lambda: "3 of 4 are saved"):
    os.kill(os.getpid(), 15)
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (
        ended.returncode == -signal.SIGTERM and ended.stderr.endswith(said) and ("saved" in ended.stderr) == bool(said)
    )


def test_a_forked_child_such_as_one_of_a_pool_says_nothing():
    code = """
import os, signal
from prefopt_trl.runtime.processes import interruptible
with interruptible(lambda: "3 of 4 are saved"):
    if (child := os.fork()) == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0 and "saved" not in ended.stderr


def test_a_checkpoint_of_an_earlier_run_is_not_what_is_trained(tmp_path):
    state = tmp_path / "checkpoint-500" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text("{}")
    assert "checkpoint-500 is saved" in processes.what_is_trained(tmp_path)
    assert "before the first checkpoint" in processes.what_is_trained(tmp_path, before=["checkpoint-500"])


def test_a_handler_of_the_callers_is_left_in_place():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with processes.interruptible(lambda: "unused"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
