"""Training steps of RSOTrainer and PROTrainer against TRL's DPOTrainer, and prompts shared against unshared.

- On pairs: a step of RSOTrainer against one of DPOTrainer, in time and in peak memory of a process of its own each.
- On rankings of n completions: a step of PROTrainer against its own without sharing, and against DPOTrainer on all
  n(n-1)/2 pairs of the same rankings, which take n-1 micro-batches of as many rows and one step of the optimizer.
- Scoring: forward and backward of n completions of a prompt, shared against unshared.

Both sides have the same weights and see the same HH-RLHF prompts in the same order, in turn, in one process; what
counts is the ratio. Run from the project's root:

    .venv/bin/python benchmarks/train_step.py --data path/to/hh_rlhf/harmless-base/test.jsonl.gz

A model of 5M parameters is made from scratch, unless `--model` names one.
"""

import argparse
import itertools
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

from prefopt_trl import DataCollatorForRanking, PROConfig, PROTrainer, RSOConfig, RSOTrainer, load_hh_rlhf
from prefopt_trl.data.rankings import tokenize_rankings
from prefopt_trl.experiments.tiny import tiny_llama, train_tokenizer
from prefopt_trl.shared_prefix.scoring import completion_logps

CONFIGS: dict[Any, Any] = {DPOTrainer: DPOConfig, RSOTrainer: RSOConfig, PROTrainer: PROConfig}
SIDES = {"ours": RSOTrainer, "theirs": DPOTrainer}


class Steps:
    """Training steps of one trainer, one batch after another, as `trainer.train()` makes them."""

    def __init__(
        self,
        trainer_class: Any,
        dataset: Dataset,
        args: argparse.Namespace,
        batch_size: int,
        micro_batches: int = 1,
        **options: Any,
    ) -> None:
        config = CONFIGS[trainer_class](
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=micro_batches,
            max_length=args.max_length,
            max_steps=args.rounds + 1,
            train_sampling_strategy="sequential",
            learning_rate=1e-4,
            seed=0,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        self.trainer = trainer_class(model=args.model, args=config, train_dataset=dataset)
        self.trainer.create_optimizer_and_scheduler(num_training_steps=config.max_steps)
        # Set by `train`, which would run all the steps at once
        self.trainer.current_gradient_accumulation_steps = micro_batches
        self.micro_batches = micro_batches
        self.batches = self._forever()
        self.losses: list[float] = []

    def _forever(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from self.trainer.get_train_dataloader()

    def __call__(self) -> None:
        losses = [
            self.trainer.training_step(self.trainer.model, next(self.batches)) for _ in range(self.micro_batches)
        ]
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        self.losses.append(torch.stack(losses).sum().item())


def rankings(pairs: Dataset, number: int, n: int) -> Dataset:
    """Prompts with n completions each: their own two, and those of the rows after them, with rewards n to 1."""
    texts = [text for row in pairs for text in (row["chosen"], row["rejected"])]
    return Dataset.from_dict(
        {
            "prompt": pairs["prompt"][:number],
            "completions": [texts[2 * row : 2 * row + n] for row in range(number)],
            "rewards": [list(range(n, 0, -1))] * number,
        }
    )


def pairs_of(ranked: Dataset) -> Dataset:
    """All pairs of completions of each prompt, the better one chosen."""
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": better, "rejected": worse}
            for row in ranked
            for better, worse in itertools.combinations(row["completions"], 2)
        ]
    )


