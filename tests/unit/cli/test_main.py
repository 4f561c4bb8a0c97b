"""The command line: what it prints, and what it refuses."""

import subprocess
import sys

import pytest

from prefopt_trl import __version__
from prefopt_trl.cli.main import main


def test_help_names_the_commands_and_does_not_import_torch():
    code = (
        "import sys\nfrom prefopt_trl.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "quickstart" in printed


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"prefopt-trl {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["quikstart"], "invalid choice: 'quikstart'"),
        (["quickstart", "--seed", "-1"], "--seed: must be at least 0, got -1"),
        (["quickstart", "--outptu_dir", "x"], "unrecognized arguments: --outptu_dir x"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
