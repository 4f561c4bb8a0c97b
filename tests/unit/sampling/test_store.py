import errno
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, Features, List, Value, load_from_disk

from prefopt_trl.runtime.settings import write_text, writing
from prefopt_trl.sampling import store as module
from prefopt_trl.sampling.store import SampleStore
from tests.hub_server import contents

SETTINGS = {"beta": 0.5, "seed": 0, "ranker": {"class": "Judge", "model": {"name": "one", "size": 3}}, "top": [1, 2]}
ROWS = [{"prompt": "a", "rewards": [0.1 + 0.2, -1e-300]}, {"prompt": "b\u2028\r\né", "rewards": [2.0]}]
FEATURES = Features({"prompt": Value("string"), "rewards": List(Value("float64"))})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "pairs"


def names(folder: Path) -> set[str]:
    return set(contents(folder))


def begun_store(folder: Path, settings: dict = SETTINGS) -> SampleStore:
    store = SampleStore(folder)
    store.begin(settings, prompts_per_shard=2, num_shards=3)
    return store


def finished_store(folder: Path, settings: dict = SETTINGS) -> SampleStore:
    store = begun_store(folder, settings)
    store.write_shard(0, "ranked", ROWS)
    store.write_dataset("candidates", ROWS, FEATURES)
    store.write_dataset("pairs", ROWS[:1], FEATURES)
    store.finish()
    return store


PAIRS = {"pairs/data-00000-of-00001.arrow", "pairs/dataset_info.json", "pairs/state.json"}
CANDIDATES = {name.replace("pairs", "candidates") for name in PAIRS}


def test_a_new_folder_is_not_finished_and_not_made_by_asking(folder: Path) -> None:
    store = SampleStore(str(folder))
    assert store.finished(SETTINGS) is False
    assert store.is_finished() is False
    assert store.shards_with("ranked") == []
    assert store.has_shard(0, "candidates") is False
    assert not folder.parent.exists()


def test_the_steps_of_a_run(folder: Path) -> None:
    store = begun_store(folder)
    assert names(folder) == {"manifest.json"}
    assert store.layout() == (2, 3)
    assert store.finished(SETTINGS) is False
    store.write_shard(1, "candidates", ROWS)
    assert store.has_shard(1, "candidates") and not store.has_shard(1, "ranked")
    assert store.read_shard(1, "candidates") == ROWS
    store.write_shard(1, "ranked", ROWS[:1])
    store.write_shard(0, "ranked", ROWS[:1])
    assert store.shards_with("ranked") == [0, 1]
    assert store.write_dataset("candidates", ROWS, FEATURES).to_list() == ROWS
    store.write_dataset("pairs", ROWS[:1], FEATURES)
    assert store.finished(SETTINGS) is store.is_finished() is False
    shards = {"shards/00000.ranked.jsonl", "shards/00001.candidates.jsonl", "shards/00001.ranked.jsonl"}
    assert names(folder) == {"manifest.json"} | shards | CANDIDATES | PAIRS
    (folder / "statistics.png.partial").write_text("half")  # of a run that was killed
    store.finish()
    assert store.finished(SETTINGS) is store.is_finished() is True
    assert names(folder) == {"manifest.json"} | CANDIDATES | PAIRS
    assert not (folder / "shards").exists()
    manifest = {"finished": True, "num_shards": 3, "prompts_per_shard": 2, "settings": SETTINGS}
    assert json.loads((folder / "manifest.json").read_text()) == manifest


def test_another_process_finds_it_all(folder: Path) -> None:
    finished_store(folder)
    store = SampleStore(folder)
    assert store.finished(SETTINGS) is True
    assert store.pairs().to_list() == ROWS[:1]
    assert load_from_disk(str(folder / "candidates")).to_list() == ROWS
    store.wait_for_settings(SETTINGS)
    store.wait_until_finished()


def test_a_run_that_goes_on_keeps_the_shards_it_began_with(folder: Path) -> None:
    begun_store(folder).write_shard(0, "candidates", ROWS)
    store = SampleStore(folder)
    store.begin(SETTINGS, prompts_per_shard=5, num_shards=1)
    assert store.layout() == (2, 3)


