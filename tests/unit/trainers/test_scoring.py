"""The rewards of completions do not depend on the processes that make them, and are made once."""

import json
import logging
import threading
from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from prefopt_trl import FunctionRanker, PairwiseRanker
from prefopt_trl.trainers import prepare
from prefopt_trl.trainers.pro_trainer import PROTrainer

WORDS = [" So.", " No", " Because", " it is", " yes, indeed"]
ROWS = Dataset.from_dict(
    {
        "prompt": ["Why?", "The dog", "Mix", "Tell me", "A"],
        "completions": [[*WORDS[: 2 + row % 3], WORDS[row]] for row in range(5)],
        "source": list("abcde"),
    }
)


class Asked:
    """A reward function that writes down the prompts it is asked about."""

    def __init__(self, sign: float = 1.0) -> None:
        self.prompts: list[str] = []
        self.sign = sign

    def __call__(self, prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        self.prompts += dict.fromkeys(prompts)
        return [self.sign * len(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]


def ranker(function: Callable[..., list[float]], version: str = "1") -> FunctionRanker:
    return FunctionRanker(function, version=version)


LENGTHS = [[float(len(row["prompt"] + text)) for text in row["completions"]] for row in ROWS]


@pytest.fixture
def run_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Runs a call as each of several processes, which are threads here, and returns what each returned or raised."""
    here = threading.local()

    def run(call: Callable[[int], Any], num_processes: int) -> list[Any]:
        barrier, given, results = threading.Barrier(num_processes, timeout=30), {}, {}

        def exchange(own: Any) -> list[Any]:
            given[here.state.process_index] = own
            barrier.wait()
            everything = [given[index] for index in range(num_processes)]
            barrier.wait()
            return everything

        monkeypatch.setattr(prepare, "process_state", lambda: here.state)
        monkeypatch.setattr(prepare, "gather_object", lambda own: list(chain(*exchange(own))))
        monkeypatch.setattr(prepare, "broadcast_object_list", lambda own: exchange(own)[0])

        def process(index: int) -> None:
            here.state = SimpleNamespace(process_index=index, num_processes=num_processes, is_main_process=index == 0)
            try:
                results[index] = call(index)
            except Exception as error:
                barrier.abort()  # as the launcher stops the others
                results[index] = error

        threads = [threading.Thread(target=process, args=(index,)) for index in range(num_processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[index] for index in range(num_processes)]

    return run


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])  # more than rows
def test_each_process_scores_its_share_and_has_all_rewards(num_processes, run_processes, tmp_path):
    asked = [Asked() for _ in range(num_processes)]
    found = run_processes(lambda n: prepare.score_or_read(ROWS, "train", ranker(asked[n]), tmp_path), num_processes)
    assert found == [LENGTHS] * num_processes
    shares = [one.prompts for one in asked]
    assert list(chain(*shares)) == ROWS["prompt"][:]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [file.name for file in (tmp_path / "scored").iterdir()] == ["train.json"]
    assert json.loads((tmp_path / "scored" / "train.json").read_text())["rewards"] == LENGTHS


def test_a_baseline_is_the_same_in_every_share(run_processes, tiny_llama_dir, tmp_path):
    rankers = [PairwiseRanker(tiny_llama_dir) for _ in range(3)]
    alone = prepare.score_or_read(ROWS, "train", rankers[0], tmp_path / "alone")
    assert [0.0 in row for row in alone] == [True] * 5 and len({reward for row in alone for reward in row}) > 5
    for found in run_processes(lambda n: prepare.score_or_read(ROWS, "train", rankers[n], tmp_path / "many"), 3):
        for row, expected in zip(found, alone, strict=True):
            assert row == pytest.approx(expected, abs=1e-4)


def test_the_main_process_alone_reads_and_writes(run_processes, tmp_path):
    """As where the machines share no folder."""

    def score(asked):
        return run_processes(
            lambda n: prepare.score_or_read(ROWS, "train", ranker(asked[n]), tmp_path / f"machine-{n}"), 2
        )

    assert score([Asked(), Asked()]) == [LENGTHS] * 2
    again = [Asked(), Asked()]
    assert score(again) == [LENGTHS] * 2
    assert [one.prompts for one in again] == [[], []]
    assert not (tmp_path / "machine-1").exists()


def test_an_error_names_the_row_of_the_dataset(run_processes, tmp_path):
    def nan_for_the_last(prompts, completions, **kwargs):
        return [float("nan") if prompt == "A" else 1.0 for prompt in prompts]

    _, error = run_processes(lambda n: prepare.score_or_read(ROWS, "train", ranker(nan_for_the_last), tmp_path), 2)
    assert "nan for completion 0 of prompt row 2" in str(error)
    assert error.__notes__ == ["Row 0 of these 3 is row 2 of the train dataset."]
    assert not (tmp_path / "scored").exists()


@pytest.mark.parametrize("others", ["ranker", "completions"])
def test_rewards_are_read_again_for_the_same_rows_and_ranker_only(others, tmp_path):
    def score(rows, function, version="1"):
        return prepare.score_or_read(rows, "train", ranker(function, version), tmp_path)

    assert score(ROWS, Asked()) == LENGTHS
    same = Asked()
    assert score(ROWS, same) == LENGTHS
    assert same.prompts == []
    changed = Asked(-1.0)
    if others == "ranker":
        assert score(ROWS, changed, "2") == [[-reward for reward in row] for row in LENGTHS]
    else:
        assert score(ROWS.select([1, 0]), changed) == [[-reward for reward in LENGTHS[row]] for row in (1, 0)]
    assert changed.prompts
    assert score(ROWS, Asked()) == LENGTHS  # made anew, in place of the others


def test_a_trainer_that_starts_again_reads_the_rewards(make, caplog, tmp_path):
    given = {"eval_dataset": {"one": ROWS.select([3])}}
    made = make(PROTrainer, ROWS.remove_columns("source"), ranker=ranker(Asked()), **given)
    assert sorted(file.name for file in (tmp_path / "scored").iterdir()) == ["eval_one.json", "train.json"]
    again = Asked()
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="prefopt_trl.trainers.prepare"):
        read = make(PROTrainer, ROWS.remove_columns("source"), ranker=ranker(again), **given)
    assert again.prompts == []
    assert read.train_dataset["rewards"][:] == made.train_dataset["rewards"][:] == LENGTHS
    assert [message for message in caplog.messages if message.startswith("Reusing")] == [
        f"Reusing the rewards of the {name} dataset in {tmp_path}/scored/{name}.json, made by the same ranker."
        for name in ("train", "eval_one")
    ]
