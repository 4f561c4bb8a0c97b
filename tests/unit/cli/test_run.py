"""What ends a command: a line for what we refuse, a traceback for what nobody expected."""

import os
import signal
from pathlib import Path

import pytest

from prefopt_trl.cli import run
from prefopt_trl.cli.main import main
from prefopt_trl.data.loading import load_rows
from prefopt_trl.runtime.hub import PushError


@pytest.fixture
def failing(monkeypatch, training):
    """Run a command whose work is to call a function."""

    def run_with(work, *extra):
        monkeypatch.setattr("prefopt_trl.cli.train.run", lambda *parsed: work())
        run.main("rso", [*training, "--output_dir", "out", *extra])

    return run_with


def refuse():
    load_rows("pairs.jsonl", num_rows=0)


def push():
    raise PushError("out was not pushed")


def test_what_our_checks_refuse_is_one_line(failing, capsys):
    with pytest.raises(SystemExit) as stop:
        failing(refuse)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "prefopt-trl rso: error: `num_rows` must be at least 1, got 0. Leave it out for all rows."
    ]


def test_a_push_that_failed_is_told_apart(failing, capsys):
    with pytest.raises(SystemExit) as stop:
        failing(push)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "prefopt-trl rso: error: out was not pushed\n"


def test_one_process_speaks_for_all_that_fail_alike(failing, monkeypatch, capsys):
    waited = []
    monkeypatch.setenv("RANK", "1")
    # Meanwhile the launcher ends this process, if the main one has failed
    monkeypatch.setattr(run.time, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    with pytest.raises(SystemExit):
        failing(refuse)
    assert waited == [(run.SECONDS_FOR_OTHERS, "")]
    assert "`num_rows` must be at least 1" in capsys.readouterr().err


def test_a_command_without_a_launcher_ends_in_the_same_way(tiny, tiny_llama_dir, capsys):
    (arguments := list(tiny))[arguments.index("pairs.jsonl")] = "prompts.jsonl"
    with open("prompts.jsonl", "w") as file:
        file.write('{"prompt": "Why?"}\n')
    with pytest.raises(SystemExit) as stop:
        main(
            ["evaluate", *arguments, "--reference", tiny_llama_dir, "--ranker", tiny_llama_dir, "--output_dir", "out"]
        )
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        "prefopt-trl evaluate: error: prompts.jsonl must have at least 2 rows with columns `prompt`"
    )


def test_the_traceback_is_there_for_those_who_ask(failing):
    with pytest.raises(ValueError, match="`num_rows` must be at least 1"):
        failing(refuse, "--log_level", "debug")


@pytest.mark.parametrize(
    ("work", "error"), [(lambda: int("x"), ValueError), (lambda: Path("gone").read_text(), FileNotFoundError)]
)
def test_what_nobody_expected_keeps_its_traceback(work, error, failing):
    with pytest.raises(error):
        failing(work)


# Interrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("saved", [None, 20])
def test_an_interrupted_command_says_what_is_saved_in_one_line(number, code, saved, failing, capsys):
    def train():
        if saved:
            Path(f"out/checkpoint-{saved}").mkdir(parents=True)
            Path(f"out/checkpoint-{saved}/trainer_state.json").write_text("{}")
        os.kill(os.getpid(), number)

    with pytest.raises(SystemExit) as stop:
        failing(train)
    assert stop.value.code == code
    os.kill(os.getpid(), number)  # as torchrun does, after the terminal
    last = "Interrupted before the first checkpoint was saved in out. A lower `save_steps` saves sooner."
    if saved:
        last = "Interrupted: out/checkpoint-20 is saved. Resume from it with `resume_from_checkpoint=True` (of a "
        last += "command: `--resume_from_checkpoint`)."
    assert capsys.readouterr().err == f"prefopt-trl rso: {last}\n"


def test_what_is_interrupted_may_say_more_and_other_processes_say_nothing(failing, monkeypatch, capsys):
    def sample():
        raise KeyboardInterrupt("Interrupted: 3 of 4 shards are saved.")

    for rank, said in {"0": "prefopt-trl rso: Interrupted: 3 of 4 shards are saved.\n", "1": ""}.items():
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="130"):
            failing(sample)
        assert capsys.readouterr().err == said


def test_a_bug_of_our_own_keeps_its_traceback(failing, monkeypatch):
    monkeypatch.setattr("prefopt_trl.data.loading.check_columns", lambda *given: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        failing(lambda: load_rows("pairs.jsonl"))
