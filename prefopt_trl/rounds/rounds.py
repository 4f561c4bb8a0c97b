"""Train in rounds: sample the policy as it then is, train on the samples, judge the result, and again; restartable."""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets, load_from_disk
from peft import PeftConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Prompt
from prefopt_trl.evaluation.policy import ModelPolicy, as_prompts, evaluate_policy
from prefopt_trl.evaluation.report import json_numbers
from prefopt_trl.evaluation.training_report import write_training_report
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.rankers.base import Ranker, check_ranker
from prefopt_trl.rounds.models import base_of, load, loading_whole, release
from prefopt_trl.rounds.options import RoundsOptions
from prefopt_trl.rounds.records import same_as_before
from prefopt_trl.rounds.report import best_round, plot_rounds, report_on_rounds
from prefopt_trl.runtime.processes import checkpoints, gathered, process_state
from prefopt_trl.runtime.settings import (
    Settings,
    as_json,
    dataset_fingerprint,
    path_fingerprint,
    plotting,
    read_json,
    tokenizer_fingerprint,
    write_json,
    write_text,
    writing,
)
from prefopt_trl.sampling.pipeline import build_preference_dataset
from prefopt_trl.sampling.shards import shard_seed
from prefopt_trl.sampling.statistics import read_sampled
from prefopt_trl.sampling.store import lock
from prefopt_trl.trainers import resuming
from prefopt_trl.trainers.base import PreferenceTrainer
from prefopt_trl.trainers.base_config import PreferenceConfig

logger = logging.getLogger(__name__)

START = "start"  # name of the model before the first round
PHASES = {"sample": "Sampling", "train": "Training", "judge": "Judging"}
NOT_WHAT_IS_MADE = ("num_rounds", "patience", "metric")  # options that may change


def train_in_rounds(
    trainer_class: type[PreferenceTrainer],
    model: str,
    args: PreferenceConfig,
    prompts: Dataset | Sequence[Prompt],
    ranker: Ranker,
    *,
    eval_prompts: Dataset | Sequence[Prompt],
    judges: Ranker | Mapping[str, Ranker] | None = None,
    options: RoundsOptions | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    peft_config: PeftConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    **changes: object,
) -> "Rounds":
    """Sample pairs or rankings from a policy, train it on them, judge it, and begin again from the result.

    `args.output_dir` gets a folder for each round with what its three phases make: `sampled/`, `model/` and
    `evaluation/`, and `record.json` with the parent, seeds, statistics, metrics and seconds of each phase. `round-0/`
    is the evaluation of the start. `rounds.md` and `rounds.png` compare the rounds, with standard errors.

    The same call resumes after an interruption in any phase, with the same data and losses, and repeats nothing that
    is finished. Another setting is refused by name; `num_rounds` may grow. Each process of `accelerate launch` or
    `torchrun` takes part. No round leaves a model behind on the device.

    Args:
        trainer_class (`type`):
            Any trainer of this package.
        model (`str`):
            Folder or Hub id of the model to begin with, or of an adapter.
        args ([`PreferenceConfig`]):
            The trainer's configuration, for each round, with its sampling options. Each round samples with a seed of
            its own, made from `seed`.
        prompts ([`~datasets.Dataset`] or `list`):
            Column `prompt`, plain text or messages.
        ranker ([`Ranker`]):
            Scores and labels the samples.
        eval_prompts ([`~datasets.Dataset`] or `list`):
            Prompts that are not trained on, to judge each round with [`evaluate_policy`].
        judges ([`Ranker`] or `dict[str, Ranker]`, *optional*):
            Who judges; the first decides which round is the best. By default the ranker, which the policies have
            learned to please: take another one to be sure.
        options ([`RoundsOptions`], *optional*):
            How rounds follow each other.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. By default that of `model`.
        peft_config, quantization_config (*optional*):
            As for the trainer.
        **changes:
            Fields of `options` by name, such as `num_rounds`.

    Returns:
        [`Rounds`]: print it, or read its `records` and `best_model`.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: for an argument of `args` that has no effect in rounds, a folder of another run, or other settings
            than before (naming them).
        FileNotFoundError: if the model of an earlier round is missing.

    Example:

    ```python
    rounds = train_in_rounds(
        RSOTrainer, "Qwen/Qwen2.5-0.5B-Instruct", RSOConfig("outputs/rounds", gamma=0.1, max_new_tokens=128),
        prompts, RewardModelRanker("my-reward-model"), eval_prompts=held_out, num_rounds=3,
    )
    rounds.best_model, rounds.records[-1]
    ```
    """
    if not isinstance(model, str):
        raise TypeError(
            f"`model` is a {type(model).__name__}. Give the folder or Hub id to load it from in each round."
        )
    check_ranker(ranker)
    judges = judges or ranker
    named = judges if isinstance(judges, Mapping) else {type(judges).__name__: judges}
    rounds = Rounds(
        trainer_class=trainer_class,
        model=model,
        args=args,
        options=RoundsOptions.of(options, **changes),
        prompts=as_prompts(prompts),
        eval_prompts=as_prompts(eval_prompts),
        load_ranker=lambda: ranker,
        load_judges=lambda: dict(named),
        tokenizer=processing_class or AutoTokenizer.from_pretrained(model),
        peft_config=peft_config,
        quantization_config=quantization_config,
    )
    rounds.check()
    while rounds.run_next():
        pass
    return rounds


