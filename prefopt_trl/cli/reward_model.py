"""`prefopt-trl reward-model`: train a reward model by Bradley-Terry, with TRL's RewardTrainer."""

from collections.abc import Callable
from typing import Any

from transformers.trainer_utils import EvalLoopOutput
from trl import ModelConfig, RewardConfig, RewardTrainer

from prefopt_trl.cli.arguments import RewardModelData
from prefopt_trl.cli.data import completions_that_fit, load_comparisons
from prefopt_trl.cli.measured import RankerTrainer
from prefopt_trl.cli.training import prepare, train_and_save
from prefopt_trl.rankers.pointwise import RewardModelRanker


class RewardModelTrainer(RankerTrainer, RewardTrainer):
    """TRL's `RewardTrainer`: the loss is `-log sigmoid(reward of chosen - reward of rejected)`."""

    ranker_class = RewardModelRanker

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        self._metrics["eval"].pop("accuracy", None)  # TRL's is a mean over batches, where a tie is wrong
        return output


def run(own: RewardModelData, args: RewardConfig, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Train a reward model on preference pairs, and measure its accuracy on those of held-out prompts."""
    tokenizer, trained = prepare(args, model, task="SEQ_CLS")
    splits = load_comparisons(own, args)
    for name, rows in splits.items():
        splits[name] = None if rows is None else completions_that_fit(rows, tokenizer, args.max_length)
    given = {**trained, **splits}
    trainer = RewardModelTrainer(own, splits["eval_dataset"], args=args, processing_class=tokenizer, **given)
    train_and_save(trainer, own, save_config, measure=trainer.report)
    trainer.create_model_card()
