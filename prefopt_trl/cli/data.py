"""Read the rows of a command and check their columns, hold out prompts, and select what fits into `max_length`."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import extract_prompt

from prefopt_trl.cli.arguments import RewardModelData, TrainingData
from prefopt_trl.data.formats import Completion, Prompt, Row, check_columns, wrap_completion
from prefopt_trl.data.loading import load_rows
from prefopt_trl.data.tokenization import chat_options, tokenize_completions, tokenize_prompts
from prefopt_trl.evaluation.comparison import instruction
from prefopt_trl.runtime.settings import read_lines
from prefopt_trl.trainers.base_config import PreferenceConfig

GIVEN = {"chosen": "given_chosen", "rejected": "given_rejected"}  # names that sampled completions do not take
COMPLETIONS = {"chosen", "rejected", "completions", "rewards"}
ORDER_SEED = 0  # of the prompts that are judged, so that every run has the same

Splits = dict[str, Dataset | None]  # a trainer's arguments `train_dataset` and `eval_dataset`


def load_data(own: TrainingData, evaluates: bool) -> Splits:
    """Load the rows to train on, and those to evaluate on if there is an evaluation."""
    evaluated, path = None, Path(own.dataset_name)
    if evaluates:
        if (path.is_file() or (path / "state.json").is_file()) and "[" not in own.dataset_test_split:
            raise ValueError(
                f"{path} has no splits, so evaluation would be on the training data. Hold out a part of it: "
                "--dataset_train_split 'train[:90%]' --dataset_test_split 'train[90%:]'."
            )
        evaluated = load_rows(own.dataset_name, own.dataset_config, own.dataset_test_split)
    rows = load_rows(own.dataset_name, own.dataset_config, own.dataset_train_split, own.num_rows)
    return {"train_dataset": rows, "eval_dataset": evaluated}


def load_comparisons(own: RewardModelData, args: TrainingArguments) -> Splits:
    """Load the comparisons to train on and, unless `eval_strategy` is "no", those of other prompts to measure on.

    Raise `ValueError` if a column is missing, or nothing remains on a side.
    """
    rows = load_rows(own.dataset_name, own.dataset_config, own.dataset_train_split, own.num_rows)
    check_columns(rows, ["prompt", "chosen", "rejected"], own.dataset_name)
    if args.eval_strategy == "no":
        return {"train_dataset": rows, "eval_dataset": None}
    if own.dataset_test_split is None:
        rows, held_out = hold_out(rows, own.held_out)
    else:
        given = load_rows(own.dataset_name, own.dataset_config, own.dataset_test_split)
        check_columns(given, ["prompt", "chosen", "rejected"], own.dataset_name)
        held_out, shared = _split_by_prompt(given, set(map(json.dumps, rows["prompt"])))
        if len(shared):
            PartialState().print(
                f"{len(shared):,} of {len(given):,} comparisons of the split {own.dataset_test_split!r} are left out: "
                "their prompts are trained on."
            )
    if not len(rows) or not len(held_out):
        raise ValueError(
            f"There are {len(rows)} comparisons to train on, and {len(held_out)} of other prompts to measure the "
            "accuracy on. Give more prompts, another `dataset_test_split`, or `eval_strategy='no'` to measure nothing."
        )
    return {"train_dataset": rows, "eval_dataset": held_out}


def hold_out(rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Return the rows to train on, and those of the prompts with the lowest SHA-256: a share of them, at least two."""
    prompts = sorted(set(map(json.dumps, rows["prompt"])), key=lambda text: hashlib.sha256(text.encode()).digest())
    return _split_by_prompt(rows, set(prompts[: max(2, round(share * len(prompts)))]))


def _split_by_prompt(rows: Dataset, prompts: set[str]) -> tuple[Dataset, Dataset]:
    """Return the rows of other prompts, and those of these, which are JSON."""
    is_among = [json.dumps(prompt) in prompts for prompt in rows["prompt"]]
    others, among = ([row for row, found in enumerate(is_among) if found == side] for side in (False, True))
    return rows.select(others), rows.select(among)


