import json
from pathlib import Path

import pytest
from datasets import Dataset

from prefopt_trl.data import jsonl
from prefopt_trl.data.jsonl import check_candidates, read_jsonl
from tests.unit.data.conftest import write_jsonl

ASK = [{"role": "user", "content": "What colour is the sky?"}]
BLUE = [{"role": "assistant", "content": "Blue."}]
GREEN = [{"role": "assistant", "content": "Green."}]

PLAIN = {"prompt": "The sky is", "completions": [" blue.", " green."]}
CONVERSATION = {"prompt": ASK, "completions": [BLUE, GREEN]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "candidates.jsonl"


# What is read


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "The sky is"}, {"prompt": "2026-01-31"}],  # a date stays the text that it is
        [{"prompt": ASK}, {"prompt": [*ASK, *BLUE, *ASK]}],
        [PLAIN, {"prompt": "The sea", "completions": [" is wet."]}],
        [CONVERSATION],
        [PLAIN | {"rewards": [0.25, -1e30], "finished": [True, False], "logps": [-3.5, 0.0]}],
        [PLAIN | {"source": {"name": "wiki", "pages": [1, 2]}}, PLAIN | {"source": {"name": None, "pages": []}}],
        [{"prompt": "día 空\u2028 \u0085", "completions": ["", "\n"]}],
    ],
)
def test_rows_are_read_as_they_are_written(path: Path, rows: list[dict]) -> None:
    assert read_jsonl(write_jsonl(path, rows)).to_list() == rows
    assert read_jsonl(str(path)).column_names == list(rows[0])
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_jsonl(path).to_list() == rows


def test_blank_lines_line_ends_and_a_byte_order_mark_do_no_harm(path: Path) -> None:
    line = json.dumps(PLAIN).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert read_jsonl(path).to_list() == [PLAIN, PLAIN]


def test_a_file_read_in_parts_is_one_table_of_the_widest_types(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "ROWS_AT_A_TIME", 2)
    rows = [PLAIN | {"rewards": [1, 2], "note": None}] * 3 + [PLAIN | {"rewards": [0.5, 2], "note": "n"}] * 2
    dataset = read_jsonl(write_jsonl(path, rows))
    assert dataset.to_list() == rows
    assert [str(dataset.features[name].dtype) for name in ("prompt", "note")] == ["string", "string"]
    assert dataset.features["rewards"].feature.dtype == "float64"


def test_columns_may_come_in_any_order(path: Path) -> None:
    assert read_jsonl(write_jsonl(path, [PLAIN, dict(reversed(PLAIN.items()))])).to_list() == [PLAIN, PLAIN]


# What is refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "Hi"}], "line 2 of {path} is the columns text, without a `prompt`. Rename yours"),
        ([{}], "line 2 of {path} is dict, without a `prompt`"),
        ([["Hi"]], "line 2 of {path} is list, without a `prompt`"),
        ([{"prompt": 7}], "The prompt of line 2 of {path} is int; give it as text, or as a list of messages."),
        ([{"prompt": [{"from": "me"}]}], "The prompt of line 2 of {path} has a message with the keys from"),
        ([PLAIN | {"completions": []}], "The completions of line 2 of {path} are []. Give a list of one or more"),
        ([PLAIN | {"completions": " blue."}], "The completions of line 2 of {path} are ' blue.'. Give a list"),
        ([PLAIN | {"completions": ["a", 3]}], "Completion 1 of line 2 of {path} is int; give it as text"),
        (
            [PLAIN | {"completions": [" blue.", BLUE]}],
            "Completion 1 of line 2 of {path} is a list of messages, and its prompt text. Give both as text, or both",
        ),
        (
            [CONVERSATION | {"completions": ["Blue."]}],
            "Completion 0 of line 2 of {path} is text, and its prompt a list of messages. Give both as text, or both",
        ),
        ([PLAIN | {"rewards": [1.0]}], "In line 2 of {path} are 2 completions and 1 `rewards`. Give one for each"),
        ([PLAIN | {"rewards": None}], "In line 2 of {path} are 2 completions and None as `rewards`. Give one for"),
        ([PLAIN | {"finished": []}], "In line 2 of {path} are 2 completions and 0 `finished`. Give one for each"),
        ([PLAIN | {"logps": [-1.0]}], "In line 2 of {path} are 2 completions and 1 `logps`. Give one for each"),
        (
            [PLAIN | {"rewards": [1.0, float("nan")]}],
            "`rewards` of completion 1 of line 2 of {path} is nan. Give a finite number, or leave the completion out.",
        ),
        ([PLAIN | {"rewards": ["1", 2.0]}], "`rewards` of completion 0 of line 2 of {path} is '1'. Give a finite"),
        ([PLAIN | {"rewards": [10**400, 2]}], "`rewards` of completion 0 of line 2 of {path} is 1000"),
        ([PLAIN | {"rewards": [True, 2]}], "`rewards` of completion 0 of line 2 of {path} is True. Give a finite"),
        ([PLAIN | {"logps": [-1.0, -float("inf")]}], "`logps` of completion 1 of line 2 of {path} is -inf. Give a"),
        ([PLAIN | {"finished": [True, 1]}], "`finished` of completion 1 of line 2 of {path} is 1. Give true or"),
        (
            [PLAIN, PLAIN | {"id": 3}],
            "In line 3 of {path} are the columns prompt, completions, id, and on the first line prompt, completions.",
        ),
        (
            [CONVERSATION, PLAIN],
            "The prompt of line 3 of {path} is text, and that of the first line a list of messages. Give all lines",
        ),
        ([], "{path} has no rows. Write one JSON object per line, with a `prompt` in each."),
        ([PLAIN | {"id": 1}, PLAIN | {"id": "one"}], "{path} is no table: "),
        ([PLAIN | {"id": 10**30}], "{path} is no table: "),
        ([{"prompt": "\ud800"}], "{path} is no table: "),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_the_remedy(path: Path, rows: list, message: str) -> None:
    write_jsonl(path, rows)
    path.write_text("\n" + path.read_text())
    with pytest.raises(ValueError) as error:
        read_jsonl(path)
    assert message.format(path=path) in str(error.value)


@pytest.mark.parametrize("line", [b'{"prompt": "Hi"', b'{"prompt": "\xff"}', b"Hi", b'{"prompt": "a"} {}'])
def test_a_line_that_is_no_json_is_named(path: Path, line: bytes) -> None:
    path.write_bytes(b'{"prompt": "Hi"}\n' + line + b"\n")
    with pytest.raises(ValueError, match="In line 2 of .*candidates.jsonl: .* Write each row as one JSON object"):
        read_jsonl(path)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="candidates.jsonl"):
        read_jsonl(path)


@pytest.mark.parametrize("row", [PLAIN, CONVERSATION, PLAIN | {"rewards": [1.0, 2.0], "finished": [True, False]}])
def test_candidates_of_a_dataset_that_are_wrong_are_named_with_their_row(row: dict) -> None:
    check_candidates(Dataset.from_list([row, row]), "`prompts`")
    with pytest.raises(
        ValueError, match=r"The completions of row 1 of `prompts` are \[\]. Give a list of one or more"
    ):
        check_candidates(Dataset.from_list([row, row | {"completions": []}]), "`prompts`")
