"""Arguments: the command line over the file over the defaults, launch options apart, and nothing unknown."""

import math
import os

import pytest

from prefopt_trl import RSOConfig
from prefopt_trl.cli import run
from prefopt_trl.cli.parsing import parse, read

BASE = ["--dataset_name=pairs.jsonl", "--model_name_or_path=m", "--output_dir=out", "--use_cpu", "--bf16=no"]


def write(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    return ["--config", "config.yaml"]


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    write(tmp_path, "gamma: 0.2\nnum_samples: 4\nlearning_rate: 5e-6\nonly_prompts: true\nranker: r\n")
    (own, args, model), launching = parse("rso", [*BASE, "--config=config.yaml", "--num_samples", "6"])
    assert (own.dataset_name, model.model_name_or_path) == ("pairs.jsonl", "m")
    assert (own.only_prompts, own.ranker) == (True, "r")
    assert isinstance(args, RSOConfig)
    assert (args.gamma, args.num_samples, args.learning_rate, args.pairing) == (0.2, 6, 5e-6, "first-round")
    assert launching == {}


def test_launch_options_of_file_and_command_line_are_kept_apart(tmp_path):
    text = "accelerate_config: zero3\nnum_processes: 8\nmulti_gpu: true\nuse_fsdp: false\n"
    file = write(tmp_path, text)
    _, launching = parse("rso", [*BASE, *file, "--num_processes", "2", "--accelerate_config=ddp"])
    assert launching == {"accelerate_config": "ddp", "num_processes": "2", "multi_gpu": True, "use_fsdp": False}


@pytest.mark.parametrize("read", [parse, read])
def test_environment_variables_of_the_file_are_set(read, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_OF_A_TEST", "before")
    read("rso", [*BASE, *write(tmp_path, "env:\n  PREFOPT_OF_A_TEST: after\n")])
    assert os.environ["PREFOPT_OF_A_TEST"] == "after"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate", "1"], "unknown argument 'lerning_rate'. Did you mean 'learning_rate'?"),
        (["--learning", "1"], "unknown argument 'learning'"),  # no abbreviations: another option may come
        (["--no_activation_offloading"], "Did you mean 'activation_offloading'?"),
        (["--num_procesess", "2"], "unknown argument 'num_procesess'. Did you mean 'num_processes'?"),
        (["extra"], "unexpected argument 'extra'"),
        (["--gamma", "-1"], "`gamma` (or `beta`) must be greater than 0 and finite, got -1.0"),
        (["--gamma", "much"], "argument --gamma: invalid float value: 'much'"),
        (["--strategy", "best"], "invalid choice: 'best'"),
        (["--only_prompts"], "`only_prompts` needs a `ranker`"),
        (["--num_judged", "9"], "`num_judged` has no effect without `judge`"),
        (["--against", "chosen"], "`against` has no effect without `judge`"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given twice. Give one file"),
        (["--config", "missing.yaml"], "--config missing.yaml is not a readable YAML file: [Errno 2]"),
    ],
)
def test_bad_arguments_end_with_one_line_and_exit_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        run.main("rso", [*BASE, *arguments])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("prefopt-trl rso: error: ")
    assert message in last


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None),
        (["--resume_from_checkpoint"], True),
        (["--resume_from_checkpoint", "--gamma", "0.1"], True),
        (["--resume_from_checkpoint", "true"], True),
        (["--resume_from_checkpoint", "True"], True),
        (["--resume_from_checkpoint", "False"], False),
        (["--resume_from_checkpoint", "out/checkpoint-4"], "out/checkpoint-4"),
    ],
)
def test_a_run_resumes_from_the_latest_checkpoint_or_a_given_one(words, expected):
    (_, args, _), _ = parse("rso", [*BASE, *words])
    assert args.resume_from_checkpoint == expected


