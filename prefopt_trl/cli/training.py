"""What the commands that train have in common."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl import SFTTrainer

from prefopt_trl.cli.arguments import TrainingData
from prefopt_trl.data.loading import load_rows
from prefopt_trl.runtime.cards import name as as_code
from prefopt_trl.runtime.cards import public_name
from prefopt_trl.trainers.publishing import Published, check_repository


def load_splits(own: TrainingData, args: Any) -> dict[str, Any]:
    """The dataset to train on, and the one to evaluate on where `eval_strategy` is not `"no"`."""
    evaluated = None
    if args.eval_strategy != "no":
        evaluated = load_rows(own.dataset_name, own.dataset_config, own.dataset_test_split)
    trained = load_rows(own.dataset_name, own.dataset_config, own.dataset_train_split, own.num_rows)
    return {"train_dataset": trained, "eval_dataset": evaluated}


def train_and_save(
    trainer: Any, own: TrainingData, save_config: Callable[[], None], once_saved: Callable[[], None] = lambda: None
) -> None:
    """Write the configuration, train, save, and only then push if `push_to_hub` says so."""
    args = trainer.args
    if trainer.accelerator.is_main_process:
        save_config()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(_internal_call=True)  # it would push by itself, before we have said what is saved
    trainer.accelerator.print(f"The trained model is saved in {args.output_dir}.")
    once_saved()
    if args.push_to_hub and (url := trainer.push_to_hub(dataset_name=own.dataset_name)):
        print(f"Pushed to {url}.")
    trainer.accelerator.end_training()  # which `Trainer.end` does, since transformers 5.18


class SupervisedTrainer(Published, SFTTrainer):
    """TRL's `SFTTrainer`, whose models go to the Hub as those of our trainers, with cards that know folders.

    Args:
        dataset_name (`str`):
            Dataset it trains on, for the card.
        given:
            Arguments of [`~trl.SFTTrainer`].
    """

    def __init__(self, dataset_name: str, **given: Any) -> None:
        if given["args"].push_to_hub:
            check_repository(given["args"])
        self.dataset_name = dataset_name
        super().__init__(**given)

    @property
    def source(self) -> str:
        """What the model is loaded from: its repository, or its folder."""
        return self.hub_model_id or self.args.hub_model_id or str(self.args.output_dir)

    def create_model_card(  # type: ignore[override]  # TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """TRL's card, which has "None" for what is not on the Hub: its base model, and where it is loaded from."""
        if not self.is_world_process_zero():
            return
        title = model_name or Path(self.source).name
        on_hub = None if Path(self.dataset_name).exists() else self.dataset_name
        SFTTrainer.create_model_card(self, title, on_hub, tags)
        model: Any = self.model
        base, dataset = (as_code(public_name(given)) for given in (model.config.name_or_path, self.dataset_name))
        made = f"This model is {base}, fine-tuned on {dataset}."
        card = Path(self.args.output_dir, "README.md")
        text = re.sub("This model is a fine-tuned version of .*", lambda _: made, card.read_text(encoding="utf-8"))
        card.write_text(text.replace('model="None"', f"model={self.source!r}"), encoding="utf-8")
