"""The command line: what it prints, and what it refuses."""

import sys

import pytest

from prefopt_trl import __version__
from prefopt_trl.cli.main import main


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    named = {line.split()[0] for line in printed.splitlines() if line.startswith("    ") and line[4] != " "}
    commands = "sft ranker reward-model sample rso slic pro listwise-dpo rrhf rounds "
    commands += "evaluate evaluate-ranker reproduce side-by-side quickstart env"
    assert named - {"command"} == set(commands.split())


def test_the_command_alone_asks_for_another(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prefopt-trl"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "the following arguments are required: command" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"prefopt-trl {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["quikstart"], "invalid choice: 'quikstart'"),
        (["quickstart", "--first_seed", "-1"], "`first_seed` must be"),
        (["quickstart", "--outptu_dir", "x"], "unknown argument 'outptu_dir'"),
        (["reproduce", "rso-table-9"], "`tables`: 'rso-table-9' is none of the kitchen world's: quickstart, rso-"),
        (["side-by-side"], "choose from"),
        (["side-by-side", "make", "--samples", "s", "--output_dir", "o", "--rater", "1"], "unknown argument 'rater'"),
        (["env", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_env_says_what_a_bug_report_needs(capsys):
    import torch
    import trl

    main(["env"])
    lines = capsys.readouterr().out.splitlines()
    assert f"- prefopt-trl: {__version__}" in lines
    assert f"- trl: {trl.__version__}" in lines
    assert ("- devices: no accelerator" in lines) == (not torch.accelerator.is_available())
    assert "- vllm: not installed" in lines or any(line.startswith("- vllm: ") for line in lines)


def test_rounds_need_a_method(capsys):
    for words in (["rounds"], ["rounds", "dpo"], ["rounds", "--num_rounds", "2"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2 and "rounds rso, rounds slic, rounds pro" in capsys.readouterr().err
