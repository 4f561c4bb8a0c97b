"""Prompts and completions as plain text or as messages, and the checks of datasets.

A *prompt* or *completion* is a string (plain format) or a list of `{"role": ..., "content": ...}` messages
(conversational format). `prompt_text` plus `completion_text` is the whole conversation as an HH-RLHF transcript.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from datasets import Dataset, IterableDataset, Value
from trl import extract_prompt

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | Sequence[Message]
Completion: TypeAlias = str | Sequence[Message]
Row: TypeAlias = dict[str, Any]  # a row of a dataset, by column
AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

TURN_NAMES = {"system": "System", "user": "Human", "assistant": "Assistant"}
ASSISTANT_TURN = "\n\nAssistant:"

EQUAL_REWARDS_HINT = (
    "In a reward function, `len(completion)` of a conversational completion counts its messages: read the text as "
    '`completion[-1]["content"]`.'
)


def transcript(messages: Sequence[Message]) -> str:
    r"""Format messages as a transcript (RSO section 2): `"\n\nHuman: Hi\n\nAssistant: Hi"`.

    Raise `ValueError` for a role other than `"system"`, `"user"` and `"assistant"`, or content that is not text.
    """
    for index, message in enumerate(messages):
        if message["role"] not in TURN_NAMES:
            raise ValueError(
                f"message {index} has the role {message['role']!r}; "
                f"the roles that can be written as a transcript are {', '.join(TURN_NAMES)}"
            )
        if not isinstance(message["content"], str):
            raise ValueError(f"message {index} must have text as its content, got {type(message['content']).__name__}")
    return "".join(f"\n\n{TURN_NAMES[message['role']]}: {message['content']}" for message in messages)


def prompt_text(prompt: Prompt) -> str:
    r"""Format a prompt as text that ends where the completion begins: a transcript ends with `"\n\nAssistant:"`."""
    return prompt if isinstance(prompt, str) else transcript(prompt) + ASSISTANT_TURN


def completion_text(completion: Completion) -> str:
    r"""Format a completion as text that follows `prompt_text`: a transcript without its first `"\n\nAssistant:"`."""
    if isinstance(completion, str):
        return completion
    text = transcript(completion)
    if not text.startswith(ASSISTANT_TURN):
        raise ValueError(f"a completion must begin with a message of the assistant, got {list(completion)!r}")
    return text.removeprefix(ASSISTANT_TURN)


def num_characters(completion: Completion) -> int:
    """Return the length of a completion in characters; of messages, that of their contents."""
    if isinstance(completion, str):
        return len(completion)
    return sum(len(message["content"] or "") for message in completion)


def wrap_completion(prompt: Prompt, completion: Completion) -> Completion:
    """Return a completion with its text as one assistant message if the prompt is a list of messages."""
    if isinstance(prompt, str) or not isinstance(completion, str):
        return completion
    return [{"role": "assistant", "content": completion}]


def check_format(value: Prompt | Completion, where: str) -> None:
    """Raise `ValueError` unless the value is text or a list of messages; the message begins with `where`."""
    if isinstance(value, str):
        return
    if not isinstance(value, list | tuple) or not value:
        found = "an empty list" if isinstance(value, list | tuple) else type(value).__name__
        raise ValueError(f"{where} is {found}; give it as text, or as a list of messages. Leave the row out.")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = f"the keys {', '.join(message)}" if isinstance(message, dict) else f"type {type(message).__name__}"
            raise ValueError(f"{where} has a message with {found}; a message has `role` and `content`.")
        if message["content"] is None and not message.get("tool_calls"):
            raise ValueError(f"{where} has a message whose `content` is None. Give it text, or leave the row out.")


def check_list(values: object, name: str, wanted: str) -> None:
    """Raise `TypeError` unless the values are a list of texts or conversations, rather than a single one."""
    if isinstance(values, str):
        found = "a single text"
    elif isinstance(values, Mapping) or not isinstance(values, Collection):
        found = type(values).__name__
    elif any(isinstance(value, Mapping) for value in values):
        found = "a single list of messages"
    else:
        return
    raise TypeError(f"`{name}` is {found}. Give {wanted}.")


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise an error unless the prompts are all text or all lists of messages; it names the first other row."""
    check_list(prompts, "prompts", "a list of prompts")
    for row, prompt in enumerate(prompts):
        check_format(prompt, f"The prompt of row {row}")
        if isinstance(prompt, str) != isinstance(prompts[0], str):
            raise ValueError(
                f"The prompt of row {row} is {format_of(prompt)}, and that of row 0 is {format_of(prompts[0])}. Give "
                "all prompts in the same format."
            )


