"""Three rounds against one offline run on the kitchen task of the quickstart, by the true reward, over seeds.

For each seed: an SFT policy and a pairwise ranker as in `prefopt-trl quickstart`. Each arm samples 64 completions for
each of 400 prompts in all and takes 240 steps in all with RSO's loss: offline at once, in rounds a third of the
prompts and of the steps each. The ranker labels; nothing is chosen by its reward. The table has the mean true reward
(at most 10) of one sample for each of 512 other prompts after the last round, and its difference from the offline run,
with standard errors over seeds.

Run from the project's root, about 4 minutes per seed:

    .venv/bin/python benchmarks/rounds.py --seeds 0 1 2 3 4
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write_results
from kitchen import prepare, with_error

from prefopt_trl import FunctionRanker, RSOConfig, RSOTrainer, train_in_rounds
from prefopt_trl.evaluation.report import table
from prefopt_trl.quickstart import study
from prefopt_trl.quickstart.kitchen import MAX_NEW_TOKENS, true_reward

NUM_ROUNDS, STEPS = 3, 240
PART = -(-study.TASK["num_prompts"] // NUM_ROUNDS)
ROUNDS: dict[str, Any] = {"num_rounds": NUM_ROUNDS, "prompts_per_round": PART}
ARMS: dict[str, dict[str, Any]] = {
    "offline": {"num_rounds": 1},
    "3 rounds": ROUNDS,
    "3 rounds, corrected": {**ROUNDS, "importance_correction": True},
    "3 rounds, reference previous": {**ROUNDS, "reference": "previous"},
}


def measure(seed: int, beta: float, folder: Path) -> dict[str, dict[str, list[float]]]:
    """Of each arm, by round: true reward, reward of the ranker, KL, acceptance rate and effective sample size."""
    shutil.rmtree(folder, ignore_errors=True)
    task, _, _, ranker = prepare(seed, folder)

    found = {}
    for number, (arm, options) in enumerate(ARMS.items()):
        training = {**study.COMMON, **study.POLICY, "max_steps": STEPS // options["num_rounds"]}
        sampling: dict[str, Any] = {
            "num_candidates": 64,
            "max_new_tokens": MAX_NEW_TOKENS,
            "generation_batch_size": 1024,
        }
        args = RSOConfig(
            str(folder / f"arm-{number}"),
            gamma=study.GAMMA,
            rejection_beta=beta,
            seed=seed,
            lr_scheduler_type="constant",
            **training,
            **sampling,
        )
        rounds = train_in_rounds(
            RSOTrainer,
            str(folder / "sft"),
            args,
            task.prompts,
            ranker,
            eval_prompts=task.eval_dataset,
            judges={"truth": FunctionRanker(true_reward), "ranker": ranker},
            against="completion",
            **options,
        )
        judged = [record["phases"]["judge"] for record in rounds.records]
        sampled = [record["phases"]["sample"]["statistics"] for record in rounds.records[1:]]
        found[arm] = {
            "true reward": [one["judges"]["truth"]["reward"]["mean"] for one in judged],
            "ranker's reward": [one["judges"]["ranker"]["reward"]["mean"] for one in judged],
            "KL": [one["samples"]["kl"]["mean"] for one in judged],
            "acceptance": [one["acceptance_rate"] for one in sampled],
            "effective size": [one["effective_size"] for one in sampled],
        }
        print(f"seed {seed}, {arm}: true reward by round {np.round(found[arm]['true reward'], 2)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds of task, policies and sampling.")
    parser.add_argument("--beta", type=float, default=2.0, help="Beta of Algorithm 1.")
    parser.add_argument("--output_dir", default="outputs/rounds_kitchen", help="Folder for models and data.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    study._quiet()

    of_seeds = [measure(seed, args.beta, Path(args.output_dir) / str(seed)) for seed in args.seeds]
    rows = []
    for arm in ARMS:
        last = {name: np.array([found[arm][name][-1] for found in of_seeds]) for name in of_seeds[0][arm]}
        offline = np.array([found["offline"]["true reward"][-1] for found in of_seeds])
        difference = with_error(last["true reward"] - offline) if arm != "offline" else ""
        rows.append(
            [arm, with_error(last["true reward"]), difference, *(with_error(last[name]) for name in HEADER[3:])]
        )
    print(table(HEADER, rows))
    print("written to", write_results(f"rounds_beta_{args.beta:g}", vars(args), {"by_seed": of_seeds}))


HEADER = ["arm", "true reward", "against offline", "ranker's reward", "KL", "acceptance", "effective size"]


if __name__ == "__main__":
    main()
