"""Commands as they are typed, through the real launcher, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "prefopt_trl.cli.main"]


@pytest.fixture
def typed(tmp_path, tiny_llama_dir):
    """Run `prefopt-trl NAME ...` in an empty folder, on 8 pairs."""
    rows = [{"prompt": f"Question {i}?", "chosen": f" Yes {i}.", "rejected": f" Not {i}, no."} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["--dataset_name", "pairs.jsonl", "--model_name_or_path", tiny_llama_dir, "--bf16", "False"]
    base += ["--max_steps", "1", "--report_to", "none", "--learning_rate", "1e-3", "--save_strategy", "no"]

    def run(arguments, **environment):
        words = [*COMMAND, arguments[0], *base, *arguments[1:]]
        settings = {**os.environ, "HF_HOME": str(tmp_path / "home"), **environment}
        return subprocess.run(words, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=500)

    return run


def test_one_process_trains_and_saves(typed, tmp_path):
    done = typed(["rso", "--use_cpu", "--output_dir", "out"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The trained model is saved in out." in done.stdout
    assert "were not passed to `accelerate launch`" not in done.stderr
    assert (tmp_path / "out" / "config.yaml").exists()
    again = typed(["rso", "--config", "out/config.yaml", "--output_dir", "again"])
    assert again.returncode == 0, again.stderr[-2000:]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert all((first[key] == second[key]).all() for key in first)


def test_a_failing_process_gives_its_exit_code_and_one_line(typed, tmp_path):
    (tmp_path / "own.py").write_text("")
    wrong = ["rso", "--use_cpu", "--output_dir", "out", "--ranker", "own.reward"]
    done = typed(wrong)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("prefopt-trl rso: error: ")
    assert "Traceback" not in done.stderr
    done = typed([*wrong, "--log_level", "debug"])
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "CalledProcessError" not in done.stderr


def test_two_processes_under_zero3_with_adafactor_are_one_at_the_same_global_batch(typed, tmp_path):
    zero3 = [
        "--accelerate_config",
        "zero3",
        "--num_processes",
        "2",
        "--ddp_backend",
        "gloo",
        "--per_device_train_batch_size",
        "2",
    ]
    done = typed(["rso", *zero3, "--output_dir", "two", "--logging_steps", "1"], DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    done = typed(["rso", *zero3, "--output_dir", "adafactor", "--optim", "adafactor"], DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr[-2000:]
    done = typed(["rso", "--use_cpu", "--output_dir", "one", "--per_device_train_batch_size", "4"])
    assert done.returncode == 0, done.stderr[-2000:]
    one, two, adafactor = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "adafactor"))
    assert one.keys() == two.keys() == adafactor.keys()
    assert all(one[key].shape == two[key].shape for key in one)
    # AdamW's first step has the size of the learning rate: in nearly all places they go the same way
    same = [((one[key] - two[key]).abs() < 1e-4).float().mean().item() for key in one]
    assert sum(same) / len(same) > 0.99
    assert any((one[key] != adafactor[key]).any() for key in one)