def test_a_dataset_is_written_anew_without_a_trace_of_the_old_one(folder: Path) -> None:
    store = begun_store(folder)
    store.write_dataset("pairs", ROWS * 9, FEATURES)
    before = (folder / "pairs" / "state.json").read_bytes()
    (folder / "pairs" / "data-00001-of-00002.arrow").write_bytes(b"of an earlier run")
    assert store.write_dataset("pairs", ROWS, FEATURES).to_list() == store.pairs().to_list() == ROWS
    assert names(folder) == {"manifest.json"} | PAIRS
    assert (folder / "pairs" / "state.json").read_bytes() != before


def test_rows_are_written_one_after_the_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write_batch = module.ArrowWriter.write_examples_on_file

    def count(writer: module.ArrowWriter) -> None:
        written.append(len(writer.current_examples))
        write_batch(writer)

    monkeypatch.setattr(module.ArrowWriter, "write_examples_on_file", count)
    made = begun_store(folder).write_dataset("pairs", (ROWS[row % 2] for row in range(250)), FEATURES)
    assert (len(made), max(written), sum(written)) == (250, 100, 250)


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
    store = finished_store(folder) if finished else begun_store(folder)
    if not finished:
        store.write_shard(0, "candidates", ROWS)
    with pytest.raises(ValueError) as error:
        store.finished(now)
    first, *lines, remedy = str(error.value).splitlines()
    assert first == f"{folder} holds a sampled dataset, made with other settings:"
    assert lines == [f"  {line}" for line in differences]
    load = f"from_disk('{folder}/candidates')"
    if not finished:
        load = f"dataset('json', data_files='{folder}/shards/*.candidates.jsonl', split='train')"
    assert remedy == (
        "Set them back to reuse it, choose another `output_dir`, or delete the folder. To keep its candidates, pass "
        f"`load_{load}` as `prompts` with another `output_dir`; remove their column `rewards` to score them again. "
        "(If only `ranker.function` differs and its rewards are the same, give `FunctionRanker` a `version`.)"
    )


def test_a_manifest_alone_does_not_count(folder: Path) -> None:
    store = begun_store(folder)
    other = SETTINGS | {"beta": 0.1}
    assert store.finished(other) is False
    store.begin(other, prompts_per_shard=4, num_shards=2)
    assert store.layout() == (4, 2)
    store.wait_for_settings(other)


@pytest.mark.parametrize("there", [False, True])
def test_settings_that_do_not_come_are_not_waited_for(folder: Path, there: bool, monkeypatch) -> None:
    monkeypatch.setattr(module, "MANIFEST_SECONDS", 0.0)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    if there:
        begun_store(folder, SETTINGS | {"beta": 0.1})
    with pytest.raises(RuntimeError, match="must be on a file system that all processes see"):
        SampleStore(folder).wait_for_settings(SETTINGS)


@pytest.mark.parametrize("name", ["README.md", "statistics.json", "shards/00000.ranked.jsonl", "candidates", "pairs"])
def test_what_would_be_overwritten_is_not_taken_over_without_a_manifest(folder: Path, name: str) -> None:
    if name in ("candidates", "pairs"):
        Dataset.from_list(ROWS).save_to_disk(str(folder / name))
    else:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
    before = contents(folder)
    message = "holds README.md, candidates, .* or shards, but no manifest.json with their settings"
    with pytest.raises(ValueError, match=message):
        SampleStore(folder).finished(SETTINGS)
    assert contents(folder) == before


def test_a_finished_folder_without_its_pairs_says_what_to_do(folder: Path) -> None:
    store = finished_store(folder)
    shutil.rmtree(folder / "pairs")
    for settings in (SETTINGS, SETTINGS | {"beta": 0.1}):
        with pytest.raises(ValueError, match="is marked as finished, but `pairs` is missing. Delete the folder"):
            store.finished(settings)
    assert names(folder) == {"manifest.json"} | CANDIDATES


