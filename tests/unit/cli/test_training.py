"""What would fail after hours of sampling, or have no effect, is refused before anything is loaded."""

import importlib.util
from pathlib import Path

import pytest

from prefopt_trl.cli import models, training

BASE = ["--dataset_name", "d", "--output_dir", "out", "--use_cpu", "--bf16", "False"]
LOADED = "`model_name_or_path`='m' has no tokenizer that can be loaded"  # and so nothing was refused before


@pytest.fixture
def refused(run_in_process):
    """Run a command with a model that is not there, and expect an error."""

    def run(arguments, message, name="rso", base=BASE, error=ValueError):
        with pytest.raises(error, match=message):
            run_in_process(name, [*base, *arguments.split()])

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "`model_name_or_path` is missing"),
        ("--model_name_or_path m --lora_r 8", "`lora_r` has no effect without `use_peft`"),
        ("--model_name_or_path m --use_dora", "`use_dora` has no effect without `use_peft`"),
        ("--model_name_or_path m --use_peft --use_bnb_nested_quant", "no effect without `load_in_4bit`"),
        ("--model_name_or_path m --report_to comet_ml", "`report_to=comet_ml` is not among the trackers installed"),
        ("--model_name_or_path m --report_to None", r"\(tensorboard\). .* or use one of these or 'none'"),
        ("--model_name_or_path m --report_to tensorboard", LOADED),
    ],
)
def test_refusals(arguments, message, refused, monkeypatch):
    monkeypatch.setattr(training, "get_available_reporting_integrations", lambda: ["tensorboard"])
    refused(arguments, message)


@pytest.mark.parametrize(
    "arguments", ["--use_peft --load_in_4bit", "--use_peft --load_in_8bit", "--optim paged_adamw_8bit"]
)
def test_bitsandbytes_is_needed_where_it_is_used(arguments, refused, monkeypatch):
    refused(f"--model_name_or_path m {arguments}", LOADED)
    real = importlib.util.find_spec
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    message = r"needs bitsandbytes. Run `pip install 'prefopt-trl\[bitsandbytes\]'`"
    refused(f"--model_name_or_path m {arguments}", message)


def test_commands_that_train_nothing_take_no_new_adapter(refused):
    base = ["--dataset_name", "d", "--output_dir", "o", "--ranker", "r", "--model_name_or_path", "m"]
    refused("--use_peft", "`use_peft` is for training", "sample", base)


def test_pro_bootstraps_with_a_ranker_only(training, run_in_process):
    with pytest.raises(ValueError, match="`bootstrap_parts` needs one"):
        run_in_process("pro", [*training, "--bootstrap_parts", "2", "--output_dir", "out"])


@pytest.fixture
def checkpoint_folders():
    """`out/run`, with checkpoints 4 and 12."""
    for step in (12, 4):
        Path(f"out/run/checkpoint-{step}").mkdir(parents=True)
        Path(f"out/run/checkpoint-{step}/trainer_state.json").write_text("{}")
    Path("out/run/checkpoint-20").mkdir()  # cut off while it was saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("out/run/checkpoint-5", "='out/run/checkpoint-5' is no checkpoint. Those in out/run: checkpoint-4, check"),
        ("out/run", "Those in out/run: checkpoint-4, checkpoint-12"),
        ("--output_dir out/new", "`resume_from_checkpoint` finds no checkpoint in out/new. Leave it out"),
        ("out/run/checkpoint-4", LOADED),
        ("--output_dir out/run", LOADED),
    ],
)
def test_what_is_resumed_must_be_there(arguments, message, checkpoint_folders, refused):
    given = f"--model_name_or_path m --resume_from_checkpoint {arguments}"
    refused(given, message, error=(ValueError, FileNotFoundError))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model_name_or_path ./sfft", "`model_name_or_path`: there is no folder ./sfft. Check"),
        ("--ranker out/rankr", "`ranker`='out/rankr' cannot be loaded .* Check the path"),
        ("--dataset_name gone.jsonl", "There is no file gone.jsonl"),
        ("--dataset_name out/pairs", "There is no file out/pairs, and no folder|'out/pairs' is neither a local file"),
    ],
)
def test_paths_with_nothing_at_them(arguments, message, training, refused):
    refused(arguments, message, base=[*training, "--output_dir", "out"], error=(ValueError, FileNotFoundError))


def test_a_file_is_not_evaluated_on_the_rows_that_are_trained_on(training, refused):
    message = "pairs.jsonl has no splits, so evaluation would be on the training data. Hold out a part"
    refused("--eval_strategy epoch", message, base=[*training, "--output_dir", "out"])