def ranking_steps(pairs: Dataset, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """PROTrainer against itself unshared, and against DPOTrainer on all pairs."""
    ranked = rankings(pairs, args.rankings * (args.rounds + 1), n)
    ours, unshared = (
        Steps(PROTrainer, ranked, args, batch_size=args.rankings, share_prefix=share) for share in (True, False)
    )
    against_unshared = alternate(ours, unshared, args.rounds)
    against_unshared["largest_relative_difference_of_losses"] = max(
        abs(our / their - 1) for our, their in zip(ours.losses, unshared.losses, strict=True)
    )
    ours = Steps(PROTrainer, ranked, args, batch_size=args.rankings)
    dpo = Steps(DPOTrainer, pairs_of(ranked), args, batch_size=args.rankings * n // 2, micro_batches=n - 1)
    return {"against_unshared": against_unshared, "against_dpo_on_all_pairs": alternate(ours, dpo, args.rounds)}


def scoring_batch(ranked: Dataset, tokenizer: Any, max_length: int) -> dict[str, torch.Tensor]:
    examples = list(tokenize_rankings(ranked, tokenizer, "scored", max_length))
    batch = DataCollatorForRanking(tokenizer.pad_token_id, max_length)(examples)
    return {name: values for name, values in batch.items() if name != "rewards"}


def scoring_step(model: Any, batch: dict[str, Any], share_prefix: bool) -> None:
    logps, _ = completion_logps(model, **batch, share_prefix=share_prefix)
    logps.mean().backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="Anthropic/hh-rlhf", help="HH-RLHF: a file, a folder or the Hub id.")
    parser.add_argument("--split", default="test", help="Split of the data to take.")
    parser.add_argument("--model", help="Model to measure with, instead of a random one of 5M parameters.")
    parser.add_argument("--batch_size", type=int, default=8, help="Pairs a step, and prompts scored at a time.")
    parser.add_argument("--rankings", type=int, default=4, help="Rankings a step.")
    parser.add_argument("--max_length", type=int, default=512, help="Longest prompt and completion, in tokens.")
    parser.add_argument("--rounds", type=int, default=7, help="Steps counted, after one that is not.")
    parser.add_argument("--peak_memory_of", choices=SIDES, help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args()

    settings = {"data": Path(args.data).name, "split": args.split, "model": args.model or "LLaMA, 5M, random"}
    settings |= {"batch_size": args.batch_size, "rankings": args.rankings, "max_length": args.max_length}
    pairs = load_hh_rlhf(args.data, split=args.split).select(range(400))
    if args.model is None:
        args.model = tempfile.mkdtemp()
        trained = train_tokenizer(pairs["chosen"], vocab_size=4096)
        tiny_llama(trained).save_pretrained(args.model)
        trained.save_pretrained(args.model)

    if args.peak_memory_of:
        steps = Steps(SIDES[args.peak_memory_of], pairs, args, args.batch_size, beta=0.1)
        for _ in range(4):
            steps()
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
        return

    # First, because a process inherits the peak of the one that starts it
    peaks = {}
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--model", args.model, "--peak_memory_of", side]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[f"{side}_peak_memory_mib"] = round(float(output.splitlines()[-1]))

    ours, theirs = (Steps(trainer, pairs, args, args.batch_size, beta=0.1) for trainer in SIDES.values())
    results: dict[str, Any] = {"train_step_n2": {**alternate(ours, theirs, args.rounds), **peaks}}
    results["train_step_n2"]["largest_difference_of_losses"] = max(
        abs(our - their) for our, their in zip(ours.losses, theirs.losses, strict=True)
    )
    print("train step, pairs:", json.dumps(results["train_step_n2"], indent=2), flush=True)

    for n in (2, 4, 8):
        results[f"pro_train_step_n{n}"] = ranking_steps(pairs, n, args)
        print(f"train step, rankings of {n}:", json.dumps(results[f"pro_train_step_n{n}"], indent=2), flush=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    scored: Any = AutoModelForCausalLM.from_pretrained(args.model)
    scored.to(device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for n in (2, 4, 8):
        batch = scoring_batch(rankings(pairs, args.batch_size, n), tokenizer, args.max_length)
        batch = {name: values.to(device) for name, values in batch.items()}
        results[f"scoring_n{n}"] = alternate(
            partial(scoring_step, scored, batch, share_prefix=True),
            partial(scoring_step, scored, batch, share_prefix=False),
            args.rounds,
        )
        print(f"scoring, n = {n}:", json.dumps(results[f"scoring_n{n}"], indent=2), flush=True)
    print("written to", write_results("train_step", settings, results))


if __name__ == "__main__":
    main()
