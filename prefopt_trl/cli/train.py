"""`prefopt-trl {rso,slic,pro,listwise-dpo,rrhf}`: the trainers of `METHODS`, each known by its configuration."""

from collections.abc import Callable
from typing import Any

from trl import ModelConfig

from prefopt_trl.cli.arguments import PreferenceArguments
from prefopt_trl.cli.data import GIVEN, completions_that_fit, keep_given, prompts_that_fit, require_columns
from prefopt_trl.cli.models import load_ranker
from prefopt_trl.cli.training import prepare, train_and_save
from prefopt_trl.trainers.base import PreferenceTrainer
from prefopt_trl.trainers.base_config import PreferenceConfig
from prefopt_trl.trainers.listwise_dpo_trainer import ListwiseDPOTrainer
from prefopt_trl.trainers.pro_trainer import PROTrainer
from prefopt_trl.trainers.rrhf_trainer import RRHFTrainer
from prefopt_trl.trainers.rso_trainer import RSOTrainer
from prefopt_trl.trainers.slic_trainer import SLiCTrainer

TRAINERS: dict[type[PreferenceConfig], type[PreferenceTrainer]] = {
    trainer.config_class: trainer for trainer in (RSOTrainer, SLiCTrainer, PROTrainer, ListwiseDPOTrainer, RRHFTrainer)
}
COMPLETIONS = {"chosen", "rejected", "completions", "rewards"}


def run(own: PreferenceArguments, args: Any, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Train, and save the result in `args.output_dir`."""
    trained, splits = prepare(own, args, model)
    trainer_class = TRAINERS[type(args)]
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
