"""The work in shards: on any number of processes, stopped anywhere, on a full disk, the same bytes."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value, load_dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_trl.generation import generators
from prefopt_trl.rankers import FunctionRanker
from prefopt_trl.sampling import pipeline, shards, store
from prefopt_trl.sampling.pipeline import build_preference_dataset
from tests.hub_server import contents

PROMPTS = [f"Prompt {row}: é\u2028{'x' * row}" for row in range(7)]
NUM_SHARDS = 4  # of two prompts with six candidates each, the last one of a single prompt
FILES = ["README.md", "manifest.json", "statistics.json", "statistics.png"]
FILES += [f"{name}/{file}" for name in ("candidates", "pairs") for file in ("data-00000-of-00001.arrow", "state.json")]
FILES += [f"{name}/dataset_info.json" for name in ("candidates", "pairs")]


class Crash(BaseException):
    """As a signal is: nothing may catch it."""


def mean_code(prompts, completions, **kwargs):
    """The mean code of a completion's characters."""
    return [float(np.mean([ord(letter) for letter in completion])) for completion in completions]


RANKER = FunctionRanker(mean_code)


def fake_candidates(
    model, tokenizer, prompt_ids, num_completions, options=None, *, seed, keep_logps, generation_kwargs=None
) -> list[SimpleNamespace]:
    """Six letters per completion, drawn with the seed."""
    drawn = np.random.default_rng(seed).integers(97, 123, (len(prompt_ids), num_completions, 6))
    return [
        SimpleNamespace(
            texts=["".join(map(chr, letters)) for letters in row],
            finished=[bool(letters[0] > 100) for letters in row],
        )
        for row in drawn
    ]


def logps_of(completions: Sequence[str]) -> list[float | None]:
    """The number of a completion's first letter; none for those that end early in the alphabet."""
    return [None if completion[-1] < "f" else -ord(completion[0]) / 7 for completion in completions]


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "SHARD_COMPLETIONS", 12)
    monkeypatch.setattr(pipeline, "GIVEN_COMPLETIONS", 12)
    monkeypatch.setattr(store, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(generators, "sample_candidates", fake_candidates)
    monkeypatch.setattr(shards, "sampled_logps", lambda tokenizer, prompt, completions, *others: logps_of(completions))
    monkeypatch.setattr(pipeline, "plot_statistics", lambda *given: given[-1].write_bytes(b"drawn"))


@pytest.fixture(scope="module")
def build(tiny_llama_dir: str) -> Callable[..., Dataset]:
    policy = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)

    def call(output_dir: Path, prompts: Any = PROMPTS, ranker: Any = RANKER, **options: Any) -> Dataset:
        how = {"num_candidates": 6, "num_samples": 4} | options
        return build_preference_dataset(prompts, policy, tokenizer, ranker, output_dir=output_dir, **how)

    return call


@pytest.fixture
def undisturbed(build: Callable[..., Dataset], tmp_path: Path) -> dict[str, bytes]:
    build(tmp_path / "undisturbed")
    return contents(tmp_path / "undisturbed")


def given_candidates() -> Dataset:
    sampled = fake_candidates(None, None, PROMPTS, 6, seed=3, keep_logps=True)
    columns = {"finished": [row.finished for row in sampled], "logps": [logps_of(row.texts) for row in sampled]}
    return Dataset.from_dict({"prompt": PROMPTS, "completions": [row.texts for row in sampled], **columns})


