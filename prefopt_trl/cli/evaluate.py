"""`prefopt-trl evaluate`: reward, win rate and KL from the reference of a policy's samples."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from trl import ModelConfig

from prefopt_trl.cli.arguments import EvaluateConfig
from prefopt_trl.cli.models import check_model, load_tokenizer, model_to_run
from prefopt_trl.cli.rankers import load_ranker
from prefopt_trl.data.loading import load_rows
from prefopt_trl.data.tokenization import chat_options
from prefopt_trl.evaluation.policy import evaluate_policy
from prefopt_trl.evaluation.report import as_percentage, table, with_error
from prefopt_trl.runtime.processes import interruptible, process_state


def run(own: EvaluateConfig, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Measure the policy, print the table, and write it as JSON and Markdown."""
    check_model(model, trains=False)
    state = PartialState(cpu=True) if own.use_cpu else process_state()
    path = str(model.model_name_or_path)
    rows = load_rows(own.dataset_name, own.dataset_config, own.dataset_split, own.num_rows)
    target = next((column for column in ("completion", "chosen") if column in rows.column_names), None)
    if target is None or "prompt" not in rows.column_names or len(rows) < 2:
        raise ValueError(
            f"{own.dataset_name} must have at least 2 rows with columns `prompt` and `chosen` or `completion`; "
            f"it has {len(rows)} with {', '.join(rows.column_names)}."
        )
    ranker = load_ranker(own, own.trust_remote_code)
    columns = {name: list(rows[name]) for name in rows.column_names if name not in ("prompt", target)}
    ranker.check_columns(columns)
    policy = model_to_run(path, model, state.device, own.trust_remote_code)
    reference = model_to_run(own.reference, ModelConfig(dtype=model.dtype), state.device, own.trust_remote_code)
    tokenizer = load_tokenizer(path, model.model_revision, own.trust_remote_code)
    save_config()
    with interruptible(lambda: "Interrupted before anything was saved."):
        measured = evaluate_policy(
            policy,
            reference,
            tokenizer,
            ranker,
            list(rows["prompt"]),
            list(rows[target]),
            max_new_tokens=own.max_new_tokens,
            chat=list(map(chat_options, rows)),
            columns=columns,
            seed=own.seed,
        )
    win_rate = measured["ranker_win_rate"]
    wins = f"{win_rate.mean * len(rows):g} of {len(rows)} prompts"  # a tie counts half
    report = table(
        ["", "mean ± standard error"],
        [
            ["reward by the ranker, against the target (nats)", with_error(measured["ranker_reward"], ".3g")],
            ["win rate against the target", f"{as_percentage(win_rate)} ({wins})"],
            ["KL from the reference (nats per completion)", with_error(measured["kl"], ".3g")],
        ],
    )
    results = {"policy": path, "num_prompts": len(rows), **{name: asdict(value) for name, value in measured.items()}}
    folder = Path(own.output_dir)
    (folder / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (folder / "evaluation.md").write_text(f"# {path}, {len(rows)} prompts\n\n{report}\n", encoding="utf-8")
    print(f"{report}\nWritten: evaluation.json and evaluation.md, in {folder}")
