"""A ranker is measured by two processes as by one, each on its share of the held-out comparisons."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
OPTIONS = "--use_cpu --bf16 False --max_steps 2 --learning_rate 1e-3 --gradient_accumulation_steps 1 --report_to none"


@pytest.mark.parametrize("name", ["ranker", "reward-model"])
def test_two_processes_measure_what_one_does(name: str, tiny_llama_dir: str, tmp_path: Path) -> None:
    texts = [[f" Yes {i}.", f" Not {i}, no."][:: 1 if i % 3 else -1] for i in range(31)]
    rows = [{"prompt": f"Question {i // 2}?", "chosen": a, "rejected": b} for i, (a, b) in enumerate(texts)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def measured(launcher: list[str], batch_size: int) -> str:
        given = f"--model_name_or_path {tiny_llama_dir} --dataset_name pairs.jsonl --held_out 0.3 --output_dir out"
        own = [*given.split(), *OPTIONS.split(), "--per_device_train_batch_size", str(batch_size)]
        command = [sys.executable, *launcher, "-m", "prefopt_trl.cli.run", name, *own]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (sentence,) = re.findall("The ranker is right on .*", done.stdout)
        return sentence

    assert measured(TWO, 4) == (alone := measured([], 8))
    assert re.search(r"right on \d+\.\d% ± [1-9]\d*\.\d% of (9|10) comparisons of 5 held-out prompts", alone)
