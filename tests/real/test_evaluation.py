"""SmolLM2-135M-Instruct before and after RSO on a real reward, by command and two judges; the evaluation is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import contents
from tests.real.conftest import PACKAGES

pytestmark = pytest.mark.real

JUDGES = """
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()

def sentiment(prompts, completions, **kwargs):  # a lexicon's, in [-5, 5]
    return [5 * analyzer.polarity_scores(completion)["compound"] for completion in completions]

def brevity(prompts, completions, **kwargs):
    return [-len(completion) / 50 for completion in completions]
"""
SUBJECTS = {
    "train": "film hotel restaurant book phone lecture concert museum",
    "test": "airline garden train bicycle bakery game school lake",
}


def command(*words: Any) -> list[str]:
    return [sys.executable, "-m", "prefopt_trl.cli.main", *map(str, words), "--use_cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Judges, and beginnings of reviews to continue: 24 to train on, and 24 of other subjects to evaluate on."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "judges.py").write_text(JUDGES)
    for name, subjects in SUBJECTS.items():
        starts = ["It was", "I think", "The first thing"]
        rows = [{"prompt": f"My review of the {one}: {start}"} for one in subjects.split() for start in starts]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder: Path, *words: Any) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(PACKAGES)])}
    done = subprocess.run(command(*words), cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_rso_is_better_by_its_reward_and_a_killed_evaluation_gives_the_same_bytes(
    folder: Path, smollm2_dir: Path
) -> None:
    how = ["--max_new_tokens", 16]
    learning = ["--use_peft", "--lora_r", 8, "--lora_alpha", 16, "--lora_target_modules", "all-linear"]
    learning += ["--learning_rate", 1e-3, "--lr_scheduler_type", "constant", "--per_device_train_batch_size", 8]
    learning += ["--max_steps", 16, "--num_candidates", 16, "--bf16", False, "--report_to", "none"]
    learning += ["--dataset_name", "train.jsonl", "--ranker", "judges.py:sentiment"]
    run(folder, "rso", "--model_name_or_path", smollm2_dir, "--output_dir", "rso", *learning, *how)

    words = ["evaluate", "--policies", f"sft={smollm2_dir}", "rso=rso", "--reference", "sft", "--against", "sft"]
    words += ["--judges", "judges.py:sentiment", "judges.py:brevity", "--dataset_name", "test.jsonl", *how]
    words += ["--num_completions", 8]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(PACKAGES)])}
    killed = subprocess.Popen(
        command(*words, "--output_dir", "killed"), cwd=folder, env=environment, start_new_session=True
    )
    while not list((folder / "killed/shards").glob("*completions-1*")):  # the second policy has begun
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    printed = run(folder, *words, "--output_dir", "killed")
    assert run(folder, *words, "--output_dir", "whole") == printed.replace("to killed", "to whole")
    left, right = contents(folder / "killed"), contents(folder / "whole")
    assert {name for name in left.keys() | right.keys() if left.get(name) != right.get(name)} <= {"config.yaml"}

    print(printed)
    found = json.loads((folder / "whole/evaluation.json").read_text())["policies"]["rso"]
    difference = found["judges"]["sentiment"]["minus"]["sft"]
    assert difference["mean"] > 5 * difference["standard_error"] > 0  # and not by chance, once in 10^6
    assert found["kl"]["mean"] > 0
    assert "| sft    |" in printed and "Judge: brevity, against: sft" in printed
