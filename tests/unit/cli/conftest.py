"""A model, pairs and prompts small enough to run every command in this process."""

import json
import signal

import pytest

from prefopt_trl.cli.parsing import parse
from prefopt_trl.cli.run import run


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(autouse=True)
def own_signals():
    """A command leaves its handlers in place, as its process ends with it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def pairs(tmp_path) -> str:
    rows = [{"prompt": f"Question {i}?", "chosen": f" Yes {i}.", "rejected": f" Not {i}, no."} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "pairs.jsonl"


@pytest.fixture
def tiny(tiny_llama_dir, pairs) -> list[str]:
    """Arguments that make a command run on the tiny model and pairs."""
    return ["--model_name_or_path", tiny_llama_dir, "--dataset_name", pairs, "--use_cpu"]


@pytest.fixture
def training(tiny) -> list[str]:
    one_step = "--bf16 False --max_steps 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 1"
    return [*tiny, *one_step.split(), "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True"]


@pytest.fixture
def function_ranker(tmp_path) -> list[str]:
    (tmp_path / "own_reward.py").write_text(
        "def brevity(prompts, completions, **kwargs):\n    return [-len(text) for text in completions]\n"
    )
    return ["--ranker", "own_reward.brevity"]


@pytest.fixture
def run_in_process():
    """Run a command, with its exceptions as they are raised."""
    return lambda name, arguments: run(name, *parse(name, arguments))
