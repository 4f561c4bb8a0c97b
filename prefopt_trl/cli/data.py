"""Check the columns of the rows that a command reads, and select the rows that fit into `max_length`."""

from collections.abc import Sequence

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt

from prefopt_trl.data.tokenization import chat_options, tokenize_completions, tokenize_prompts

GIVEN = {"chosen": "given_chosen", "rejected": "given_rejected"}  # names that sampled completions do not take


def require_columns(rows: Dataset, dataset_name: str, *alternatives: set[str]) -> None:
    """Raise a ValueError that lists the dataset's columns, unless it has all columns of one of the sets."""
    if not any(columns <= set(rows.column_names) for columns in alternatives):
        needed = ", or ".join(" and ".join(f"`{column}`" for column in sorted(columns)) for columns in alternatives)
        raise ValueError(
            f"{dataset_name} has the columns {', '.join(rows.column_names)}, and needs {needed}. Rename yours, as "
            f"with `dataset.rename_column({rows.column_names[0]!r}, {min(alternatives[0])!r}).to_json('new.jsonl')`."
        )


def keep_given(rows: Dataset) -> Dataset:
    """Rename the dataset's `chosen` and `rejected` to [`GIVEN`], so that sampled ones do not replace them."""
    names = {old: new for old, new in GIVEN.items() if old in rows.column_names and new not in rows.column_names}
    return rows.rename_columns(names)


def prompts_that_fit(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, max_new_tokens: int
) -> Dataset:
    """Return the rows whose prompts leave room for a completion."""
    if max_length is None:
        return rows
    lengths = [
        len(ids) + max_new_tokens
        for ids in tokenize_prompts(tokenizer, list(rows["prompt"]), list(map(chat_options, rows)))
    ]
    reason = f"with `max_new_tokens`={max_new_tokens} they would exceed"
    return rows.select(rows_that_fit(lengths, max_length, "prompts", reason))


def completions_that_fit(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """Return the rows that training would not truncate.

    Rows that the ranker does not read, and rows that the trainer rejects, are kept.
    """
    pairs = "completions" not in rows.column_names
    if max_length is None or "rewards" in rows.column_names or (pairs and not GIVEN.keys() <= set(rows.column_names)):
        return rows

    def length(row: dict[str, Sequence]) -> int:
        row = row if "prompt" in row else extract_prompt(row)
        completions = [row["chosen"], row["rejected"]] if pairs else row["completions"]
        prompt_ids, completion_ids = tokenize_completions(tokenizer, row["prompt"], completions, **chat_options(row))
        return len(prompt_ids) + max(map(len, completion_ids))

    return rows.select(rows_that_fit(list(map(length, rows)), max_length, "rows", "training would cut them at"))


def rows_that_fit(lengths: list[int], max_length: int, rows: str, reason: str) -> list[int]:
    """Return the indices of the rows of at most `max_length` tokens, and print how many are left out.

    Raises:
        ValueError: if no row fits.
    """
    fitting = [row for row, length in enumerate(lengths) if length <= max_length]
    left_out = f"{len(lengths) - len(fitting):,} of {len(lengths):,} {rows} are left out: {reason}"
    if not fitting:
        raise ValueError(f"{left_out} `max_length`={max_length} tokens. Raise it.")
    if len(fitting) < len(lengths):
        PartialState().print(f"{left_out} `max_length`={max_length} tokens.")
    return fitting
