"""Experiments from end to end, with a few steps of everything."""

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from prefopt_trl.experiments import report, worlds
from prefopt_trl.experiments.cells import HINDSIGHT, NOTHING, SFT, Cell
from prefopt_trl.experiments.runner import folder_of, run_tables
from prefopt_trl.experiments.tables import Table

SAMPLING = {"num_candidates": 8, "max_new_tokens": 20, "generation_batch_size": 1024}
HOW = {"num_samples": 4, "strategy": "sft"}
GIVEN = {**HOW, "given": ["first", "second", "fair"], "num_samples": 3}
CELLS = {
    "given pairs": Cell(),
    "samples": Cell(HOW),
    "rso by the truth": Cell({"num_samples": 4}, ranker=worlds.TRUTH, length=0.5),
    "slic": Cell(HOW, "slic", {"regularization_weight": 1.0, "target_column": "target"}),
    "unlikelihood": Cell(HOW, "slic", {"loss_type": ["unlikelihood"]}),
    "pro": Cell({**GIVEN, "pairing": "ranking"}, "pro"),
    "pro, bootstrapped": Cell({**GIVEN, "pairing": "ranking"}, "pro", {"bootstrap_parts": 2}),
    "rrhf": Cell({**HOW, "pairing": "ranking"}, "rrhf"),
    "hindsight": Cell({**GIVEN, "pairing": "best-worst"}, HINDSIGHT, is_last=True),
    "best": Cell({**HOW, "pairing": "best"}, SFT),
    "right or wrong": Cell({**HOW, "pairing": "correct-wrong"}),
    "best of 4": Cell(method=NOTHING, best_of=4),
    "rounds": Cell({"num_samples": 4, "rejection_beta": 2.0}, rounds={"num_rounds": 2, "importance_correction": True}),
}
TABLE = Table("All kinds of cells", "nowhere", "kitchen", CELLS, [("samples", "given pairs")], shows_samples=True)


def tiny(seed, folder):
    """The kitchen with a few steps of everything, in a process of its own."""
    worlds.TASK = {"num_prompts": 40, "num_eval_prompts": 64, "num_sft": 2000, "num_comparisons": 400}
    worlds.SFT = {**worlds.SFT, "max_steps": 60, "per_device_train_batch_size": 32}
    worlds.RANKER = {**worlds.RANKER, "per_device_train_batch_size": 16}
    worlds.RANKER_STEPS = dict.fromkeys(worlds.RANKER_STEPS, 4)
    worlds.HELD_OUT, worlds.calibrate = 40, lambda *_: SimpleNamespace(temperature=0.5)
    worlds.POLICY = {**worlds.POLICY, "max_steps": 8, "per_device_train_batch_size": 4}
    return replace(worlds.kitchen(seed, folder), sampling=SAMPLING)


@pytest.fixture(scope="module", autouse=True)
def importable():
    """New processes import `tiny` from here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])
        yield


def run(folder, table=TABLE, num_workers=1, **settings):
    [(_, found)] = run_tables({"all": table}, tiny, {"tiny": True, **settings}, [3], folder, num_workers)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    return folder, run(folder)


def test_every_kind_of_cell_is_measured(made):
    folder, found = made
    assert list(found) == ["SFT policy", *CELLS]
    for row, [one] in found.items():
        assert math.isfinite(one[report.REWARD]) and 0 <= one["ranker's win_rate"] <= 1, row
        assert row in ("hindsight", "best of 4") or one["kl"] > -0.1
    assert found["SFT policy"][0]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["best of 4"][0]["ranker's reward"] > found["SFT policy"][0]["ranker's reward"]
    assert found["rso by the truth"][0]["ranker accuracy"] == 1
    assert len(found["rounds"][0]["rounds"]) == 3
    text = report.write("all", TABLE, found, folder, 10.0, "World: kitchen.").partition("| claim ")[0]
    for row, [one] in found.items():
        (line,) = [line for line in text.splitlines() if line.startswith("|") and line.split("|")[1].strip() == row]
        assert f"| {one[report.REWARD]:.2f} |" in " ".join(line.split())


def test_the_reported_checkpoint_has_the_highest_reward_by_the_ranker(made):
    folder, _ = made
    found = json.loads((folder_of(folder, 3, CELLS["given pairs"]) / "results.json").read_text())
    trained = {int(step): reward for step, reward in found["ranker's reward by step"].items() if step != "0"}
    assert sorted(trained) == [2, 4, 6, 8]
    assert trained[found["step"]] == max(trained.values())


def test_what_is_finished_is_not_done_again_and_other_settings_are_refused(made):
    folder, found = made
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("results.json")}
    assert run(folder) == found
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("results.json")} == before
    with pytest.raises(ValueError, match="has results with other tiny. Choose another `output_dir`"):
        run(folder, tiny=False)


def test_a_run_that_made_no_world_leaves_its_folder_to_other_settings(tmp_path):
    for steps in (1, 2):
        assert not list(run_tables({}, worlds.kitchen, {"max_steps": steps}, [0], tmp_path, 1))
    (tmp_path / "seed-0").mkdir()
    with pytest.raises(ValueError, match="has results with other max_steps"):
        list(run_tables({}, worlds.kitchen, {"max_steps": 1}, [0], tmp_path, 1))


def test_two_processes_find_what_one_does(made, tmp_path):
    _, found = made
    cells = {row: CELLS[row] for row in ("given pairs", "samples", "right or wrong", "rso by the truth")}
    both = run(tmp_path, Table("", "", "", cells, []), 2)
    assert both == {row: found[row] for row in ("SFT policy", *cells)}


def test_a_killed_command_leaves_no_process(tmp_path):
    script = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from prefopt_trl.experiments.runner import _start
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), _start, (None, None, False))
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""
    (tmp_path / "command.py").write_text(script)
    with subprocess.Popen([sys.executable, tmp_path / "command.py"], stdout=subprocess.PIPE, text=True) as command:
        worker = Path("/proc", command.stdout.readline().strip())
        assert worker.is_dir()
        command.kill()
    for _ in range(100):
        if not (worker / "cmdline").exists() or not (worker / "cmdline").read_bytes():  # gone, or waited for
            return
        time.sleep(0.1)
    pytest.fail("the worker lives on")


def test_what_was_cut_off_is_made_again(made, tmp_path):
    """A kill leaves worlds and cells without their last file, which is written when all others are."""
    folder, found = made
    copy = shutil.copytree(folder, tmp_path / "copy")
    policy = folder_of(copy, 3, CELLS["samples"])
    (policy / "results.json").unlink()
    (copy / "seed-3" / "ranker-learned").rename(copy / "seed-3" / "ranker-learned-unfinished")
    shutil.rmtree(copy / "seed-3" / "candidates-truth")
    assert run(copy) == found
    assert (policy / "policy" / "model.safetensors").exists()