def test_other_files_in_the_folder_do_no_harm(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    finished_store(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_settings_that_json_cannot_write_are_refused_before_anything_is_made(folder: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        SampleStore(folder).finished({"beta": object()})
    assert not folder.exists()


# One run at a time


def test_a_folder_is_held_by_one_at_a_time(folder: Path) -> None:
    message = f"Another run is making a sampled dataset in {folder}. Wait for it, or stop it"
    with SampleStore(folder).held():
        begun_store(folder)  # the holder may write
        with pytest.raises(RuntimeError) as error, SampleStore(folder).held():
            pass
        assert str(error.value).startswith(message)
        with SampleStore(folder.with_name("other")).held():
            pass
    with SampleStore(folder).held(), pytest.raises(ZeroDivisionError), SampleStore(folder.with_name("other")).held():
        raise ZeroDivisionError
    with SampleStore(folder.with_name("other")).held():  # also after an error
        pass
    assert names(folder) == {"manifest.json"}


HOLDER = """
import sys
from prefopt_trl.sampling.store import SampleStore
with SampleStore(sys.argv[1]).held():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_holds_a_folder_until_it_dies(folder: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], text=True, **pipes)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RuntimeError, match="Another run is making a sampled dataset in"),
            SampleStore(folder).held(),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with SampleStore(folder).held():
        pass


def test_a_file_system_without_locks_is_used_and_said(folder: Path, monkeypatch, caplog) -> None:
    def without_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", without_locks)
    with SampleStore(folder).held():
        begun_store(folder)
    assert caplog.messages == [f"{folder} cannot be locked. Make sure that no other run uses it."]


# Durable


def test_what_is_written_is_synced_before_and_its_name_after_it_is_given(folder: Path, monkeypatch) -> None:
    begun_store(folder)
    done = []
    replace, sync, opened = os.replace, os.fsync, os.open
    paths: dict[int, str] = {}

    def open_it(path: Path, *how: int) -> int:
        descriptor = opened(path, *how)
        paths[descriptor] = Path(path).relative_to(folder).as_posix()
        return descriptor

    monkeypatch.setattr(module.os, "open", open_it)
    monkeypatch.setattr(module.os, "fsync", lambda at: (done.append(f"sync {paths[at]}"), sync(at)))
    monkeypatch.setattr(module.os, "replace", lambda old, new: (done.append(f"name {new.name}"), replace(old, new)))
    write_text(folder / "README.md", "text")
    own = f"{socket.gethostname()}-{os.getpid()}.partial"  # so that two runs never write to one file
    assert done == [f"sync README.md.{own}", "name README.md", "sync ."]
    done.clear()
    with writing(folder / "pairs") as temporary:
        temporary.mkdir()
        (temporary / "one").touch()
    assert done == [f"sync pairs.{own}", f"sync pairs.{own}/one", "name pairs", "sync ."]


def test_what_cannot_be_written_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = begun_store(folder)
    store.write_shard(2, "ranked", ROWS)
    write_text(folder / "README.md", "old")
    store.write_dataset("pairs", ROWS, FEATURES)
    before = contents(folder)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    writes = {
        "README.md": lambda: write_text(folder / "README.md", "new"),
        "manifest.json": store.finish,
        "shards/00002.ranked.jsonl": lambda: store.write_shard(2, "ranked", ROWS[:1]),
        "shards/pairs.arrow": lambda: store.write_dataset("pairs", ROWS[:1], FEATURES),
    }
    for name, write in writes.items():
        with pytest.raises(OSError, match="No space left on device") as error:
            write()
        assert error.value.__notes__[0].startswith(f"Could not write {folder / name}, which is unchanged.")
        assert contents(folder) == before


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}'])
def test_a_manifest_of_something_else_is_refused(folder: Path, content: str) -> None:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json is not the manifest of a sampled dataset. Choose another"):
        SampleStore(folder).finished(SETTINGS)
    assert (folder / "manifest.json").read_text() == content


def test_a_manifest_that_is_written_after_the_look_for_it_is_missing(tmp_path: Path, monkeypatch) -> None:
    made = SampleStore(tmp_path)

    def too_late(path: Path) -> None:
        path.write_text("{}")

    monkeypatch.setattr(module, "read_json", too_late)
    assert made._manifest() is None
