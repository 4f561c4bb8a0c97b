"""Rows by name: what a file, a folder and a sampled dataset hold comes out, and transcripts are recognised."""

import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from prefopt_trl.data.hh_rlhf import load_hh_rlhf
from prefopt_trl.data.loading import load_rows
from tests.unit.data.conftest import write_jsonl

PAIRS = [{"prompt": f"{i}?", "chosen": f" {i}.", "rejected": " no."} for i in range(4)]
TRANSCRIPTS = [
    {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: So.",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: No.",
    }
]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.json", "pairs.parquet"])
def test_a_file_is_read_whole_whatever_the_split(tmp_path, name):
    file = str(tmp_path / name)
    Dataset.from_list(PAIRS).to_parquet(file) if "parquet" in name else write_jsonl(tmp_path / name, PAIRS)
    assert load_rows(file, split="test").to_list() == PAIRS


def test_what_save_to_disk_wrote(tmp_path):
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "one")
    halves = DatasetDict({"train": Dataset.from_list(PAIRS[:3]), "test": Dataset.from_list(PAIRS[3:])})
    halves.save_to_disk(tmp_path / "two")
    assert load_rows(str(tmp_path / "one")).to_list() == PAIRS
    assert load_rows(str(tmp_path / "two"), split="test").to_list() == PAIRS[3:]
    with pytest.raises(ValueError, match="no split 'validation'; it has train, test"):
        load_rows(str(tmp_path / "two"), split="validation")


def test_a_folder_of_data_files_has_splits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of tmp_path has "test" in it, which `datasets` would take for a split
    (tmp_path / "pairs").mkdir()
    write_jsonl(tmp_path / "pairs" / "train.jsonl", PAIRS[:3])
    write_jsonl(tmp_path / "pairs" / "test.jsonl", PAIRS[3:])
    assert load_rows("pairs").to_list() == PAIRS[:3]
    assert load_rows("pairs", split="test").to_list() == PAIRS[3:]


@pytest.fixture
def sampled(tmp_path):
    """As `build_preference_dataset` leaves a folder, but for its card."""
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "sampled" / "pairs")
    Dataset.from_list([{"prompt": "0?", "completions": ["a", "b"]}]).save_to_disk(tmp_path / "sampled" / "candidates")
    (tmp_path / "sampled" / "manifest.json").write_text("{}")
    return str(tmp_path / "sampled")


def test_a_sampled_folder_is_read_from_its_own_files(sampled, tmp_path):
    pairs = load_rows(sampled)
    assert pairs.to_list() == PAIRS
    # By which a model's card finds out how they were sampled
    assert {Path(file["filename"]).parent for file in pairs.cache_files} == {tmp_path / "sampled" / "pairs"}
    assert load_rows(sampled, "candidates").column_names == ["prompt", "completions"]


def test_a_part_of_a_split_has_whole_prompts(sampled, tmp_path):
    # Prompts 0 to 4, with 1, 3, 1, 3 and 2 pairs, and two more pairs of prompt 0 at the end
    prompts = [0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 0, 0]
    rows = [{**PAIRS[0], "prompt": f"{prompt}?", "row": row} for row, prompt in enumerate(prompts)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "sampled" / "pairs")
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "saved")
    for name in (sampled, str(tmp_path / "saved"), write_jsonl(tmp_path / "pairs.jsonl", rows)):
        one, other = (load_rows(name, split=f"train[{part}]") for part in (":60%", "60%:"))
        assert [row["row"] for row in one] == [0, 1, 2, 3, 4, 10, 11]
        assert [row["row"] for row in other] == [5, 6, 7, 8, 9]
        assert load_rows(name, split="train[1:2]")["row"] == [1, 2, 3]
    no_prompts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "same"}] * 10)
    assert len(load_rows(no_prompts, split="train[90%:]")) == 1
    with pytest.raises(ValueError, match=r"The part 'train\[99%:\]' of 10 prompts has none. Take a larger part."):
        load_rows(no_prompts, split="train[99%:]")


def test_a_sampled_folder_has_a_training_split(sampled):
    with pytest.raises(ValueError, match="sampled has no split 'test'; a sampled dataset is all 'train'"):
        load_rows(sampled, split="test")
    with pytest.raises(ValueError, match="sampled has no configuration 'rankings'; it has pairs and candidates"):
        load_rows(sampled, "rankings")


