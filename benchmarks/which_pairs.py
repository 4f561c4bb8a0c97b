"""Ten ways of building pairs on the kitchen task of the quickstart, by the true reward of what is trained on them.

For each seed: an SFT policy and a pairwise ranker as in `prefopt-trl quickstart`, one set of 64 candidates for each of
400 prompts, scored once, and from them the data of each way. Each policy starts from the SFT policy and takes the same
number of steps: RSO's loss on pairs, PRO's on rankings, SFT on the best of n. No checkpoint is chosen. The table has
the mean true reward (at most 10) of one sample for each of 512 other prompts, and its difference from the first way,
with standard errors over seeds.

Run from the project's root, about 5 minutes per seed:

    .venv/bin/python benchmarks/which_pairs.py --seeds 0 1 2 3 4
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_results
from datasets import Dataset, load_from_disk
from kitchen import prepare, with_error
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from prefopt_trl import PROConfig, PROTrainer, RSOConfig, RSOTrainer, build_preference_dataset, sample_completions
from prefopt_trl.evaluation.report import table
from prefopt_trl.quickstart import study
from prefopt_trl.quickstart.kitchen import MAX_NEW_TOKENS, true_reward

ALL = {"strategy": "sft", "num_samples": 64}
WAYS: dict[str, dict[str, Any]] = {
    "8 at random, first-round": {"strategy": "sft"},
    "8 at random, tournament": {"strategy": "sft", "pairing": "tournament"},
    "8 by rejection, beta 0.5, first-round": {},
    "8 by rejection, beta 2, first-round": {"rejection_beta": 2.0},
    "8 at random, first-round, min_margin 1": {"strategy": "sft", "min_margin": 1.0},
    "all, best-worst": {**ALL, "pairing": "best-worst"},
    "all, best-quantile": {**ALL, "pairing": "best-quantile"},
    "all, correct-wrong": {**ALL, "pairing": "correct-wrong"},
    "4 at random, ranking (PRO)": {"strategy": "sft", "num_samples": 4, "pairing": "ranking"},
    "all, best (SFT)": {**ALL, "pairing": "best"},
}
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ranking": (PROTrainer, PROConfig, {}),
    "best": (SFTTrainer, SFTConfig, {}),
}


def measure(seed: int, folder: Path, steps: int) -> dict[str, float]:
    """The mean true reward of the SFT policy and of each way."""
    task, tokenizer, sft, ranker = prepare(seed, folder)

    def reward_of(policy: Any) -> float:
        prompts = task.eval_dataset["prompt"][:]
        how: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "seed": seed, "generation_batch_size": 512}
        samples = sample_completions(policy, tokenizer, prompts, 1, **how)
        return float(np.mean(true_reward(prompts, [completion for [completion] in samples])))

    candidates: Dataset | None = None
    rewards = {"SFT policy": reward_of(sft)}
    for number, (name, how) in enumerate(WAYS.items()):
        pairing = how.get("pairing", "first-round")
        given = task.prompts if candidates is None else candidates
        if pairing == "correct-wrong":  # correct is what the ranker prefers to most samples
            given = given.map(lambda row: {"rewards": [float(reward > 0) for reward in row["rewards"]]})
        options = {"num_candidates": 64, "num_samples": 8, "max_new_tokens": MAX_NEW_TOKENS, **how}
        made = build_preference_dataset(
            given, sft, tokenizer, ranker, folder / f"way-{number}", seed=seed, generation_batch_size=1024, **options
        )
        candidates = candidates or load_from_disk(str(folder / f"way-{number}" / "candidates"))
        trainer_class, config_class, own = TRAINERS.get(pairing, (RSOTrainer, RSOConfig, {"gamma": study.GAMMA}))
        policy = AutoModelForCausalLM.from_pretrained(folder / "sft")
        training = {**study.COMMON, **study.POLICY, "max_steps": steps, "lr_scheduler_type": "constant", **own}
        args = config_class(str(folder / f"policy-{number}"), seed=seed, **training)
        study._train_without_logs(trainer_class(policy, args=args, train_dataset=made, processing_class=tokenizer))
        rewards[name] = reward_of(policy.eval())
        print(f"seed {seed}, {name}: {len(made)} rows, true reward {rewards[name]:.2f}", flush=True)
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds of task, policies and sampling.")
    parser.add_argument("--steps", type=int, default=study.POLICY["max_steps"], help="Steps of each policy.")
    parser.add_argument("--output_dir", default="outputs/which_pairs", help="Folder for models and data.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study._quiet()

    of_seeds = [measure(seed, Path(args.output_dir) / str(seed), args.steps) for seed in args.seeds]
    found = {name: np.array([rewards[name] for rewards in of_seeds]) for name in of_seeds[0]}
    first = found[next(iter(WAYS))]
    rows = [[name, with_error(values), with_error(values - first)] for name, values in found.items()]
    print(table(["data", "true reward", "against the first way"], rows))
    results = {name: values.tolist() for name, values in found.items()}
    print("written to", write_results("which_pairs", vars(args), results))


if __name__ == "__main__":
    main()
