"""A sampled dataset, an evaluation or rounds are the same, to the byte, however often they are killed (SIGKILL).

Runs are forks of one driver, killed_run.py, which says what each run did. Moments are of two kinds: just before the
n-th call that samples, ranks or changes the folder, so that every stage is hit on any machine; and at random by the
clock, so that any place in between can be.
"""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk

DRIVER = Path(__file__).with_name("killed_run.py")
NUM_PROMPTS, NUM_CANDIDATES, NUM_PAIRS, NUM_SHARDS = 24, 8, 2, 12
NUM_MOMENTS = 20
SEED = 20309
STAGES = {"generate": "sampling", "score": "ranking", "compare": "ranking"}  # any other call is writing

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Builds the dataset in a folder; the arguments, and what is returned, are those of `killed_run.run`."""
    with subprocess.Popen([sys.executable, str(DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:

        def ask(folder: Path, **options: Any) -> dict[str, Any]:
            driver.stdin.write(json.dumps({"folder": str(folder), **options}).encode() + b"\n")
            driver.stdin.flush()
            return json.loads(driver.stdout.readline())

        yield ask


@pytest.fixture(scope="module")
def undisturbed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run that nobody kills, and its calls."""
    folder = tmp_path_factory.mktemp("undisturbed") / "pairs"
    outcome = run(folder)
    assert outcome["status"] == [0]
    return folder, outcome["calls"][0]


@pytest.fixture(scope="module")
def expected(undisturbed: tuple[Path, list[str]]) -> dict[str, bytes | None]:
    return contents(undisturbed[0])


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


def killed(outcome: dict[str, Any]) -> bool:
    return -signal.SIGKILL in outcome["status"]


def test_the_undisturbed_run_has_every_prompt_once(undisturbed: tuple[Path, list[str]]) -> None:
    folder, calls = undisturbed
    candidates, pairs = (load_from_disk(str(folder / name)) for name in ("candidates", "pairs"))
    prompts = list(candidates["prompt"])
    assert len(set(prompts)) == len(prompts) == NUM_PROMPTS
    assert list(pairs["prompt"]) == [prompt for prompt in prompts for _ in range(NUM_PAIRS)]
    assert {len(row) for row in candidates["completions"]} == {NUM_CANDIDATES}
    assert calls.count("score") == NUM_SHARDS
    assert set(contents(folder)) >= {"README.md", "manifest.json", "statistics.json", "statistics.png"}
    assert not [name for name in contents(folder) if "shards" in name or "partial" in name]


# One process, at given calls


@pytest.mark.parametrize(("call", "fraction"), [("generate", 0.5), ("score", 0.3), ("fsync", 0.9), ("unlink", 0.8)])
def test_killed_before_a_call_and_started_again(
    run: Run, undisturbed: tuple[Path, list[str]], expected: dict, tmp_path: Path, call: str, fraction: float
) -> None:
    calls = undisturbed[1]
    moments = [number for number, name in enumerate(calls) if name == call]
    first = run(tmp_path / "pairs", call=moments[int(fraction * len(moments))])
    assert killed(first) and first["last"] == call
    assert contents(tmp_path / "pairs") != expected
    again = run(tmp_path / "pairs")
    assert again["status"] == [0]
    assert contents(tmp_path / "pairs") == expected
    # What was done is not done again, but for the call in which it was killed, and the probe that begins each run
    for work, more in {"generate": 2, "score": 1}.items():
        done = first["calls"][0].count(work) + again["calls"][0].count(work)
        assert done <= calls.count(work) + more


@pytest.mark.slow
def test_killed_before_every_call(
    run: Run, undisturbed: tuple[Path, list[str]], expected: dict, tmp_path: Path
) -> None:
    """Of the manifest, of the last shard, and of all that follows; the shards before do as the last."""
    calls = undisturbed[1]
    samplings = [number for number, name in enumerate(calls) if name == "generate"]
    folder = tmp_path / "pairs"
    for moment in [*range(samplings[0]), *range(samplings[-1], len(calls))]:
        assert killed(run(folder, call=moment)), f"call {moment}, {calls[moment]}"
        assert run(folder)["status"] == [0], f"call {moment}, {calls[moment]}"
        assert contents(folder) == expected, f"call {moment}, {calls[moment]}"
        shutil.rmtree(folder)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.distributed])])
def test_an_evaluation_killed_before_a_call_and_started_again(run: Run, tmp_path: Path, processes: int) -> None:
    outcome = run(tmp_path / "undisturbed", what="evaluation")
    assert outcome["status"] == [0]
    calls, expected = outcome["calls"][0], contents(tmp_path / "undisturbed")
    for call, fraction in [("generate", 0.5), ("fsync", 0.9), ("unlink", 0.5)]:
        moments = [number for number, name in enumerate(calls) if name == call]
        moment, folder = moments[int(fraction * len(moments))] // processes, tmp_path / call
        first = run(folder, what="evaluation", processes=processes, call=moment)
        assert killed(first) and contents(folder) != expected
        again = run(folder, what="evaluation", processes=processes)
        assert again["status"] == [0] * processes and contents(folder) == expected, call
        done = sum(one.count("generate") for outcome in (first, again) for one in outcome["calls"])
        assert done <= calls.count("generate") + 2 * processes


