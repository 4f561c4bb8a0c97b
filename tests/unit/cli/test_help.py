"""The first screen of `--help` shows options and defaults of the real parser, and prints within a second."""

import re
import subprocess
import sys
import time
from dataclasses import MISSING

import pytest

from prefopt_trl.cli.commands import COMMANDS
from prefopt_trl.cli.help import MODEL, TRAINING, first_screen, own_options
from prefopt_trl.cli.main import main
from prefopt_trl.cli.parsing import make_parser, parse


@pytest.mark.parametrize("name", COMMANDS)
def test_options_and_defaults_are_those_of_the_parser(name):
    actions = {}
    for action in make_parser(name)._actions:
        actions.setdefault(action.dest, action)  # the first is `--name`, a second one `--no_name`
    shown = re.findall(r"^  --(\w+) ", first_screen(name), flags=re.MULTILINE)
    own = {option: default for group in own_options(name).values() for option, (default, _) in group.items()}
    training = TRAINING if "weight_decay" in actions else {}  # of the trainers
    model = MODEL if COMMANDS[name].takes_model else {}
    assert shown == [*own, *model, *training] and set(shown) <= actions.keys()
    for option, default in own.items():
        assert default == (MISSING if actions[option].required else actions[option].default), option


def test_all_options_are_printed_by_the_parser(capsys):
    main(["pro", "--help", "all"])
    shown = capsys.readouterr().out
    assert all(f"--{action.dest}" in shown for action in make_parser("pro")._actions)


@pytest.mark.parametrize("arguments", [["--help"], ["rso", "--help"]])
def test_help_is_fast_and_imports_no_torch(arguments):
    code = (
        "import sys\nfrom prefopt_trl.cli.main import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'trl', 'numpy', 'yaml'} & set(sys.modules)"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1


def test_a_bool_is_set_and_unset_as_the_help_says():
    assert "set by its name, and unset by `--NAME False`." in " ".join(first_screen("rso").split())
    given = ["--dataset_name", "d", "--model_name_or_path", "m", "--output_dir", "o", "--use_cpu", "--bf16", "False"]
    for name in ("hub_private_repo", "share_prefix", "activation_offloading", "use_peft"):  # of four dataclasses
        for words, expected in [([f"--{name}"], True), ([f"--{name}", "False"], False)]:
            parts, _ = parse("rso", [*given, *words])
            assert [getattr(part, name) for part in parts if hasattr(part, name)] == [expected]


@pytest.mark.parametrize("arguments", [["slic", "--help"], ["slic", "--delta", "5", "-h"]])
def test_help_wins_over_other_arguments(arguments, capsys):
    main(arguments)
    assert capsys.readouterr().out.startswith("usage: prefopt-trl slic ")