def check_completions(prompt: Prompt, completions: Sequence[Completion], where: str) -> None:
    """Raise `ValueError` unless the completions have the format of their prompt."""
    for index, completion in enumerate(completions):
        check_format(completion, f"Completion {index} of {where}")
        if isinstance(completion, str) != isinstance(prompt, str):
            raise ValueError(
                f"Completion {index} of {where} is {format_of(completion)}, and its prompt {format_of(prompt)}. "
                "Give both as text, or both as lists of messages."
            )


def format_of(value: Prompt | Completion) -> str:
    """Return the name of a prompt's or completion's format, for an error message."""
    return "text" if isinstance(value, str) else "a list of messages"


def normalize_pairs(dataset: AnyDataset, where: str) -> AnyDataset:
    """Return preference pairs as TRL expects them: plain Python values, prompts in the format of their completions.

    UltraFeedback on the Hub has text prompts, and completions that are whole conversations, starting with a user
    message of that text. Such a prompt is replaced by the messages with which both completions begin. Lists of several
    chosen and rejected completions, as in RewardBench 2, are unchanged. Raise `ValueError`, naming the row, for None
    in a cell or completions that do not begin with the prompt.
    """
    if dataset.features is None:  # a stream without declared features
        return dataset
    dataset, features = dataset.with_format(None), dataset.features
    columns = [column for column in ("prompt", "chosen", "rejected") if column in features]
    if isinstance(dataset, Dataset) and columns:
        start = 0
        for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
            for column in columns:
                if table[column].null_count:
                    row = start + table[column].is_null().to_pylist().index(True)
                    raise ValueError(f"`{column}` of row {row} of {where} is None. Leave the row out.")
            start += len(table)
    if len(columns) == 3 and are_candidates(features["chosen"]):
        return dataset
    if len(columns) == 3 and isinstance(features["chosen"], Value) and not isinstance(features["prompt"], Value):
        raise ValueError(
            f"The prompts of {where} are lists of messages, and `chosen` is text. Give both as text, or both as "
            "messages."
        )
    if len(columns) == 3 and isinstance(features["prompt"], Value) and not isinstance(features["chosen"], Value):
        return dataset.map(_split_conversations, with_indices=True, fn_kwargs={"where": where})
    return dataset


def are_candidates(feature: Any) -> bool:
    """Return whether the cells of a column are lists of completions, by its entry in `dataset.features`."""
    inner = getattr(feature, "feature", None)  # of a list; that of a list of messages is a dictionary
    return isinstance(inner, Value) or hasattr(inner, "feature")


def _split_conversations(pair: Row, row: int, where: str) -> Row:
    split = extract_prompt({"chosen": pair["chosen"], "rejected": pair["rejected"]})
    if not split["prompt"] or split["prompt"][-1]["content"] != pair["prompt"]:
        raise ValueError(
            f"The prompt of row {row} of {where} is text, and its completions are lists of messages that do not both "
            "begin with it. Give all three as text, or all three as lists of messages."
        )
    return split


def check_columns(dataset: Dataset, required: Sequence[str], where: str) -> None:
    """Raise an error unless this is one non-empty split with these columns; the message begins with `where`."""
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{where} must be a datasets.Dataset, got {type(dataset).__name__}; "
            'of a DatasetDict, pass one split, such as dataset["train"]'
        )
    missing = [column for column in required if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{where} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; "
            f"it has {', '.join(dataset.column_names) or 'none'}. Rename yours with dataset.rename_column(old, new)."
        )
    if len(dataset) == 0:
        raise ValueError(f"{where} is empty: it must have at least one row")


def columns_of(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    """Return the columns of a dataset from its first row, as a stream may not declare them; raise if it is empty."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"The {name} dataset must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`. Pass one "
            'split, such as `dataset["train"]`; a list of prompts becomes one with '
            '`Dataset.from_dict({"prompt": prompts})`.'
        )
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"The {name} dataset is empty. Give it at least one row.")
    return list(first_row)


def number_rows(dataset: Dataset) -> Dataset:
    """Return the dataset with a column `row`, the index of each row, which replaces a column of that name."""
    if "row" in dataset.column_names:
        dataset = dataset.remove_columns("row")
    return dataset.add_column("row", range(len(dataset)))


def is_lost(name: str) -> bool:
    """Return whether a name can only be a path, not an id on the Hub, and does not exist."""
    path = Path(name)
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return not path.exists() and (looks_like_a_path or ("/" in name and path.parent.is_dir()))
