import datetime
import errno
import json
import logging
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5Config,
)

from prefopt_trl import SamplingOptions
from prefopt_trl.generation import generators
from prefopt_trl.generation.sampler import sample_completions
from prefopt_trl.rankers import FunctionRanker
from prefopt_trl.rankers.base import PointwiseRanker, sigmoid
from prefopt_trl.sampling import pipeline, shards, store
from prefopt_trl.sampling.pipeline import build_preference_dataset
from prefopt_trl.sampling.selection import preference_rows, select_and_pair
from prefopt_trl.sampling.shards import shard_seed
from prefopt_trl.sampling.statistics import summarize

PROMPTS = ["The dog", "What is the capital of France?", "Bread:"]
CONVERSATIONS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
OPTIONS: dict[str, Any] = {"num_candidates": 8, "num_samples": 4, "max_new_tokens": 6}
COLUMNS = ["prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "label_probability"]
FILES = {"README.md", "candidates", "manifest.json", "pairs", "statistics.json", "statistics.png"}


def text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def log_code(prompts, completions, **kwargs):
    """The logarithm of the mean code of a completion's characters."""
    return [np.log1p(np.mean([ord(letter) for letter in text(completion)] or [0])) for completion in completions]


def twice_log_code(prompts, completions, **kwargs):
    return [2 * reward for reward in log_code(prompts, completions)]


RANKER = FunctionRanker(log_code)


class CountingRanker(PointwiseRanker):
    """As RANKER, counts the calls of `score`, and fails in those that it is told to fail in."""

    def __init__(self, failing: int = 0) -> None:
        self.failing, self.calls = failing, 0

    def score(self, prompts, completions, baselines=None):
        self.calls += 1
        if self.calls <= self.failing:
            raise RuntimeError("the judge is out")
        return super().score(prompts, completions, baselines)

    def compare(self, prompts, first, second):
        return RANKER.compare(prompts, first, second)

    def rewards(self, prompts, completions):
        return RANKER.rewards(prompts, completions)

    def settings(self):
        return {"class": "CountingRanker"}


@pytest.fixture(scope="module")
def build(tiny_llama_dir: str) -> Callable[..., Dataset]:
    """`build_preference_dataset` of a few prompts, unless told otherwise."""
    policy = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)

    def call(output_dir: Path, prompts: Any = PROMPTS, **options: Any) -> Dataset:
        arguments = {"policy": policy, "tokenizer": tokenizer, "ranker": RANKER, **OPTIONS, **options}
        return build_preference_dataset(prompts, output_dir=output_dir, **arguments)

    return call


