"""`prefopt-trl rounds {rso,slic,pro,listwise-dpo,rrhf}`: sample, train and judge, and again."""

import os
from collections.abc import Callable
from functools import partial

from trl import ModelConfig, get_peft_config, get_quantization_config

from prefopt_trl.cli.arguments import RoundsArguments
from prefopt_trl.cli.data import load_data, prompts_that_fit, prompts_to_judge, require_columns, without_completions
from prefopt_trl.cli.launch import ONE_PHASE
from prefopt_trl.cli.models import init_kwargs
from prefopt_trl.cli.rankers import load_judges, load_ranker
from prefopt_trl.cli.train import trainer_of
from prefopt_trl.cli.training import check_and_load_tokenizer
from prefopt_trl.rounds.options import RoundsOptions
from prefopt_trl.rounds.rounds import Rounds
from prefopt_trl.runtime.processes import is_main_process, process_state
from prefopt_trl.trainers.base_config import PreferenceConfig


def run(own: RoundsArguments, args: PreferenceConfig, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Run the next phase, if the launcher starts each of them, or else all phases."""
    tokenizer, path = check_and_load_tokenizer(args, model), str(model.model_name_or_path)
    args.model_init_kwargs = {**init_kwargs(model), **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
    splits = load_data(own, evaluates=True)
    rows, held_out = splits["train_dataset"], splits["eval_dataset"]
    assert rows is not None and held_out is not None
    require_columns(rows, own.dataset_name, {"prompt"})
    rounds = Rounds(
        trainer_class=trainer_of(args),
        model=path,
        args=args,
        options=RoundsOptions.of(own),
        prompts=prompts_that_fit(without_completions(rows), tokenizer, args.max_length, args.max_new_tokens),
        eval_prompts=prompts_to_judge(held_out, own.dataset_name, own.num_judged, tokenizer, args),
        load_ranker=partial(load_ranker, own, args.trust_remote_code),
        load_judges=partial(load_judges, own.judges or [own.ranker], own, args.trust_remote_code),
        tokenizer=tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    rounds.check()
    if is_main_process():
        save_config()
    while rounds.run_next() and ONE_PHASE not in os.environ:
        pass
    process_state().destroy_process_group()
