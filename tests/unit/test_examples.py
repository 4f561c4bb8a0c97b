"""What all example scripts rely on, without running them: they take minutes and a base model."""

import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

from prefopt_trl import PROConfig

EXAMPLES = Path(__file__).parents[2] / "examples" / "hh_rlhf"


@pytest.mark.parametrize("checkpoint", [None, "outputs/pro/checkpoint-500"])
def test_the_printed_way_to_resume_resumes(checkpoint, capsys):
    calls = []
    trainer = SimpleNamespace(
        args=SimpleNamespace(resume_from_checkpoint=checkpoint, output_dir="outputs/pro", push_to_hub=False),
        train=lambda **given: calls.append(given),
        save_model=lambda: calls.append("saved"),
    )
    runpy.run_path(str(EXAMPLES / "shared.py"))["train_and_save"](trainer)
    assert calls == [{"resume_from_checkpoint": checkpoint}, "saved"]
    assert "saved in outputs/pro" in capsys.readouterr().out


def test_comparisons_are_drawn_from_all_subsets(tiny_llama_dir, capsys):
    rows = [{"prompt": f"{subset} {i}", "subset": subset} for subset in range(4) for i in range(100)]
    args = SimpleNamespace(seed=3, max_new_tokens=4, max_length=40)
    draw = runpy.run_path(str(EXAMPLES / "shared.py"))["draw_comparisons"]
    comparisons = Dataset.from_list([*rows, {"prompt": "long " * 40, "subset": 9}])
    drawn = draw(comparisons, tiny_llama_dir, SimpleNamespace(num_prompts=100), args)
    assert capsys.readouterr().out == "401 comparisons; 100 of the 400 that fit, drawn with seed 3.\n"
    # Hypergeometric, mean 25 and standard deviation 3.8 of each subset: 4 standard deviations for a fixed seed
    assert all(abs(drawn["subset"].count(subset) - 25) < 15 for subset in range(4))
    assert len(set(drawn["prompt"])) == 100


@pytest.mark.parametrize("name", ["pro", "pro_bootstrap"])
def test_pro_starts_from_the_base_model_for_two_epochs(name, tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    assert "--num_train_epochs 2" in module["__doc__"].split("Offline")[0]  # PRO section 4.3
    names, started = module["main"].__globals__, []
    rows = Dataset.from_dict({"prompt": ["Why?"], "chosen": [" So."], "rejected": [" No."]})
    names |= {
        "load_comparisons": lambda script: rows,
        "PairwiseRanker": lambda folder: None,
        "PROTrainer": lambda model, **given: started.append((model, given["train_dataset"][:])),
        "train_and_save": lambda trainer: None,
    }
    base = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    script = {"base_model": str(base), "policy": tiny_llama_dir, "ranker": "r", "num_prompts": 1}
    script_class = names.get("PROScriptArguments", names["ScriptArguments"])
    sizes = {"max_length": 64, "max_new_tokens": 4, "use_cpu": True, "bf16": False, "report_to": "none"}
    module["main"](script_class(**script), PROConfig(str(tmp_path), **sizes))
    ((model, dataset),) = started
    assert model == str(base)
    assert dataset["prompt"] == ["Why?"]
    if name == "pro":
        assert dataset["completions"][0][:2] == [" So.", " No."] and len(dataset["completions"][0]) == 4


def test_every_trainer_has_an_example():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {"grpo", "listwise_dpo", "pro", "pro_bootstrap", "rrhf", "rso", "shared", "slic"}
