"""`prefopt-trl rounds`: a launch for each phase, and the same rounds as in one process."""

import json
import os

import pytest
import yaml

from prefopt_trl.cli import launch
from prefopt_trl.cli.main import main
from prefopt_trl.cli.parsing import parse
from prefopt_trl.cli.run import run


@pytest.fixture
def arguments(training, function_ranker):
    splits = ["--dataset_train_split", "train[:3]", "--dataset_test_split", "train[3:]"]
    sampling = "--num_candidates 4 --num_samples 2 --max_new_tokens 4 --num_rounds 1"
    return [*training, *splits, *sampling.split(), *function_ranker]


@pytest.mark.parametrize("method", ["rso", "pro"])
def test_each_phase_is_a_launch_of_its_own(method, arguments, tmp_path, monkeypatch, capsys):
    launched = []

    def in_process(given):
        launched.append(os.environ.get(launch.ONE_PHASE))
        run(given.training_script_args[0], *parse(given.training_script_args[0], given.training_script_args[1:]))

    monkeypatch.setattr(launch, "launch_command", in_process)
    monkeypatch.setenv(launch.ONE_PHASE, "")  # so that it is removed again
    main(["rounds", method, *arguments, "--output_dir", "launched"])
    assert launched == ["1"] * 4  # judge, sample, train, judge
    assert capsys.readouterr().out.count("The best by reward is") == 1
    monkeypatch.delenv(launch.ONE_PHASE)
    run(f"rounds {method}", *parse(f"rounds {method}", [*arguments, "--output_dir", "at once"]))
    for file in ("round-1/evaluation/samples.jsonl", "round-1/sampled/statistics.json"):
        assert (tmp_path / "launched" / file).read_bytes() == (tmp_path / "at once" / file).read_bytes()
    assert yaml.safe_load((tmp_path / "launched/config.yaml").read_text())["num_rounds"] == 1
    judged = json.loads((tmp_path / "at once/round-1/record.json").read_text())["phases"]["judge"]["judges"]
    assert list(judged) == ["own_reward.brevity"]


@pytest.mark.parametrize(
    "given, message",
    [
        (["--dataset_test_split", "test"], "has no splits, so evaluation would be on the training data"),
        (["--judges", "nowhere.yaml"], "`judges`='nowhere.yaml'"),
        (["--lora_r", "4"], "`lora_r` has no effect without `use_peft`"),
    ],
)
def test_bad_arguments(given, message, arguments):
    with pytest.raises(ValueError, match=message):
        run("rounds rso", *parse("rounds rso", [*arguments, "--output_dir", "out", *given]))
