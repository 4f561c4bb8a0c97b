"""`--help` is made of source files: it must say what the imported dataclasses and TRL's parser have."""

import dataclasses
import subprocess
import sys
import time

import pytest
from trl import TrlParser

from prefopt_trl.cli.commands import COMMANDS
from prefopt_trl.cli.help import REQUIRED, command_help, fields
from prefopt_trl.cli.main import main
from prefopt_trl.cli.parsing import parse


@pytest.mark.parametrize("name", COMMANDS)
def test_fields_are_those_of_the_parser_that_runs(name):
    command = COMMANDS[name]
    read = {field: value for path in command.takes for field, value in fields(path).items()}
    real = {field.name: field for part in command.dataclasses() for field in dataclasses.fields(part)}
    actions = {}
    for action in TrlParser(command.dataclasses())._actions:
        if action.dest != "help":
            actions.setdefault(action.dest, action)  # the first is `--name`, a second one `--no_name`
    assert read.keys() == actions.keys()
    for field, value in read.items():
        action = actions[field]
        assert value.metadata.get("help") == action.help, field
        assert (value.default is REQUIRED) == action.required, field
        if not action.required:
            made = real[field].default_factory
            default = real[field].default if made is dataclasses.MISSING else made()
            assert getattr(default, "value", default) == value.default, field
        assert list(value.metadata.get("choices", [])) == list(action.choices or []), field


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_is_shown_with_its_default_and_help(name):
    shown = command_help(name)
    words = " ".join(shown.split())  # however the lines are broken
    for path in COMMANDS[name].takes:
        for field, value in fields(path).items():
            assert f"\n  --{field} {value.type} (" in shown
            assert " ".join(value.metadata["help"].replace("%%", "%").split()) in words
    assert "%%" not in shown


def test_fields_are_grouped_by_what_they_are_about():
    shown = command_help("pro")
    titles = ["\ndata:", "\nranker:", "\nmodel, adapter", "\nshared prompts and sampling:", "\nthe method:"]
    places = [shown.index(title) for title in [*titles, "\ntraining (trl.DPOConfig):"]]
    assert places == sorted(places)
    sampling, method, training = places[3:]
    for field in ("temperature", "num_samples", "pairing"):
        assert sampling < shown.index(f"\n  --{field} ") < method
    for field in ("reward_temperature", "sft_weight"):
        assert method < shown.index(f"\n  --{field} ") < training
    assert shown.index("\n  --loss_type ") > training  # TRL's


def test_help_is_fast_and_imports_no_torch():
    code = (
        "import sys\nfrom prefopt_trl.cli.main import main\nmain(['rso', '--help'])\n"
        "assert not {'torch', 'transformers', 'trl', 'numpy', 'yaml'} & set(sys.modules)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert time.perf_counter() - started < 2
    assert "--rejection_beta float (default: 0.5)" in done.stdout


def test_a_bool_is_set_and_unset_as_the_help_says():
    assert "set by its name, and unset by `--NAME False`." in " ".join(command_help("rso").split())
    given = ["--dataset_name", "d", "--model_name_or_path", "m", "--output_dir", "o", "--use_cpu", "--bf16", "False"]
    for name in ("hub_private_repo", "share_prefix", "activation_offloading", "use_peft"):  # of four dataclasses
        for words, expected in [([f"--{name}"], True), ([f"--{name}", "False"], False)]:
            parts, _ = parse("rso", [*given, *words])
            assert [getattr(part, name) for part in parts if hasattr(part, name)] == [expected]


@pytest.mark.parametrize("arguments", [["slic", "--help"], ["slic", "--delta", "5", "-h"]])
def test_help_wins_over_other_arguments(arguments, capsys):
    main(arguments)
    assert capsys.readouterr().out.startswith("usage: prefopt-trl slic ")
