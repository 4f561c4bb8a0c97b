"""Rankings: prompts with any number of completions, each with a reward."""

import logging

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt

from prefopt_trl.data.formats import (
    EQUAL_REWARDS_HINT,
    Row,
    check_completions,
    check_format,
    columns_of,
    normalize_pairs,
)
from prefopt_trl.data.tokenization import (
    chat_options,
    check_tokens,
    no_prompt,
    tokenize_completions,
    warn_of_full_prompts,
)

logger = logging.getLogger(__name__)

FLOAT32_MAX = 3.4e38  # rewards are float32 in a batch


def pairs_to_rankings(dataset: Dataset | IterableDataset, where: str = "the dataset") -> Dataset | IterableDataset:
    """Convert `chosen` and `rejected` to rankings of two, with rewards 1 and 0 (so PRO's temperatures are 1).

    Without a column `prompt`, it is the common beginning of both. Raise `ValueError` for a column `rewards` or a row
    without a prompt; `where` names the dataset.
    """
    if "rewards" in (dataset.column_names or []):
        raise ValueError(
            f"{where} has pairs and a column `rewards`. Remove it, or put both completions into a column "
            "`completions`, in the order of their rewards."
        )

    def to_ranking(example: Row, row: int) -> Row:
        if "prompt" not in example and not (example := extract_prompt(example))["prompt"]:
            raise no_prompt(row, where.removeprefix("the ").removesuffix(" dataset"), list(dataset.column_names or []))
        completions = [example["chosen"], example["rejected"]]
        return {"prompt": example["prompt"], "completions": completions, "rewards": [1.0, 0.0]}

    return normalize_pairs(dataset, where).map(to_ranking, with_indices=True, remove_columns=["chosen", "rejected"])


def check_ranking(completions: object, rewards: object, where: str) -> None:
    """Require at least two completions and a finite reward for each; the error begins with `where`."""
    if not isinstance(completions, list):
        raise ValueError(f"{where} has {type(completions).__name__} as `completions`. Give a list of completions.")
    if len(completions) < 2:
        count = f"{len(completions)} completion{'' if len(completions) == 1 else 's'}"
        raise ValueError(f"{where} has {count}, and a ranking has at least 2. Leave the row out.")
    if not isinstance(rewards, list) or len(rewards) != len(completions):
        count = f"{len(rewards)} rewards" if isinstance(rewards, list) else f"{rewards!r} as `rewards`"
        raise ValueError(f"{where} has {len(completions)} completions and {count}. Give one reward per completion.")
    for index, reward in enumerate(rewards):
        if not isinstance(reward, int | float) or not abs(reward) < FLOAT32_MAX:
            raise ValueError(
                f"{where} has the reward {reward!r} for completion {index}, a finite number was expected. Give "
                "`rewards` as numbers, or leave the row out; with a `ranker` and no column `rewards`, they are scored."
            )


def tokenize_rankings(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenize rankings for [`DataCollatorForRanking`], and leave out those whose prompt fills `max_length`.

    Return the dataset with `prompt_ids`, `completion_ids` and `rewards` beside its other columns. With
    `truncation_mode="keep_end"` all prompts fit. Raise `ValueError` for missing columns or a row that is not a
    ranking; `name` is the name of the dataset.
    """
    columns = columns_of(dataset, name)
    dataset = dataset.with_format(None)
    missing = [column for column in ("prompt", "completions", "rewards") if column not in columns]
    if missing:
        raise ValueError(
            f"The {name} dataset has no column {' and no column '.join(map(repr, missing))}; it has {columns}. "
            "Rankings have `prompt`, `completions` and `rewards`, pairs have `prompt`, `chosen` and `rejected`, and "
            "data to be sampled have `prompt`, need a `ranker`, and are given to the trainer when it is made: rename "
            "yours with `dataset.rename_column(old, new)`."
        )

    def tokenize(example: Row, row: int) -> Row:
        where = f"Row {row} of the {name} dataset"
        check_ranking(example["completions"], example["rewards"], where)
        check_format(example["prompt"], f"The prompt of row {row} of the {name} dataset")
        check_completions(example["prompt"], example["completions"], f"row {row} of the {name} dataset")
        prompt_ids, completion_ids = tokenize_completions(
            tokenizer, example["prompt"], example["completions"], **chat_options(example)
        )
        if not all(completion_ids):
            raise ValueError(
                f"{where}: completion {completion_ids.index([])} has no tokens beyond the prompt's. Leave it out."
            )
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "rewards": [float(reward) for reward in example["rewards"]],
        }

    if not isinstance(dataset, Dataset):
        tokenized = dataset.map(tokenize, with_indices=True)
        if max_length is not None and truncation_mode == "keep_start":
            tokenized = tokenized.filter(lambda example: len(example["prompt_ids"]) < max_length)
        return tokenized

    with PartialState().main_process_first():  # the other processes read its cache
        tokenized = dataset.map(tokenize, with_indices=True, num_proc=num_proc, desc=f"Tokenizing {name} dataset")
    check_tokens(tokenized, columns, name)
    if equal := sum(len(set(rewards)) == 1 for rewards in tokenized["rewards"]):
        logger.warning(
            "%d of %d rows of the %s dataset have equal rewards only, so there is nothing to rank in them, and their "
            "first completion counts as the best. Leave them out, or score them with a finer ranker. %s",
            equal,
            len(tokenized),
            name,
            EQUAL_REWARDS_HINT,
        )
    if max_length is None:
        return tokenized
    lengths = [
        (len(prompt_ids), max(map(len, completion_ids)))
        for prompt_ids, completion_ids in zip(tokenized["prompt_ids"], tokenized["completion_ids"], strict=True)
    ]
    if truncation_mode == "keep_start":
        fits = [row for row, (prompt, _) in enumerate(lengths) if prompt < max_length]
        warn_of_full_prompts(len(lengths), len(fits), name, max_length)
        if len(fits) < len(lengths):
            tokenized, lengths = tokenized.select(fits), [lengths[row] for row in fits]
    if cut := sum(prompt + completion > max_length for prompt, completion in lengths):
        logger.warning(
            "%d of %d rows of the %s dataset have a completion that `max_length`=%d cuts. Raise `max_length` to keep "
            "it whole.",
            cut,
            len(lengths),
            name,
            max_length,
        )
    return tokenized
