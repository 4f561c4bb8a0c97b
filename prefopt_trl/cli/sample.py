"""`prefopt-trl sample`: sample completions from a policy, and make preference pairs or rankings with a ranker."""

import re
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from trl import ModelConfig

from prefopt_trl.cli.arguments import SampleConfig
from prefopt_trl.cli.data import keep_given, prompts_that_fit, read_completions, require_columns
from prefopt_trl.cli.models import check_model, load_tokenizer, model_to_run
from prefopt_trl.cli.rankers import load_ranker
from prefopt_trl.data.loading import load_rows
from prefopt_trl.generation.generators import ContinuousBatchingGenerator, OpenAIGenerator
from prefopt_trl.runtime.processes import process_state
from prefopt_trl.sampling.pipeline import build_preference_dataset
from prefopt_trl.sampling.publishing import push_preference_dataset


def run(own: SampleConfig, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Build the dataset. Rows that have candidates already are not sampled again."""
    check_model(model, trains=False, is_optional=True)
    rows = load_rows(own.dataset_name, own.dataset_config, own.dataset_split, own.num_rows)
    are_given = "completions" in rows.column_names
    is_remote = "://" in own.generator
    needs_policy = own.keep_logps or not (are_given or (own.given and model.model_name_or_path is None))
    check_model(model, trains=False, is_optional=not needs_policy)
    if is_remote:
        _check_loads_nothing(model)
    state = PartialState(cpu=True) if own.use_cpu else process_state()
    path: Any = model.model_name_or_path
    # A model's name at a server need not be that of a tokenizer
    has_tokenizer = path and (own.max_length or not is_remote)
    tokenizer: Any = load_tokenizer(path, model.model_revision, own.trust_remote_code) if has_tokenizer else None
    ranker = load_ranker(own, own.trust_remote_code)
    require_columns(rows, own.dataset_name, {"prompt"})
    if own.rescore:
        require_columns(rows, own.dataset_name, {"completions", "rewards"})
        rows = rows.remove_columns("rewards")
    rows, given = _with_files(rows, own.given or [])
    rows = keep_given(rows, given)
    if not are_given and tokenizer is not None:
        rows = prompts_that_fit(rows, tokenizer, own.max_length, own.max_new_tokens)
    needs_policy &= not is_remote
    policy: Any = model_to_run(model, state.device, own.trust_remote_code) if needs_policy else None
    how: dict[str, Any] = {"policy": policy, "tokenizer": tokenizer}
    if own.generator == "continuous":
        how = {"policy": None, "tokenizer": None, "generator": ContinuousBatchingGenerator(policy, tokenizer)}
    elif is_remote:
        how["generator"] = OpenAIGenerator(path, own.generator)
    build_preference_dataset(
        rows,
        ranker=ranker,
        output_dir=own.output_dir,
        options=own,
        seed=own.seed,
        max_length=own.max_length,
        keep_logps=own.keep_logps,
        job=own.job,
        given=given,
        **how,
    )
    if state.is_main_process and own.job[1] > 1:
        print(f"Part {own.shard} is in {own.output_dir}. Once all are, the command without `shard` assembles them.")
    elif state.is_main_process:
        save_config()
        if own.hub_dataset_id is not None:
            print(f"Pushed to {push_preference_dataset(own.output_dir, own.hub_dataset_id)}.")
    state.destroy_process_group()


def _check_loads_nothing(model: ModelConfig) -> None:
    """Refuse arguments of a model that a server has loaded, but for those that name it and its tokenizer."""
    defaults = ModelConfig(model.model_name_or_path, model.model_revision)
    if other := [name for name, value in vars(model).items() if value != getattr(defaults, name)]:
        raise ValueError(f"`{other[0]}` has no effect on the model of a server, given as `generator`. Leave it out.")


def _with_files(rows: Dataset, given: list[str]) -> tuple[Dataset, list[str]]:
    """Add a column for each NAME=FILE, and return the names of all columns with candidates."""
    for one in given:
        if file := re.fullmatch(r"([^=/]+)=(.+\.jsonl?)(?::(.+))?", one):
            found = read_completions("given", file[2], file[3], rows["prompt"][:])
            if any(len(completions) > 1 for completions in found):
                raise ValueError(f"`given`: {file[2]} has several completions of a prompt. Keep one of each.")
            rows = rows.add_column(file[1], [completion for [completion] in found])
    return rows, [one.partition("=")[0] for one in given]