def failing(call: Callable[..., Any], at: int, error: BaseException) -> Callable[..., Any]:
    """`call` that raises the error in its `at`-th call."""
    calls = iter(range(1, 1000))

    def fail(*args: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise error
        return call(*args, **options)

    return fail


# What is made


def test_the_folder_has_no_trace_of_the_shards_or_of_where_and_when(build, undisturbed, tmp_path: Path) -> None:
    assert sorted(undisturbed) == sorted(FILES)
    build(tmp_path / "another" / "folder")
    assert contents(tmp_path / "another" / "folder") == undisturbed
    # Nor are cached results of one taken for those of another
    names = ("undisturbed/pairs", "another/folder/pairs", "undisturbed/candidates", "another/folder/candidates")
    fingerprints = [load_from_disk(str(tmp_path / name))._fingerprint for name in names]
    fingerprints.append(build(tmp_path / "other", seed=1)._fingerprint)
    assert fingerprints[0] == fingerprints[1] and fingerprints[2] == fingerprints[3]
    assert len(set(fingerprints)) == 3


def test_each_shard_has_a_seed_of_its_own(build, tmp_path: Path) -> None:
    build(tmp_path, seed=5)
    candidates = load_from_disk(str(tmp_path / "candidates"))
    assert candidates["prompt"] == PROMPTS
    seeds = [np.random.SeedSequence([5, shard]).generate_state(1)[0] for shard in range(NUM_SHARDS)]
    expected = [
        row.texts
        for shard, seed in enumerate(seeds)
        for row in fake_candidates(None, None, PROMPTS[2 * shard : 2 * shard + 2], 6, seed=seed, keep_logps=False)
    ]
    assert candidates["completions"] == expected


@pytest.mark.parametrize("pairing", ["tournament", "ranking"])
def test_what_is_selected_does_not_depend_on_the_shards(pairing, build, tmp_path: Path, monkeypatch) -> None:
    build(tmp_path / "shards", given_candidates(), pairing=pairing)
    monkeypatch.setattr(pipeline, "GIVEN_COMPLETIONS", 600)
    build(tmp_path / "whole", given_candidates(), pairing=pairing)
    cut, whole = contents(tmp_path / "shards"), contents(tmp_path / "whole")
    layouts = [json.loads(files.pop("manifest.json")) for files in (cut, whole)]
    assert [layout["num_shards"] for layout in layouts] == [NUM_SHARDS, 1]
    assert cut == whole


TEXT, NUMBER = Value("string"), Value("float64")
MESSAGES = List({"role": TEXT, "content": TEXT})


@pytest.mark.parametrize("pairing", ["all", "ranking"])
@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_every_column_has_its_type(given: bool, conversational: bool, pairing: str, build, tmp_path: Path) -> None:
    def wrapped(text: str, role: str) -> Any:
        return [{"role": role, "content": text}] if conversational else text

    ranker = FunctionRanker(lambda prompts, completions: [sum(map(ord, str(text))) for text in completions])
    form = MESSAGES if conversational else TEXT
    others = {"source": TEXT, "label": Value("int8"), "notes": List(TEXT)}
    rows = {"prompt": [wrapped(text, "user") for text in PROMPTS], "source": [None] * 7, "label": range(7)}
    rows["notes"] = [[]] * 6 + [["late"]]
    features = {"prompt": form, **others}
    made = {"finished": List(Value("bool"))}
    if given:
        rows["completions"] = [[wrapped(text, "assistant") for text in "abcde"]] * 7
        rows["rewards"], made = [[1, 2, 3, 4, 5]] * 7, {}
        features |= {"completions": List(form), "rewards": List(Value("int32"))}
    prompts = Dataset.from_dict(rows, features=Features(features))
    pairs = build(tmp_path, prompts, ranker, pairing=pairing)
    candidates = load_from_disk(str(tmp_path / "candidates"))
    assert candidates.features == {"completions": List(form), "rewards": List(NUMBER), **made, **features}
    assert [candidates[name][:] for name in others] == [prompts[name][:] for name in others]
    if pairing == "ranking":
        assert pairs.features == {"prompt": form, **others, "completions": List(form), "rewards": List(NUMBER)}
    else:
        numbers = dict.fromkeys(["chosen_reward", "rejected_reward", "label_probability"], NUMBER)
        assert pairs.features == {"prompt": form, **others, "chosen": form, "rejected": form, **numbers}
    label = dict(zip(map(str, prompts["prompt"]), prompts["label"], strict=True))
    assert all(row["label"] == label[str(row["prompt"])] for row in pairs)


@pytest.mark.parametrize("given", [False, True])
def test_pairs_keep_the_log_probabilities_of_their_completions(
    given: bool, build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(model, tokenizer, prompts, pairs, max_length):
        return np.array([[-float(len(prompt)), -0.5] for prompt, _ in zip(prompts, pairs, strict=True)])

    monkeypatch.setattr(shards, "pair_logps", score)
    pairs = build(tmp_path, given_candidates() if given else PROMPTS, keep_logps=True)
    assert load_from_disk(str(tmp_path / "candidates")).features["logps"] == List(NUMBER)
    assert len(pairs) == 14
    scored = 0
    for row in pairs:
        logps = logps_of([row["chosen"], row["rejected"]])
        if None in logps:  # then both are scored by the policy, as one pair
            logps, scored = [-float(len(row["prompt"])), -0.5], scored + 1
        assert [row["ref_chosen_logps"], row["ref_rejected_logps"]] == logps
    assert 0 < scored < 14


def test_log_probabilities_that_are_not_there_cannot_be_kept(build, tmp_path: Path) -> None:
    assert "ref_chosen_logps" not in build(tmp_path / "not_asked_for", given_candidates()).column_names
    with pytest.raises(ValueError, match="`keep_logps` needs a column `logps` beside the `completions`"):
        build(tmp_path / "asked_for", given_candidates().remove_columns("logps"), keep_logps=True)
    with pytest.raises(ValueError, match=r"Row \d+ of `prompts` has a candidate without a log-probability in `logps`"):
        build_preference_dataset(
            given_candidates(), None, None, RANKER, output_dir=tmp_path / "no_policy", num_samples=4, keep_logps=True
        )


def test_candidates_come_from_a_file_too(build, tmp_path: Path) -> None:
    file = tmp_path / "candidates.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in given_candidates()))
    pairs = build(tmp_path / "file", file)
    assert pairs.to_dict() == build(tmp_path / "dataset", given_candidates()).to_dict()
    assert build(tmp_path / "file", str(file)).to_dict() == pairs.to_dict()


def test_candidates_that_do_not_fit_are_named_by_their_row(build, tmp_path: Path) -> None:
    rows = given_candidates().to_list()
    rows[5]["logps"].pop()
    with pytest.raises(ValueError, match="row 5 of `prompts` are 6 completions and 5 `logps`"):
        build(tmp_path / "pairs", Dataset.from_list(rows))
    assert not (tmp_path / "pairs").exists()


def test_a_prompt_of_a_later_shard_is_named_by_its_row_before_anything_is_sampled(build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The prompt of row 6 .*1 of 7 prompts do"):
        build(tmp_path / "pairs", [*PROMPTS[:6], "x" * 99], max_length=90)
    assert not (tmp_path / "pairs").exists()


# Stopped and started again


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("at", range(1, 17))
def test_killed_at_any_name_given(at: int, moment: str, build, undisturbed, tmp_path: Path, monkeypatch) -> None:
    calls = iter(range(1, 1000))
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if moment == "after":
            replace(source, target)
        if next(calls) == at:
            raise Crash
        if moment == "before":
            replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", killed)
        with pytest.raises(Crash):
            build(tmp_path / "killed")
    assert build(tmp_path / "killed").to_dict() == load_from_disk(str(tmp_path / "undisturbed" / "pairs")).to_dict()
    assert contents(tmp_path / "killed") == undisturbed


def test_killed_again_and_again(build, undisturbed, tmp_path: Path, monkeypatch) -> None:
    kills = 0
    for at in range(1, 40):  # later each time, as a run that is killed at once gets nowhere
        with monkeypatch.context() as patch:
            patch.setattr(store.os, "fsync", failing(os.fsync, at, Crash()))
            try:
                build(tmp_path / "killed")
                break
            except Crash:
                kills += 1
    assert kills > 15
    assert contents(tmp_path / "killed") == undisturbed


def test_killed_while_the_shards_are_removed(build, undisturbed, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", failing(shutil.rmtree, 1, Crash()))
        with pytest.raises(Crash):
            build(tmp_path / "killed")
    assert len(contents(tmp_path / "killed")) == len(undisturbed) + 2 * NUM_SHARDS
    build(tmp_path / "killed")
    assert contents(tmp_path / "killed") == undisturbed


@pytest.mark.parametrize("at", range(1, 3 * NUM_SHARDS, 2))
def test_what_is_sampled_and_ranked_is_not_done_again(at: int, build, undisturbed, tmp_path, monkeypatch) -> None:
    sampled, compared = [], []

    def count(*args: Any, seed: int, **options: Any) -> list[SimpleNamespace]:
        sampled.append(seed)
        return fake_candidates(*args, seed=seed, **options)

    monkeypatch.setattr(generators, "sample_candidates", count)
    select = shards.select_and_pair
    with monkeypatch.context() as patch:
        patch.setattr(shards, "select_and_pair", failing(select, (at + 2) // 3, RuntimeError("the judge is out")))
        with pytest.raises(RuntimeError, match="the judge is out") as error:
            build(tmp_path / "stopped")
    shard = (at - 1) // 3
    assert error.value.__notes__[0] == f"Row 0 of these {1 if shard == 3 else 2} is row {2 * shard} of `prompts`."
    files = {path.name for path in (tmp_path / "stopped" / "shards").iterdir()}
    assert files == {f"{done:05d}.candidates.jsonl" for done in range(shard + 1)} | {
        f"{done:05d}.ranked.jsonl" for done in range(shard)
    }
    monkeypatch.setattr(shards, "select_and_pair", lambda *rest, **how: compared.append(1) or select(*rest, **how))
    build(tmp_path / "stopped")
    assert (len(sampled), len(set(sampled)), len(compared)) == (NUM_SHARDS, NUM_SHARDS, NUM_SHARDS - shard)
    assert contents(tmp_path / "stopped") == undisturbed


def test_candidates_of_an_unfinished_folder_can_be_kept(build, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards, "select_and_pair", failing(shards.select_and_pair, 2, RuntimeError("out")))
        with pytest.raises(RuntimeError):
            build(tmp_path / "first")
    with pytest.raises(ValueError, match="rejection_beta: 0.5 there, 2.0 now") as error:
        build(tmp_path / "first", rejection_beta=2.0)
    file = str(tmp_path / "first" / "shards" / "*.candidates.jsonl")
    advised = f"load_dataset('json', data_files='{file}', split='train')"
    assert f"pass `{advised}` as `prompts`" in str(error.value)
    kept = load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert kept["prompt"] == PROMPTS[:4]
    assert len(build(tmp_path / "second", kept, rejection_beta=2.0)) == 8


def test_a_manifest_with_nothing_made_may_be_overwritten(build, undisturbed, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(generators, "sample_candidates", failing(fake_candidates, 1, RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            build(tmp_path / "stopped", rejection_beta=2.0)
    build(tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == undisturbed


# A full disk

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["fsync", "write_bytes", "ArrowWriter.write", "save_to_disk"])
@pytest.mark.parametrize("at", [1, 2, 3, 8])
def test_a_full_disk_is_named_and_harms_nothing(place, at, build, undisturbed, tmp_path, monkeypatch) -> None:
    owners = {"fsync": os, "write_bytes": Path, "ArrowWriter.write": store.ArrowWriter, "save_to_disk": Dataset}
    owner, name = owners[place], place.split(".")[-1]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), at, FULL))
        if place == "save_to_disk" and at > 2:  # there are two of them
            build(tmp_path / "full")
            assert contents(tmp_path / "full") == undisturbed
            return
        with pytest.raises(OSError, match="No space left on device") as error:
            build(tmp_path / "full")
    assert error.value.errno == errno.ENOSPC
    saved = len(list((tmp_path / "full" / "shards").glob("*.ranked.jsonl")))
    begun = (tmp_path / "full" / "manifest.json").exists()
    notes = "\n".join(error.value.__notes__)
    assert f"Could not write {tmp_path / 'full'}/" in notes
    assert (f"{saved} of {NUM_SHARDS} shards are saved" if begun else "Nothing is saved") in notes
    assert "the same call resumes from there" in notes
    assert not list((tmp_path / "full").rglob("*.partial"))
    if place in ("ArrowWriter.write", "save_to_disk"):
        assert saved == NUM_SHARDS
    build(tmp_path / "full")
    assert contents(tmp_path / "full") == undisturbed


# Several processes


@pytest.fixture
def run_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Any]]]:
    """Runs a call as each of several processes, which are threads here, and returns what each returned or raised."""
    here = threading.local()
    monkeypatch.setattr(pipeline, "process_state", lambda: here.state)

    def run(call: Callable[[], Any], indices: list[int], num_processes: int) -> list[Any]:
        results: dict[int, Any] = {}

        def process(index: int) -> None:
            here.state = SimpleNamespace(process_index=index, num_processes=num_processes, is_main_process=index == 0)
            try:
                results[index] = call()
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=process, args=(index,)) for index in indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[index] for index in indices]

    yield run


@pytest.mark.parametrize("num_processes", [2, 3, 6])
def test_the_number_of_processes_leaves_no_trace(
    num_processes: int, build, undisturbed, run_processes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = load_from_disk(str(tmp_path / "undisturbed" / "pairs")).to_dict()
    capsys.readouterr()
    made = run_processes(lambda: build(tmp_path / "many"), list(range(num_processes)), num_processes)
    assert [pairs.to_dict() for pairs in made] == [expected] * num_processes
    assert contents(tmp_path / "many") == undisturbed
    printed = capsys.readouterr()
    assert printed.out.count("Pairs saved in") == 1
    assert printed.err.count("Sampling and ranking: 100%|██████████| 7/7") == 1


def test_another_number_of_processes_goes_on(build, undisturbed, run_processes, tmp_path: Path, monkeypatch) -> None:
    make = shards.Shards.make

    def make_some(self: shards.Shards, shard: int) -> None:
        if shard == 2:
            raise RuntimeError("the main process runs out of memory")
        make(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "make", make_some)
        patch.setattr(store.SampleStore, "wait_until_finished", failing(print, 1, RuntimeError("and is missed")))
        main, other = run_processes(lambda: build(tmp_path / "many"), [0, 1], 2)
    assert [str(main), str(other)] == ["the main process runs out of memory", "and is missed"]
    ranked = sorted(path.name for path in (tmp_path / "many" / "shards").glob("*.ranked.jsonl"))
    assert ranked == ["00000.ranked.jsonl", "00001.ranked.jsonl", "00003.ranked.jsonl"]
    run_processes(lambda: build(tmp_path / "many"), [0, 1, 2], 3)
    assert contents(tmp_path / "many") == undisturbed


def test_a_process_that_does_not_see_the_folder_says_so(build, run_processes, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(store, "MANIFEST_SECONDS", 0.05)
    [error] = run_processes(lambda: build(tmp_path / "lonely"), [1], 2)
    assert isinstance(error, RuntimeError)
    assert "`output_dir` must be on a file system that all processes see" in str(error)


def test_every_process_refuses_other_settings(build, undisturbed, run_processes, tmp_path: Path) -> None:
    for error in run_processes(lambda: build(tmp_path / "undisturbed", rejection_beta=2.0), [0, 1], 2):
        assert isinstance(error, ValueError) and "rejection_beta: 0.5 there, 2.0 now" in str(error)
    assert contents(tmp_path / "undisturbed") == undisturbed


def test_the_main_process_says_what_it_waits_for(build, run_processes, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(store, "REMINDER_SECONDS", 0.2)
    make = shards.Shards.make

    def slowly(self: shards.Shards, shard: int) -> None:
        if shard % 2:
            time.sleep(0.2)
        make(self, shard)

    monkeypatch.setattr(shards.Shards, "make", slowly)
    with caplog.at_level("WARNING"):
        run_processes(lambda: build(tmp_path / "many"), [0, 1], 2)
    assert any(re.match(r"Waiting for \d of \d shards from other processes", text) for text in caplog.messages)


SCRIPT = """
import sys
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from prefopt_trl.rankers import FunctionRanker
from prefopt_trl.sampling import pipeline

def length(prompts, completions, **kwargs):
    return [len(completion) / 9 for completion in completions]

model_dir, output_dir, num_processes = sys.argv[1:]
state = PartialState(cpu=True)
assert state.num_processes == int(num_processes), state
pipeline.SHARD_COMPLETIONS = 12
pairs = pipeline.build_preference_dataset(
    [f"Prompt {row}" for row in range(7)],
    AutoModelForCausalLM.from_pretrained(model_dir),
    AutoTokenizer.from_pretrained(model_dir),
    FunctionRanker(length),
    output_dir=output_dir,
    num_candidates=6,
    num_samples=4,
    max_new_tokens=8,
)
print("RETURNED", pairs._fingerprint, len(pairs), flush=True)
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_two_real_processes_make_the_bytes_of_one(tiny_llama_dir: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    returned = []
    for folder, command in {"one": [sys.executable], "two": launch}.items():
        arguments = [str(script), tiny_llama_dir, str(tmp_path / folder), "1" if folder == "one" else "2"]
        result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        returned += [line for line in result.stdout.splitlines() if line.startswith("RETURNED")]
    assert len(returned) == 3 and len(set(returned)) == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# Two runs in one folder


def test_a_folder_that_another_run_holds_is_left_alone(build, undisturbed, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards, "select_and_pair", failing(shards.select_and_pair, 2, RuntimeError("out")))
        with pytest.raises(RuntimeError):
            build(tmp_path / "pairs")
    before = contents(tmp_path / "pairs")
    with store.SampleStore(tmp_path / "pairs").held():
        with pytest.raises(
            RuntimeError, match="Another run is making a sampled dataset in .*or choose another `output_dir`"
        ):
            build(tmp_path / "pairs")
        assert contents(tmp_path / "pairs") == before
    build(tmp_path / "pairs")
    assert contents(tmp_path / "pairs") == undisturbed


def test_what_another_run_has_finished_in_the_meantime_is_read(
    build, undisturbed, tmp_path: Path, monkeypatch
) -> None:
    folder, held, sampled = tmp_path / "pairs", store.SampleStore.held, []

    def after_another(own: store.SampleStore, shared: bool = False) -> Any:
        monkeypatch.setattr(store.SampleStore, "held", held)
        build(folder)
        monkeypatch.setattr(generators, "sample_candidates", lambda *args, **options: sampled.append(args))
        return held(own)

    monkeypatch.setattr(store.SampleStore, "held", after_another)
    pairs = build(folder)
    assert sampled == []
    assert contents(folder) == undisturbed and not (folder / "shards").exists()
    assert pairs.to_dict() == load_from_disk(str(folder / "pairs")).to_dict()


# Jobs without a common start


def test_jobs_in_any_order_make_the_bytes_of_one(build, undisturbed, tmp_path: Path, monkeypatch) -> None:
    folder, sampled = tmp_path / "pairs", []
    make = shards.Shards.make
    monkeypatch.setattr(shards.Shards, "make", lambda self, shard: sampled.append(shard) or make(self, shard))
    parts = {job: build(folder, job=(job, 3))["prompt"] for job in (3, 1)}
    assert [set(parts[job]) for job in (1, 3)] == [set(PROMPTS[0:2]) | set(PROMPTS[6:]), set(PROMPTS[4:6])]
    with store.SampleStore(folder).held(), pytest.raises(RuntimeError, match="Another run"):
        build(folder, job=(2, 3))
    with store.SampleStore(folder).held(shared=True), pytest.raises(RuntimeError, match="Another run"):
        build(folder)
    with store.SampleStore(folder).held(shared=True):  # another job's
        build(folder, job=(1, 3))
    assert sampled == [2, 0, 3]
    assert len(build(folder)) and sampled == [2, 0, 3, 1]  # what no job has made, the last call makes
    assert contents(folder) == undisturbed
    with pytest.raises(ValueError, match="`job` is 3 of 2"):
        build(folder, job=(3, 2))
