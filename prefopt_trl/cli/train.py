"""`prefopt-trl {rso,slic,pro,listwise-dpo,rrhf}`: the five trainers, each known by its configuration."""

from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, extract_prompt

from prefopt_trl.cli.arguments import PreferenceArguments, TrainingData
from prefopt_trl.cli.config_file import config_text, write_config
from prefopt_trl.cli.models import load_ranker, model_to_train
from prefopt_trl.data.loading import load_rows
from prefopt_trl.data.tokenization import chat_options, tokenize_completions
from prefopt_trl.sampling.prompts import tokenize_prompts
from prefopt_trl.trainers.base import PreferenceTrainer
from prefopt_trl.trainers.base_config import PreferenceConfig
from prefopt_trl.trainers.listwise_dpo_trainer import ListwiseDPOTrainer
from prefopt_trl.trainers.pro_trainer import PROTrainer
from prefopt_trl.trainers.rrhf_trainer import RRHFTrainer
from prefopt_trl.trainers.rso_trainer import RSOTrainer
from prefopt_trl.trainers.slic_trainer import SLiCTrainer

TRAINERS: dict[type[PreferenceConfig], type[PreferenceTrainer]] = {
    trainer.config_class: trainer for trainer in (RSOTrainer, SLiCTrainer, PROTrainer, ListwiseDPOTrainer, RRHFTrainer)
}
COMPLETIONS = {"chosen", "rejected", "completions", "rewards"}
GIVEN = {"chosen": "given_chosen", "rejected": "given_rejected"}  # names that sampled completions do not take


def run(own: PreferenceArguments, args: Any, model: ModelConfig) -> None:
    """Train, and save the result in `args.output_dir`."""
    config = config_text(own, args, model)  # as given: what follows changes `args`
    trained = model_to_train(model, args)
    splits = load_splits(own, args)
    trainer_class = TRAINERS[type(args)]
    target: Any = getattr(args, "target_column", None)  # SLiC's
    given_target = GIVEN.get(target, target)
    for name, rows in splits.items():
        if rows is None:
            continue
        require_columns(rows, own.dataset_name, {"prompt"}, {"chosen", "rejected"})
        if own.only_prompts:
            rows = keep_given(rows)
            dropped = {*COMPLETIONS, *GIVEN.values()} - {given_target}
            rows = rows.remove_columns([column for column in rows.column_names if column in dropped])
        if target not in rows.column_names and given_target in rows.column_names:
            args.target_column = given_target
        if not COMPLETIONS & set(rows.column_names):
            rows = prompts_that_fit(rows, trained["processing_class"], args.max_length, args.max_new_tokens)
        elif own.ranker is not None and trainer_class.learns_from == "rankings":
            rows = completions_that_fit(rows, trained["processing_class"], args.max_length)
        splits[name] = rows
    train_and_save(trainer_class(args=args, ranker=load_ranker(own), **splits, **trained), own, config)


def load_splits(own: TrainingData, args: Any) -> dict[str, Any]:
    """The dataset to train on, and the one to evaluate on where `eval_strategy` is not `"no"`."""
    evaluated = None
    if args.eval_strategy != "no":
        evaluated = load_rows(own.dataset_name, own.dataset_config, own.dataset_test_split)
    trained = load_rows(own.dataset_name, own.dataset_config, own.dataset_train_split, own.num_rows)
    return {"train_dataset": trained, "eval_dataset": evaluated}


def require_columns(rows: Dataset, dataset_name: str, *alternatives: set[str]) -> None:
    """Require one of some sets of columns; a ValueError names the columns that are there."""
    if not any(columns <= set(rows.column_names) for columns in alternatives):
        needed = ", or ".join(" and ".join(f"`{column}`" for column in sorted(columns)) for columns in alternatives)
        raise ValueError(
            f"{dataset_name} has the columns {', '.join(rows.column_names)}, and needs {needed}. Rename yours, as "
            f"with `dataset.rename_column({rows.column_names[0]!r}, {min(alternatives[0])!r}).to_json('new.jsonl')`."
        )


def keep_given(rows: Dataset) -> Dataset:
    """Rename the data's own `chosen` and `rejected` to [`GIVEN`], so that sampled ones do not take their place."""
    names = {old: new for old, new in GIVEN.items() if old in rows.column_names and new not in rows.column_names}
    return rows.rename_columns(names)


def prompts_that_fit(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, max_new_tokens: int
) -> Dataset:
    """The rows whose prompts leave room for a completion."""
    if max_length is None:
        return rows
    lengths = [
        len(ids) + max_new_tokens
        for ids in tokenize_prompts(tokenizer, list(rows["prompt"]), list(map(chat_options, rows)))
    ]
    reason = f"with `max_new_tokens`={max_new_tokens} they would exceed"
    return rows.select(rows_that_fit(lengths, max_length, "prompts", reason))


def completions_that_fit(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """The rows that training would not cut. Those that the ranker does not read, or the trainer refuses, are kept."""
    pairs = "completions" not in rows.column_names
    if max_length is None or "rewards" in rows.column_names or (pairs and not GIVEN.keys() <= set(rows.column_names)):
        return rows

    def length(row: dict[str, Any]) -> int:
        row = row if "prompt" in row else extract_prompt(row)
        completions = [row["chosen"], row["rejected"]] if pairs else row["completions"]
        prompt_ids, completion_ids = tokenize_completions(tokenizer, row["prompt"], completions, **chat_options(row))
        return len(prompt_ids) + max(map(len, completion_ids))

    return rows.select(rows_that_fit(list(map(length, rows)), max_length, "rows", "training would cut them at"))


def rows_that_fit(lengths: list[int], max_length: int, rows: str, reason: str) -> list[int]:
    """Numbers of the rows of at most `max_length` tokens. How many others there are is printed; some row must fit."""
    fitting = [row for row, length in enumerate(lengths) if length <= max_length]
    left_out = f"{len(lengths) - len(fitting):,} of {len(lengths):,} {rows} are left out: {reason}"
    if not fitting:
        raise ValueError(f"{left_out} `max_length`={max_length} tokens. Raise it.")
    if len(fitting) < len(lengths):
        PartialState().print(f"{left_out} `max_length`={max_length} tokens.")
    return fitting


def train_and_save(
    trainer: Any, own: TrainingData, config: str, once_saved: Callable[[], None] = lambda: None
) -> None:
    """Write the configuration, train, save, and only then push if `push_to_hub` says so."""
    args = trainer.args
    if trainer.accelerator.is_main_process:
        write_config(args.output_dir, config)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(_internal_call=True)  # it would push by itself, before we have said what is saved
    trainer.accelerator.print(f"The trained model is saved in {args.output_dir}.")
    once_saved()
    if args.push_to_hub and (url := trainer.push_to_hub(dataset_name=own.dataset_name)):
        print(f"Pushed to {url}.")
    trainer.accelerator.end_training()  # which `Trainer.end` does, since transformers 5.18
