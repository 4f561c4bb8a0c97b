"""`prefopt-trl sft`: TRL's SFTTrainer on prompts and completions."""

import re
from pathlib import Path
from typing import Any

from trl import ModelConfig, SFTConfig, SFTTrainer

from prefopt_trl.cli.arguments import TrainingData
from prefopt_trl.cli.config_file import config_text
from prefopt_trl.cli.models import model_to_train
from prefopt_trl.cli.train import load_splits, require_columns, train_and_save
from prefopt_trl.runtime.cards import name as as_code
from prefopt_trl.runtime.cards import public_name
from prefopt_trl.trainers.publishing import Published, check_repository


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


def run(own: TrainingData, args: SFTConfig, model: ModelConfig) -> None:
    """Fine-tune a model; of preference pairs, on the chosen completions."""
    config = config_text(own, args, model)  # as given: what follows changes `args`
    splits = load_splits(own, args)
    for name, rows in splits.items():
        if rows is None:
            continue
        alone = ({column} for column in ("messages", "conversations", "input_ids", args.dataset_text_field))
        require_columns(rows, own.dataset_name, {"prompt", "completion"}, {"prompt", "chosen"}, *alone)
        if {"prompt", "chosen"} <= set(rows.column_names):
            splits[name] = rows.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    trainer = SupervisedTrainer(own.dataset_name, args=args, **splits, **model_to_train(model, args))
    train_and_save(trainer, own, config)
    trainer.create_model_card()
