import gzip
import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset

from prefopt_trl.data.formats import completion_text, prompt_text, transcript
from prefopt_trl.data.hh_rlhf import SUBSETS, load_hh_rlhf
from tests.unit.data.conftest import write_jsonl

GREETING = "\n\nHuman: Hi\n\nAssistant:"


def pair(chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


def messages(*turns: str) -> list[dict[str, str]]:
    roles = {"H": "user", "A": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


@pytest.mark.parametrize("conversational", [False, True])
def test_the_harmless_test_split_keeps_every_row_and_every_character(shared_dir: Path, conversational: bool) -> None:
    """PRO Table 1: 2,312 of 2,312. Completions are single turns, but for five that part ways earlier."""
    file = shared_dir / "data" / "hh_rlhf" / "harmless-base" / "test.jsonl.gz"
    dataset = load_hh_rlhf(file, conversational=conversational)
    assert dataset.column_names == ["prompt", "chosen", "rejected"]
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        raw = [json.loads(line) for line in lines]
    assert len(dataset) == len(raw) == 2312
    longer = []
    for index, (row, transcripts) in enumerate(zip(dataset, raw, strict=True)):
        prompt = prompt_text(row["prompt"])
        completions = {side: completion_text(row[side]) for side in ("chosen", "rejected")}
        assert prompt.endswith("\n\nAssistant:")
        assert {side: prompt + text for side, text in completions.items()} == transcripts
        longer += [index] if "\n\nAssistant:" in "".join(completions.values()) else []
    assert longer == [1254, 1688, 1950, 1952, 2036]


# Prompt, chosen and rejected completion
CASES = {
    "the last turn, not the first": (["H Hi", "A Hello", "H Bye"], ["A See you"], ["A Go"]),
    "paragraphs belong to their turn": (["H Hi\n\nyou"], ["A One\n\n1. a\n\n2. b "], ["A Two\n\n"]),
    "role names inside a turn": (["H Hi"], ["A Human: no.  Human: So?\nAssistant: yes"], ["A an Assistant: is"]),
    "two assistant turns in a row, in both": (["H Hi", "A Wait"], ["A Yes"], ["A No"]),
    "two assistant turns in a row, in one": (["H Hi"], ["A Wait", "A Yes"], ["A No"]),
    "the conversations part ways early": (["H Hi"], ["A A", "H B", "A C"], ["A D", "H B", "A C"]),
    "one conversation ends where the other goes on": (["H Hi"], ["A A"], ["A A", "H B", "A C"]),
    "empty completions, and a space too many": (["H Hi"], ["A "], ["A  A"]),
    "equal transcripts": (["H Hi"], ["A A"], ["A A"]),
}


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize(("prompt", "chosen", "rejected"), CASES.values(), ids=CASES)
def test_odd_rows_come_apart_as_they_were_written(
    tmp_path: Path, prompt, chosen, rejected, conversational: bool
) -> None:
    row = {"prompt": messages(*prompt), "chosen": messages(*chosen), "rejected": messages(*rejected)}
    raw = {side: transcript(row["prompt"] + row[side]) for side in ("chosen", "rejected")}
    dataset = load_hh_rlhf(write_jsonl(tmp_path / "rows.jsonl", [raw]), conversational=conversational)
    if not conversational:
        row = {"prompt": prompt_text(row["prompt"]), **{side: completion_text(row[side]) for side in raw}}
    assert dataset[0] == row


MALFORMED = [
    pair("\n\nHuman: Hi", "\n\nHuman: Hi"),
    pair("\n\nHuman: Hi\n\nAssistant: A", "\n\nHuman: Ho\n\nAssistant: A"),
    pair("Hi\n\nAssistant: A", "Hi\n\nAssistant: B"),
    pair("\n\nAssistant: A", "\n\nAssistant: B"),
    pair("", ""),
]


@pytest.mark.parametrize("conversational", [False, True])
def test_rows_without_a_prompt_are_left_out_and_named(tmp_path: Path, caplog, conversational: bool) -> None:
    good = pair(GREETING + " A", GREETING + " B")
    file = write_jsonl(tmp_path / "rows.jsonl", [good, *MALFORMED[:3], good, *MALFORMED[3:], good])
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        assert len(load_hh_rlhf(file, conversational=conversational)) == 3
    assert [record.getMessage() for record in caplog.records if record.name == "prefopt_trl.data.hh_rlhf"] == [
        f"{file}: 5 of 8 rows have no prompt, as their transcripts do not begin with '\\n\\nHuman:' or do not agree "
        "up to any '\\n\\nAssistant:': rows 1, 2, 3, 5, 6. They are left out."
    ]


def test_a_file_of_such_rows_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"12 of 12 rows have no prompt, .*: rows 0, 1, .* 8, 9, \.\.\.$"):
        load_hh_rlhf(write_jsonl(tmp_path / "rows.jsonl", [MALFORMED[0]] * 12))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("helpful-online", "harmless-base"):
        for split in ("train", "test"):
            write_jsonl(tmp_path / name / f"{split}.jsonl.gz", [pair(f"{GREETING} {name}", f"{GREETING} {split}")])
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "chosen", "rejected"),
    [
        ({}, [" harmless-base", " helpful-online"], [" train"] * 2),
        ({"split": "test"}, [" harmless-base", " helpful-online"], [" test"] * 2),
        ({"subset": "helpful-online"}, [" helpful-online"], [" train"]),
        ({"subset": "helpful"}, [" helpful-online"], [" train"]),
    ],
)
def test_a_folder_gives_the_subsets_it_has_or_the_one_asked_for(folder: Path, arguments, chosen, rejected) -> None:
    dataset = load_hh_rlhf(str(folder), **arguments)
    assert [dataset["chosen"][:], dataset["rejected"][:]] == [chosen, rejected]


