"""`prefopt-trl sft`: TRL's SFTTrainer on prompts and completions."""

from trl import ModelConfig, SFTConfig, SFTTrainer

from prefopt_trl.cli.arguments import TrainingData
from prefopt_trl.cli.models import model_to_train
from prefopt_trl.cli.train import load_splits, save_arguments, train_and_save


def run(own: TrainingData, args: SFTConfig, model: ModelConfig) -> None:
    """Fine-tune a model; of preference pairs, on the chosen completions."""
    save_arguments(own, args, model)
    splits = load_splits(own, args)
    for name, rows in splits.items():
        if rows is not None and {"prompt", "chosen"} <= set(rows.column_names):
            splits[name] = rows.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    train_and_save(SFTTrainer(args=args, **splits, **model_to_train(model, args)), own)
