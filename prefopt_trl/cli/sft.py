"""`prefopt-trl sft`: TRL's SFTTrainer on prompts and completions."""

from collections.abc import Callable

from trl import ModelConfig, SFTConfig

from prefopt_trl.cli.arguments import TrainingData
from prefopt_trl.cli.data import load_data, require_columns
from prefopt_trl.cli.training import SupervisedTrainer, prepare, train_and_save


def run(own: TrainingData, args: SFTConfig, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Fine-tune a model on completions; for preference pairs, on the chosen ones."""
    tokenizer, trained = prepare(args, model)
    splits = load_data(own, args.eval_strategy != "no")
    for name, rows in splits.items():
        if rows is None:
            continue
        alone = ({column} for column in ("messages", "conversations", "input_ids", args.dataset_text_field))
        require_columns(rows, own.dataset_name, {"prompt", "completion"}, {"prompt", "chosen"}, *alone)
        if {"prompt", "chosen"} <= set(rows.column_names):
            splits[name] = rows.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    trainer = SupervisedTrainer(own.dataset_name, args=args, processing_class=tokenizer, **trained, **splits)
    train_and_save(trainer, own, save_config)
    trainer.create_model_card()