@pytest.mark.parametrize("text", ["true", "'true'"])
def test_the_latest_checkpoint_in_a_file(text, tmp_path):
    (_, args, _), _ = parse("rso", [*BASE, *write(tmp_path, f"resume_from_checkpoint: {text}\n")])
    assert args.resume_from_checkpoint is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1\n", "unknown argument 'lerning_rate'. Did you mean 'learning_rate'?"),
        ("- gamma\n- 1\n", "config.yaml must hold a YAML mapping"),
        ("", "config.yaml must hold a YAML mapping"),
        ("gamma: [1\n", "--config config.yaml is not a readable YAML file: while parsing"),
        ("gamma: -1.0\n", "`gamma` (or `beta`) must be greater than 0"),
        ("num_samples: eight\n", "argument --num_samples/--num-samples: invalid int value: 'eight'"),
        ("num_rows: 3.0\n", "argument --num_rows/--num-rows: invalid int value: '3.0'"),
        ("pairing: none at all\n", "invalid choice: 'none at all' (choose from 'first-round',"),
        ("dtype: fp16\n", "invalid choice: 'fp16' (choose from 'auto', 'bfloat16', 'float16', 'float32')"),
        ("rejection_beta: [1, 2]\n", "`rejection_beta` in the file of --config is [1, 2], and must be float | str."),
        ("rejection_beta: true\n", "is true, and must be float | str."),
        ("rejection_beta: automatic\n", "invalid number_or_auto value: 'automatic'"),
        ("num_rows: true\n", "is true, and must be int | None."),
        ("num_candidates: null\n", "is null, and must be int."),
        ("ranker: [a, b]\n", '`ranker` in the file of --config is ["a", "b"], and must be str | None.'),
        ("save_strategy: no\n", "Put text that YAML reads as something else, such as no, in quotes."),
        ("output_dir: 2024-01-02\n", 'is "2024-01-02", and must be str'),
        ("model_init_kwargs: [1]\n", "is [1], and must be dict[str, typing.Any] | str | None."),
        ("loss_weights: [much]\n", "argument --loss_weights/--loss-weights: invalid float value: 'much'"),
    ],
)
def test_bad_files_end_with_one_line_and_exit_code_2(text, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        run.main("rso", [*BASE, *write(tmp_path, text)])
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("word", "beta"), [("auto", "auto"), ("2", 2.0), ("inf", math.inf)])
def test_the_beta_of_rejection_is_a_number_or_chosen_for_each_prompt(word, beta, tmp_path):
    for words in (["--rejection_beta", word], write(tmp_path, f"rejection_beta: {word}\n")):
        (_, args, _), _ = parse("rso", [*BASE, *words])
        assert args.rejection_beta == beta


def test_values_of_a_file_that_fit_pass(tmp_path):
    text = "num_rows: null\nmax_length: null\ngamma: 1\nlearning_rate: 5e-6\nsave_strategy: 'no'\nbf16: no\n"
    text += "loss_type: [sigmoid, hinge]\nloss_weights: [1, 5e-1]\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    (own, args, _), _ = parse("rso", [*BASE, *write(tmp_path, text)])
    assert (own.num_rows, args.max_length, args.gamma, args.learning_rate) == (None, None, 1, 5e-6)
    assert (args.save_strategy, args.loss_weights, args.lr_scheduler_kwargs) == ("no", [1, 0.5], {"num_cycles": 2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--output_dir o --ranker r", "the following arguments are required: --dataset_name"),
        ("--dataset_name d --output_dir o", "the following arguments are required: --ranker"),
        ("--dataset_name d --output_dir o --ranker r --num_samples 65", "`num_samples`=65 completions cannot be kept"),
        ("--dataset_name d --output_dir o --ranker r --seed -3", "`seed` must be a whole number, at least 0, got -3"),
    ],
)
def test_bad_arguments_of_sample(arguments, message, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        run.main("sample", arguments.split())
    assert message in capsys.readouterr().err


def test_evaluate_ranker_is_not_launched_and_takes_no_launch_options():
    arguments = "--dataset_name d --output_dir o --ranker r --num_processes 2"
    with pytest.raises(ValueError, match="unknown argument 'num_processes'"):
        parse("evaluate-ranker", arguments.split())


def test_what_does_not_train_does_not_suggest_an_option_of_trainings():
    with pytest.raises(ValueError, match=r"unknown argument 'resume_from_checkpoint'\. See --help"):
        read("reproduce", ["--resume_from_checkpoint"])