def test_num_rows_are_drawn_from_all_rows(tmp_path):
    file = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": str(row), "subset": row // 250} for row in range(1000)])
    rows = load_rows(file, num_rows=400)
    # Hypergeometric, mean 100 and standard deviation 6.7 of each quarter: 4 standard deviations for a fixed seed
    assert all(abs(rows["subset"].count(subset) - 100) < 27 for subset in range(4))
    assert len(set(rows["prompt"])) == 400
    assert load_rows(file, num_rows=400).to_list() == rows.to_list()
    assert load_rows(file, num_rows=100).to_list() == rows.to_list()[:100]
    assert load_rows(file, num_rows=2000)["prompt"] == [str(row) for row in range(1000)]
    with pytest.raises(ValueError, match="`num_rows` must be at least 1, got 0"):
        load_rows(file, num_rows=0)


def test_transcripts_are_split_at_the_last_assistant_turn(tmp_path):
    rows = load_rows(write_jsonl(tmp_path / "hh.jsonl", TRANSCRIPTS))
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    assert rows.to_list() == [{"prompt": prompt, "chosen": " So.", "rejected": " No."}]


@pytest.mark.parametrize(
    "row", [{"prompt": "Go on:", **TRANSCRIPTS[0]}, {"chosen": "Human: Hi", "rejected": "\n\nHuman: Hi"}]
)
def test_transcripts_beside_a_prompt_and_pairs_that_are_none_are_left_as_they_are(tmp_path, row):
    assert load_rows(write_jsonl(tmp_path / "own.jsonl", [row])).to_list() == [row]


def test_real_transcripts_are_those_of_load_hh_rlhf(shared_dir):
    folder = shared_dir / "data" / "hh_rlhf"
    expected = load_hh_rlhf(folder, subset="harmless-base", split="test").to_list()
    assert len(expected) == 2312
    assert load_rows(str(folder / "harmless-base" / "test.jsonl.gz")).to_list() == expected
    assert load_rows(str(folder), "harmless-base", "test[:2]").to_list() == expected[:2]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing.jsonl", FileNotFoundError, "There is no file missing.jsonl"),
        ("no-such-org/no-such-data", FileNotFoundError, "neither a local file or folder nor a dataset of the Hub"),
        ("notes.txt", ValueError, "notes.txt is no file of .jsonl, .json, .parquet"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch, name, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("Hello")
    with pytest.raises(error, match=message):
        load_rows(name)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_file_replaced_within_the_same_second_is_read_anew(tmp_path, suffix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    files = [Path(f"hh{suffix}"), Path("folder", f"train{suffix}")]
    read = []
    for answer in (" So.", " Yes."):
        rows = [{side: text.replace(" So.", answer) for side, text in TRANSCRIPTS[0].items()}]
        for file in files:
            write_jsonl(file, rows)
            os.utime(file, (1_000_000_000, 1_000_000_000))
        read += [
            load_hh_rlhf(files[0])["chosen"][0],
            *(load_rows(str(name))["chosen"][0] for name in (files[0], "folder")),
        ]
    assert read == [" So."] * 3 + [" Yes."] * 3


def test_transcripts_are_recognised_by_most_rows(tmp_path, caplog):
    odd = {"chosen": "Human: Hi\n\nAssistant: I think a", "rejected": "Human: Hi\n\nAssistant: I think b"}
    rows = load_rows(write_jsonl(tmp_path / "hh.jsonl", [odd, *TRANSCRIPTS * 2]))
    assert rows["chosen"][:] == [" So.", " So."]
    assert "1 of 3 rows have no prompt" in caplog.text and "rows 0. They are left out." in caplog.text
    mostly_others = [odd, odd, *TRANSCRIPTS]
    assert load_rows(write_jsonl(tmp_path / "other.jsonl", mostly_others)).to_list() == mostly_others


def test_pairs_as_ultrafeedback_has_them_get_messages_as_their_prompt(tmp_path):
    asked, sides = {"role": "user", "content": "Why?"}, {"chosen": "So.", "rejected": "No."}
    sides = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
    rows = [{"prompt": "Why?", **{side: [asked, *reply] for side, reply in sides.items()}}]
    assert load_rows(write_jsonl(tmp_path / "pairs.jsonl", rows)).to_list() == [{"prompt": [asked], **sides}]
