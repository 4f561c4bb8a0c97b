"""Rounds as a command, each phase a launch of its own: ZeRO-3 with two processes makes what one process makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed
ZERO3 = (
    "--accelerate_config zero3 --num_processes 2 --ddp_backend gloo --use_cpu False --per_device_train_batch_size 2"
)


def test_rounds_of_lora_under_zero3(tiny_llama_dir: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"Tell me {number} of"} for number in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(
        "def e(prompts, completions):\n    return [one.count('e') for one in completions]\n"
    )
    given = f"--model_name_or_path {tiny_llama_dir} --dtype float32 --bf16 False --dataset_name prompts.jsonl "
    given += "--dataset_train_split train[:50%] --dataset_test_split train[50%:] --ranker reward.py:e --num_rounds 2 "
    given += "--num_candidates 6 --num_samples 4 --max_new_tokens 6 --max_length 64 --importance_correction "
    given += "--max_steps 2 --logging_steps 1 --save_steps 1 --learning_rate 1e-2 --gamma 0.1 --report_to none "
    given += "--use_peft --lora_target_modules all-linear"
    for name, how in {"one": "--use_cpu --per_device_train_batch_size 4", "zero3": ZERO3}.items():
        environment = os.environ | ({"DS_ACCELERATOR": "cpu"} if name == "zero3" else {})
        command = [sys.executable, "-m", "prefopt_trl.cli.main", "rounds", "rso", *given.split(), *how.split()]
        done = subprocess.run(
            [*command, "--output_dir", name], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def losses(name: str, number: int) -> list[float]:
        state = tmp_path / name / f"round-{number}/model/checkpoint-2/trainer_state.json"
        return [entry["loss"] for entry in json.loads(state.read_text())["log_history"]]

    first, again = (tmp_path / name / "round-1/sampled/pairs/data-00000-of-00001.arrow" for name in ("one", "zero3"))
    assert first.read_bytes() == again.read_bytes()
    assert losses("zero3", 1) == pytest.approx(losses("one", 1), abs=1e-4)
    # The second round begins away from its reference model, the base, and samples other weights by a rounding
    assert abs(losses("zero3", 2)[0] - 0.6931) > 1e-4
    records = [json.loads((tmp_path / name / "round-2/record.json").read_text()) for name in ("one", "zero3")]
    assert [record["phases"].keys() for record in records] == [{"sample", "train", "judge"}] * 2