@pytest.fixture(scope="module")
def built(build: Callable[..., Dataset], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished dataset, to be read only."""
    folder = tmp_path_factory.mktemp("built") / "pairs"
    build(folder)
    return folder


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of prompts whenever completions are sampled."""
    calls: list[int] = []

    def count(model, tokenizer, prompt_ids, *args, **options):
        calls.append(len(prompt_ids))
        return sample_candidates(model, tokenizer, prompt_ids, *args, **options)

    sample_candidates = generators.sample_candidates
    monkeypatch.setattr(generators, "sample_candidates", count)
    return calls


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What is made


@pytest.mark.parametrize("prompts", [PROMPTS, CONVERSATIONS], ids=["plain", "conversational"])
def test_from_prompts_to_pairs(prompts: list, build, policy, tokenizer, tmp_path: Path) -> None:
    pairs = build(tmp_path / "pairs", prompts, seed=3)
    assert names(tmp_path / "pairs") == FILES

    candidates = load_from_disk(str(tmp_path / "pairs" / "candidates"))
    assert candidates.column_names == ["prompt", "completions", "finished", "rewards"]
    assert candidates["prompt"] == prompts
    samples = sample_completions(policy, tokenizer, prompts, 8, max_new_tokens=6, seed=shard_seed(3, 0))
    assert [[text(completion) for completion in row] for row in candidates["completions"]] == samples
    for row in candidates:
        assert row["rewards"] == log_code(None, row["completions"])

    assert pairs.column_names == COLUMNS
    assert pairs["prompt"] == [prompt for prompt in prompts for _ in range(2)]
    for pair in pairs:
        row = candidates[prompts.index(pair["prompt"])]
        rewards = {
            text(completion): reward for completion, reward in zip(row["completions"], row["rewards"], strict=True)
        }
        assert pair["chosen"] in row["completions"]
        assert pair["rejected"] in row["completions"]
        assert pair["chosen_reward"] == rewards[text(pair["chosen"])]
        assert pair["rejected_reward"] == rewards[text(pair["rejected"])]
        assert pair["chosen_reward"] > pair["rejected_reward"]
        margin = pair["chosen_reward"] - pair["rejected_reward"]
        assert pair["label_probability"] == pytest.approx(sigmoid(np.array(margin)))
    if prompts is CONVERSATIONS:
        assert all(pair["chosen"][0]["role"] == "assistant" and len(pair["chosen"]) == 1 for pair in pairs)
    assert load_from_disk(str(tmp_path / "pairs" / "pairs")).to_dict() == pairs.to_dict()


@pytest.mark.parametrize("strategy", ["rso", "sft", "top-k"])
@pytest.mark.parametrize("pairing", ["first-round", "tournament", "all"])
def test_pairs_are_selected_from_the_saved_candidates(strategy: str, pairing: str, build, tmp_path: Path) -> None:
    pairs = build(tmp_path / "pairs", strategy=strategy, pairing=pairing, rejection_beta=0.1, seed=5)
    candidates = load_from_disk(str(tmp_path / "pairs" / "candidates"))
    columns = candidates["prompt"][:], candidates["completions"][:], [np.array(row) for row in candidates["rewards"]]
    options = SamplingOptions(strategy=strategy, num_samples=4, rejection_beta=0.1, pairing=pairing)
    selected = select_and_pair(*columns, RANKER, options, seed=5)
    assert list(pairs) == [
        pair for row, kept in zip(candidates, selected, strict=True) for pair in preference_rows(row, kept, pairing)
    ]
    assert len(pairs) == 3 * {"first-round": 2, "tournament": 3, "all": 6}[pairing]
    statistics = json.loads((tmp_path / "pairs" / "statistics.json").read_text())
    assert statistics == summarize(zip(candidates, selected, strict=True), options)[0].as_dict()


def test_the_manifest_has_every_setting(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    settings = manifest.pop("settings")
    assert manifest == {"finished": True, "num_shards": 1, "prompts_per_shard": 256}
    fingerprints = {name: settings.pop(name) for name in ("prompts", "policy", "tokenizer", "ranker")}
    assert settings == {
        "strategy": "rso",
        "num_candidates": 8,
        "num_samples": 4,
        "rejection_beta": 0.5,
        "pairing": "first-round",
        "rejected_deviations": 2.0,
        "min_margin": None,
        "max_margin": None,
        "length_penalty": 0.0,
        "unfinished_penalty": 0.0,
        "seed": 0,
        "max_new_tokens": 6,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "eos_token_ids": [2],
        "generation_batch_size": None,
        "generation_memory_budget": 4.0,
        "share_prefix": True,
        "prompts_are_shared": True,
        "keep_logps": False,
    }
    assert all(len(fingerprints[name]) == 64 for name in ("prompts", "policy", "tokenizer"))
    assert fingerprints["ranker"] == RANKER.settings()


def test_the_same_seed_gives_the_same_dataset_and_another_seed_another(build, built: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    pairs = load_from_disk(str(built / "pairs")).to_dict()
    assert build(tmp_path / "again").to_dict() == pairs
    assert build(tmp_path / "column", Dataset.from_dict({"prompt": PROMPTS})["prompt"]).to_dict() == pairs
    other = build(tmp_path / "other", seed=1).to_dict()
    assert not set(other["chosen"]) & set(pairs["chosen"])


def test_a_tokenizer_without_pad_gives_the_same_dataset(build, built: Path, tokenizer, tmp_path: Path) -> None:
    tokenizer.pad_token = None
    pairs = build(tmp_path / "pairs", tokenizer=tokenizer)
    assert pairs.to_dict() == load_from_disk(str(built / "pairs")).to_dict()


def test_top_k_keeps_the_best(build, tmp_path: Path) -> None:
    pairs = build(tmp_path / "pairs", strategy="top-k", num_samples=2)
    candidates = load_from_disk(str(tmp_path / "pairs" / "candidates"))
    best = [sorted(rewards, reverse=True)[:2] for rewards in candidates["rewards"]]
    assert list(zip(pairs["chosen_reward"], pairs["rejected_reward"], strict=True)) == [tuple(two) for two in best]


def test_generation_kwargs_reach_the_sampler(build, tmp_path: Path) -> None:
    build(tmp_path / "pairs", num_candidates=64, generation_kwargs={"stop_strings": ["e", "a"]})
    candidates = load_from_disk(str(tmp_path / "pairs" / "candidates"))
    assert any(any(finished) for finished in candidates["finished"])
    assert not any(
        set("ea") & set(completion) for completions in candidates["completions"] for completion in completions
    )
    manifest = json.loads((tmp_path / "pairs" / "manifest.json").read_text())
    assert manifest["settings"]["stop_strings"] == ["e", "a"]


# Given columns


def test_given_candidates_are_not_sampled_and_may_differ_in_number(sampled: list[int], tmp_path: Path) -> None:
    completions = [["a", "b", "c", "d", "a"], ["e", "f"], ["g", "h", "i", "j"]]
    given = Dataset.from_dict({"prompt": PROMPTS, "completions": completions})
    pairs = build_preference_dataset(
        given, None, None, RANKER, output_dir=tmp_path / "pairs", num_samples=4, pairing="all"
    )
    assert sampled == []
    assert Counter(pairs["prompt"]) == {PROMPTS[0]: 6, PROMPTS[1]: 1, PROMPTS[2]: 6}
    assert {*pairs["chosen"], *pairs["rejected"]} == set("abcdefghij")
    candidates = load_from_disk(str(tmp_path / "pairs" / "candidates"))
    assert candidates.to_dict() == {**given.to_dict(), "rewards": [log_code(None, row) for row in completions]}
    statistics = json.loads((tmp_path / "pairs" / "statistics.json").read_text())
    counted = [statistics[f"num_{name}"] for name in ("skipped", "short", "duplicates", "unfinished")]
    assert counted == [0, 1, 1, None]
    manifest = json.loads((tmp_path / "pairs" / "manifest.json").read_text())
    assert not {"policy", "tokenizer", "max_new_tokens", "num_candidates"} & manifest["settings"].keys()


def test_given_rewards_are_not_scored_again(sampled: list[int], tmp_path: Path) -> None:
    rewards = [[1.0, 2.0], [4.0, 3.0]]  # not the ranker's, whose labels follow the alphabet
    given = Dataset.from_dict({"prompt": ["p", "q"], "completions": [["a", "b"], ["c", "d"]], "rewards": rewards})
    ranker = CountingRanker()
    pairs = build_preference_dataset(given, None, None, ranker, output_dir=tmp_path / "pairs", num_samples=2)
    assert (ranker.calls, sampled) == (0, [])
    assert pairs["chosen"] == ["b", "d"]
    assert pairs["chosen_reward"] == [2.0, 3.0]
    assert pairs["rejected_reward"] == [1.0, 4.0]


def test_saved_candidates_serve_another_beta(build, built: Path, sampled: list[int], tmp_path: Path) -> None:
    candidates = load_from_disk(str(built / "candidates"))
    ranker = CountingRanker()
    options = {"policy": None, "tokenizer": None, "ranker": ranker}
    pairs = build(tmp_path / "pairs", candidates, rejection_beta=0.0, **options)
    assert (ranker.calls, sampled) == (0, [])
    assert pairs.to_dict() == build(tmp_path / "whole", rejection_beta=0.0).to_dict()
    assert len(sampled) == 1


def test_columns_of_earlier_pairs_are_not_carried_into_new_ones(build, built: Path, tmp_path: Path) -> None:
    numbers = ["ref_chosen_logps", "ref_rejected_logps", "chosen_reward", "rejected_reward", "label_probability"]
    earlier = {name: [111.0 + row for row in range(3)] for name in numbers}
    earlier |= {"chosen": ["never"] * 3, "rejected": ["these"] * 3, "ref_max_length": [7] * 3, "logps": [[1.0]] * 3}
    prompts = Dataset.from_dict({"prompt": PROMPTS, "topic": ["x", "y", "z"], **earlier})
    pairs = build(tmp_path / "pairs", prompts)
    assert sorted(pairs.column_names) == sorted([*COLUMNS, "topic"])
    again = load_from_disk(str(built / "pairs"))
    assert pairs.select_columns(COLUMNS).to_dict() == again.to_dict()
    candidates = load_from_disk(str(tmp_path / "pairs" / "candidates"))
    assert sorted(candidates.column_names) == ["completions", "finished", "prompt", "rewards", "topic"]
    # Candidates that are given bring none of them either, and with `keep_logps` they are of these pairs
    given = Dataset.from_dict(
        {"prompt": ["p"], "completions": [["a", "b"]], "rewards": [[1.0, 2.0]], "logps": [[-1.0, -2.0]]}
        | {name: [111.0] for name in numbers}
    )
    pair = build(tmp_path / "given", given, policy=None, tokenizer=None, num_samples=2, keep_logps=True)[0]
    assert (pair["chosen"], pair["chosen_reward"], pair["rejected_reward"]) == ("b", 2.0, 1.0)
    assert (pair["ref_chosen_logps"], pair["ref_rejected_logps"], pair["ref_max_length"]) == (-2.0, -1.0, None)


@pytest.mark.parametrize("num_contradicted", [0, 1, 2])
def test_rewards_that_the_ranker_contradicts_are_warned_of(
    num_contradicted: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The ranker prefers the later letter; so do the rewards, except of the first few prompts
    rewards = [[2.0, 1.0]] * num_contradicted + [[1.0, 2.0]] * (4 - num_contradicted)
    given = Dataset.from_dict({"prompt": list("pqrs"), "completions": [["a", "b"]] * 4, "rewards": rewards})
    with caplog.at_level(logging.WARNING):
        build_preference_dataset(given, None, None, RANKER, output_dir=tmp_path / "pairs", num_samples=2)
    warned = [message for message in caplog.messages if "the lower of the given `rewards`" in message]
    assert len(warned) == (num_contradicted == 2)  # 1 of 4 is not many
    assert not warned or warned[0].startswith("In 2 of 4 pairs the ranker prefers the completion with the lower")


# Once finished, or not


def test_a_finished_dataset_is_read_again(
    build, built: Path, sampled: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    with caplog.at_level(logging.INFO, logger="prefopt_trl"):
        pairs = build(str(built))
    assert pairs.to_dict() == load_from_disk(str(built / "pairs")).to_dict()
    assert sampled == []
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before
    assert caplog.messages == [f"Reusing the dataset in {built}, made with the same settings."]


@pytest.mark.parametrize("leftovers", [False, True])
def test_a_finished_dataset_on_a_read_only_disk_is_only_read(
    leftovers: bool, build, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "pairs"))
    if leftovers:
        (folder / "shards").mkdir()
        (folder / "README.md.partial").touch()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def read_only(call: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(path: Any, *args: Any, **options: Any) -> Any:
            writes = call is not os.open or args[0] & (os.O_WRONLY | os.O_RDWR)
            if writes and str(path).startswith(str(folder)):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return call(path, *args, **options)

        return refuse

    for name in ("mkdir", "unlink", "rmdir", "replace", "rename", "open"):
        monkeypatch.setattr(os, name, read_only(getattr(os, name)))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    pairs = build(folder)
    longer = pairs.map(lambda row: {"chosen": row["chosen"] + "!"})  # as a trainer tokenises them
    assert longer["chosen"] == [text + "!" for text in pairs["chosen"]]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("stopping", ["sampling", "ranking"])
def test_ctrl_c_says_what_is_saved(stopping: str, build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "SHARD_COMPLETIONS", 8)
    calls = iter(range(3))

    def stop(*args: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return call(*args, **options)

    step = {"sampling": (generators, "sample_candidates"), "ranking": (shards, "select_and_pair")}[stopping]
    call = getattr(*step)
    monkeypatch.setattr(*step, stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        build(tmp_path / "pairs")
    folder = tmp_path / "pairs"
    assert str(stopped.value) == f"Interrupted: 2 of 3 shards are saved in {folder}; the same call resumes from there."


@pytest.mark.parametrize(
    ("num_candidates", "batch_size", "flops", "expected"),
    [
        (8, None, 1e18, 256),  # 2048 completions
        (8, 24, 1e18, 3),
        (8, 3, 1e18, 1),
        (8, None, 8 * 6 * 5.5, 5),  # of two floating-point operations per parameter and token
        (4, None, 8 * 6 * 5.5, 11),
        (8, 24, 8 * 6 * 5.5, 3),
        (4096, None, 1e18, 0),
    ],
)
def test_a_shard_is_what_is_sampled_at_a_time(
    num_candidates, batch_size, flops, expected, policy, tokenizer, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(pipeline, "SHARD_FLOPS", flops * 2 * policy.num_parameters())
    prompts, sampling = Dataset.from_dict({"prompt": PROMPTS}), {"num_samples": 2, "max_new_tokens": 6}
    options = SamplingOptions(num_candidates=num_candidates, generation_batch_size=batch_size, **sampling)
    generator = generators.SharedPrefixGenerator(policy, tokenizer)
    how = (generator, policy, tokenizer, RANKER, options, 0, False, None)
    made = shards.Shards(store.SampleStore(tmp_path), prompts, *how)
    assert pipeline.prompts_at_once(made) == expected


@pytest.mark.parametrize(
    ("num_prompts", "at_once", "expected"),
    [(7, 2, (2, 4)), (7, 0, (1, 7)), (20_000, 2, (2, 10_000)), (20_001, 2, (4, 5001)), (160_000, 3, (18, 8889))],
)
def test_there_are_no_more_shards_than_a_folder_bears(num_prompts, at_once, expected) -> None:
    assert pipeline.shard_layout(num_prompts, at_once) == expected


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"strategy": "sft"}, "strategy: 'rso' there, 'sft' now"),
        ({"num_candidates": 9}, "num_candidates: 8 there, 9 now"),
        ({"num_samples": 2}, "num_samples: 4 there, 2 now"),
        ({"rejection_beta": math.inf}, "rejection_beta: 0.5 there, inf now"),
        ({"pairing": "all"}, "pairing: 'first-round' there, 'all' now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"max_new_tokens": 5}, "max_new_tokens: 6 there, 5 now"),
        ({"temperature": 0.7}, "temperature: 1.0 there, 0.7 now"),
        ({"top_p": 0.9}, "top_p: 1.0 there, 0.9 now"),
        ({"top_k": 50}, "top_k: 0 there, 50 now"),
        ({"generation_batch_size": 8}, "generation_batch_size: None there, 8 now"),
        ({"generation_memory_budget": 1.0}, "generation_memory_budget: 4.0 there, 1.0 now"),
        ({"keep_logps": True}, "keep_logps: False there, True now"),
        ({"generation_kwargs": {"min_p": 0.1}}, "min_p: None there, 0.1 now"),
        ({"prompts": PROMPTS[::-1]}, "prompts: '"),
        ({"ranker": FunctionRanker(twice_log_code)}, "ranker.function: 'log_code:"),
        ({"ranker": CountingRanker()}, "ranker.class: 'FunctionRanker' there, 'CountingRanker' now"),
    ],
)
def test_other_settings_are_refused_and_named(
    options: dict, difference: str, build, built: Path, sampled: list[int]
) -> None:
    with pytest.raises(ValueError) as error:
        build(built, **options)
    first, *lines, _ = str(error.value).splitlines()
    assert first == f"{built} holds a sampled dataset, made with other settings:"
    assert any(line.startswith(f"  {difference}") for line in lines)
    assert {line.split(":")[0].split(".")[0].strip() for line in lines} == {difference.split(":")[0].split(".")[0]}
    assert sampled == []


def test_prompts_that_were_shared_and_are_not_now_are_refused(build, built: Path, sampled: list[int]) -> None:
    with pytest.raises(ValueError) as error:
        build(built, share_prefix=False)
    assert str(error.value).splitlines()[1:3] == [
        "  prompts_are_shared: True there, False now",
        "  share_prefix: True there, False now",
    ]
    assert sampled == []


def test_conversations_of_a_dated_template_are_not_resumed_on_another_day(
    build, tokenizer, tmp_path: Path, monkeypatch, caplog
) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    for day in (27, 28):
        clock = SimpleNamespace(now=lambda day=day: datetime.datetime(2026, 11, day))
        monkeypatch.setattr("prefopt_trl.runtime.settings.datetime", clock)
        build(tmp_path / "plain", tokenizer=tokenizer)  # the template has no part in it
        if day == 27:
            build(tmp_path / "dated", CONVERSATIONS, tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match="settings:\n  date_in_chat_template: '27 Nov 2026' there, '28 Nov 2026' now\nSet"
    ):
        build(tmp_path / "dated", CONVERSATIONS, tokenizer=tokenizer)
    assert caplog.text.count("writes the date (27 Nov 2026) into the prompts, so this run cannot be resumed") == 1


def test_equal_rewards_of_all_candidates_are_said(build, tmp_path: Path, caplog) -> None:
    def number_of_messages(prompts, completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    build(tmp_path / "equal", CONVERSATIONS, ranker=FunctionRanker(number_of_messages))
    warning = json.loads((tmp_path / "equal" / "statistics.json").read_text())["warning"]
    assert warning in caplog.text
    assert warning.startswith("All candidates have equal rewards on 3 of 3 prompts, so their labels are arbitrary.")
    assert "`len(completion)` of a conversational completion counts its messages" in warning


def test_other_weights_and_another_tokenizer_are_refused(build, built: Path, policy, tokenizer) -> None:
    build(built, policy=policy)  # the same weights elsewhere are the same policy
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight += 1e-3
    with pytest.raises(ValueError, match="settings:\n  policy: '[0-9a-f]{64}' there, '[0-9a-f]{64}' now\nSet"):
        build(built, policy=policy)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="settings:\n  tokenizer: '[0-9a-f]{64}' there, '[0-9a-f]{64}' now\nSet"):
        build(built, tokenizer=tokenizer)


# What is said


def test_the_statistics_are_printed(build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "pairs")
    printed = capsys.readouterr().out
    assert f"Pairs saved in {tmp_path / 'pairs'}\n6 pairs from 3 of 3 prompts\ncandidates: 24, of which" in printed
    assert "mean probability the ranker gives to its own labels" in printed


@pytest.mark.parametrize("num_cut", [0, 1, 2])
def test_many_candidates_cut_short_are_warned_of(
    num_cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    completions = [[chr(ord("a") + index) for index in range(10)]]
    finished = [[False] * num_cut + [True] * (10 - num_cut)]
    given = Dataset.from_dict({"prompt": ["p"], "completions": completions, "finished": finished})
    with caplog.at_level(logging.WARNING):
        build_preference_dataset(given, None, None, RANKER, output_dir=tmp_path / "pairs", num_samples=2)
    warned = [message for message in caplog.messages if "were cut at `max_new_tokens`" in message]
    # 1 of 10 is not many
    assert warned == (
        ["2 of 10 candidates were cut at `max_new_tokens`. Training adds EOS to them all the same: raise it."]
        if num_cut == 2
        else []
    )


def test_a_policy_that_does_not_end_is_warned_of(build, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(tmp_path / "pairs")
    assert any("of 24 candidates were cut at `max_new_tokens`" in message for message in caplog.messages)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        build(tmp_path / "ending", generation_kwargs={"forced_eos_token_id": 2})
    assert caplog.messages == []


@pytest.mark.parametrize(("strategy", "warns"), [("rso", True), ("top-k", False)])
def test_a_beta_too_small_for_the_ranker_is_warned_of(
    strategy: str, warns: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    completions = [["z" * (index + 1) for index in range(4)] + [chr(20 * index + 1) for index in range(4)]] * 30
    rewards = [[12.2] * 4 + [0.01, 0.21, 0.41, 0.61]] * 30
    given = Dataset.from_dict(
        {"prompt": [str(row) for row in range(30)], "completions": completions, "rewards": rewards}
    )
    with caplog.at_level(logging.WARNING):
        options = SamplingOptions(strategy=strategy, num_samples=4, rejection_beta=0.0)
        build_preference_dataset(given, None, None, RANKER, tmp_path / "pairs", options)
    assert any("`rejection_beta`=0 is too small for this ranker" in message for message in caplog.messages) == warns


def test_without_matplotlib_there_is_no_plot_and_one_line_says_so(
    build, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING):
        pairs = build(tmp_path / "pairs")
    assert pairs.to_dict() == load_from_disk(str(built / "pairs")).to_dict()
    assert names(tmp_path / "pairs") == FILES - {"statistics.png"}
    assert any("No plot was drawn: install matplotlib" in message for message in caplog.messages)


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"prompts": Dataset.from_dict({"question": ["a"]})},
            ValueError,
            "`prompts` lacks the column prompt; it has qu",
        ),
        ({"prompts": Dataset.from_dict({"prompt": []})}, ValueError, "`prompts` is empty"),
        ({"prompts": []}, ValueError, "`prompts` is empty"),
        (
            {"prompts": DatasetDict(train=Dataset.from_dict({"prompt": ["a"]}))},
            TypeError,
            "got DatasetDict; .* one split",
        ),
        (
            {"prompts": "The dog"},
            TypeError,
            "`prompts` is 'The dog'. Give a dataset, a list of prompts, or the path of a `.jsonl` file",
        ),
        (
            {"prompts": "x.json"},
            TypeError,
            "`prompts` is 'x.json'. Give .* a `.jsonl` file, which has one JSON object",
        ),
        ({"prompts": Path("x.jsonl.gz")}, TypeError, "`prompts` is 'x.jsonl.gz'. .* and is not compressed"),
        ({"seed": -1}, ValueError, "`seed` must be a whole number, at least 0, got -1"),
        ({"seed": 1.5}, ValueError, "`seed` must be a whole number, at least 0, got 1.5"),
        ({"tokenizer": "my-model"}, TypeError, "`tokenizer` is 'my-model'. Load it, with `AutoTokenizer"),
        ({"policy": "my-model"}, TypeError, "`policy` is the path 'my-model'. Load the model"),
        ({"temperature": 0.0}, ValueError, "`temperature` must be greater than 0"),
        ({"beta": 0.5}, TypeError, "`beta` is not an option of SamplingOptions. Did you mean `rejection_beta`"),
        ({"ranker": None}, TypeError, "`ranker` is a NoneType, not a ranker"),
        ({"policy": None}, ValueError, "`policy` and `tokenizer` are needed to sample candidates"),
        ({"tokenizer": None}, ValueError, "`policy` and `tokenizer` are needed to sample candidates"),
        ({"num_samples": 9}, ValueError, "`num_samples`=9 completions cannot be kept out of `num_candidates`=8"),
        ({"keep_logps": True, "pairing": "ranking"}, ValueError, "`keep_logps` is for pairs only"),
        ({"generation_kwargs": {"temperature": 0.5}}, ValueError, "`generation_kwargs` has `temperature`, which"),
        ({"generation_kwargs": {"stop": "x"}}, ValueError, "`generation_kwargs` has `stop`, which"),
        ({"generation_kwargs": {"stop_strings": {"x"}}}, TypeError, "not JSON serializable"),
    ],
)
def test_bad_arguments_are_named_and_leave_nothing(
    options: dict, error: type[Exception], message: str, build, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        build(tmp_path / "pairs", **options)
    assert not (tmp_path / "pairs").exists()


def test_a_prompt_that_fills_max_length_is_named(build, tokenizer, tmp_path: Path) -> None:
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    assert lengths[1] == max(lengths) > max(lengths[0], lengths[2])
    message = (
        f"The prompt of row 1 has {lengths[1]} tokens and fills `max_length`={lengths[1]} .1 of 3 prompts do.. "
        "Raise `max_length` or leave those rows out"
    )
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "pairs", max_length=lengths[1])
    assert not (tmp_path / "pairs").exists()
    assert len(build(tmp_path / "pairs", max_length=lengths[1] + 1)) == 6  # the same folder serves the mended call


def test_a_column_that_json_cannot_write_is_refused_and_leaves_nothing(build, tmp_path: Path) -> None:
    prompts = Dataset.from_dict({"prompt": PROMPTS, "asked": [datetime.datetime(2026, 1, day) for day in (1, 2, 3)]})
    with pytest.raises(TypeError, match="the columns prompt, asked cannot be written as JSON"):
        build(tmp_path / "pairs", prompts)
    assert not (tmp_path / "pairs").exists()


def test_a_finished_folder_without_its_pairs_is_not_made_anew(build, tmp_path: Path, sampled: list[int]) -> None:
    build(tmp_path / "pairs")
    shutil.rmtree(tmp_path / "pairs" / "pairs")
    sampled.clear()
    with pytest.raises(ValueError, match="is marked as finished, but `pairs` is missing. Delete the folder"):
        build(tmp_path / "pairs")
    assert sampled == [] and names(tmp_path / "pairs") == FILES - {"pairs"}


def test_an_encoder_decoder_is_sampled_and_its_logps_are_not_kept(build, tokenizer, tmp_path: Path) -> None:
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    policy = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match="`keep_logps` is for training, which takes no encoder-decoder. Leave it out"):
        build(tmp_path / "pairs", policy=policy, keep_logps=True)
    assert not (tmp_path / "pairs").exists()
    assert len(build(tmp_path / "pairs", policy=policy)) == 6
    manifest = json.loads((tmp_path / "pairs" / "manifest.json").read_text())
    assert manifest["settings"]["prompts_are_shared"] is False


def test_a_tokenizer_without_eos_is_refused(build, tokenizer, tmp_path: Path) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`tokenizer` has no EOS token.*Set `tokenizer.eos_token`"):
        build(tmp_path / "pairs", tokenizer=tokenizer)
    assert not (tmp_path / "pairs").exists()


def test_conversations_without_a_chat_template_are_refused(build, tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        build(tmp_path / "pairs", CONVERSATIONS, tokenizer=tokenizer)


class BadRanker(CountingRanker):
    def __init__(self, returned: list) -> None:
        super().__init__()
        self.returned = returned

    def score(self, prompts, completions, baselines=None):
        return self.returned


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([[0.0] * 8] * 2, "BadRanker returned rewards for 2 prompts, 3 were expected"),
        ([[0.0] * 8, [0.0] * 7, [0.0] * 8], "BadRanker returned 7 rewards for prompt row 1, 8 were expected"),
        ([[0.0] * 8] * 2 + [[0.0, math.nan] * 4], "BadRanker returned nan for completion 1 of prompt row 2"),
        ([[math.inf] + [0.0] * 7] * 3, "BadRanker returned inf for completion 0 of prompt row 0"),
    ],
)
def test_a_ranker_that_returns_the_wrong_rewards_is_named(returned: list, message: str, build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build(tmp_path / "pairs", ranker=BadRanker(returned))
    assert error.value.__notes__[0] == "Row 0 of these 3 is row 0 of `prompts`."
    assert names(tmp_path / "pairs" / "shards") == {"00000.candidates.jsonl"}  # sampled is sampled


def test_prompts_with_too_few_distinct_candidates_are_an_error_if_all_are(build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No prompt has candidates that differ .*prompt are 1.*`temperature`"):
        build(tmp_path / "pairs", temperature=1e-5)
    candidates = load_from_disk(str(tmp_path / "pairs" / "candidates"))  # which are kept
    assert [len(set(row)) for row in candidates["completions"]] == [1, 1, 1]
    with pytest.raises(
        ValueError, match="num_samples: 4 there, 2 now\nSet.*pass `load_from_disk\\('.*/pairs/candidates'"
    ):
        build(tmp_path / "pairs", temperature=1e-5, num_samples=2)


def test_a_bare_function_is_no_ranker(build, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`ranker` is a function, not a ranker. Wrap a function in `FunctionRanker`"):
        build(tmp_path / "pairs", ranker=lambda prompts, completions: [0.0])


@pytest.mark.parametrize("keep_logps", [False, True])
def test_prompts_are_written_with_the_tools_and_arguments_of_their_row(
    build, tiny_llama_dir: str, keep_logps: bool, tmp_path: Path
) -> None:
    reads, says = (AutoTokenizer.from_pretrained(tiny_llama_dir) for _ in range(2))
    reads.chat_template = "{{ style }}{{ tools[0]['name'] }}" + reads.chat_template
    says.chat_template = "tersesum" + says.chat_template
    options = {"chat_template_kwargs": [{"style": "terse"}] * 3, "tools": [json.dumps([{"name": "sum"}])] * 3}
    prompts = Dataset.from_dict({"prompt": CONVERSATIONS, **options})
    how = {"keep_logps": keep_logps, "max_length": 80}
    pairs = build(tmp_path / "columns", prompts, tokenizer=reads, **how)
    assert {name: pairs[name][0] for name in options} == {name: values[0] for name, values in options.items()}
    expected = build(tmp_path / "template", CONVERSATIONS, tokenizer=says, **how)
    assert pairs.remove_columns([*options]).to_dict() == expected.to_dict()
    with pytest.raises(ValueError, match="fills `max_length`=20"):
        build(tmp_path / "long", prompts, tokenizer=reads, max_length=20)


def test_candidates_that_training_reads_as_equal_tokens_count_as_one(tokenizer, tmp_path: Path) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("['content']", "['content'].split('</think>')[-1]")
    texts = [
        ["<think>a</think>yes", "<think>b</think>yes", "<think>b</think>no", "c</think>no"],
        ["x</think>", "y</think>"],
    ]
    candidates = [[[{"role": "assistant", "content": said}] for said in row] for row in texts]
    given = Dataset.from_dict({"prompt": CONVERSATIONS[:2], "completions": candidates})
    folder = tmp_path / "pairs"
    (pair,) = build_preference_dataset(given, None, tokenizer, RANKER, output_dir=folder, num_samples=2)
    assert {text(pair["chosen"]), text(pair["rejected"])} == {texts[0][0], texts[0][2]}
    statistics = json.loads((folder / "statistics.json").read_text())
    assert (statistics["num_duplicates"], statistics["num_skipped"]) == (3, 1)
    saved = load_from_disk(str(folder / "candidates"))["completions"]
    assert [[text(said) for said in row] for row in saved] == texts  # what was drawn is kept


def test_rankings_are_saved_with_the_columns_of_their_prompts(policy, tokenizer, tmp_path, capsys, caplog):
    prompts = Dataset.from_dict({"prompt": PROMPTS, "target": ["a", "b", "c"]})
    how = {"output_dir": tmp_path, "pairing": "ranking", "strategy": "top-k", **OPTIONS}
    made = build_preference_dataset(prompts, policy, tokenizer, RANKER, **how)
    assert f"Rankings saved in {tmp_path}\n3 rankings from 3 of 3 prompts" in capsys.readouterr().out
    candidates = load_from_disk(str(tmp_path / "candidates"))
    assert candidates["target"] == made["target"] == ["a", "b", "c"]
    for row, sampled in zip(made, candidates, strict=True):
        distinct = {
            text.strip(): reward for text, reward in zip(sampled["completions"], sampled["rewards"], strict=True)
        }
        assert row["rewards"] == sorted(distinct.values(), reverse=True)[:4]
        assert row["rewards"] == pytest.approx(log_code(None, row["completions"]))
    with caplog.at_level(logging.INFO, logger="prefopt_trl"):
        again = build_preference_dataset(prompts, policy, tokenizer, RANKER, **how)
    assert again.to_dict() == made.to_dict() == load_from_disk(str(tmp_path / "pairs")).to_dict()
    assert "Reusing the dataset in" in caplog.text


def test_only_models_that_are_run_must_be_whole(tmp_path, policy, tokenizer, monkeypatch):
    monkeypatch.setattr(pipeline, "partition_reason", lambda model: "sharded" if model is policy else None)
    given = Dataset.from_dict({"prompt": ["a"], "completions": [["b", "cc"]]})
    ranker = FunctionRanker(lambda prompts, completions: [float(len(text)) for text in completions])
    build_preference_dataset(given, policy, tokenizer, ranker, output_dir=tmp_path / "given", num_samples=2)
    with pytest.raises(ValueError, match="A LlamaForCausalLM cannot be sampled or asked: sharded"):
        build_preference_dataset(["a"], policy, tokenizer, ranker, output_dir=tmp_path / "sampled")
