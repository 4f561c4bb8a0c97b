"""`prefopt-trl reproduce TABLE ...`: run the papers' experiments, and write what they show."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from prefopt_trl.cli.arguments import ReproduceConfig
from prefopt_trl.cli.data import require_columns
from prefopt_trl.cli.rankers import is_model, load_ranker
from prefopt_trl.data.loading import load_rows
from prefopt_trl.experiments.kitchen import PERFECT_MARKS
from prefopt_trl.experiments.report import write
from prefopt_trl.experiments.runner import Make, run_tables
from prefopt_trl.experiments.tables import TABLES
from prefopt_trl.experiments.worlds import REAL_GAMMA, kitchen, real, reviews
from prefopt_trl.rounds.models import base_of
from prefopt_trl.runtime.processes import interruptible
from prefopt_trl.runtime.settings import Settings, dataset_fingerprint, path_fingerprint, versions
from prefopt_trl.sampling.store import lock


def run(own: ReproduceConfig, save_config: Callable[[], None]) -> None:
    """Train and measure the policies of the tables, and write each table as Markdown, CSV and PNG."""
    is_real = own.world == "real"
    possible = [name for name, table in TABLES.items() if table.is_real or not is_real]
    names = own.tables or possible
    if unknown := [name for name in names if name not in possible]:
        raise ValueError(f"`tables`: {unknown[0]!r} is none of the {own.world} world's: {', '.join(possible)}.")
    make, settings, described = _real(own) if is_real else (kitchen, {"world": own.world}, own.world)
    workers = own.num_workers or (1 if is_real or torch.accelerator.is_available() else os.cpu_count() or 1)
    seeds = range(own.first_seed, own.first_seed + own.num_seeds)
    policies, folder = Path(own.output_dir, "policies"), Path(own.results_dir or own.output_dir)
    environment = ", ".join(f"{name} {version}" for name, version in versions().items())
    how = (None if is_real else PERFECT_MARKS, f"World: {described}, with {environment}.")
    with lock(policies, "experiments"):
        runs = run_tables({name: TABLES[name] for name in names}, make, settings, seeds, policies, workers)
        save_config()
        with interruptible(lambda: f"Interrupted: what is finished is kept in {policies}; the same command resumes."):
            for name, results in runs:
                tqdm.write(f"\n{write(name, TABLES[name], results, folder, *how)}")
    tqdm.write(f"Written to {folder}: {', '.join(names)}. The policies are in {policies}.")


def _real(own: ReproduceConfig) -> tuple[Make, Settings, str]:
    """Return what makes a world of the user's model, what it depends on, and that in words."""
    prompts, model = reviews(), own.model_name_or_path
    if own.dataset_name is not None:
        prompts = load_rows(own.dataset_name, None, own.dataset_split)
        require_columns(prompts, own.dataset_name, {"prompt"})
    distinct = {json.dumps(prompt): row for row, prompt in enumerate(prompts["prompt"][:])}
    prompts = prompts.select(sorted(distinct.values()))  # none is trained on and reported on
    if base_of(model) is not None:
        raise ValueError(f"`model_name_or_path`={model!r} is an adapter. Merge it into its base first.")
    if len(prompts) - own.num_judged - own.num_judged // 2 < 16:
        raise ValueError(f"`num_judged`={own.num_judged} leaves too few of {len(prompts)} prompts to train on.")
    trained = ("max_steps", "learning_rate", "per_device_train_batch_size", "max_length")
    training = {name: getattr(own, name) for name in trained} | {"bf16": torch.cuda.is_available()}
    sampling = {"num_candidates": own.num_candidates, "max_new_tokens": own.max_new_tokens}
    numbers = {"gamma": REAL_GAMMA, "num_judged": own.num_judged, **training, **sampling}
    settings = {
        "model": path_fingerprint(model),
        "prompts": dataset_fingerprint(prompts),
        "ranker": path_fingerprint(own.ranker) if is_model(own.ranker) else load_ranker(own).settings(),
        "ranker_template": own.ranker_template,
        **numbers,
    }
    given = {"model": model, "prompts": prompts, "num_judged": own.num_judged}
    make = partial(real, **given, load_ranker=partial(load_ranker, own), training=training, sampling=sampling)
    names = [Path(name).name for name in (model, own.dataset_name or "beginnings of reviews", own.ranker)]
    described = [f"{name} {value:g}" for name, value in numbers.items()]
    return make, settings, f"{names[0]} on {names[1]} by {names[2]} ({', '.join(described)})"
