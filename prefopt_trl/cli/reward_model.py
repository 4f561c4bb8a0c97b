"""`prefopt-trl reward-model`: train a reward model by Bradley-Terry, with TRL's RewardTrainer."""

from collections.abc import Callable

from transformers import Trainer
from trl import ModelConfig, RewardConfig, RewardTrainer

from prefopt_trl.cli.arguments import RewardModelData
from prefopt_trl.cli.data import completions_that_fit, load_comparisons
from prefopt_trl.cli.measured import RankerTrainer
from prefopt_trl.cli.training import prepare, train_and_save
from prefopt_trl.rankers.pointwise import RewardModelRanker


class LogsMeasured(Trainer):
    """Mixin that follows `RewardTrainer`, to replace its `eval_accuracy`: a mean over batches where a tie is wrong."""

    measured: dict[str, float]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_accuracy" in logs:
            logs.update(self.measured)
        super().log(logs, start_time)


class RewardModelTrainer(RankerTrainer, RewardTrainer, LogsMeasured):
    """TRL's `RewardTrainer`: the loss is `-log sigmoid(reward of chosen - reward of rejected)`."""

    ranker_class = RewardModelRanker


def run(own: RewardModelData, args: RewardConfig, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Train a reward model on preference pairs, and measure its accuracy on those of held-out prompts."""
    tokenizer, trained = prepare(args, model, task="SEQ_CLS")
    splits = load_comparisons(own, args)
    for name, rows in splits.items():
        splits[name] = None if rows is None else completions_that_fit(rows, tokenizer, args.max_length)
    given = {**trained, **splits}
    trainer = RewardModelTrainer(own, splits["eval_dataset"], {}, args=args, processing_class=tokenizer, **given)
    train_and_save(trainer, own, save_config, measure=trainer.report)
    trainer.create_model_card()
