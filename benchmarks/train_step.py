"""Training step of RSOTrainer against TRL's DPOTrainer, and scoring n completions of a prompt shared against unshared.

Both sides have the same weights and see the same HH-RLHF pairs, in turn, in one process; what counts is the ratio.
Peak memory is that of a process of its own for each side. Run from the project's root:

    .venv/bin/python benchmarks/train_step.py --data path/to/hh_rlhf/harmless-base/test.jsonl.gz

A model of 5M parameters is made from scratch, unless `--model` names one.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import alternate, write_results
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from prefopt_trl import RSOConfig, RSOTrainer, load_hh_rlhf
from prefopt_trl.data.tiny import tiny_llama, train_tokenizer
from prefopt_trl.shared_prefix.scoring import completion_logps

SIDES = {"ours": (RSOTrainer, RSOConfig), "theirs": (DPOTrainer, DPOConfig)}


class Steps:
    """Training steps of one trainer, one batch after another, as `trainer.train()` makes them."""

    def __init__(self, side: str, model: str, dataset: Dataset, args: argparse.Namespace) -> None:
        trainer_class, config_class = SIDES[side]
        config = config_class(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=args.batch_size,
            max_length=args.max_length,
            max_steps=args.rounds + 1,
            beta=0.1,
            learning_rate=1e-4,
            seed=0,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        self.trainer: Any = trainer_class(model=model, args=config, train_dataset=dataset)
        self.trainer.create_optimizer_and_scheduler(num_training_steps=config.max_steps)
        self.trainer.current_gradient_accumulation_steps = 1  # set by `train`, which would run all the steps at once
        self.batches = self._forever()
        self.losses: list[float] = []

    def _forever(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from self.trainer.get_train_dataloader()

    def __call__(self) -> None:
        loss = self.trainer.training_step(self.trainer.model, next(self.batches))
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self.losses.append(loss.item())


def scoring_batch(dataset: Dataset, tokenizer: Any, num_prompts: int, n: int, max_length: int) -> dict[str, Any]:
    """Prompts with n completions each: their own two, and those of the rows after them."""
    texts = [text for row in dataset for text in (row["chosen"], row["rejected"])]
    rows, groups = [], []
    for group in range(num_prompts):
        prompt = tokenizer(dataset[group]["prompt"])["input_ids"]
        for text in texts[2 * group : 2 * group + n]:
            completion = tokenizer(text)["input_ids"]
            rows.append((prompt[: max_length // 2], completion[: max_length // 2]))
            groups.append(group)
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    batch = {
        name: torch.zeros(len(rows), length, dtype=torch.long)
        for name in ("input_ids", "attention_mask", "completion_mask")
    }
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        batch["input_ids"][row, :end] = torch.tensor(prompt + completion)
        batch["attention_mask"][row, :end] = 1
        batch["completion_mask"][row, len(prompt) : end] = 1
    return {**batch, "group_ids": torch.tensor(groups)}


def scoring_step(model: Any, batch: dict[str, Any], share_prefix: bool) -> None:
    logps, _ = completion_logps(model, **batch, share_prefix=share_prefix)
    logps.mean().backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="Anthropic/hh-rlhf", help="HH-RLHF: a file, a folder or the Hub id.")
    parser.add_argument("--split", default="test", help="Split of the data to take.")
    parser.add_argument("--model", help="Model to measure with, instead of a random one of 5M parameters.")
    parser.add_argument("--batch_size", type=int, default=8, help="Pairs a step.")
    parser.add_argument("--max_length", type=int, default=512, help="Longest prompt and completion, in tokens.")
    parser.add_argument("--rounds", type=int, default=15, help="Steps counted, after one that is not.")
    parser.add_argument("--peak_memory_of", choices=SIDES, help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args()

    dataset = load_hh_rlhf(args.data, split=args.split).select(range(400))
    model = args.model
    if model is None:
        model = tempfile.mkdtemp()
        trained = train_tokenizer(dataset["chosen"], vocab_size=4096)
        tiny_llama(trained).save_pretrained(model)
        trained.save_pretrained(model)

    if args.peak_memory_of:
        steps = Steps(args.peak_memory_of, model, dataset, args)
        for _ in range(4):
            steps()
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
        return

    # First, because a process inherits the peak of the one that starts it
    peaks = {}
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--model", model, "--peak_memory_of", side]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[f"{side}_peak_memory_mib"] = round(float(output.splitlines()[-1]))

    ours, theirs = (Steps(side, model, dataset, args) for side in ("ours", "theirs"))
    results: dict[str, Any] = {"train_step_n2": {**alternate(ours, theirs, args.rounds), **peaks}}
    results["train_step_n2"]["largest_difference_of_losses"] = max(
        abs(our - their) for our, their in zip(ours.losses, theirs.losses, strict=True)
    )
    print("train step, n = 2:", json.dumps(results["train_step_n2"], indent=2), flush=True)

    scored = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for n in (2, 4, 8):
        batch = scoring_batch(dataset, tokenizer, args.batch_size, n, args.max_length)
        results[f"scoring_n{n}"] = alternate(
            partial(scoring_step, scored, batch, share_prefix=True),
            partial(scoring_step, scored, batch, share_prefix=False),
            args.rounds,
        )
        print(f"scoring, n = {n}:", json.dumps(results[f"scoring_n{n}"], indent=2), flush=True)
    settings = {"data": Path(args.data).name, "split": args.split, "model": args.model or "LLaMA, 5M, random"}
    settings |= {"batch_size": args.batch_size, "max_length": args.max_length}
    print("written to", write_results("train_step", settings, results))


if __name__ == "__main__":
    main()
