"""`prefopt-trl evaluate`: compare policies, files and columns of completions by one or several judges."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers.utils import find_adapter_config_file
from trl import ModelConfig

from prefopt_trl.cli.arguments import EvaluateConfig, RankerArguments
from prefopt_trl.cli.models import check_model, load_tokenizer, model_to_run
from prefopt_trl.cli.rankers import load_ranker
from prefopt_trl.data.formats import Completion, Prompt, is_lost, wrap_completion
from prefopt_trl.data.loading import load_rows
from prefopt_trl.evaluation.comparison import instruction
from prefopt_trl.evaluation.policy import BestOf, ModelPolicy, evaluate_policy
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.rankers.base import Ranker
from prefopt_trl.runtime.processes import process_state
from prefopt_trl.runtime.settings import folder_fingerprint

TARGETS = ("chosen", "completion")  # columns, the first of which is the opponent by default


def run(own: EvaluateConfig, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Evaluate, print the tables, and write them with the samples."""
    check_model(model, trains=False, is_optional=True)
    state = PartialState(cpu=True) if own.use_cpu else process_state()
    rows = load_rows(own.dataset_name, own.dataset_config, own.dataset_split, own.num_rows)
    if "prompt" not in rows.column_names:
        raise ValueError(f"{own.dataset_name} has no column `prompt`; it has {', '.join(rows.column_names)}.")
    judges = _named("judges", own.judges, partial(_judge, own))
    ranker = next(iter(judges.values()))
    given = [*([str(model.model_name_or_path)] if model.model_name_or_path else []), *(own.policies or [])]
    load = partial(_policy, own=own, model=model, rows=rows, ranker=ranker, device=state.device)
    policies, reference = _named("policies", given, load), own.reference
    if reference is not None and reference not in policies:
        policies["reference"], reference = load("reference", reference), "reference"
    if not policies:
        raise ValueError("There is no policy. Give `model_name_or_path` or `policies`.")
    against = own.against or next((name for name in TARGETS if name in rows.column_names), reference)
    if state.is_main_process:
        save_config()
    found = evaluate_policy(
        policies,
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
    state.print(
        f"{found}\n\nWritten: evaluation.json, .md and .png, samples.jsonl and alpaca_eval/, in {own.output_dir}"
    )


def _named(argument: str, given: list[str], load: Callable[[str, str], Any]) -> dict[str, Any]:
    """Load what is given as [NAME=]WHAT, by name; the default name is the last part of WHAT."""
    loaded: dict[str, Any] = {}
    for one in given:
        name, what = re.fullmatch(r"(?:([^=/:]+)=)?(.+)", one, re.DOTALL).groups()  # type: ignore[union-attr]
        best = re.match(r"best-of-\d+(?=:)", what)
        name = name or f"{f'{best[0]} ' if best else ''}{re.split('[/:]', what.rstrip('/'))[-1]}"
        if name in loaded:
            raise ValueError(f"`{argument}` has two with the name {name!r}. Give names: NAME={what}.")
        loaded[name] = load(name, what)
    return loaded


def _judge(own: EvaluateConfig, name: str, what: str) -> Ranker:
    options = {"ranker_template": own.ranker_template, "ranker_batch_size": own.ranker_batch_size}
    has_options = not what.endswith((".yaml", ".yml")) and ":" not in Path(what).name
    arguments = RankerArguments(ranker=what, **(options if has_options else {}))  # type: ignore[arg-type]
    return load_ranker(arguments, own.trust_remote_code)


def _policy(
    name: str,
    what: str,
    own: EvaluateConfig,
    model: ModelConfig,
    rows: Dataset,
    ranker: Ranker,
    device: torch.device,
) -> Any:
    """Return a policy for [`evaluate_policy`], whose model is loaded when it is needed."""
    if best := re.fullmatch(r"best-of-(\d+):(.+)", what, re.DOTALL):
        return BestOf(_policy(name, best[2], own, model, rows, ranker, device), int(best[1]), ranker)
    if what.startswith("column:"):
        return what.removeprefix("column:")
    if what.endswith((".jsonl", ".json")):
        return _read_completions(what, name, rows["prompt"][:])
    if is_lost(what):
        raise FileNotFoundError(f"`policies`: there is no folder {what}. Check the path.")
    if what != model.model_name_or_path:
        model = replace(model, model_name_or_path=what, model_revision="main")
    load = partial(model_to_run, what, model, device, own.trust_remote_code)
    how = {key: value for key, value in vars(model).items() if key != "model_name_or_path"}
    identity = f"{_fingerprint(what)} {json.dumps(how, sort_keys=True, default=str)}"
    return ModelPolicy(load, load_tokenizer(what, model.model_revision, own.trust_remote_code), identity)


def _fingerprint(path: str) -> str:
    """Return what recognizes a model: the contents of a folder, with those of an adapter's base, or a Hub id."""
    if not Path(path).is_dir():
        return path
    config = find_adapter_config_file(path)
    base = str(json.loads(Path(config).read_text())["base_model_name_or_path"]) if config else ""
    return folder_fingerprint(Path(path)) + (f" on {_fingerprint(base)}" if base else "")


def _read_completions(path: str, name: str, prompts: list[Prompt]) -> list[list[Completion]]:
    """Read the completions of each prompt from a file; of `samples.jsonl` those of the policy `name`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"`policies`: there is no file {path}. Check the path.")
    text = Path(path).read_text(encoding="utf-8")
    lines = json.loads(text) if path.endswith(".json") else [json.loads(line) for line in text.splitlines() if line]
    found: dict[str, list[Completion]] = {}
    for line in lines:
        if line.get("policy", name) == name:
            key = instruction(line.get("prompt", line.get("instruction", "")))
            given = line.get("completions") or [line[key] for key in ("completion", "output") if key in line]
            found.setdefault(key, []).extend(given)
    if missing := next((row for row, prompt in enumerate(prompts) if not found.get(instruction(prompt))), None):
        raise ValueError(
            f"{path} has no completion of the policy {name!r} for row {missing} of the prompts. Its rows need "
            "`prompt` and `completion` or `completions`, or `instruction` and `output`."
        )
    return [[wrap_completion(prompt, one) for one in found[instruction(prompt)]] for prompt in prompts]
