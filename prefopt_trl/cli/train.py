"""`prefopt-trl {rso,slic,pro,listwise-dpo,rrhf}`: the trainers of `METHODS`, selected by their configuration."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from trl import ModelConfig

import prefopt_trl
from prefopt_trl.cli.arguments import PreferenceArguments
from prefopt_trl.cli.data import (
    COMPLETIONS,
    GIVEN,
    completions_that_fit,
    load_data,
    prompts_that_fit,
    prompts_to_judge,
    require_columns,
    without_completions,
)
from prefopt_trl.cli.models import renaming
from prefopt_trl.cli.rankers import load_ranker
from prefopt_trl.cli.training import prepare, train_and_save
from prefopt_trl.evaluation.win_rate import WinRateCallback
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.trainers import METHODS
from prefopt_trl.trainers.base_config import PreferenceConfig
from prefopt_trl.trainers.slic_config import SLiCConfig

TRAINERS = [getattr(prefopt_trl, f"{method.name}Trainer") for method in METHODS.values()]


def run(own: PreferenceArguments, args: PreferenceConfig, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Train, and save the result in `args.output_dir`."""
    tokenizer, trained = prepare(args, model)
    splits = load_data(own, args.eval_strategy != "no")
    trainer_class = trainer_of(args)
    target = args.target_column if isinstance(args, SLiCConfig) else None
    given_target = GIVEN.get(target or "", target)
    prompts = None
    if own.judge is not None:
        if (held_out := splits["eval_dataset"]) is None:
            raise ValueError("`judge` has no effect with `eval_strategy='no'`. Set it to 'steps' or 'epoch'.")
        prompts = prompts_to_judge(held_out, own.dataset_name, own.num_judged, tokenizer, args)
    for name, rows in splits.items():
        if rows is None:
            continue
        require_columns(rows, own.dataset_name, {"prompt"}, {"chosen", "rejected"})
        if own.only_prompts:
            rows = without_completions(rows, given_target)
        if isinstance(args, SLiCConfig) and target not in rows.column_names and given_target in rows.column_names:
            args.target_column = given_target
        if not COMPLETIONS & set(rows.column_names):
            rows = prompts_that_fit(rows, tokenizer, args.max_length, args.max_new_tokens)
        elif own.ranker is not None and trainer_class.learns_from == "rankings":
            rows = completions_that_fit(rows, tokenizer, args.max_length)
        splits[name] = rows
    ranker = None if own.ranker is None else load_ranker(own, args.trust_remote_code)
    judged = None
    if prompts is not None:  # before completions are sampled, as its errors end the command
        judge = ranker if own.judge == own.ranker else None  # loaded once
        judge = judge or renaming("judge")(load_ranker)(replace(own, ranker=own.judge), args.trust_remote_code)
        judged = WinRateCallback(judge, prompts, own.against, options=GenerationOptions.of(args), seed=args.seed)
    trainer = trainer_class(args=args, ranker=ranker, processing_class=tokenizer, **trained, **splits)
    if judged is not None:
        judged.trainer = trainer
        trainer.add_callback(judged)
    train_and_save(trainer, own, save_config)


def trainer_of(args: PreferenceConfig) -> Any:
    """Return the class of the trainer that takes a configuration."""
    return next(trainer for trainer in TRAINERS if trainer.config_class is type(args))
