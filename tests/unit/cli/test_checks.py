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
        ("--model_name_or_path m --report_to comet_ml", "`report_to=comet_ml` is not among the trackers installed"),
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


def test_pro_bootstraps_with_a_ranker_only():
    with pytest.raises(ValueError, match="`bootstrap_parts` needs a `ranker`"):
        check("--model_name_or_path m --bootstrap_parts 2", "pro")
    check("--model_name_or_path m --bootstrap_parts 2 --ranker r", "pro")


def test_commands_that_train_nothing_take_no_new_adapter():
    base = ["--dataset_name", "d", "--output_dir", "o", "--ranker", "r"]
    with pytest.raises(ValueError, match="`use_peft` is for training"):
        check("--model_name_or_path m --use_peft", "sample", base)
    check("--model_name_or_path m --load_in_4bit", "sample", base)
