"""The benchmark's dry run on a CPU: it trains what it says, and both sides see the same."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))  # where the scripts import each other from

import gpu_7b  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    gpu_7b.save_model(folder, "tiny")
    return folder


@pytest.mark.parametrize("job", gpu_7b.JOBS.values(), ids=gpu_7b.JOBS)
def test_texts_have_the_jobs_lengths(job, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    row = gpu_7b.texts(job, 3)[2]
    completions = row.get("completions") or [row["chosen"], row["rejected"]]
    assert len(tokenizer(row["prompt"]).input_ids) == 384
    assert [len(tokenizer(text).input_ids) for text in completions] == [127] * job.completions  # and the EOS token


@pytest.mark.parametrize(
    ("config", "job", "tolerance"),
    # nf4 with an adapter in bfloat16 rounds more
    [("ddp", "RSO", 1e-5), ("ddp", "PRO", 1e-5), ("ddp, LoRA", "RSO", 1e-5), ("ddp, QLoRA", "PRO", 1e-4)],
)
def test_both_sides_have_the_same_losses(config, job, tolerance, tiny, monkeypatch):
    short = gpu_7b.Job(gpu_7b.JOBS[job].completions, prompt_length=24, completion_length=8)
    monkeypatch.setitem(gpu_7b.JOBS, job, short)
    ours, theirs = (gpu_7b.run_side(tiny, config, job, side, steps=1) for side in ("ours", "theirs"))
    assert len(ours["losses"]) == gpu_7b.WARMUP + 1
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
    assert ours["tokens_per_second"] > 0 < ours["peak_memory_gb"]


def test_sides_take_turns_and_medians_are_compared():
    order = []
    speeds = {"ours": iter([30.0, 40.0, 80.0]), "theirs": iter([10.0, 20.0, 20.0])}

    def run(side):
        order.append(side)
        loss = 1.0 if side == "ours" else 1.25
        return {"tokens_per_second": next(speeds[side]), "peak_memory_gb": len(order), "losses": [0.5, loss]}

    results = gpu_7b.compare(run, rounds=3)
    assert order == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert results["ours"] == {
        "tokens_per_second_median": 40.0,
        "tokens_per_second_range": [30.0, 80.0],
        "peak_memory_gb_median": statistics.median([2, 3, 6]),
        "peak_memory_gb_range": [2, 6],
    }
    assert (results["ratio_median"], results["ratio_range"]) == (3.0, [2.0, 4.0])
    assert results["largest_difference_of_losses"] == 0.25


@pytest.mark.parametrize(("memory", "full"), [(80e9, "zero3_offload"), (138e9, "zero3_offload"), (150e9, "zero3")])
def test_the_plan_decides_on_offload(memory, full):
    assert gpu_7b.default_configs(memory) == [full, "ddp, LoRA", "ddp, QLoRA"]


def test_results_join_those_of_earlier_runs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_7b, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_7b, "DEVICE", "cuda")
    monkeypatch.setattr(gpu_7b, "save_model", lambda folder, shape: None)
    written = {}
    monkeypatch.setattr(gpu_7b, "write_results", lambda name, settings, results: written.update({name: results}))
    side = {"tokens_per_second": 1.0, "peak_memory_gb": 2.0, "losses": [3.0]}
    monkeypatch.setattr(gpu_7b, "in_own_process", lambda *arguments: side)
    monkeypatch.setattr(
        gpu_7b.torch.cuda, "get_device_properties", lambda device: type("GPU", (), {"total_memory": 0})
    )
    (tmp_path / "gpu_7b.json").write_text(json.dumps({"results": {"zero3": {"RSO": 1}, "ddp, LoRA": {"PRO": 2}}}))
    monkeypatch.setattr(sys, "argv", ["gpu_7b.py", "--configs", "ddp, LoRA", "--jobs", "RSO", "--rounds", "1"])
    gpu_7b.main()
    assert written["gpu_7b"]["zero3"] == {"RSO": 1}
    assert written["gpu_7b"]["ddp, LoRA"].keys() == {"RSO", "PRO"}


def test_seven_billion_parameters_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_7b.py"])
    with pytest.raises(SystemExit):
        gpu_7b.main()
    assert "no GPU is seen" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["zero3", "zero3_offload"])
def test_zero3_trains_as_one_process_does(config, tiny):
    command = [sys.executable, "benchmarks/gpu_7b.py", "--shape", "tiny", "--configs", config, "--jobs", "RSO"]
    command += ["--steps", "1", "--model", tiny, "--side", "ours"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    sharded = json.loads(output.splitlines()[-1])
    whole = gpu_7b.run_side(tiny, "ddp", "RSO", "ours", steps=1)
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-4)