# Two processes, one of them at given calls


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_before_a_call_of_one_of_two_processes(run: Run, expected: dict, tmp_path: Path, rank: int) -> None:
    outcome = run(tmp_path / "alone", processes=2)
    assert outcome["status"] == [0, 0]
    assert contents(tmp_path / "alone") == expected
    assert [calls.count("score") for calls in outcome["calls"]] == [NUM_SHARDS // 2] * 2  # both have worked
    num_calls = len(outcome["calls"][rank])
    for moment in np.linspace(0, 0.9 * num_calls, 12).astype(int).tolist():
        folder = tmp_path / f"pairs-{moment}"
        assert killed(run(folder, processes=2, rank=rank, call=moment))
        processes = 1 + moment % 2  # any number may go on
        assert run(folder, processes=processes)["status"] == [0] * processes
        assert contents(folder) == expected


# At random moments


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_killed_at_random_moments(run: Run, expected: dict, tmp_path: Path, processes: int) -> None:
    """At least 20 moments, one in each twentieth of a run, and until each stage has been hit, for at most 60.

    Every other run is killed again before it may finish.
    """
    random = np.random.default_rng([SEED, processes])
    duration = run(tmp_path / "alone", processes=processes)["seconds"]
    hit: list[str] = []
    while len(hit) < NUM_MOMENTS or set(hit) != {"sampling", "ranking", "writing"}:
        assert len(hit) < 3 * NUM_MOMENTS
        folder = tmp_path / "pairs"
        moment = (len(hit) + random.random()) % NUM_MOMENTS / NUM_MOMENTS
        outcome = run(folder, processes=processes, seconds=moment * duration)
        if not killed(outcome):  # it was faster than the one before
            duration = outcome["seconds"]
        else:
            hit.append(STAGES.get(outcome["last"], "writing"))
            if len(hit) % 2:
                run(folder, processes=processes, seconds=random.random() * duration)
            assert run(folder, processes=processes)["status"] == [0] * processes, f"after {hit[-1]} at {moment}"
            assert contents(folder) == expected, f"after {hit[-1]} at {moment}"
        shutil.rmtree(folder, ignore_errors=True)


def data_and_losses(folder: Path) -> dict[str, Any]:
    """What rounds have made: the files of data and samples as bytes, and the loss of every step."""
    files = [*folder.glob("round-*/sampled/**/*"), *folder.glob("round-*/evaluation/samples.jsonl")]
    made: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.is_file() and not path.name.startswith("cache-")  # of `Dataset.map`, while training
    }
    for state in folder.glob("round-*/model/checkpoint-3/trainer_state.json"):
        made[state.parts[-4]] = [entry["loss"] for entry in json.loads(state.read_text())["log_history"]]
        made[f"{state.parts[-4]}/weights"] = (state.parents[1] / "model.safetensors").read_bytes()
        record = json.loads((state.parents[2] / "record.json").read_text())["phases"]
        train, judges = record["train"], record["judge"]["judges"]
        made[f"{state.parts[-4]}/record"] = (train["loss"], train["steps"], judges)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_rounds_killed_at_random_moments(run: Run, tmp_path: Path, processes: int) -> None:
    """At least 20 moments, and until each phase of each round has been hit, for at most 60."""
    random = np.random.default_rng([SEED, 100 + processes])
    outcome = run(tmp_path / "undisturbed", what="rounds", processes=processes)
    assert outcome["status"] == [0] * processes
    expected = data_and_losses(tmp_path / "undisturbed")
    assert [len(expected[f"round-{number}"]) for number in (1, 2)] == [3, 3]
    assert expected["round-1/weights"] != expected["round-2/weights"]
    hit: list[str] = []
    for moment in range(3 * NUM_MOMENTS):
        if len(hit) >= NUM_MOMENTS and len(set(hit)) == 7:
            break
        folder, rank = tmp_path / "rounds", int(random.integers(processes))
        call = int((moment + random.random()) % NUM_MOMENTS / NUM_MOMENTS * 0.95 * len(outcome["calls"][rank]))
        first = run(folder, what="rounds", processes=processes, rank=rank, call=call)
        assert killed(first)
        begun = [name for name in first["calls"][rank] if name in ("_sample", "_train", "_judge")]
        hit.append(f"{len(begun)} {begun[-1]}" if begun else "before")
        assert run(folder, what="rounds", processes=processes)["status"] == [0] * processes, f"after {hit[-1]}, {call}"
        assert data_and_losses(folder) == expected, f"after {hit[-1]}, call {call}, {first['last']}"
        shutil.rmtree(folder)
    assert len(set(hit) - {"before"}) == 7, hit
    print(hit)
