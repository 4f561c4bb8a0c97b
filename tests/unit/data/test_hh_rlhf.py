import gzip
import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset

from prefopt_trl.data.formats import completion_text, prompt_text, transcript
from prefopt_trl.data.hh_rlhf import SUBSETS, load_hh_rlhf

GREETING = "\n\nHuman: Hi\n\nAssistant:"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(file: Path, *rows: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return file


def read(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def pair(chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": chosen, "rejected": rejected}


def messages(*turns: str) -> list[dict[str, str]]:
    roles = {"H": "user", "A": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


@pytest.fixture(scope="module")
def harmless_test_file(shared_dir: Path) -> Path:
    return shared_dir / "data" / "hh_rlhf" / "harmless-base" / "test.jsonl.gz"


@pytest.fixture(scope="module")
def harmless_test_rows(harmless_test_file: Path) -> list[dict[str, str]]:
    return read(harmless_test_file)


def test_the_harmless_test_split_keeps_every_row_and_every_character(harmless_test_file, harmless_test_rows) -> None:
    """PRO Table 1: 2,312 of 2,312."""
    dataset = load_hh_rlhf(harmless_test_file)
    assert dataset.column_names == ["prompt", "chosen", "rejected"]
    assert len(dataset) == len(harmless_test_rows) == 2312
    for row, raw in zip(dataset, harmless_test_rows, strict=True):
        assert row["prompt"].endswith("\n\nAssistant:")
        assert row["prompt"] + row["chosen"] == raw["chosen"]
        assert row["prompt"] + row["rejected"] == raw["rejected"]


def test_messages_of_the_harmless_test_split_write_the_same_transcripts(
    harmless_test_file, harmless_test_rows
) -> None:
    dataset = load_hh_rlhf(harmless_test_file, conversational=True)
    assert len(dataset) == 2312
    for row, raw in zip(dataset, harmless_test_rows, strict=True):
        assert row["prompt"][-1]["role"] == "user"
        for column in ("chosen", "rejected"):
            assert transcript(row["prompt"] + row[column]) == raw[column]
            assert prompt_text(row["prompt"]) + completion_text(row[column]) == raw[column]


def test_completions_of_the_harmless_test_split_are_single_turns_but_for_those_that_part_ways_earlier(
    harmless_test_file,
) -> None:
    dataset = load_hh_rlhf(harmless_test_file)
    longer = [i for i, row in enumerate(dataset) if "\n\nAssistant:" in row["chosen"] + row["rejected"]]
    assert longer == [1254, 1688, 1950, 1952, 2036]


CASES = {
    "the last turn, not the first": (
        pair(
            GREETING + " Hello\n\nHuman: Bye\n\nAssistant: See you", GREETING + " Hello\n\nHuman: Bye\n\nAssistant: Go"
        ),
        (GREETING + " Hello\n\nHuman: Bye\n\nAssistant:", " See you", " Go"),
        (messages("H Hi", "A Hello", "H Bye"), messages("A See you"), messages("A Go")),
    ),
    "paragraphs belong to their turn": (
        pair("\n\nHuman: Hi\n\nyou\n\nAssistant: One\n\n1. a\n\n2. b ", "\n\nHuman: Hi\n\nyou\n\nAssistant: Two\n\n"),
        ("\n\nHuman: Hi\n\nyou\n\nAssistant:", " One\n\n1. a\n\n2. b ", " Two\n\n"),
        (messages("H Hi\n\nyou"), messages("A One\n\n1. a\n\n2. b "), messages("A Two\n\n")),
    ),
    "role names inside a turn": (
        pair(GREETING + " Human: no.  Human: So?\nAssistant: yes", GREETING + " an Assistant: is"),
        (GREETING, " Human: no.  Human: So?\nAssistant: yes", " an Assistant: is"),
        (messages("H Hi"), messages("A Human: no.  Human: So?\nAssistant: yes"), messages("A an Assistant: is")),
    ),
    "two assistant turns in a row, in both": (
        pair(GREETING + " Wait\n\nAssistant: Yes", GREETING + " Wait\n\nAssistant: No"),
        (GREETING + " Wait\n\nAssistant:", " Yes", " No"),
        (messages("H Hi", "A Wait"), messages("A Yes"), messages("A No")),
    ),
    "two assistant turns in a row, in one": (
        pair(GREETING + " Wait\n\nAssistant: Yes", GREETING + " No"),
        (GREETING, " Wait\n\nAssistant: Yes", " No"),
        (messages("H Hi"), messages("A Wait", "A Yes"), messages("A No")),
    ),
    "the conversations part ways early": (
        pair(GREETING + " A\n\nHuman: B\n\nAssistant: C", GREETING + " D\n\nHuman: B\n\nAssistant: C"),
        (GREETING, " A\n\nHuman: B\n\nAssistant: C", " D\n\nHuman: B\n\nAssistant: C"),
        (messages("H Hi"), messages("A A", "H B", "A C"), messages("A D", "H B", "A C")),
    ),
    "one conversation ends where the other goes on": (
        pair(GREETING + " A", GREETING + " A\n\nHuman: B\n\nAssistant: C"),
        (GREETING, " A", " A\n\nHuman: B\n\nAssistant: C"),
        (messages("H Hi"), messages("A A"), messages("A A", "H B", "A C")),
    ),
    "empty completions, and a space too many": (
        pair(GREETING + " ", GREETING + "  A"),
        (GREETING, " ", "  A"),
        (messages("H Hi"), messages("A "), messages("A  A")),
    ),
    "equal transcripts": (
        pair(GREETING + " A", GREETING + " A"),
        (GREETING, " A", " A"),
        (messages("H Hi"), messages("A A"), messages("A A")),
    ),
}


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize(("raw", "plain", "as_messages"), CASES.values(), ids=CASES)
def test_odd_rows_by_hand(tmp_path: Path, raw, plain, as_messages, conversational: bool) -> None:
    dataset = load_hh_rlhf(write(tmp_path / "rows.jsonl", raw), conversational=conversational)
    expected = as_messages if conversational else plain
    assert dataset[0] == dict(zip(["prompt", "chosen", "rejected"], expected, strict=True))


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
    file = write(tmp_path / "rows.jsonl", good, *MALFORMED[:3], good, *MALFORMED[3:], good)
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        assert len(load_hh_rlhf(file, conversational=conversational)) == 3
    assert [record.getMessage() for record in caplog.records if record.name == "prefopt_trl.data.hh_rlhf"] == [
        f"{file}: 5 of 8 rows have no prompt, as their transcripts do not begin with '\\n\\nHuman:' or do not agree "
        "up to any '\\n\\nAssistant:': rows 1, 2, 3, 5, 6. They are left out."
    ]


def test_a_file_of_such_rows_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"12 of 12 rows have no prompt, .*: rows 0, 1, .* 8, 9, \.\.\.$"):
        load_hh_rlhf(write(tmp_path / "rows.jsonl", *[MALFORMED[0]] * 12))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("helpful-online", "harmless-base"):
        for split in ("train", "test"):
            write(tmp_path / name / f"{split}.jsonl.gz", pair(f"{GREETING} {name}", f"{GREETING} {split}"))
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
def test_the_hub_is_asked_for_each_subset(folder: Path, monkeypatch: pytest.MonkeyPatch, subset, names) -> None:
    asked = []

    def load_dataset(repo: str, *, data_dir: str, split: str) -> Dataset:
        asked.append((repo, data_dir, split))
        return Dataset.from_list(read(folder / "harmless-base" / "test.jsonl.gz"))

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
    write(folder / "none.jsonl")
    write(folder / "none.jsonl.gz")
    write(folder / "columns.jsonl", {"chosen": "a", "prompt": "b"})
    write(folder / "null.jsonl", pair(GREETING, GREETING), {"chosen": GREETING})
    with pytest.raises(error, match=message):
        load_hh_rlhf(**{**arguments, "path_or_repo": folder / arguments.get("path_or_repo", "")})


def test_a_repository_that_cannot_be_read_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing' is neither a local .* Check the path, or download"):
        load_hh_rlhf("nobody/nothing")