@dataclass(frozen=True)
class Rounds:
    """All inputs of rounds. What a round makes depends only on these and on the rounds before it.

    The fields are the arguments of [`train_in_rounds`], with functions that load the ranker and the judges.
    """

    trainer_class: type[PreferenceTrainer]
    model: str
    args: PreferenceConfig
    options: RoundsOptions
    prompts: Dataset
    eval_prompts: Dataset
    load_ranker: Callable[[], Ranker]
    load_judges: Callable[[], dict[str, Ranker]]
    tokenizer: PreTrainedTokenizerBase
    peft_config: PeftConfig | None = None
    quantization_config: BitsAndBytesConfig | None = None

    def check(self) -> None:
        """Refuse, before anything is loaded, arguments without effect and a folder of other rounds."""
        args, options = self.args, self.options
        is_of_sampled = (options.reference, options.data) == ("previous", "replace") or options.importance_correction
        corrects = args.is_whole_distribution() and args.can_correct
        for is_refused, reason in (
            (args.push_to_hub, "Push the best round once it is known, and leave `push_to_hub` out."),
            (args.eval_strategy != "no", "Rounds are judged when they end: leave `eval_strategy` at 'no'."),
            (args.resume_from_checkpoint, "Rounds resume by themselves: leave `resume_from_checkpoint` out."),
            (args.save_only_model, "Rounds resume from checkpoints with an optimizer: leave `save_only_model` out."),
            (args.samples_while_training, "Rounds sample before they train: leave `sampling` at 'offline'."),
            (
                options.reference != "first" and not self.trainer_class.has_reference,
                f"{self.trainer_class.__name__} has no reference model: leave `reference` out.",
            ),
            (
                args.keep_logps and not is_of_sampled,
                "`reference_logps`='sampled' needs log-probabilities under the reference model. Rounds have them with "
                "reference='previous' and data='replace', or with `importance_correction`.",
            ),
            (
                options.importance_correction and not corrects,
                "`importance_correction` is for Algorithm 1 on samples of the whole distribution: set `strategy` to "
                "'rso', `rejection_beta` above 0, `temperature` and `top_p` to 1, `top_k` to 0.",
            ),
            (
                len(self.prompts) < (options.prompts_per_round or 0),
                f"`prompts_per_round` is more than the {len(self.prompts)} prompts that there are.",
            ),
            (
                self.peft_config is not None and base_of(self.model) is not None,
                f"{self.model} is an adapter already: leave `peft_config` (of the command: `use_peft`) out.",
            ),
        ):
            if is_refused:
                raise ValueError(reason)
        if shared := len({*map(json.dumps, self.prompts["prompt"])} & {*map(json.dumps, self.eval_prompts["prompt"])}):
            logger.warning("%d of the prompts to judge on are trained on, too, so the judgment is too good.", shared)
        same_as_before(self.folder, self.settings)

    @cached_property
    def settings(self) -> Settings:
        """What all rounds depend on, as JSON, but for the rankers."""
        options = {name: value for name, value in vars(self.options).items() if name not in NOT_WHAT_IS_MADE}
        training = {f"args.{name}": value for name, value in resuming.determining(self.args.to_dict()).items()}
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return as_json(
            {
                **options,
                **training,
                f"args.{resuming.GLOBAL_BATCH}": batch,
                "trainer": self.trainer_class.__name__,
                "model": path_fingerprint(self.model),
                "prompts": dataset_fingerprint(self.prompts),
                "eval_prompts": dataset_fingerprint(self.eval_prompts),
                "tokenizer": tokenizer_fingerprint(self.tokenizer),
                "model_init_kwargs": self.args.model_init_kwargs,
                "peft_config": self.peft_config and self.peft_config.to_dict(),
                "quantization_config": self.quantization_config and self.quantization_config.to_dict(),
            },
            default=lambda value: sorted(value) if isinstance(value, set) else str(value),
        )

    @cached_property
    def identity(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def round_folder(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def model_of(self, number: int) -> str:
        """Return the path of the model that a round has trained; that of round 0 is the start."""
        return str(self.round_folder(number) / "model") if number else self.model

    def record(self, number: int) -> Settings:
        """Return what is known of a round: what it began with, and by phase what was made."""
        file = self.round_folder(number) / "record.json"
        found = read_json(file)
        if found is None:
            parent = self.model_of(number - 1) if number else None
            return {"round": number, "parent": parent, "settings": self.identity, "phases": {}}
        if found.get("settings") != self.identity:
            raise ValueError(
                f"{file} belongs to rounds with other settings. Choose another `output_dir`, or delete it."
            )
        return found

    @property
    def records(self) -> list[Settings]:
        """The records of the rounds that are finished, from round 0."""
        records = [self.record(number) for number in range(self.options.num_rounds + 1)]
        return [record for record in records if "judge" in record["phases"]]

    @property
    def best_model(self) -> str:
        """Path of the model of the best round, by `metric`; the start, if no round is better."""
        return self.model_of(best_round(self.records, self.options.metric))

    def __str__(self) -> str:
        return report_on_rounds(self.records, self.options.metric, self.best_model)

    def next(self) -> tuple[int, str] | None:
        """Return the round and the phase that are next, or None if all are finished."""
        for number in range(self.options.num_rounds + 1):
            done = self.record(number)["phases"]
            for phase in PHASES if number else ["judge"]:
                if phase not in done:
                    return number, phase
            patience, best = self.options.patience, best_round(self.records[: number + 1], self.options.metric)
            if patience is not None and number - best >= patience:
                return None
        return None

    def run_next(self) -> bool:
        """Run the next phase, if there is one; return whether others remain, and print the table when none does."""
        state = process_state()
        [following] = broadcast_object_list([self.next() if state.is_main_process else None])
        if following is not None:
            (number, phase), began = following, time.monotonic()
            state.print(f"Round {number} of {self.options.num_rounds}: {PHASES[phase]}.")
            run = {"sample": self._sample, "train": self._train, "judge": self._judge}[phase]
            with lock(self.folder, "rounds") if state.is_main_process else nullcontext():
                found = run(number)
            release()
            if state.is_main_process:
                record = self.record(number)
                record["phases"][phase] = {"seconds": round(time.monotonic() - began, 1), **json_numbers(found)}
                write_json(self.round_folder(number) / "record.json", record)
                if phase == "judge" and number:
                    self._report()
        [remaining] = broadcast_object_list([self.next() if state.is_main_process else None])
        if state.is_main_process:  # for the launcher
            settings = read_json(self.folder / "rounds.json")
            write_json(self.folder / "rounds.json", settings | {"finished": remaining is None})
        if remaining is None:
            left = self.options.num_rounds + 1 - len(self.records)
            state.print(f"{self}" + (f"\n\nStopped by `patience`, {left} rounds before the end." if left else ""))
        state.wait_for_everyone()
        return remaining is not None

    def _sample(self, number: int) -> Settings:
        seed, folder = shard_seed(self.args.seed, number), self.round_folder(number)
        sampled, corrects = self.model_of(number - 1), self.options.importance_correction and number > 1
        with loading_whole(self.args):
            ranker, policy = self.load_ranker(), self._load(self.model if corrects else sampled)
            proposal = self._load(sampled) if corrects else None
        with gathered(ranker.model):
            same_as_before(self.folder, {"ranker": ranker.settings()})
        prompts = self._prompts(number)
        build_preference_dataset(
            prompts,
            policy,
            self.tokenizer,
            ranker,
            folder / "sampled",
            self.args,
            seed=seed,
            max_length=self.args.max_length,
            keep_logps=self.args.keep_logps,
            proposal=proposal,
            proposal_clip=self.options.proposal_clip if corrects else None,
        )
        made = read_sampled(folder / "sampled")
        assert made is not None
        return {"seed": seed, "prompts": len(prompts), "statistics": made[1].as_dict()}

    def _train(self, number: int) -> Settings:
        args, before = copy(self.args), self.model_of(number - 1)
        args.output_dir = self.model_of(number)
        args.hub_model_id = args.hub_model_id or f"{self.folder.name}-round-{number}"  # the title of the card
        start = before if self.options.start == "previous" else self.model
        reference = self.model if self.options.reference == "first" else before
        base = base_of(start)
        model: Any = start
        others: dict[str, Any] = {"peft_config": self.peft_config, "quantization_config": self.quantization_config}
        if base is not None:
            model, others = self._load(start, is_trainable=True), {}
        has_other_reference = self.trainer_class.has_reference and reference != start and not args.keep_logps
        # With the adapter off, the model is its base
        is_base = has_other_reference and reference == base and not args.precompute_ref_log_probs
        if has_other_reference and not is_base:
            others["ref_model"] = self._load(reference)
        trainer: Any = self.trainer_class(
            model,
            args=args,
            train_dataset=self._data(number),
            processing_class=self.tokenizer,
            **others,
        )
        if is_base:
            trainer.model.delete_adapter("ref")  # TRL's copy of the adapter as it is
        trainer.train(resume_from_checkpoint=bool(checkpoints(args.output_dir)))
        trainer.save_model()
        history = trainer.state.log_history
        if trainer.accelerator.is_main_process:
            write_training_report(args.output_dir, history)
        trainer.accelerator.free_memory()
        losses = [entry["loss"] for entry in history if "loss" in entry]
        return {"steps": trainer.state.global_step, "loss": losses[-1] if losses else None}

    def _judge(self, number: int) -> Settings:
        with loading_whole(self.args):
            judges = self.load_judges()
        with gathered(*(judge.model for judge in judges.values())):
            settings = {name: judge.settings() for name, judge in judges.items()}
            same_as_before(self.folder, {"judges": settings, "first_judge": next(iter(judges))})
        name, against = f"round {number}" if number else START, self.options.against
        if not number and against == START and any(judge.draws_baselines for judge in judges.values()):
            return {"first_judge": next(iter(judges)), "judges": {}}  # which only compare
        paths = {START: self.model, name: self.model_of(number)}
        policies = {
            who: ModelPolicy(partial(self._load, path), self.tokenizer, path_fingerprint(path))
            for who, path in paths.items()
        }
        with loading_whole(self.args):
            found = evaluate_policy(
                policies,
                self.tokenizer,
                self.eval_prompts,
                judges=judges,
                against=None if not number and against == START else against,
                reference=START,
                options=GenerationOptions.of(self.args),
                seed=self.args.seed,
                output_dir=self.round_folder(number) / "evaluation",
            )
        if number <= 1 and math.isnan(found.judged[next(iter(judges))][name]["reward"].mean):
            raise ValueError(f"The judge {next(iter(judges))!r} has no opinion on {name}. Give another one first.")
        measured = {
            judge: {**of[name], **({"gain": found.difference(name, START, judge)} if number else {})}
            for judge, of in found.judged.items()
        }
        return {
            "first_judge": next(iter(judges)),
            "judges": {judge: {key: asdict(one) for key, one in of.items()} for judge, of in measured.items()},
            "samples": {key: asdict(one) for key, one in found.estimates[name].items()},
        }

    def _load(self, path: str, is_trainable: bool = False) -> Any:
        return load(path, self.args, self.quantization_config, is_trainable)

    def _prompts(self, number: int) -> Dataset:
        """Return the prompts of a round."""
        count = self.options.prompts_per_round
        if count is None:
            return self.prompts
        order = np.random.default_rng(self.args.seed).permutation(len(self.prompts))
        return self.prompts.select(np.sort(np.roll(order, -(number - 1) * count)[:count]))

    def _data(self, number: int) -> Dataset:
        """Return what a round trains on."""
        first = number if self.options.data == "replace" else 1
        folders = (self.round_folder(one) / "sampled" / "pairs" for one in range(first, number + 1))
        *before, own = (load_from_disk(str(folder)) for folder in folders)
        if not before:
            return own
        earlier = concatenate_datasets(before)
        if self.options.data == "mix":
            drawn = np.random.default_rng([self.args.seed, number]).permutation(len(earlier))[: len(own)]
            earlier = earlier.select(np.sort(drawn))
        return concatenate_datasets([earlier, own])

    def _report(self) -> None:
        write_text(self.folder / "rounds.md", f"# Rounds\n\n{self}\n")
        with plotting(), writing(self.folder / "rounds.png") as temporary:
            plot_rounds(self.records, temporary)
