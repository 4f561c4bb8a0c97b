import json
import math
from pathlib import Path

import pytest
from datasets import Dataset

from prefopt_trl.sampling.store import SampleStore

SETTINGS = {"beta": 0.5, "seed": 0, "ranker": {"class": "Judge", "model": {"name": "one", "size": 3}}, "top": [1, 2]}
CANDIDATES = Dataset.from_dict({"prompt": ["a", "b"], "completions": [["x", "y"], ["z"]]})
PAIRS = Dataset.from_dict({"prompt": ["a"], "chosen": ["x"], "rejected": ["y"], "label_probability": [0.1 + 0.2]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "pairs"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def finished_store(folder: Path, settings: dict = SETTINGS) -> SampleStore:
    store = SampleStore(folder)
    store.begin(settings)
    store.save_candidates(CANDIDATES)
    store.finish(PAIRS, {"num_pairs": 1})
    return store


def test_a_new_folder_is_not_finished_and_not_made_by_asking(folder: Path) -> None:
    store = SampleStore(str(folder))
    assert store.finished(SETTINGS) is False
    assert store.candidates() is None
    assert not folder.parent.exists()


def test_the_steps_of_a_run(folder: Path) -> None:
    store = SampleStore(folder)
    store.begin(SETTINGS)
    assert names(folder) == {"manifest.json"}
    assert store.finished(SETTINGS) is False
    assert store.candidates() is None
    store.save_candidates(CANDIDATES)
    assert store.finished(SETTINGS) is False
    assert store.candidates().to_dict() == CANDIDATES.to_dict()
    store.finish(PAIRS, {"num_pairs": 1})
    assert store.finished(SETTINGS) is True
    assert names(folder) == {"candidates", "manifest.json", "pairs", "statistics.json"}  # no temporary names are left
    assert json.loads((folder / "manifest.json").read_text()) == {"finished": True, "settings": SETTINGS}
    assert json.loads((folder / "statistics.json").read_text()) == {"num_pairs": 1}


def test_another_process_finds_it_all(folder: Path) -> None:
    finished_store(folder)
    store = SampleStore(folder)
    assert store.finished(SETTINGS) is True
    assert store.pairs().to_dict() == PAIRS.to_dict()
    assert store.candidates().to_dict() == CANDIDATES.to_dict()


def test_what_json_writes_otherwise_is_no_difference(folder: Path) -> None:
    settings = {"beta": math.inf, "low": -math.inf, "stop_strings": ("a", "b"), "ranker": {"weights": {1: (0.1,)}}}
    store = finished_store(folder, settings)
    assert store.finished(settings) is True
    with pytest.raises(ValueError, match="beta: inf there, 0.5 now"):
        store.finished(settings | {"beta": 0.5})


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("now", "differences"),
    [
        ({**SETTINGS, "beta": 0.1}, ["beta: 0.5 there, 0.1 now"]),
        ({**SETTINGS, "beta": 0.1, "seed": 7}, ["beta: 0.5 there, 0.1 now", "seed: 0 there, 7 now"]),
        ({**SETTINGS, "top": [2, 1]}, ["top: [1, 2] there, [2, 1] now"]),
        ({**SETTINGS, "new": "n"}, ["new: None there, 'n' now"]),
        ({"beta": 0.5, "ranker": SETTINGS["ranker"], "top": [1, 2]}, ["seed: 0 there, None now"]),
        (
            {**SETTINGS, "ranker": {"class": "Judge", "model": {"name": "two", "size": 3}, "extra": True}},
            ["ranker.extra: None there, True now", "ranker.model.name: 'one' there, 'two' now"],
        ),
        (
            {**SETTINGS, "ranker": {"class": "Judge", "model": "one"}},
            ["ranker.model: {'name': 'one', 'size': 3} there, 'one' now"],
        ),
        ({**SETTINGS, "ranker": "Judge"}, [f"ranker: {SETTINGS['ranker']!r} there, 'Judge' now"]),
    ],
)
def test_other_settings_are_refused_and_named(folder: Path, finished: bool, now: dict, differences: list[str]) -> None:
    store = SampleStore(folder)
    store.begin(SETTINGS)
    if finished:
        store.finish(PAIRS, {})
    with pytest.raises(ValueError) as error:
        store.finished(now)
    first, *lines, remedy = str(error.value).splitlines()
    assert first == f"{folder} holds a dataset sampled with other settings:"
    assert lines == [f"  {line}" for line in differences]
    assert remedy == (
        "Set them as they were to reuse it, choose another `output_dir`, or delete the folder. To keep its "
        "candidates, pass `load_from_disk('.../candidates')` as `prompts` with another `output_dir`; without their "
        "column `rewards` they are scored again."
    )


@pytest.mark.parametrize("name", ["candidates", "pairs"])
def test_a_folder_without_a_manifest_is_not_taken_over(folder: Path, name: str) -> None:
    CANDIDATES.save_to_disk(str(folder / name))
    with pytest.raises(ValueError, match="holds candidates or pairs, and no manifest.json"):
        SampleStore(folder).finished(SETTINGS)


def test_other_files_in_the_folder_do_no_harm(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    finished_store(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_settings_that_json_cannot_write_are_refused_before_anything_is_made(folder: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        SampleStore(folder).finished({"beta": object()})
    assert not folder.exists()


def test_candidates_read_from_the_folder_can_be_saved_again_with_more(folder: Path) -> None:
    store = SampleStore(folder)
    store.begin(SETTINGS)
    store.save_candidates(CANDIDATES)
    rewards = [[0.1, 1 / 3], [2.0]]
    store.save_candidates(store.candidates().add_column("rewards", rewards))
    assert store.candidates().to_dict() == {**CANDIDATES.to_dict(), "rewards": rewards}
    assert names(folder) == {"candidates", "manifest.json"}


class Crash(BaseException):
    """As a signal is: nothing may catch it."""


def crash_while_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    def save_half(dataset: Dataset, path: str) -> None:
        Path(path).mkdir(parents=True)
        (Path(path) / "data-00000-of-00002.arrow").write_bytes(b"half")
        raise Crash

    monkeypatch.setattr(Dataset, "save_to_disk", save_half)


def test_a_crash_while_saving_leaves_what_was_there_and_no_half_of_the_new(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SampleStore(folder)
    store.begin(SETTINGS)
    with monkeypatch.context() as patch:
        crash_while_saving(patch)
        with pytest.raises(Crash):
            store.save_candidates(CANDIDATES)
    assert store.candidates() is None
    store.save_candidates(CANDIDATES)
    with monkeypatch.context() as patch:
        crash_while_saving(patch)
        with pytest.raises(Crash):
            store.save_candidates(CANDIDATES.select([0]))
        with pytest.raises(Crash):
            store.finish(PAIRS, {})
    assert store.candidates().to_dict() == CANDIDATES.to_dict()
    assert store.finished(SETTINGS) is False
    assert not (folder / "pairs").exists()
    # The next run goes on, and what the crash left is cleared away
    store.save_candidates(CANDIDATES)
    store.finish(PAIRS, {})
    assert not list(folder.rglob("data-00000-of-00002.arrow"))
    assert store.pairs().to_dict() == PAIRS.to_dict()
    assert names(folder) == {"candidates", "manifest.json", "pairs", "statistics.json"}


def test_pairs_without_the_rest_are_not_finished(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SampleStore(folder)
    store.begin(SETTINGS)
    with pytest.raises(TypeError):
        store.finish(PAIRS, {"num_pairs": object()})
    assert store.finished(SETTINGS) is False
    assert names(folder) == {"manifest.json", "pairs"}
    store.finish(PAIRS, {})
    assert store.finished(SETTINGS) is True