def require_columns(rows: Dataset, dataset_name: str, *alternatives: set[str]) -> None:
    """Raise a ValueError that lists the dataset's columns, unless it has all columns of one of the sets."""
    if not any(columns <= set(rows.column_names) for columns in alternatives):
        needed = ", or ".join(" and ".join(f"`{column}`" for column in sorted(columns)) for columns in alternatives)
        raise ValueError(
            f"{dataset_name} has the columns {', '.join(rows.column_names)}, and needs {needed}. Rename yours, as "
            f"with `dataset.rename_column({rows.column_names[0]!r}, {min(alternatives[0])!r}).to_json('new.jsonl')`."
        )


def keep_given(rows: Dataset, candidates: Sequence[str] = ()) -> Dataset:
    """Rename `chosen` and `rejected` to [`GIVEN`] unless they are `candidates`, as sampled ones would replace them."""
    others = set(GIVEN) & set(rows.column_names) - set(candidates)
    names = {old: new for old, new in GIVEN.items() if old in others and new not in rows.column_names}
    return rows.rename_columns(names)


def without_completions(rows: Dataset, kept: str | None = None) -> Dataset:
    """Return the rows with their prompts and other columns, and of those with completions the one that is kept."""
    rows = keep_given(rows)
    dropped = {*COMPLETIONS, *GIVEN.values()} - {kept}
    return rows.remove_columns([column for column in rows.column_names if column in dropped])


def prompts_to_judge(
    rows: Dataset, dataset_name: str, num_judged: int, tokenizer: PreTrainedTokenizerBase, args: PreferenceConfig
) -> Dataset:
    """Return the prompts that are sampled and judged: so many different ones, at random."""
    require_columns(rows, dataset_name, {"prompt"})
    first = dict(reversed(list(zip(map(json.dumps, rows["prompt"]), range(len(rows)), strict=True))))
    rows = rows.select(sorted(first.values())).shuffle(seed=ORDER_SEED)
    rows = prompts_that_fit(rows, tokenizer, args.max_length, args.max_new_tokens)
    return rows.select(range(min(num_judged, len(rows))))


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

    return rows.select(rows_that_fit(list(map(length, rows)), max_length, "rows", "they exceed"))


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


def read_completions(argument: str, path: str, policy: str | None, prompts: list[Prompt]) -> list[list[Completion]]:
    """Read the completions of each prompt from a file that has those of one policy, or also of others."""
    try:
        lines: list[Row] = json.loads(Path(path).read_bytes()) if path.endswith(".json") else read_lines(Path(path))
        found: dict[Any, dict[str, list[Completion]]] = {}
        for line in lines:
            key = instruction(line.get("prompt") or line["instruction"])
            given = line.get("completions") or [line["completion" if "completion" in line else "output"]]
            found.setdefault(line.get("policy", line.get("generator")), {}).setdefault(key, []).extend(given)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"`{argument}`: {path} cannot be read ({error!r}). It must be a file with `prompt` and `completion` or "
            "`completions`, or with `instruction` and `output`, in each row."
        ) from error
    policy = next(iter(found)) if policy is None and len(found) == 1 else policy
    if policy not in found:
        names = ", ".join(map(str, found))
        raise ValueError(f"`{argument}`: {path} has completions of {names}. Name one of them: {path}:NAME.")
    keys, left = list(map(instruction, prompts)), found[policy]
    shares = {key: len(left.get(key, [])) // count for key, count in Counter(keys).items()}  # of a repeated prompt
    completions = []
    for row, (key, prompt) in enumerate(zip(keys, prompts, strict=True)):
        if not shares[key]:
            raise ValueError(
                f"`{argument}`: {path} has no completion for row {row} of the prompts. Leave the row out."
            )
        own, left[key] = left[key][: shares[key]], left[key][shares[key] :]
        completions.append([wrap_completion(prompt, one) for one in own])
    return completions
