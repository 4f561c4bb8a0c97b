"""How a command ends: with one line for a user error, and with a traceback for everything else."""

import os
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest

from prefopt_trl.cli import run
from prefopt_trl.cli.main import main
from prefopt_trl.data.loading import load_rows
from prefopt_trl.runtime.hub import PushError
from prefopt_trl.runtime.processes import interruptible


@pytest.fixture
def failing(monkeypatch, training):
    """Run a command whose work is to call a function."""

    def run_with(work, *extra):
        monkeypatch.setattr("prefopt_trl.cli.train.run", lambda *parsed: work())
        run.main("rso", [*training, "--output_dir", "out", *extra])

    return run_with


def refuse():
    try:
        load_rows("pairs.jsonl", num_rows=0)
    except ValueError as error:
        error.add_note("A note says more.")
        raise


def push():
    raise PushError("out was not pushed")


@pytest.mark.parametrize(
    ("work", "code", "message"),
    [
        (refuse, 2, "`num_rows` must be at least 1, got 0. Leave it out for all rows. A note says more."),
        (push, 1, "out was not pushed"),
    ],
)
def test_user_errors_and_failed_pushes_are_one_line(work, code, message, failing, capsys):
    with pytest.raises(SystemExit, match=f"^{code}$"):
        failing(work)
    assert capsys.readouterr().err == f"prefopt-trl rso: error: {message}\n"


def test_one_process_speaks_for_all_that_fail_alike(failing, monkeypatch, capsys):
    waited = []
    monkeypatch.setenv("RANK", "1")
    # Meanwhile the launcher ends this process, if the main one has failed
    monkeypatch.setattr(run.time, "sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    with pytest.raises(SystemExit):
        failing(refuse)
    assert waited == [(run.SECONDS_FOR_OTHERS, "")]
    assert "`num_rows` must be at least 1" in capsys.readouterr().err


def test_a_command_without_a_launcher_ends_in_the_same_way(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(["evaluate-ranker", "--dataset_name", "none.jsonl", "--ranker", "r", "--output_dir", "out"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("prefopt-trl evaluate-ranker: error: There is no file none.jsonl")


def test_the_traceback_is_there_for_those_who_ask(failing):
    with pytest.raises(ValueError, match="`num_rows` must be at least 1"):
        failing(refuse, "--log_level", "debug")


def begin(error):
    with interruptible(lambda: "3 of 4 are saved"):
        raise error


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("a full disk"), ImportError("a package")])
def test_a_traceback_is_there_once_sampling_or_training_has_begun(error, failing):
    with pytest.raises(type(error)) as raised:
        failing(lambda: begin(error))
    assert raised.value.__notes__ == ["3 of 4 are saved"]


def raise_bug():
    raise RuntimeError("a bug")


def test_other_errors_keep_their_traceback(failing):
    with pytest.raises(RuntimeError):
        failing(raise_bug)


def test_an_error_of_a_function_that_ranks_keeps_its_traceback(training):
    Path("raising.py").write_text(
        "def reward(prompts, completions):\n    return [float(text) for text in completions]\n"
    )
    sampling = "--only_prompts --ranker raising.reward --num_candidates 4 --num_samples 2 --max_new_tokens 4"
    with pytest.raises(ValueError, match="could not convert string to float"):
        run.main("rso", [*training, *sampling.split(), "--output_dir", "out"])


def test_a_folder_of_another_dataset_is_refused_before_sampling_begins(tiny, function_ranker, capsys):
    sampling = "--num_candidates 4 --num_samples 2 --max_new_tokens 4 --output_dir out"
    words = [*tiny, *function_ranker, *sampling.split()]
    run.main("sample", words)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run.main("sample", [*words, "--seed", "1"])
    assert "prefopt-trl sample: error: out " in capsys.readouterr().err


# Interrupted


@pytest.mark.parametrize("said", ["Interrupted: 3 of 4 shards are saved.", ""])
def test_ctrl_c_is_one_line_of_the_main_process(said, failing, monkeypatch, capsys):
    def work():
        with interruptible(lambda: said) if said else nullcontext():
            os.kill(os.getpid(), signal.SIGINT)

    expected = f"prefopt-trl rso: {said or 'Interrupted before anything was saved.'}\n"
    for rank, printed in {"0": expected, "1": ""}.items():
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="130"):
            failing(work)
        os.kill(os.getpid(), signal.SIGINT)  # as torchrun does, after the terminal
        assert capsys.readouterr().err == printed


@pytest.mark.parametrize("name", ["sft", "rso"])
def test_an_interrupted_training_says_what_is_saved(name, training, monkeypatch, capsys):
    monkeypatch.setattr("transformers.Trainer.train", lambda *given, **named: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit, match="130"):
        run.main(name, [*training, "--output_dir", "out"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"prefopt-trl {name}: Interrupted before the first checkpoint was saved in out. A lower `save_steps` saves "
        "sooner."
    )
