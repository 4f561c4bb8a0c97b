"""`prefopt-trl {rso,slic,pro,listwise-dpo,rrhf}`: the trainers of `METHODS`, each known by its configuration."""

from collections.abc import Callable
from typing import Any

from trl import ModelConfig

import prefopt_trl
from prefopt_trl.cli.arguments import PreferenceArguments
from prefopt_trl.cli.data import GIVEN, completions_that_fit, keep_given, prompts_that_fit, require_columns
from prefopt_trl.cli.models import load_ranker
from prefopt_trl.cli.training import prepare, train_and_save
from prefopt_trl.trainers import METHODS

TRAINERS = [getattr(prefopt_trl, f"{method.name}Trainer") for method in METHODS.values()]
COMPLETIONS = {"chosen", "rejected", "completions", "rewards"}


def run(own: PreferenceArguments, args: Any, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Train, and save the result in `args.output_dir`."""
    trained, splits = prepare(own, args, model)
    trainer_class = next(trainer for trainer in TRAINERS if trainer.config_class is type(args))
    target: Any = getattr(args, "target_column", None)  # SLiC's
    given_target = GIVEN.get(target, target)
    for name, rows in splits.items():
        if rows is None:
            continue
        require_columns(rows, own.dataset_name, {"prompt"}, {"chosen", "rejected"})
        if own.only_prompts:
            rows = keep_given(rows)
            dropped = {*COMPLETIONS, *GIVEN.values()} - {given_target}
            rows = rows.remove_columns([column for column in rows.column_names if column in dropped])
        if target not in rows.column_names and given_target in rows.column_names:
            args.target_column = given_target
        if not COMPLETIONS & set(rows.column_names):
            rows = prompts_that_fit(rows, trained["processing_class"], args.max_length, args.max_new_tokens)
        elif own.ranker is not None and trainer_class.learns_from == "rankings":
            rows = completions_that_fit(rows, trained["processing_class"], args.max_length)
        splits[name] = rows
    train_and_save(trainer_class(args=args, ranker=load_ranker(own), **splits, **trained), own, save_config)
