"""What a trainer publishes: its model with its card, at the end and, if asked for, at every checkpoint."""

import os
import shutil
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import ModelCard
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from prefopt_trl.runtime.hub import PushError, push_folder, push_in_background, reserve_repository
from prefopt_trl.trainers.model_card import TrainingData, model_card

# Of `output_dir`: checkpoints, what was sampled (a dataset of its own), and pickled arguments, which hold the token
NOT_PUSHED = ["_*", "checkpoint-*", "sampled/*", "scored/*", "bootstrap*/*", "precomputed/*", "*training_args.bin"]
LATEST = "_pushed"  # folder in `output_dir` for the model of the latest checkpoint that is pushed
# Of a checkpoint, all that is the model
MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
]


def not_pushed(args: Any) -> list[str]:
    """Patterns of what stays in `output_dir`; the trackers' logs too, where they have tables of prompts."""
    return [*NOT_PUSHED, "runs/*"] if getattr(args, "log_completions", False) else NOT_PUSHED


def check_repository(args: Any) -> None:
    """Before hours of sampling, see that the repository of `push_to_hub` can be written to.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the run.

    Raises:
        PushError: on every process, so that none waits for the main one.
    """
    failure: list[str | None] = [None]
    if args.process_index == 0:
        try:
            reserve_repository(
                _repository(args),
                args.output_dir,
                exclude=not_pushed(args),
                private=args.hub_private_repo,
                token=args.hub_token,
                revision=args.hub_revision,
            )
        except PushError as error:
            failure = [str(error)]
    if args.world_size > 1:
        failure = broadcast_object_list(failure)
    if failure[0] is not None:
        raise PushError(failure[0])


def _repository(args: Any) -> str:
    return args.hub_model_id or Path(args.output_dir).absolute().name


class Published:
    """The part of a trainer that writes model cards and pushes to the Hub, before [`~trl.DPOTrainer`] in its bases."""

    args: Any
    training_data: TrainingData
    reference_given: str | None

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card, `<output_dir>/README.md`.

        Args:
            model_name (`str`, *optional*):
                Title. By default the name of the repository or folder.
            dataset_name (`str`, *optional*):
                Dataset repository on the Hub.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        trainer: Any = self
        if not trainer.is_world_process_zero():
            return
        model_name = model_name or _repository(self.args).split("/")[-1]
        super().create_model_card(model_name, dataset_name, tags)  # type: ignore[misc]  # TRL's
        card = Path(self.args.output_dir, "README.md")
        source = trainer.hub_model_id or self.args.hub_model_id or str(self.args.output_dir)
        model_card(self, ModelCard.load(card), model_name, source, dataset_name).save(card)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> "str | Future[str] | None":
        """Save the model and its card in `output_dir`, and upload them to the Hub. Call it on all processes.

        All of them save, as a sharded model needs; then the main one uploads, and the others go on.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                First line of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait until the upload is done.
            token (`str`, *optional*):
                Access token. By default `args.hub_token`, or the one you are logged in with.
            revision (`str`, *optional*):
                Branch. By default `args.hub_revision`, or `main`.
            private (`bool`, *optional*):
                Whether a repository made here is private. By default `args.hub_private_repo`.
            kwargs:
                Arguments of [`create_model_card`].

        Returns:
            Address of the repository, or its `Future` if `blocking=False`; None on the other processes.

        Raises:
            PushError: if the upload fails, with the command that repeats it. The folder stays whole.
        """
        trainer: Any = self
        trainer.callback_handler.on_push_begin(self.args, trainer.state, trainer.control)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None

        def write_card(repo_id: str) -> None:
            trainer.hub_model_id = repo_id
            self.create_model_card(**kwargs)

        trainer._finish_current_push()
        push = push_folder if blocking else push_in_background
        return push(
            self.args.output_dir,
            trainer.hub_model_id or _repository(self.args),
            write_card,
            commit_message=commit_message or "End of training",
            exclude=not_pushed(self.args),
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint in the background, as [`~transformers.Trainer`] does. If it fails a warning says so, and
        training goes on."""
        trainer: Any = self
        args = self.args
        if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        pushing = trainer.push_in_progress
        busy = pushing is not None and not pushing.is_done()
        if busy and not args.hub_always_push:
            return
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        # Copied, as checkpoints may be removed before they are pushed
        folder = Path(args.output_dir, LATEST)
        folder.mkdir(exist_ok=True)
        for file in os.scandir(checkpoint_folder):
            if any(fnmatch(file.name, pattern) for pattern in MODEL_FILES):
                shutil.copy(file.path, folder)
        trainer.processing_class.save_pretrained(folder)
        shutil.copy(Path(args.output_dir, "README.md"), folder)

        options = {"private": args.hub_private_repo, "token": args.hub_token, "revision": args.hub_revision}
        message = f"Training in progress, {Path(checkpoint_folder).name}"
        repo_id = trainer.hub_model_id
        jobs = [push_in_background(folder, repo_id, commit_message=message, **options)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                push_in_background(
                    checkpoint_folder,
                    repo_id,
                    commit_message=f"{message}, to resume from",
                    path_in_repo="last-checkpoint" if last else Path(checkpoint_folder).name,
                    exclude=["*training_args.bin"],
                    **options,
                )
            )
        if busy:
            pushing.jobs.extend(jobs)
        else:
            trainer.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]  # annotated as one
