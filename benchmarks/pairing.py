"""Time of selection: ten ways of keeping and pairing the same stored candidates.

10,000 prompts with 64 candidates each, rewards drawn from a normal distribution (0 and 1 for `"correct-wrong"`), texts
of a few characters, 100 prompts at a time, as the pipeline selects them. The ranker compares by Bradley-Terry, so that
the time is that of the selection and not of a ranker.

Run from the project's root:

    .venv/bin/python benchmarks/pairing.py
"""

import argparse
import json
import time
from typing import Any

import numpy as np
from common import write_results

from prefopt_trl import SamplingOptions
from prefopt_trl.rankers.base import PointwiseRanker
from prefopt_trl.sampling.options import BEST, RANKING
from prefopt_trl.sampling.selection import select_and_pair

SHARD = 100  # prompts that are selected at a time
ALL = {"strategy": "sft", "num_samples": 64}  # every candidate is kept
WAYS: dict[str, dict[str, Any]] = {
    "rso, first-round": {},
    "rso, tournament": {"pairing": "tournament"},
    "rso, all": {"pairing": "all"},
    "sft, first-round": {"strategy": "sft"},
    "top-k, first-round": {"strategy": "top-k"},
    "rso, ranking": {"pairing": "ranking"},
    "all candidates, best-worst": {**ALL, "pairing": "best-worst"},
    "all candidates, best-quantile": {**ALL, "pairing": "best-quantile", "min_margin": 0.5, "length_penalty": 0.01},
    "all candidates, correct-wrong": {**ALL, "pairing": "correct-wrong"},
    "all candidates, best": {**ALL, "pairing": "best"},
}


class Stored(PointwiseRanker):
    """A completion is its reward."""

    def rewards(self, prompts, completions):  # type: ignore[no-untyped-def]
        return [np.array(list(map(float, row))) for row in completions]

    def settings(self) -> dict[str, Any]:
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000, help="Prompts.")
    parser.add_argument("--num_candidates", type=int, default=64, help="Candidates of a prompt.")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    scores = {
        False: rng.normal(size=(args.prompts, args.num_candidates)),
        True: (rng.random((args.prompts, args.num_candidates)) < 0.3).astype(float),
    }
    prompts = [f"prompt {row}" for row in range(args.prompts)]
    texts = {name: [list(map(str, row)) for row in rewards.round(6).tolist()] for name, rewards in scores.items()}
    texts[True] = [[f"{score}{'0' * at}" for at, score in enumerate(row)] for row in texts[True]]  # distinct

    results: dict[str, Any] = {}
    for name, how in WAYS.items():
        options = SamplingOptions(**{"num_candidates": args.num_candidates, **how})
        is_binary = options.pairing == "correct-wrong"
        num_rows, started, started_cpu = 0, time.perf_counter(), time.process_time()
        for start in range(0, args.prompts, SHARD):  # as the pipeline does
            shard = slice(start, start + SHARD)
            given = prompts[shard], texts[is_binary][shard], list(scores[is_binary][shard])
            selected = select_and_pair(*given, Stored(), options, seed=0, first_row=start)
            of_prompts = [one.accepted[:1] if options.pairing in (RANKING, BEST) else one.chosen for one in selected]
            num_rows += sum(map(len, of_prompts))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
        results[name] = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "rows": num_rows}
        print(f"{name}:", json.dumps(results[name]), flush=True)
    for unit in ("seconds", "cpu_seconds"):
        results[f"{unit}_in_all"] = round(sum(results[name][unit] for name in WAYS), 2)
        print(f"{unit} in all:", results[f"{unit}_in_all"])
    print("written to", write_results("pairing", vars(args), results))


if __name__ == "__main__":
    main()
