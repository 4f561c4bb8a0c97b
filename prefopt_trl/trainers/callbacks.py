"""Tables of the completions that a trainer learns from, for the trackers that show tables."""

import html
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback

TABLE_TRACKERS = ["tensorboard", "trackio", "wandb"]  # of `report_to`
NUM_EXAMPLES = 8  # pairs or rankings of a table
Example = dict[str, Any]  # a pair or a ranking, as text or as messages
Row = list[str | float]
PAIR_COLUMNS = ["prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "label_probability"]


class LogPreferencesCallback(TrainerCallback):
    """Log a table of completions with their rewards to trackio, Weights & Biases and TensorBoard (`log_completions`).

    The main process logs `examples`, pairs or rankings, when training begins. Without examples it logs the latest
    `batch` whenever the loss is logged. The table is named "completions", as in TRL's `GRPOTrainer`.
    """

    def __init__(self, trainer: Trainer, examples: list[Example] | None = None) -> None:
        self.trainer, self.examples = trainer, examples
        self.batch: dict[str, torch.Tensor] | None = None  # set by the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.examples is not None and state.is_world_process_zero:
            self._log(self.examples, args, state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_due = self.examples is None and "loss" in kwargs["logs"] and state.is_world_process_zero
        if is_due and self.batch is not None:
            processor = kwargs["processing_class"]
            examples = examples_of_batch(self.batch, getattr(processor, "tokenizer", processor))
            self._log(examples, args, state, control)

    def _log(
        self, examples: list[Example], args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        columns, rows = table_of(examples)
        columns, rows = ["step", *columns], [[state.global_step, *row] for row in rows]
        trackers = args.report_to or []
        step = {"train/global_step": state.global_step}  # the axis of transformers' own callbacks
        if "wandb" in trackers:
            import wandb

            if wandb.run is not None:
                wandb.log({"completions": wandb.Table(columns=[*columns], data=rows), **step})
        if "trackio" in trackers:
            import trackio

            trackio.log({"completions": trackio.Table(columns=columns, data=rows), **step})
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.on_log(args, state, control, logs={"completions": html_table(columns, rows)})


def epoch_of(state: TrainerState) -> int:
    """Return the index of the current epoch, from 0, also in a resumed run."""
    return int((state.epoch or 0) + 1e-6)  # rounding may leave it just below a whole number


def first_examples(dataset: Dataset | IterableDataset) -> list[Example] | None:
    """Return the first pairs or rankings of a dataset, or None if it holds tokens only."""
    examples = list(islice(dataset, NUM_EXAMPLES))
    are_texts = all({"chosen", "rejected"} <= row.keys() or "completions" in row for row in examples)
    return examples if are_texts else None


def examples_of_batch(batch: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Decode the first pairs or rankings of a batch, with special tokens and without padding."""

    def texts(row: int) -> tuple[str, str]:
        ids, in_completion = batch["input_ids"][row], batch["completion_mask"][row].bool()
        in_prompt = batch["attention_mask"][row].bool() & ~in_completion
        return str(tokenizer.decode(ids[in_prompt])), str(tokenizer.decode(ids[in_completion]))

    if "group_ids" not in batch:
        num_pairs = len(batch["input_ids"]) // 2
        pairs = ((texts(row), texts(num_pairs + row)) for row in range(min(num_pairs, NUM_EXAMPLES)))
        return [{"prompt": prompt, "chosen": chosen, "rejected": other} for (prompt, chosen), (_, other) in pairs]
    rankings: dict[int, Example] = {}
    for row, group in enumerate(batch["group_ids"].tolist()):
        if group < NUM_EXAMPLES:
            prompt, completion = texts(row)
            ranking = rankings.setdefault(group, {"prompt": prompt, "completions": [], "rewards": []})
            ranking["completions"].append(completion)
            ranking["rewards"].append(batch["rewards"][row].item())
    return list(rankings.values())


def table_of(examples: list[Example]) -> tuple[list[str], list[Row]]:
    """Return the columns and the rows: one for each pair, or for each completion of a ranking, best first.

    >>> table_of([{"prompt": "2 + 2?", "completions": ["5", "4"], "rewards": [-1, 1]}])
    (['prompt', 'completion', 'reward', 'rank'], [['2 + 2?', '4', 1.0, 1], ['2 + 2?', '5', -1.0, 2]])
    """
    if not examples or "completions" not in examples[0]:
        columns = [column for column in PAIR_COLUMNS if examples and column in examples[0]]
        return columns, [[_text(example[column]) for column in columns] for example in examples]
    rows = []
    for example in examples:
        ranked = sorted(zip(example["rewards"], example["completions"], strict=True), key=lambda pair: -pair[0])
        for rank, (reward, completion) in enumerate(ranked, start=1):
            rows.append([_text(example["prompt"]), _text(completion), float(reward), rank])
    return ["prompt", "completion", "reward", "rank"], rows


def _text(value: Any) -> Any:
    """Format messages as one text; return other values unchanged."""
    if not isinstance(value, list | tuple):
        return value
    return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in value)


def html_table(columns: list[str], rows: list[Row]) -> str:
    """Format a table for TensorBoard, which reads Markdown only outside of HTML."""

    def line(cells: Sequence[str | float], tag: str) -> str:
        texts = [f"{cell:.4g}" if isinstance(cell, float) else str(cell).strip() for cell in cells]
        return "".join(f"<{tag}>{'<br>'.join(html.escape(text).splitlines())}</{tag}>" for text in texts)

    lines = [line(columns, "th"), *(line(row, "td") for row in rows)]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
