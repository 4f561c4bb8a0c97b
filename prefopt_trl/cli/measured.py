"""Train a ranker and measure it on comparisons of held-out prompts: the common part of the commands that train one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.trainer_utils import EvalLoopOutput

from prefopt_trl.cli.arguments import RankerData, RewardModelData
from prefopt_trl.cli.training import CommandTrainer
from prefopt_trl.data.formats import completion_text
from prefopt_trl.evaluation.metrics import Estimate
from prefopt_trl.rankers.base import ask_probabilities
from prefopt_trl.rankers.publishing import ranker_card
from prefopt_trl.runtime.processes import gathered

# Settings of the training that the card lists
HYPERPARAMETERS = ["learning_rate", "lr_scheduler_type", "max_length", "num_train_epochs", "optim", "seed"]


class RankerTrainer(CommandTrainer):
    """Mixin that measures a ranker at each evaluation and writes its card. It precedes TRL's trainer in the bases.

    Each evaluation has the metrics `eval_accuracy` and `eval_accuracy_se`, its standard error by prompt, of the
    held-out `comparisons`, which are None if nothing is evaluated. `given` are arguments of the trainer.
    """

    ranker_class: Any  # a `PublishedModel`
    saved_step: int | None = None  # of the weights that are saved, once they are

    def __init__(self, own: RewardModelData, comparisons: Dataset | None, **given: Any) -> None:
        self.own, self.comparisons = own, comparisons
        self.options = {"template": own.ranker_template} if isinstance(own, RankerData) else {}  # of the ranker
        self.measured: dict[str, float] = {}  # the last measurement
        super().__init__(own.dataset_name, **given)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        accuracy = self.accuracy()
        self.measured = {"eval_accuracy": accuracy.mean, "eval_accuracy_se": accuracy.standard_error}
        return output._replace(metrics={**(output.metrics or {}), **self.measured})

    def accuracy(self) -> Estimate:
        """Return the share of held-out comparisons whose chosen completion the ranker prefers; a tie counts half."""
        assert self.comparisons is not None  # or nothing would be evaluated
        state, model = self.accelerator, self.accelerator.unwrap_model(self.model)
        own_part = self.comparisons.select(range(state.process_index, len(self.comparisons), state.num_processes))
        prompts, chosen, rejected = (own_part[column][:] for column in ("prompt", "chosen", "rejected"))
        batch_size = self.args.per_device_eval_batch_size
        with gathered(model):
            ranker = self.ranker_class(model, self.processing_class, batch_size=batch_size, **self.options)
            probabilities = ask_probabilities(ranker, prompts, chosen, rejected)
        correct = ranker.verdicts(probabilities)
        results = gather_object(list(zip(correct.tolist(), map(json.dumps, prompts), strict=True)))
        values, clusters = zip(*results, strict=True)
        return Estimate.of(np.array(values), np.array(clusters))

    def report(self) -> None:
        """Print the accuracy of the weights that are saved. Measure it now if no evaluation has."""
        if self.comparisons is None:
            return
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        self.saved_step = int(best.rpartition("-")[2]) if best else self.state.global_step
        of_step = [entry for entry in self.state.log_history if entry["step"] == self.saved_step]
        measured = [entry for entry in of_step if "eval_accuracy" in entry]
        self.measured = measured[-1] if measured else self.evaluate()
        weights = f"The saved weights are those of step {self.saved_step}."
        self.accelerator.print(f"The ranker is right on {self.describe()}. {weights}")

    def describe(self) -> str:
        """Return the last accuracy and what it was measured on, and how often the longer completion is chosen."""
        if self.comparisons is None or not self.measured:
            return "not measured"
        mean, error = (100 * self.measured[name] for name in ("eval_accuracy", "eval_accuracy_se"))
        num_prompts = len(set(map(json.dumps, self.comparisons["prompt"])))
        pairs = zip(self.comparisons["chosen"], self.comparisons["rejected"], strict=True)
        lengths = [[len(completion_text(completion)) for completion in pair] for pair in pairs]
        longer = 50 * (1 - np.sign(np.diff(lengths))).mean()  # in percent; a tie counts half
        return (
            f"{mean:.1f}% ± {error:.1f}% of {len(lengths):,} comparisons of {num_prompts:,} held-out prompts, where "
            f"the longer completion is chosen in {longer:.1f}%"
        )

    def create_model_card(  # type: ignore[override]  # TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write a card that shows how to load the ranker. The arguments are TRL's and have no effect."""
        if not self.is_world_process_zero():
            return
        args = self.args
        settings = {
            **{name: getattr(args, name) for name in HYPERPARAMETERS},
            "total batch size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "step of the saved weights": self.saved_step or self.state.global_step,
            **self.options,
            "accuracy": self.describe(),
        }
        if self.comparisons is not None:
            split = self.own.dataset_test_split
            settings["held out"] = f"split {split}" if split else f"{self.own.held_out} of the prompts, by SHA-256"
        arguments = {name: repr(value) for name, value in self.options.items()}
        model = self.accelerator.unwrap_model(self.model)
        card = ranker_card(self.ranker_class, model, self.source, arguments, settings, self.dataset_name)
        card.save(Path(args.output_dir, "README.md"))
