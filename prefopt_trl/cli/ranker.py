"""`prefopt-trl ranker`: train a pairwise ranker with TRL's SFTTrainer to answer which completion was chosen."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from trl import ModelConfig, SFTConfig

from prefopt_trl.cli.arguments import RankerData
from prefopt_trl.cli.data import rows_that_fit
from prefopt_trl.cli.training import SupervisedTrainer, prepare, train_and_save
from prefopt_trl.evaluation.policy import Estimate
from prefopt_trl.rankers.pairwise import PairwiseRanker, pairwise_ranker_dataset
from prefopt_trl.rankers.publishing import ranker_card
from prefopt_trl.runtime.processes import gathered

# Settings of the training that the card lists
HYPERPARAMETERS = ["learning_rate", "lr_scheduler_type", "max_length", "num_train_epochs", "optim", "seed"]


class RankerTrainer(SupervisedTrainer):
    """An SFT trainer that writes the card of a ranker."""

    template: str
    accuracy = "not measured"  # on held-out comparisons

    def create_model_card(  # type: ignore[override]  # TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write a card that shows how to load the ranker. The arguments are TRL's and have no effect."""
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
            "accuracy": self.accuracy,
        }
        arguments = {"template": repr(self.template)}
        card = ranker_card(PairwiseRanker, model, self.source, arguments, settings, self.dataset_name)
        card.save(Path(args.output_dir, "README.md"))


def run(own: RankerData, args: SFTConfig, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Train a ranker on preference pairs, and measure its accuracy on the evaluation split."""
    tokenizer, trained, splits = prepare(own, args, model)
    pairs = {}
    for name, rows in splits.items():
        if rows is not None:
            answers = pairwise_ranker_dataset(rows, own.ranker_template, args.seed)
            fitting = list(range(len(answers)))
            if args.max_length is not None:  # a truncated row loses its answer
                texts = [row["prompt"] + row["completion"] for row in answers]
                lengths = [len(ids) + 1 for ids in tokenizer(texts)["input_ids"]]  # and EOS
                fitting = rows_that_fit(lengths, args.max_length, "comparisons", "they exceed")
            splits[name], pairs[name] = answers.select(fitting), rows.select(fitting)
    trainer = RankerTrainer(own.dataset_name, args=args, processing_class=tokenizer, **trained, **splits)
    trainer.template = own.ranker_template
    train_and_save(trainer, own, save_config, measure=lambda: measure(trainer, **pairs))
    trainer.create_model_card()


def measure(trainer: RankerTrainer, train_dataset: Dataset, eval_dataset: Dataset | None = None) -> None:
    """Print the accuracy on comparisons of held-out prompts, and keep it for the card."""
    trained_on = set(map(json.dumps, train_dataset["prompt"]))
    prompts = [] if eval_dataset is None else map(json.dumps, eval_dataset["prompt"])
    held_out = [row for row, prompt in enumerate(prompts) if prompt not in trained_on]
    if eval_dataset is None or len(held_out) < 2:
        trainer.accelerator.print(
            "The ranker's accuracy was not measured: there are no comparisons of prompts that are not trained on. To "
            "hold out 5% of the prompts, pass `--eval_strategy epoch --dataset_train_split 'train[:95%]' "
            "--dataset_test_split 'train[95%:]'`."
        )
        return
    state, model = trainer.accelerator, trainer.accelerator.unwrap_model(trainer.model)
    own_part = eval_dataset.select(held_out[state.process_index :: state.num_processes])
    with gathered(model):
        batch_size = trainer.args.per_device_eval_batch_size
        ranker = PairwiseRanker(model, trainer.processing_class, template=trainer.template, batch_size=batch_size)
        probabilities = ranker.compare(own_part["prompt"][:], own_part["chosen"][:], own_part["rejected"][:])
    correct = [0.5 * (1 + np.sign(probability - 0.5)) for probability in probabilities]  # a tie counts half
    accuracy = Estimate.of(np.array(gather_object(correct)))
    trainer.accuracy = f"{100 * accuracy.mean:.1f}% ± {100 * accuracy.standard_error:.1f}%"
    trainer.accuracy += f" of {len(held_out):,} held-out comparisons, both orders averaged"
    state.print(f"The ranker is right on {trainer.accuracy}.")
