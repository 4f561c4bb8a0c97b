"""The rehearsal of the GPU run on a CPU: every part runs, and its sides compute the same."""

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))

import run  # noqa: E402

TINY = run.SCALES["tiny"]
SIDES = {"train_rso": "trl_sdpa", "train_pro": "unshared", "rank": "unshared", "sample": "generate"}
FAST = ("train_rso_7b", "rank_1b")


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    monkeypatch.setattr(run.gc, "collect", lambda: 0)  # which takes longer than what is measured here


def run_main(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", "--shape", "tiny", "--output_dir", str(folder), *arguments])
    run.main()
    return {path.stem.removeprefix("gpu_"): json.loads(path.read_text()) for path in folder.iterdir()}


def numbers(value):
    if isinstance(value, dict | list):
        return [number for one in (value.values() if isinstance(value, dict) else value) for number in numbers(one)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("part", [pytest.param(p, marks=() if p in FAST else pytest.mark.slow) for p in run.PARTS])
def test_every_part_writes_finite_numbers_and_equal_values(part, tmp_path, monkeypatch):
    written = run_main(monkeypatch, tmp_path, "--parts", part, "--budget", "1e6")[part]
    results = written["results"]
    assert results.pop("warnings") == []  # such as that prompts are not shared
    other = next((side for name, side in SIDES.items() if part.startswith(name)), None)
    assert {"ours", *([other] if other else [])} <= results.keys()
    assert all("error" not in values and values["tokens_per_second"] > 0 for values in results.values())
    assert all(map(math.isfinite, numbers(written)))
    assert (written["settings"]["seed"], written["environment"]["device"]) == (0, "cpu")
    if part.startswith(("train", "rank")):
        values = results["ours"]["first_values"]
        assert results[other]["largest_difference"] < 1e-5 * max(1, *map(abs, values))  # PRO's losses are some 50 nats
        assert len(set(values)) > 1  # not all ln 2, the loss of a policy that is its reference


@pytest.mark.parametrize(("n", "batch"), [(2, 2), (4, 1)])
def test_texts_have_the_lengths_that_are_counted(n, batch):
    texts = run.Texts(TINY, seed=0)
    rankings = texts.rankings(batch, n, prompt=(3, 5), completion=(4, 4))
    tokenize = texts.tokenizer
    assert all(len(tokenize(text).input_ids) == 3 for row in rankings["completions"] for text in row)  # and EOS
    whole = [len(tokenize(row["prompt"] + text).input_ids) + 1 for row in rankings for text in row["completions"]]
    assert texts.num_tokens(rankings) == sum(whole)
    assert len(tokenize) == TINY.vocabulary
    assert rankings[0] == run.Texts(TINY, seed=0).rankings(batch, n, (3, 5), (4, 4))[0]


def fake(name, order, speeds, values=()):
    speeds = iter(speeds)

    def side(warm_up):
        if not warm_up:
            order.append(name)
        return {"tokens": 10.0, "seconds": 10.0 if warm_up else 10.0 / next(speeds), "values": values}

    return lambda: side


def test_sides_take_turns_and_medians_are_compared():
    order: list[str] = []
    sides = {
        "ours": fake("ours", order, [30.0, 40.0, 80.0], [0.5, 1.0]),
        "theirs": fake("theirs", order, [10, 20, 20]),
    }
    sides["other"] = fake("other", order, [60.0, 40.0, 20.0], [0.5, 1.25])
    results = run.compare(sides, rounds=3, deadline=math.inf)
    assert order == ["ours", "theirs", "other", "theirs", "other", "ours", "other", "ours", "theirs"]
    assert (results["ours"]["tokens_per_second"], results["ours"]["tokens_per_second_range"]) == (40.0, [30.0, 80.0])
    assert (results["theirs"]["ratio"], results["theirs"]["ratio_range"]) == (3.0, [2.0, 4.0])
    assert (results["other"]["ratio"], results["other"]["largest_difference"]) == (1.0, 0.25)
    assert "largest_difference" not in results["theirs"]


def test_a_side_that_cannot_start_and_a_deadline_leave_the_rest():
    sides = {"ours": fake("ours", [], [1.0, 2.0]), "broken": lambda: 1 / 0}
    results = run.compare(sides, rounds=2, deadline=-math.inf)
    assert results["broken"]["error"].startswith("ZeroDivisionError")
    assert results["ours"]["rounds"] == 1


def test_a_part_that_fails_stops_nothing(tmp_path, monkeypatch, capsys):
    def fails(texts, deadline):
        raise ValueError("no such kernel")

    works = {"ours": fake("ours", [], [2.0])}
    parts = {"a": (1, fails), "b": (1, lambda texts, deadline: run.compare(works, 1, deadline)), "c": (10**9, fails)}
    parts["hangs"] = (0.5, lambda texts, deadline: time.sleep(30))
    monkeypatch.setattr(run, "PARTS", parts)
    written = run_main(monkeypatch, tmp_path, "--budget", "1e6")
    assert written.keys() == {"a", "b", "hangs"}
    assert written["hangs"]["results"]["error"].startswith("TimeoutError")
    assert written["a"]["results"]["error"] == "ValueError: no such kernel"
    assert "test_gpu_run.py" in written["a"]["results"]["at"][-1] and str(ROOT) not in json.dumps(written)
    assert written["b"]["results"]["ours"]["tokens_per_second"] == 2.0
    assert "c                    not measured" in capsys.readouterr().out


def test_fewer_prompts_are_sampled_at_once_where_memory_runs_out(monkeypatch):
    batches = []

    def theirs(self, prompts, n, max_new_tokens):
        batches.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        self.lengths["theirs"] += [3] * len(prompts) * n

    monkeypatch.setattr(run.Sampler, "theirs", theirs)
    results = run.sample(run.Texts(TINY, seed=0), math.inf, "1b", num_prompts=6, at_once=4)
    assert batches == [4, 2, 2, 2, 2]
    assert results["generate"]["tokens_per_second"] > 0


def test_large_models_need_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit):
        run.main()
    assert "no GPU is seen" in capsys.readouterr().err
