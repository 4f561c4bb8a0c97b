"""`prefopt-trl ranker`: a pairwise ranker, trained by TRL's SFTTrainer to answer which completion was chosen."""

from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig

from prefopt_trl.cli.arguments import RankerData
from prefopt_trl.cli.config_file import config_text
from prefopt_trl.cli.models import model_to_train
from prefopt_trl.cli.sft import SupervisedTrainer
from prefopt_trl.cli.train import load_splits, train_and_save
from prefopt_trl.rankers.pairwise import PairwiseRanker, pairwise_ranker_dataset
from prefopt_trl.rankers.publishing import ranker_card

# What the card says of the training
HYPERPARAMETERS = ["learning_rate", "lr_scheduler_type", "max_length", "num_train_epochs", "optim", "seed"]


class RankerTrainer(SupervisedTrainer):
    """Writes the card of a ranker."""

    template: str

    def create_model_card(  # type: ignore[override]  # TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Say how to make the ranker of the model. All arguments are TRL's, and not needed."""
        if not self.is_world_process_zero():
            return
        model, args = self.accelerator.unwrap_model(self.model), self.args
        settings = {
            **{name: getattr(args, name) for name in HYPERPARAMETERS},
            "batch size, over all processes": (
                args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            ),
            "steps": self.state.global_step,
            "template": self.template,
        }
        arguments = {"template": repr(self.template)}
        card = ranker_card(PairwiseRanker, model, self.source, arguments, settings, self.dataset_name)
        card.save(Path(args.output_dir, "README.md"))


def run(own: RankerData, args: SFTConfig, model: ModelConfig) -> None:
    """Train a ranker on preference pairs."""
    config = config_text(own, args, model)  # as given: what follows changes `args`
    trained = model_to_train(model, args)
    splits = load_splits(own, args)
    for name, pairs in splits.items():
        if pairs is not None:
            answers = pairwise_ranker_dataset(pairs, own.ranker_template, args.seed)
            splits[name] = comparisons_that_fit(answers, trained["processing_class"], args.max_length)
    trainer = RankerTrainer(own.dataset_name, args=args, **splits, **trained)
    trainer.template = own.ranker_template
    train_and_save(trainer, own, config)
    trainer.create_model_card()


def comparisons_that_fit(answers: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """The rows that are not cut, as a cut row has no answer left to learn; how many are is printed.

    Raises:
        ValueError: if every row would be cut.
    """
    if max_length is None:
        return answers
    texts = [prompt + answer for prompt, answer in zip(answers["prompt"], answers["completion"], strict=True)]
    lengths = map(len, tokenizer(texts)["input_ids"])
    fitting = [row for row, length in enumerate(lengths) if length < max_length]  # EOS comes after the answer
    if not fitting:
        raise ValueError(f"Every comparison exceeds `max_length`={max_length} tokens. Raise it.")
    if len(fitting) < len(answers):
        PartialState().print(
            f"{len(answers) - len(fitting):,} of {len(answers):,} comparisons are left out: they exceed `max_length`="
            f"{max_length} tokens."
        )
    return answers.select(fitting)