@pytest.mark.parametrize(
    ("subset", "names"),
    [(None, SUBSETS), ("helpful", SUBSETS[1:]), ("helpful-rejection-sampled", ["helpful-rejection-sampled"])],
)
def test_the_hub_is_asked_for_each_subset(monkeypatch: pytest.MonkeyPatch, subset, names) -> None:
    asked = []

    def load_dataset(repo: str, *, data_dir: str, split: str) -> Dataset:
        asked.append((repo, data_dir, split))
        return Dataset.from_list([pair(f"{GREETING} a", f"{GREETING} b")])

    monkeypatch.setattr("prefopt_trl.data.hh_rlhf.load_dataset", load_dataset)
    dataset = load_hh_rlhf(subset=subset, split="test")
    assert asked == [("Anthropic/hh-rlhf", name, "test") for name in names]
    assert dataset["prompt"][:] == [GREETING] * len(names)


BAD_CALLS = [
    ({"subset": "harmless"}, ValueError, r"subset must be one of harmless-base, helpful-base, .* got 'harmless'"),
    ({"subset": "helpful-base"}, FileNotFoundError, r"none of helpful-base/train\.jsonl\.gz; .* another split"),
    ({"split": "validation"}, FileNotFoundError, r"none of harmless-base/validation\.jsonl\.gz, .* it has harmless-"),
    (
        {"path_or_repo": "harmless-base"},
        FileNotFoundError,
        r"it has test\.jsonl\.gz, train\.jsonl\.gz\. Lay the folder out",
    ),
    ({"path_or_repo": "empty"}, FileNotFoundError, r"it has no \.jsonl\.gz file at all"),
    ({"path_or_repo": "missing"}, FileNotFoundError, r"is neither a local file or folder nor a dataset of the Hub"),
    ({"path_or_repo": "null.jsonl", "subset": "helpful-base"}, ValueError, r"is a single file: leave subset out"),
    ({"path_or_repo": "none.jsonl"}, ValueError, r"none\.jsonl must hold one JSON object per line: it is empty"),
    (
        {"path_or_repo": "none.jsonl.gz"},
        ValueError,
        r"none\.jsonl\.gz must hold one JSON object per line: it is empty",
    ),
    ({"path_or_repo": "text.jsonl"}, ValueError, r"text\.jsonl must hold one JSON object per line: .*JSON"),
    (
        {"path_or_repo": "columns.jsonl"},
        ValueError,
        r"columns\.jsonl lacks the column rejected; it has chosen, prompt",
    ),
    ({"path_or_repo": "null.jsonl"}, ValueError, r"null\.jsonl, row 1: rejected must be a transcript, got None"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS)
def test_bad_input_is_named_with_the_remedy(folder: Path, arguments: dict, error: type, message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "text.jsonl").write_text("chosen, rejected\n")
    write_jsonl(folder / "none.jsonl", [])
    write_jsonl(folder / "none.jsonl.gz", [])
    write_jsonl(folder / "columns.jsonl", [{"chosen": "a", "prompt": "b"}])
    write_jsonl(folder / "null.jsonl", [pair(GREETING, GREETING), {"chosen": GREETING}])
    with pytest.raises(error, match=message):
        load_hh_rlhf(**{**arguments, "path_or_repo": folder / arguments.get("path_or_repo", "")})
