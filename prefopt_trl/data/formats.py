"""Prompts and completions as plain text or as messages, and the checks every dataset passes.

A *prompt* or *completion* is a string (plain format) or a list of `{"role": ..., "content": ...}` messages
(conversational format). Written out as a transcript, the two are the same text: `prompt_text` followed by
`completion_text` is the whole conversation in the form HH-RLHF has it.
"""

from collections.abc import Sequence
from typing import TypeAlias

from datasets import Dataset, IterableDataset

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | Sequence[Message]
Completion: TypeAlias = str | Sequence[Message]

TURN_NAMES = {"system": "System", "user": "Human", "assistant": "Assistant"}
ASSISTANT_TURN = "\n\nAssistant:"


def transcript(messages: Sequence[Message]) -> str:
    r"""
    Writes messages as the "conversation between human and assistant" of RSO section 2.

    Args:
        messages (sequence of `dict[str, str]`):
            Messages with `role` (`"system"`, `"user"` or `"assistant"`) and `content`.

    Returns:
        `str`: the turns `"\n\nHuman: ..."`, `"\n\nAssistant: ..."` and `"\n\nSystem: ..."`, one after the other.

    Raises:
        ValueError: if a message has another role, or content that is not text.

    Example:

    ```python
    >>> transcript([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    '\n\nHuman: Hi\n\nAssistant: Hello'
    ```
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
    r"""
    Writes a prompt as text that ends where the completion begins.

    Args:
        prompt (`str` or sequence of `dict[str, str]`):
            Prompt in either format.

    Returns:
        `str`: a plain prompt unchanged; messages as their transcript followed by `"\n\nAssistant:"`.

    Raises:
        ValueError: as `transcript`.

    Example:

    ```python
    >>> prompt_text([{"role": "user", "content": "Hi"}])
    '\n\nHuman: Hi\n\nAssistant:'
    ```
    """
    return prompt if isinstance(prompt, str) else transcript(prompt) + ASSISTANT_TURN


def completion_text(completion: Completion) -> str:
    r"""
    Writes a completion as the text that follows `prompt_text`.

    Args:
        completion (`str` or sequence of `dict[str, str]`):
            Completion in either format; of messages, the first is the assistant's.

    Returns:
        `str`: a plain completion unchanged; messages as their transcript without the first `"\n\nAssistant:"`, so with
            the space after the colon.

    Raises:
        ValueError: if the first message is not the assistant's, and as `transcript`.

    Example:

    ```python
    >>> completion_text([{"role": "assistant", "content": "Hello"}])
    ' Hello'
    ```
    """
    if isinstance(completion, str):
        return completion
    text = transcript(completion)
    if not text.startswith(ASSISTANT_TURN):
        raise ValueError(f"a completion must begin with a message of the assistant, got {list(completion)!r}")
    return text.removeprefix(ASSISTANT_TURN)


def wrap_completion(prompt: Prompt, text: str) -> str | list[Message]:
    """
    Gives a generated text the format of the prompt that it completes.

    Args:
        prompt (`str` or sequence of `dict[str, str]`):
            Prompt in either format.
        text (`str`):
            Generated text.

    Returns:
        `str` or `list[dict[str, str]]`: the text itself for a plain prompt, one message of the assistant otherwise.

    Example:

    ```python
    >>> wrap_completion([{"role": "user", "content": "Hi"}], "Hello")
    [{'role': 'assistant', 'content': 'Hello'}]
    ```
    """
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def check_format(value: Prompt | Completion, where: str) -> None:
    """
    Refuses what is neither text nor a list of messages.

    Args:
        value (`str` or sequence of `dict[str, str]`):
            Prompt or completion.
        where (`str`):
            What it is to the user, as the error calls it.

    Raises:
        ValueError: naming what was found.

    Example:

    ```python
    >>> check_format([{"from": "human", "value": "Hi"}], "The prompt of row 3")
    Traceback (most recent call last):
    ValueError: The prompt of row 3 has a message with the keys from, value; a message has `role` and `content`.
    ```
    """
    if isinstance(value, str):
        return
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else type(value).__name__
        raise ValueError(f"{where} is {found}; give it as text, or as a list of messages. Leave the row out.")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = f"the keys {', '.join(message)}" if isinstance(message, dict) else f"type {type(message).__name__}"
            raise ValueError(f"{where} has a message with {found}; a message has `role` and `content`.")


def check_columns(dataset: Dataset, required: Sequence[str], where: str) -> None:
    """
    Refuses a dataset that is empty or lacks a column.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset to check.
        required (sequence of `str`):
            Names of the columns that must be there.
        where (`str`):
            What the dataset is to the user, as the error calls it, e.g. `"train_dataset"`.

    Raises:
        TypeError: if `dataset` is not a [`~datasets.Dataset`], for example all the splits at once.
        ValueError: if a column is missing, or if there is no row.

    Example:

    ```python
    >>> check_columns(Dataset.from_dict({"text": ["Hi"]}), ["prompt"], "train_dataset")
    Traceback (most recent call last):
    ValueError: train_dataset lacks the column prompt; it has text. Rename yours with dataset.rename_column(old, new).
    ```
    """
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
    """Names of the columns of a dataset with at least one row; a stream may know them from its rows only.

    Raises:
        TypeError: for anything but a dataset.
        ValueError: for an empty one.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"The {name} dataset must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`. Of several "
            'splits pass one, such as `dataset["train"]`; a list of prompts becomes one with '
            '`Dataset.from_dict({"prompt": prompts})`.'
        )
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"The {name} dataset is empty. Give it at least one row.")
    return list(first_row)


def number_rows(dataset: Dataset) -> Dataset:
    """The dataset with a column `row`, the number of each row, in place of any of that name."""
    if "row" in dataset.column_names:
        dataset = dataset.remove_columns("row")
    return dataset.add_column("row", range(len(dataset)))
