"""Arguments that are valid each, and cannot work together or here: refused before anything is started."""

import importlib.util
import json
from pathlib import Path

import pytest

from prefopt_trl.cli import checks
from prefopt_trl.cli.parsing import parse

BASE = ["--dataset_name", "d", "--output_dir", "out", "--use_cpu", "--bf16", "False"]


def check(arguments, name="rso", base=BASE):
    parsed, _ = parse(name, [*base, *arguments.split()])
    checks.check_arguments(*parsed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "`model_name_or_path` is missing"),
        ("--model_name_or_path m --lora_r 8", "`lora_r` has no effect without `use_peft`"),
        ("--model_name_or_path m --use_dora", "`use_dora` has no effect without `use_peft`"),
        ("--model_name_or_path m --use_peft --use_bnb_nested_quant", "no effect without `load_in_4bit`"),
        ("--model_name_or_path m --load_in_4bit", "`load_in_4bit` alone cannot be trained. Add `use_peft`"),
        ("--model_name_or_path m --report_to comet_ml", "not among the trackers installed.*`pip install comet_ml`"),
        ("--model_name_or_path m --report_to None", r"no tracker that transformers knows. Did you mean 'none'\?$"),
        ("--model_name_or_path m --report_to wanbd", r"no tracker that transformers knows. Did you mean 'wandb'\?$"),
    ],
)
def test_refusals(arguments, message, monkeypatch):
    monkeypatch.setattr(checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=message):
        check(arguments)


def test_a_tracker_that_is_installed_passes(monkeypatch):
    monkeypatch.setattr(checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
    check("--model_name_or_path m --report_to tensorboard")


@pytest.mark.parametrize(
    "arguments", ["--use_peft --load_in_4bit", "--use_peft --load_in_8bit", "--optim paged_adamw_8bit"]
)
def test_bitsandbytes_is_needed_where_it_is_used(arguments, monkeypatch):
    check(f"--model_name_or_path m {arguments}")
    real = importlib.util.find_spec
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(ValueError, match=r"needs bitsandbytes. Run `pip install 'prefopt-trl\[bitsandbytes\]'`"):
        check(f"--model_name_or_path m {arguments}")


def test_an_adapter_on_top_of_an_adapter_is_refused():
    Path("adapter").mkdir()
    Path("adapter", "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="adapter is an adapter already, and `use_peft` would put another on top"):
        check("--model_name_or_path adapter --use_peft")
    check("--model_name_or_path adapter --load_in_4bit")  # trained further, on a base in 4 bits


@pytest.fixture
def checkpoint_folders():
    """`out/sft` and `out/run`, with checkpoints 4 and 12."""
    Path("out/sft").mkdir(parents=True)
    for step in (12, 4):
        Path(f"out/run/checkpoint-{step}").mkdir(parents=True)
        Path(f"out/run/checkpoint-{step}/trainer_state.json").write_text("{}")
    Path("out/run/checkpoint-20").mkdir()  # cut off while it was saved


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model_name_or_path out/sfft", "`model_name_or_path`='out/sfft' is not there"),
        ("--model_name_or_path ./sft", "`model_name_or_path`='./sft' is not there"),
        ("--model_name_or_path gone/sft/last", "`model_name_or_path`='gone/sft/last' is not there"),
        ("--model_name_or_path m --ranker out/rankr", "`ranker`='out/rankr' is not there"),
        ("--model_name_or_path m --dataset_name gone.jsonl", "There is no file gone.jsonl"),
        ("--model_name_or_path m --dataset_name out/pairs", "There is no file out/pairs, and no folder"),
        (
            "--model_name_or_path m --resume_from_checkpoint out/run/checkpoint-5",
            "`resume_from_checkpoint`='out/run/checkpoint-5' is no checkpoint. Those in out/run: "
            "checkpoint-4, checkpoint-12.",
        ),
        ("--model_name_or_path m --resume_from_checkpoint out/run", "Those in out/run: checkpoint-4, checkpoint-12"),
    ],
)
def test_paths_with_nothing_at_them(arguments, message, checkpoint_folders):
    with pytest.raises(FileNotFoundError, match=message):
        check(arguments)


def test_names_that_may_be_on_the_hub_pass(checkpoint_folders):
    check("--model_name_or_path gone/sft --ranker org/ranker --dataset_name org/pairs")
    check("--model_name_or_path out/sft --ranker out/run --dataset_name out/run")


def test_the_latest_checkpoint_must_be_there(checkpoint_folders):
    check("--model_name_or_path m --resume_from_checkpoint --output_dir out/run")
    check("--model_name_or_path m --resume_from_checkpoint out/run/checkpoint-4")
    with pytest.raises(ValueError, match="`resume_from_checkpoint` finds no checkpoint in out/new. Leave it out"):
        check("--model_name_or_path m --resume_from_checkpoint --output_dir out/new")


def test_an_adapter_whose_base_has_moved(checkpoint_folders):
    Path("out/sft/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "out/gone"}))
    message = "the adapter out/sft names its base 'out/gone', .* Edit .* in out/sft/adapter_config.json"
    for arguments in ("--model_name_or_path out/sft", "--model_name_or_path m --ranker out/sft"):
        with pytest.raises(ValueError, match=message):
            check(arguments)


@pytest.mark.parametrize(
    ("ranker", "message"),
    [
        ("./own.py:brevity", "is a file. Give its function as `own.brevity`"),
        ("folder/own.py:brevity", "is a file. Give its function as `folder.own.brevity`"),
        ("own.py", "is a file. Give its function as `own.FUNCTION`"),
        ("owm.brevity", "no function that can be imported .there is no module owm"),
        ("gone.own.brevity", "no function that can be imported .No module named 'gone'"),
    ],
)
def test_a_ranking_function_is_named_by_its_module(ranker, message):
    Path("folder").mkdir()
    for file in ("own.py", "folder/own.py"):
        Path(file).write_text("raise RuntimeError('this is not to run in the launcher')")
    with pytest.raises(ValueError, match=message):
        check(f"--model_name_or_path m --ranker {ranker}")
    check("--model_name_or_path m --ranker own.brevity")


def test_pro_bootstraps_with_a_ranker_only():
    with pytest.raises(ValueError, match="`bootstrap_parts` needs a `ranker`"):
        check("--model_name_or_path m --bootstrap_parts 2", "pro")
    check("--model_name_or_path m --bootstrap_parts 2 --ranker r", "pro")


def test_commands_that_train_nothing_take_no_new_adapter():
    base = ["--dataset_name", "d", "--output_dir", "o", "--ranker", "r"]
    with pytest.raises(ValueError, match="`use_peft` is for training"):
        check("--model_name_or_path m --use_peft", "sample", base)
    check("--model_name_or_path m --load_in_4bit", "sample", base)
