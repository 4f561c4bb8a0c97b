"""`prefopt-trl {rso,slic,pro,listwise-dpo,rrhf}`: the five trainers, each known by its configuration."""

from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from prefopt_trl.cli.arguments import PreferenceArguments, TrainingData
from prefopt_trl.cli.config_file import config_text, write_config
from prefopt_trl.cli.models import load_ranker, model_to_train
from prefopt_trl.data.loading import load_rows
from prefopt_trl.data.tokenization import tokenize_completions
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


def run(own: PreferenceArguments, args: PreferenceConfig, model: ModelConfig) -> None:
    """Train, and save the result in `args.output_dir`."""
    config = config_text(own, args, model)  # as given: what follows changes `args`
    trained = model_to_train(model, args)
    splits = load_splits(own, args)
    trainer_class = TRAINERS[type(args)]
    for name, rows in splits.items():
        if rows is not None and own.only_prompts:
            rows = rows.remove_columns([column for column in rows.column_names if column in COMPLETIONS])
        if rows is not None and not COMPLETIONS & set(rows.column_names):
            rows = prompts_that_fit(rows, trained["processing_class"], args.max_length, args.max_new_tokens)
        elif rows is not None and own.ranker is not None and trainer_class.learns_from == "rankings":
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


def prompts_that_fit(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None, max_new_tokens: int
) -> Dataset:
    """The rows whose prompts leave room for a completion; how many do not is printed.

    Raises:
        ValueError: if none does.
    """
    if max_length is None:
        return rows
    lengths = map(len, tokenize_prompts(tokenizer, list(rows["prompt"])))
    fitting = [row for row, length in enumerate(lengths) if length + max_new_tokens <= max_length]
    if not fitting:
        raise ValueError(
            f"No prompt leaves room for `max_new_tokens`={max_new_tokens} within `max_length`={max_length}. Raise the "
            "second or lower the first."
        )
    if len(fitting) < len(rows):
        PartialState().print(
            f"{len(rows) - len(fitting):,} of {len(rows):,} prompts are left out: with `max_new_tokens`="
            f"{max_new_tokens} they would exceed `max_length`={max_length}."
        )
    return rows.select(fitting)


def completions_that_fit(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """The rows that training would not cut, so that the ranker reads no more than is learnt; the others are counted.

    Rows with `rewards`, which the ranker does not read, are all kept.

    Raises:
        ValueError: if none fits.
    """
    if max_length is None or "rewards" in rows.column_names:
        return rows
    pairs = "completions" not in rows.column_names

    def fits(row: dict[str, Any]) -> bool:
        completions = [row["chosen"], row["rejected"]] if pairs else row["completions"]
        prompt_ids, completion_ids = tokenize_completions(tokenizer, row["prompt"], completions)
        return len(prompt_ids) + max(map(len, completion_ids)) <= max_length

    fitting = [index for index, row in enumerate(rows) if fits(row)]
    if not fitting:
        raise ValueError(f"Every row has a completion that `max_length`={max_length} would cut. Raise it.")
    if len(fitting) < len(rows):
        PartialState().print(
            f"{len(rows) - len(fitting):,} of {len(rows):,} rows are left out: they exceed `max_length`={max_length} "
            "tokens, and the ranker would read what is not learnt."
        )
    return rows.select(fitting)


def train_and_save(trainer: Any, own: TrainingData, config: str) -> None:
    """Write the configuration, train, save, and only then push if `push_to_hub` says so."""
    args = trainer.args
    if trainer.accelerator.is_main_process:
        write_config(args.output_dir, config)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(_internal_call=True)  # it would push by itself, before we have said what is saved
    trainer.accelerator.print(f"The trained model is saved in {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=own.dataset_name)
    trainer.end()
