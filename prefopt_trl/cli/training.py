"""Prepare, train, save and push: the common part of the commands that train."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, SFTTrainer

from prefopt_trl.cli.arguments import TrainingData
from prefopt_trl.cli.models import TrainingConfig, check_bitsandbytes, check_model, load_tokenizer, model_to_train
from prefopt_trl.data.tokenization import check_vocabulary
from prefopt_trl.evaluation.training_report import write_training_report
from prefopt_trl.runtime.cards import name as as_code
from prefopt_trl.runtime.cards import public_name
from prefopt_trl.runtime.processes import checkpoints, interruptible, is_main_process, last_checkpoint, what_is_trained
from prefopt_trl.trainers.publishing import Published, check_repository


def prepare(
    args: TrainingConfig, model: ModelConfig, task: str | None = "CAUSAL_LM"
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Return the tokenizer, and a trainer's arguments for its model, as [`model_to_train`] does."""
    tokenizer = check_and_load_tokenizer(args, model)
    return tokenizer, model_to_train(model, args, task)


def check_and_load_tokenizer(args: TrainingConfig, model: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer. Errors that would otherwise occur after hours of sampling are raised first."""
    if "8bit" in args.optim:
        check_bitsandbytes("optim")
    installed = get_available_reporting_integrations()
    if missing := [tracker for tracker in args.report_to or [] if tracker not in installed]:
        raise ValueError(
            f"`report_to={missing[0]}` is not among the trackers installed ({', '.join(installed)}). Install its "
            "package, or use one of these or 'none'."
        )
    check_model(model)
    _check_resumed(args)
    return load_tokenizer(str(model.model_name_or_path), model.model_revision, args.trust_remote_code)


def _check_resumed(args: TrainingConfig) -> None:
    """Resolve `resume_from_checkpoint`, or print which checkpoints this run will overwrite."""
    folder, given = str(args.output_dir), args.resume_from_checkpoint
    if given is True:
        args.resume_from_checkpoint = last_checkpoint(folder)
    elif given and not Path(given, "trainer_state.json").is_file():
        folder = given if checkpoints(given) else str(Path(given).parent)
        there = ", ".join(checkpoints(folder)) or "none"
        raise FileNotFoundError(f"`resume_from_checkpoint`={given!r} is no checkpoint. Those in {folder}: {there}.")
    elif not given and is_main_process() and (earlier := checkpoints(folder)):
        print(
            f"{folder} has checkpoints of an earlier run ({', '.join(earlier)}), and this one writes over those of "
            "the same step. `--resume_from_checkpoint` resumes the last one instead."
        )


def train_and_save(
    trainer: Published, own: TrainingData, save_config: Callable[[], None], measure: Callable[[], None] | None = None
) -> None:
    """Write the configuration, train, save, report, measure, and push if `push_to_hub` is set."""
    args = trainer.args
    before = [] if args.resume_from_checkpoint else checkpoints(args.output_dir)
    if trainer.accelerator.is_main_process:
        save_config()
    with interruptible(partial(what_is_trained, args.output_dir, before)):
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(_internal_call=True)  # without it, `save_model` pushes before the message below
        best = trainer.state.best_model_checkpoint if args.load_best_model_at_end else None
        which = f" It is that of {Path(best).name}, the best by {args.metric_for_best_model}." if best else ""
        trainer.accelerator.print(f"The trained model is saved in {args.output_dir}.{which}")
        if trainer.accelerator.is_main_process:
            write_training_report(args.output_dir, trainer.state.log_history)
        if measure is not None:
            measure()
        if args.push_to_hub and (url := trainer.push_to_hub(dataset_name=own.dataset_name)):
            print(f"Pushed to {url}.")
    trainer.accelerator.end_training()  # `Trainer.end` does this since transformers 5.18


class CommandTrainer(Published):
    """Mixin that pushes another library's trainer to the Hub like the package's. It precedes it in the bases.

    `dataset_name` is for the card, and `given` are arguments of the trainer.
    """

    def __init__(self, dataset_name: str, **given: Any) -> None:
        if given["args"].push_to_hub:
            check_repository(given["args"])
        self.dataset_name = dataset_name
        super().__init__(**given)
        check_vocabulary(given["processing_class"], self.model)  # type: ignore[arg-type]  # it is a model

    @property
    def source(self) -> str:
        """Repository or folder to load the model from."""
        return self.hub_model_id or self.args.hub_model_id or str(self.args.output_dir)


class SupervisedTrainer(CommandTrainer, SFTTrainer):
    """TRL's `SFTTrainer`, with a card that names local folders."""

    def create_model_card(  # type: ignore[override]  # TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write TRL's card with the names of local folders, for which TRL writes "None"."""
        if not self.is_world_process_zero():
            return
        on_hub = None if Path(self.dataset_name).exists() else self.dataset_name
        SFTTrainer.create_model_card(self, model_name or Path(self.source).name, on_hub, tags)
        base = self.accelerator.unwrap_model(self.model).config.name_or_path
        made = f"This model is {as_code(public_name(base))}, fine-tuned on {as_code(public_name(self.dataset_name))}."
        card = Path(self.args.output_dir, "README.md")
        text = re.sub("This model is a fine-tuned version of .*", lambda _: made, card.read_text(encoding="utf-8"))
        card.write_text(text.replace('model="None"', f"model={self.source!r}"), encoding="utf-8")
