"""`prefopt-trl sft`: TRL's SFTTrainer on prompts and completions."""

from collections.abc import Callable

from datasets import Dataset
from trl import ModelConfig, SFTConfig

from prefopt_trl.cli.arguments import SupervisedArguments
from prefopt_trl.cli.data import load_data, require_columns
from prefopt_trl.cli.training import SupervisedTrainer, prepare, train_and_save
from prefopt_trl.data.hindsight import chain_of_hindsight


def run(own: SupervisedArguments, args: SFTConfig, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Fine-tune a model on completions; for preference pairs, on the chosen ones, or on both in hindsight."""
    tokenizer, trained = prepare(args, model)
    splits = load_data(own, args.eval_strategy != "no")
    for name, rows in splits.items():
        if rows is None:
            continue
        if own.chain_of_hindsight:
            require_columns(rows, own.dataset_name, {"prompt", "chosen", "rejected"})
            splits[name] = Dataset.from_list([example for row in rows for example in chain_of_hindsight(row)])
            continue
        alone = ({column} for column in ("messages", "conversations", "input_ids", args.dataset_text_field))
        require_columns(rows, own.dataset_name, {"prompt", "completion"}, {"prompt", "chosen"}, *alone)
        if {"prompt", "chosen"} <= set(rows.column_names):
            splits[name] = rows.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    trainer = SupervisedTrainer(own.dataset_name, args=args, processing_class=tokenizer, **trained, **splits)
    train_and_save(trainer, own, save_config)
    trainer.create_model_card()
