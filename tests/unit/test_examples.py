"""What all example scripts rely on, without running them: they take minutes and a base model."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

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


def test_every_trainer_has_an_example():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {"grpo", "listwise_dpo", "pro", "pro_bootstrap", "rrhf", "rso", "shared", "slic"}
