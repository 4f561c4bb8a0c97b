import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from prefopt_trl.data.formats import (
    are_candidates,
    check_columns,
    completion_text,
    normalize_pairs,
    num_characters,
    number_rows,
    prompt_text,
    transcript,
    wrap_completion,
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi\n\nAre you there? "},
    {"role": "assistant", "content": " Yes."},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Good"},
]


def test_transcript_writes_every_turn_and_keeps_every_character() -> None:
    assert transcript(CHAT) == (
        "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAre you there? \n\nAssistant:  Yes.\n\nAssistant: \n\nHuman: Good"
    )
    assert transcript([]) == ""


@pytest.mark.parametrize("split", [2, 3])
def test_prompt_then_completion_is_the_transcript(split: int) -> None:
    assert prompt_text(CHAT[:split]) + completion_text(CHAT[split:]) == transcript(CHAT)
    assert prompt_text(CHAT[:split]).endswith("\n\nAssistant:")


def test_plain_text_stays_as_it_is() -> None:
    assert prompt_text("\n\nHuman: Hi ") == "\n\nHuman: Hi "
    assert completion_text("  Hello\n") == "  Hello\n"


@pytest.mark.parametrize("prompt", ["Hi", [{"role": "user", "content": "Hi"}]])
def test_a_wrapped_completion_has_the_format_of_its_prompt_and_the_text(prompt: str | list[dict[str, str]]) -> None:
    completion = wrap_completion(prompt, "Hello\n")
    assert type(completion) is type(prompt)
    assert completion_text(completion).removeprefix(" ") == "Hello\n"
    if isinstance(prompt, list):
        assert completion == [{"role": "assistant", "content": "Hello\n"}]


def test_messages_that_cannot_be_written_are_named() -> None:
    with pytest.raises(ValueError, match=r"message 1 has the role 'tool'; the roles .* are system, user, assistant"):
        transcript([CHAT[1], {"role": "tool", "content": "42"}])
    with pytest.raises(ValueError, match="message 0 must have text as its content, got list"):
        prompt_text([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])


@pytest.mark.parametrize("completion", [[], [{"role": "user", "content": "Hi"}]])
def test_a_completion_begins_with_the_assistant(completion: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="must begin with a message of the assistant, got "):
        completion_text(completion)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, "train_dataset lacks the columns prompt, chosen; it has text. Rename yours with"),
        ({"prompt": ["a"], "text": ["a"]}, "train_dataset lacks the column chosen; it has prompt, text. Rename"),
        ({}, "train_dataset lacks the columns prompt, chosen; it has none."),
        ({"prompt": [], "chosen": []}, "train_dataset is empty: it must have at least one row"),
    ],
)
def test_check_columns_says_what_is_wrong_and_what_to_do(columns: dict[str, list[str]], message: str) -> None:
    check_columns(Dataset.from_dict({"chosen": ["b"], "more": [1], "prompt": ["a"]}), ["prompt", "chosen"], "data")
    with pytest.raises(ValueError, match=message):
        check_columns(Dataset.from_dict(columns), ["prompt", "chosen"], "train_dataset")


def test_check_columns_asks_for_one_split() -> None:
    splits = DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})})
    with pytest.raises(TypeError, match=r'prompts must be a datasets.Dataset, got DatasetDict; .* dataset\["train"\]'):
        check_columns(splits, ["prompt"], "prompts")


def test_rows_are_numbered_whatever_was_called_so():
    dataset = Dataset.from_dict({"row": ["a", "b"], "prompt": ["x", "y"]})
    assert number_rows(dataset).to_dict() == {"prompt": ["x", "y"], "row": [0, 1]}


def conversation(*texts):
    roles = ("user", "assistant") if len(texts) == 2 else ("system", "user", "assistant")
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_of_whole_conversations_is_their_common_messages(stream) -> None:
    """UltraFeedback on the Hub has a prompt of text beside such conversations, sometimes two equal ones."""
    rows = [
        {"prompt": "Hi?", "chosen": conversation("Hi?", "Yes."), "rejected": conversation("Hi?", "No."), "score": 1.0},
        {
            "prompt": "Hi",
            "chosen": conversation("S", "Hi", "a"),
            "rejected": conversation("S", "Hi", "a"),
            "score": 2.0,
        },
    ]
    dataset = Dataset.from_list(rows)
    dataset: Dataset | IterableDataset = dataset.to_iterable_dataset() if stream else dataset.with_format("torch")
    assert list(normalize_pairs(dataset, "the train dataset")) == [
        {"prompt": row["chosen"][:-1], "chosen": row["chosen"][-1:], "rejected": row["rejected"][-1:], "score": score}
        for row, score in zip(rows, (1.0, 2.0), strict=True)
    ]


def test_pairs_that_trl_reads_are_left_as_they_are() -> None:
    for rows in ({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}, {"chosen": ["ab"], "rejected": ["ac"]}):
        assert normalize_pairs(Dataset.from_dict(rows), "`pairs`").to_dict() == rows


def test_a_cell_of_none_and_conversations_of_another_prompt_are_named() -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": None if row == 1500 else "c"} for row in range(2000)]
    with pytest.raises(ValueError, match="^`rejected` of row 1499 of the train dataset is None. Leave the row out.$"):
        normalize_pairs(Dataset.from_list(rows).select(range(1, 2000)), "the train dataset")
    rows = [{"prompt": "Hi", "chosen": conversation(text, "a"), "rejected": conversation(text, "b")} for text in "Hi"]
    with pytest.raises(ValueError, match="The prompt of row 0 of `pairs` is text, and its completions are lists of"):
        normalize_pairs(Dataset.from_list(rows), "`pairs`")


@pytest.mark.parametrize("message", [" a", [{"role": "assistant", "content": "a"}]])
def test_lists_of_completions_are_not_taken_for_conversations(message):
    prompt = "Why?" if isinstance(message, str) else [{"role": "user", "content": "Why?"}]
    rows = Dataset.from_list([{"prompt": prompt, "chosen": [message], "rejected": [message, message]}])
    assert list(normalize_pairs(rows, "`pairs`")) == list(rows)
    assert are_candidates(rows.features["chosen"])
    assert not are_candidates(Dataset.from_list([{"chosen": message}]).features["chosen"])


def test_a_length_is_that_of_the_contents():
    messages = [{"role": "assistant", "content": "four"}, {"role": "tool", "content": None}]
    assert (num_characters("four"), num_characters(messages)) == (4, 4)
