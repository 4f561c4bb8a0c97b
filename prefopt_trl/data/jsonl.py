"""Read prompts and candidates that another generator wrote as JSON Lines."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from prefopt_trl.data.formats import Row, check_completions, check_format, format_of
from prefopt_trl.data.rankings import FLOAT32_MAX

ROWS_AT_A_TIME = 1000  # held as Python objects, which take much more memory than the text


def read_jsonl(path: str | Path) -> Dataset:
    """Read prompts, or prompts with their candidates, from a JSON Lines file in UTF-8.

    Each line is an object with

    - `prompt`: text, or a list of messages;
    - `completions` (optional): one or more candidates, in the format of the prompt;
    - `rewards` and `logps` (optional): a number for each completion (either may be null: no opinion of a ranker,
      not known);
    - `finished` (optional): true or false for each completion;
    - `source` (optional): a name for each completion;
    - any other columns, which are kept. All lines have the same columns.

    Blank lines are skipped. Other invalid lines raise a `ValueError` that names the line.
    """
    rows, tables = _rows(Path(path)), []
    try:
        while some := list(islice(rows, ROWS_AT_A_TIME)):
            tables.append(pa.Table.from_pylist(some))
        if not tables:
            raise ValueError(f"{path} has no rows. Write one JSON object per line, with a `prompt` in each.")
        return Dataset(pa.concat_tables(tables, promote_options="permissive"))
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"{path} is no table: {error}. Give each column values of one type on all lines.") from error


def check_candidates(dataset: Dataset, name: str) -> None:
    """Raise `ValueError`, naming the row, unless each prompt has candidates, with one reward each if any."""
    for row, example in enumerate(dataset):
        _check_row(example, f"row {row} of {name}")


def _rows(path: Path) -> Iterator[Row]:
    """Yield the rows of the file, each checked by itself and against the first."""
    first: Row = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                row = json.loads(line)
            except ValueError as error:  # no JSON, or no UTF-8
                raise ValueError(f"In {where}: {error}. Write each row as one JSON object on one line.") from error
            if not isinstance(row, dict) or "prompt" not in row:
                found = f"the columns {', '.join(row)}" if isinstance(row, dict) and row else type(row).__name__
                raise ValueError(f"In {where} is {found}, without a `prompt`. Rename yours, or leave the line out.")
            _check_row(row, where)
            first = first or row
            if row.keys() != first.keys():
                raise ValueError(
                    f"In {where} are the columns {', '.join(row)}, and on the first line {', '.join(first)}. Give all "
                    "lines the same columns."
                )
            if isinstance(row["prompt"], str) != isinstance(first["prompt"], str):
                raise ValueError(
                    f"The prompt of {where} is {format_of(row['prompt'])}, and that of the first line "
                    f"{format_of(first['prompt'])}. Give all lines the same format."
                )
            yield row


def _check_row(row: Row, where: str) -> None:
    check_format(row["prompt"], f"The prompt of {where}")
    if "completions" not in row:
        return
    completions = row["completions"]
    if not isinstance(completions, list) or not completions:
        raise ValueError(
            f"The completions of {where} are {completions!r}. Give a list of one or more, or leave the row out."
        )
    check_completions(row["prompt"], completions, where)
    per_completion = {"rewards", "logps", "finished"} | ({"source"} if isinstance(row.get("source"), list) else set())
    for name in per_completion & row.keys():
        values = row[name]
        if not isinstance(values, list) or len(values) != len(completions):
            found = f"{len(values)}" if isinstance(values, list) else f"{values!r} as"
            raise ValueError(
                f"In {where} are {len(completions)} completions and {found} `{name}`. Give one for each completion, "
                "or leave the row out."
            )
        for index, value in enumerate(values):
            if name in ("finished", "source"):
                kind, wanted = (bool, "true or false") if name == "finished" else (str, "a name")
                valid = isinstance(value, kind)
            else:
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                valid = (is_number and abs(value) < FLOAT32_MAX) or value is None
                wanted = "a finite number, or leave the completion out"
            if not valid:
                raise ValueError(f"`{name}` of completion {index} of {where} is {value!r}. Give {wanted}.")
