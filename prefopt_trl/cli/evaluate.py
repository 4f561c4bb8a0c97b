"""`prefopt-trl evaluate`: compare policies, files and columns of completions by one or several judges."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from trl import ModelConfig

from prefopt_trl.cli.arguments import EvaluateConfig
from prefopt_trl.cli.data import read_completions, require_columns
from prefopt_trl.cli.models import check_model, load_tokenizer, model_to_run, renaming
from prefopt_trl.cli.rankers import by_name, load_judges
from prefopt_trl.data.loading import load_rows
from prefopt_trl.evaluation.policy import BestOf, ModelPolicy, evaluate_policy
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.rankers.base import Ranker
from prefopt_trl.runtime.processes import process_state
from prefopt_trl.runtime.settings import path_fingerprint


def run(own: EvaluateConfig, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Evaluate, print the tables, and write them with the samples."""
    check_model(model, trains=False, is_optional=True)
    given = by_name("policies", [one for one in (model.model_name_or_path, *(own.policies or [])) if one])
    names = {what: name for name, what in given.items()}
    reference = own.reference
    if reference is not None and reference not in given:  # a model, which may be a policy already
        reference = names.setdefault(reference, "reference")
        given[reference] = str(own.reference)
    if not given:
        raise ValueError("There is no policy. Give `model_name_or_path` or `policies`.")
    rows = load_rows(own.dataset_name, own.dataset_config, own.dataset_split, own.num_rows)
    require_columns(rows, own.dataset_name, {"prompt"})
    against = own.against or next((one for one in ("chosen", "completion") if one in rows.column_names), reference)
    if against is not None and against not in given:
        against = reference or against if against == "reference" else names.get(against, against)
    state = PartialState(cpu=True) if own.use_cpu else process_state()
    judges, load = load_judges(own.judges, own, own.trust_remote_code), partial(_model, own, model, state.device)
    found = evaluate_policy(
        {name: _policy(what, rows, next(iter(judges.values())), load) for name, what in given.items()},
        None,
        rows,
        judges=judges,
        against=against,
        reference=reference,
        num_completions=own.num_completions,
        options=GenerationOptions.of(own),
        seed=own.seed,
        generation_kwargs={"stop_strings": own.stop_strings} if own.stop_strings else None,
        output_dir=own.output_dir,
    )
    if state.is_main_process:
        save_config()
        print(f"{found}\n\nWritten, with every completion and verdict, to {own.output_dir}")
    state.destroy_process_group()


def _policy(what: str, rows: Dataset, ranker: Ranker, load: Callable[[str], ModelPolicy]) -> Any:
    """Return a policy for [`evaluate_policy`]."""
    if best := re.fullmatch(r"best-of-(\d+):(.+)", what, re.DOTALL):
        return BestOf(_policy(best[2], rows, ranker, load), int(best[1]), ranker)
    if what.startswith("column:"):
        return what.removeprefix("column:")
    if file := re.fullmatch(r"(.+\.jsonl?)(?::(.+))?", what):
        return read_completions("policies", file[1], file[2], rows["prompt"][:])
    return load(what)


def _model(own: EvaluateConfig, model: ModelConfig, device: torch.device, path: str) -> ModelPolicy:
    """Return a model as a policy, which is loaded when it is needed."""
    argument = {own.reference: "reference", model.model_name_or_path: "model_name_or_path"}.get(path, "policies")
    if path != model.model_name_or_path:
        model = replace(model, model_name_or_path=path, model_revision="main")
    tokenizer = renaming(argument)(load_tokenizer)(path, model.model_revision, own.trust_remote_code)
    how = {key: value for key, value in vars(model).items() if key != "model_name_or_path"}
    identity = f"{path_fingerprint(path)} {json.dumps(how, sort_keys=True, default=str)}"
    load = renaming(argument)(model_to_run)
    return ModelPolicy(partial(load, model, device, own.trust_remote_code), tokenizer, identity)
