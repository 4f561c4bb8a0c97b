"""Push a trainer's model with its card to the Hub, at the end and, with `hub_strategy`, at each checkpoint."""

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from prefopt_trl.runtime.hub import PushError, push_folder, push_in_background, reason_of, upload_command
from prefopt_trl.trainers.model_card import model_card
from prefopt_trl.trainers.prepare import TrainingData

# In `output_dir`: checkpoints, sampled data (pushed separately as a dataset), and pickled arguments with the token
NOT_PUSHED = ["_*", "checkpoint-*", "sampled/*", "scored/*", "bootstrap*/*", "precomputed/*", "*training_args.bin"]
NOT_PUSHED += ["report.md", "evaluations/*"]  # texts of the dataset and completions
LATEST = "_pushed"  # folder in `output_dir` with a copy of the model of the latest checkpoint that is pushed
# The model's files in a checkpoint
MODEL_FILES = ["*config.json", "*.safetensors", "*.safetensors.index.json"]


def upload_options(args: TrainingArguments) -> dict[str, Any]:
    """Return the options that all pushes of a run share."""
    # With `log_completions` the trackers' logs contain prompts
    ignored = [*NOT_PUSHED, "runs/*"] if getattr(args, "log_completions", False) else NOT_PUSHED
    return {"private": args.hub_private_repo, "revision": args.hub_revision, "ignore_patterns": ignored}


def repository(args: TrainingArguments) -> str:
    """Return the repository's id, as transformers derives it."""
    return args.hub_model_id or Path(str(args.output_dir)).absolute().name


def check_repository(args: TrainingArguments) -> None:
    """Check, before hours of sampling, that `push_to_hub` can create the repository and write to it.

    Raises:
        PushError: on every process, so that no process waits for the main one.
    """
    failure: str | None = None
    if args.process_index == 0:
        try:
            api = HfApi(token=args.hub_token)
            repo = api.create_repo(repository(args), private=args.hub_private_repo, exist_ok=True)
            api.auth_check(repo.repo_id, write=True)  # `create_repo` accepts a repository that may only be read
        except Exception as error:
            failure = (
                f"{repository(args)} cannot be pushed to: {reason_of(error)}\n"
                "Nothing was sampled or trained yet. Correct it, or leave out `push_to_hub` and run after training\n\n"
                f"    {upload_command(str(args.output_dir), repository(args), **upload_options(args))}\n"
            )
    if args.world_size > 1:
        [failure] = broadcast_object_list([failure])
    if failure is not None:
        raise PushError(failure)


class Published(Trainer):
    """Mixin that writes a trainer's model card and pushes to the Hub. It precedes TRL's trainer in the bases.

    transformers' own pushes call the Hub before a sharded model is saved, and send all of `output_dir`: sampled
    prompts, and the token in `training_args.bin`. Remove once `Trainer` saves first and takes patterns to ignore.
    """

    args: Any  # transformers types these attributes as they are before they are set
    hub_model_id: Any
    processing_class: Any
    push_in_progress: Any
    training_data: TrainingData
    reference_given: str | None

    def create_model_card(  # type: ignore[override]  # as TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card, `<output_dir>/README.md`. The arguments are those of TRL's trainers."""
        if not self.is_world_process_zero():
            return
        model_name = model_name or repository(self.args).split("/")[-1]
        super().create_model_card(model_name, dataset_name, tags)  # TRL's card has the tags and the trackers' links
        card = Path(self.args.output_dir, "README.md")
        source = self.hub_model_id or self.args.hub_model_id or str(self.args.output_dir)
        model_card(self, ModelCard.load(card), model_name, source, dataset_name).save(card)

    def push_to_hub(  # type: ignore[override]  # returns an address
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | Future[str] | None:
        """Save the model and its card in `output_dir`, then upload them to the Hub. Call it on all processes.

        All processes save, as a sharded model needs. Then the main process uploads while the others continue. The
        arguments are those of [`~transformers.Trainer.push_to_hub`].

        Returns:
            Address of the repository, or its `Future` if `blocking=False`; None on the other processes.

        Raises:
            PushError: if the upload fails, with the command that retries it. The local folder stays complete.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None

        def write_card(repo_id: str) -> None:
            self.hub_model_id = repo_id
            self.create_model_card(**kwargs)

        self._finish_current_push()
        options = upload_options(self.args)
        options |= {} if private is None else {"private": private}
        options |= {} if revision is None else {"revision": revision}
        push = push_folder if blocking else push_in_background
        return push(
            self.args.output_dir,
            self.hub_model_id or repository(self.args),
            write_card,
            commit_message=commit_message or "End of training",
            token=token or self.args.hub_token,
            **options,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint in the background, as transformers does; a failure is logged, and training continues."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        earlier = self.push_in_progress
        running = [] if earlier is None or earlier.is_done() else earlier.jobs
        if running and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # A copy, as a checkpoint may be removed before it is pushed
        checkpoint, latest = Path(checkpoint_folder), Path(args.output_dir, LATEST)
        latest.mkdir(exist_ok=True)
        self.processing_class.save_pretrained(latest)
        for file in filter_repo_objects(os.listdir(checkpoint), allow_patterns=MODEL_FILES):
            shutil.copy(checkpoint / file, latest)
        shutil.copy(Path(args.output_dir, "README.md"), latest)

        folders: dict[Path, str | None] = {latest: None}
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            folders[checkpoint] = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        options = {**upload_options(args), "token": args.hub_token}
        options["commit_message"] = f"Training in progress, {checkpoint.name}"
        jobs = [
            push_in_background(folder, self.hub_model_id, path_in_repo=path, **options)
            for folder, path in folders.items()
        ]
        self.push_in_progress = PushInProgress([*running, *jobs])  # type: ignore[arg-type]  # annotated as one
