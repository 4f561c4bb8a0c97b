"""Statistical rejection sampling against the paper's own listing of it (RSO Algorithm 1), prompt by prompt.

- Time: 64 candidates for each of 10,000 prompts, 8 accepted, rewards drawn from a normal distribution.
- Law: for one prompt with few candidates, how often each outcome is accepted by the one and by the other. The total
  variation between the two is what chance alone makes it, where the laws are the same. That between Algorithm 1 and
  draws without replacement shows what it is where they are not.

Run from the project's root:

    .venv/bin/python benchmarks/rejection.py
"""

import argparse
import json
from collections import Counter
from typing import Any

import numpy as np
from common import alternate, write_results

from prefopt_trl import statistical_rejection_sampling


def algorithm_1(candidates: list[str], rewards: list[float], num_samples: int, beta: float) -> list[str]:
    """RSO Algorithm 1 as printed: it may accept more than `num_samples`, and proposes in the order it is given."""
    left = dict(zip(candidates, rewards, strict=True))
    accepted: list[str] = []
    while len(accepted) < num_samples:
        max_reward = max(left.values())
        to_remove = []
        for candidate, reward in left.items():
            u = np.random.uniform()
            if u >= np.exp((reward - max_reward) / beta):
                continue
            accepted.append(candidate)
            to_remove.append(candidate)
        if len(accepted) == num_samples:
            break
        for candidate in to_remove:
            left.pop(candidate)
    return accepted


def time_of_many_prompts(args: argparse.Namespace) -> dict[str, Any]:
    rewards = np.random.default_rng(0).normal(size=(args.prompts, args.num_candidates))
    rows = rewards.tolist()
    candidates = [f"candidate {index}" for index in range(args.num_candidates)]

    def ours() -> None:
        statistical_rejection_sampling(rewards, args.num_samples, args.beta, rng=0)

    def theirs() -> None:
        np.random.seed(0)
        for row in rows:
            algorithm_1(candidates, row, args.num_samples, args.beta)

    return alternate(ours, theirs, args.rounds)


def law_of_one_prompt(args: argparse.Namespace) -> dict[str, Any]:
    """Total variation between what is accepted, in its order, of 5 candidates when 3 are asked for.

    The printed algorithm is given the candidates in random order, as samples of a policy are, and the first of what
    it accepts are taken: then it favors nobody by position either.
    """
    rewards = [0.0, 0.3, 0.5, 0.9, 1.0]
    num_samples, draws = 3, args.draws

    tiled = np.tile(rewards, (draws, 1))

    def ours() -> Counter[tuple[int, ...]]:
        return Counter(map(tuple, statistical_rejection_sampling(tiled, num_samples, args.beta, rng=1).tolist()))

    def without_replacement() -> Counter[tuple[int, ...]]:
        noise = np.random.default_rng(1).gumbel(size=tiled.shape)
        return Counter(map(tuple, (-tiled - args.beta * noise).argsort(axis=1)[:, :num_samples].tolist()))

    def theirs() -> Counter[tuple[int, ...]]:
        np.random.seed(2)
        counts: Counter[tuple[int, ...]] = Counter()
        for _ in range(draws):
            order = np.random.permutation(len(rewards)).tolist()
            shuffled = [rewards[index] for index in order]
            accepted = algorithm_1(list(map(str, order)), shuffled, num_samples, args.beta)
            counts[tuple(map(int, accepted[:num_samples]))] += 1
        return counts

    def total_variation(first: Counter[tuple[int, ...]], second: Counter[tuple[int, ...]]) -> float:
        return sum(abs(first[outcome] - second[outcome]) for outcome in first.keys() | second.keys()) / draws / 2

    printed, accepted = theirs(), ours()
    one_law = np.array(list((printed + accepted).values())) / draws / 2
    first, second = (np.random.default_rng(seed).multinomial(draws, one_law, size=1000) for seed in (3, 4))
    by_chance = np.abs(first - second).sum(axis=1) / draws / 2
    return {
        "draws": draws,
        "outcomes": len(one_law),
        "total_variation": round(total_variation(accepted, printed), 4),
        "total_variation_by_chance_mean": round(float(by_chance.mean()), 4),
        "total_variation_by_chance_99_percent": round(float(np.quantile(by_chance, 0.99)), 4),
        "total_variation_of_another_law": round(total_variation(without_replacement(), printed), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000, help="Prompts, for the time.")
    parser.add_argument("--num_candidates", type=int, default=64, help="Candidates of a prompt.")
    parser.add_argument("--num_samples", type=int, default=8, help="Candidates accepted.")
    parser.add_argument("--beta", type=float, default=0.5, help="Weight of the KL penalty.")
    parser.add_argument("--draws", type=int, default=100_000, help="Times that one prompt is sampled, for the law.")
    parser.add_argument("--rounds", type=int, default=7, help="Rounds counted, after one that is not.")
    args = parser.parse_args()

    results = {}
    for name, measure in {"time": time_of_many_prompts, "law": law_of_one_prompt}.items():
        results[name] = measure(args)
        print(f"{name}:", json.dumps(results[name], indent=2), flush=True)
    print("written to", write_results("rejection", vars(args), results))


if __name__ == "__main__":
    main()
