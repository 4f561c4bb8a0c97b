"""What the commands that train have in common."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, SFTTrainer

from prefopt_trl.cli.arguments import TrainingData
from prefopt_trl.cli.models import check_bitsandbytes, model_to_train
from prefopt_trl.data.loading import load_rows
from prefopt_trl.data.tokenization import check_vocabulary
from prefopt_trl.runtime.cards import name as as_code
from prefopt_trl.runtime.cards import public_name
from prefopt_trl.runtime.processes import checkpoints, interruptible, is_main_process, last_checkpoint, what_is_trained
from prefopt_trl.trainers.publishing import Published, check_repository


def prepare(own: TrainingData, args: Any, model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of a trainer for its model and for its data.

    What would otherwise fail after hours of sampling is checked first.
    """
    if "8bit" in args.optim:
        check_bitsandbytes("optim")
    installed = get_available_reporting_integrations()
    if missing := [tracker for tracker in args.report_to if tracker not in installed]:
        raise ValueError(
            f"`report_to={missing[0]}` is not among the trackers installed ({', '.join(installed)}). Install its "
            "package, or use one of these or 'none'."
        )
    folder, given = args.output_dir, args.resume_from_checkpoint
    if given is True:
        args.resume_from_checkpoint = last_checkpoint(folder)
    elif given and not Path(given, "trainer_state.json").is_file():
        folder = given if checkpoints(given) else Path(given).parent
        there = ", ".join(checkpoints(folder)) or "none"
        raise FileNotFoundError(f"`resume_from_checkpoint`={given!r} is no checkpoint. Those in {folder}: {there}.")
    elif not given and is_main_process() and (earlier := checkpoints(folder)):
        print(
            f"{folder} has checkpoints of an earlier run ({', '.join(earlier)}), and this one writes over those of "
            "the same step. `--resume_from_checkpoint` resumes the last one instead."
        )
    trained = model_to_train(model, args)
    evaluated = None
    if args.eval_strategy != "no":
        evaluated = load_rows(own.dataset_name, own.dataset_config, own.dataset_test_split)
    rows = load_rows(own.dataset_name, own.dataset_config, own.dataset_train_split, own.num_rows)
    return trained, {"train_dataset": rows, "eval_dataset": evaluated}


def train_and_save(
    trainer: Any, own: TrainingData, save_config: Callable[[], None], once_saved: Callable[[], None] = lambda: None
) -> None:
    """Write the configuration, train, save, and only then push if `push_to_hub` says so."""
    args = trainer.args
    before = [] if args.resume_from_checkpoint else checkpoints(args.output_dir)
    if trainer.accelerator.is_main_process:
        save_config()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    with interruptible(partial(what_is_trained, args.output_dir, before)):
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
        check_vocabulary(given["processing_class"], self.model)  # type: ignore[arg-type]  # it is a model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        before = [] if resume_from_checkpoint else checkpoints(str(self.args.output_dir))
        with interruptible(partial(what_is_trained, str(self.args.output_dir), before)):
            return super().train(resume_from_checkpoint, *args, **kwargs)

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
