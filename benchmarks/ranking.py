"""64 candidates of each of 8 HH-RLHF prompts scored with shared prompts, against one row per comparison or completion.

- `PairwiseRanker.score` (RSO eq. 9): each candidate against a baseline, in both orders;
- `RewardModelRanker.score`: each candidate by itself;
- `EnsembleRanker.score` of three such reward models, against the three one after the other: the ratio is 1 if an
  ensemble of k costs k times one.

The other side of the first two is the same ranker with `share_prefix=False`. The candidates are completions of other
prompts of the
same data, all different. What counts is the ratio. Run from the project's root:

    .venv/bin/python benchmarks/ranking.py --data path/to/hh_rlhf/harmless-base/test.jsonl.gz

The models have random weights, of a LLaMA with 5M parameters unless `--shape` says otherwise. So their rewards mean
nothing, but are the same on both sides up to rounding: the largest difference is printed, beside the rewards' spread.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from common import DEVICE, SHAPES, alternate, llama_config, random_model, vocabulary_size, write_results
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefopt_trl import EnsembleRanker, PairwiseRanker, RewardModelRanker, load_hh_rlhf
from prefopt_trl.experiments.tiny import train_tokenizer


def measure(
    sharing: Any, unshared: Any, prompts: list[str], candidates: list[list[str]], rounds: int
) -> dict[str, Any]:
    rewards: dict[str, np.ndarray] = {}

    def score(side: str, ranker: Any) -> None:
        rewards[side] = np.concatenate(ranker.score(prompts, candidates))

    result = alternate(lambda: score("ours", sharing), lambda: score("theirs", unshared), rounds)
    result["largest_difference_of_rewards"] = float(np.abs(rewards["ours"] - rewards["theirs"]).max())
    result["standard_deviation_of_rewards"] = float(rewards["theirs"].std())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="Anthropic/hh-rlhf", help="HH-RLHF: a file, a folder or the Hub id.")
    parser.add_argument("--split", default="test", help="Split of the data to take.")
    parser.add_argument("--shape", choices=SHAPES, default="5m", help="Size of the models.")
    parser.add_argument("--prompts", type=int, default=8, help="Prompts whose candidates are scored.")
    parser.add_argument("--num_candidates", type=int, default=64, help="Candidates of a prompt.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds counted, after one that is not.")
    args = parser.parse_args()

    pairs = load_hh_rlhf(args.data, split=args.split)
    prompts = pairs["prompt"][: args.prompts]
    others = list(dict.fromkeys(text for name in ("chosen", "rejected") for text in pairs[name][args.prompts :]))
    n = args.num_candidates
    candidates = [others[n * row : n * (row + 1)] for row in range(args.prompts)]
    texts = [prompt + chosen for prompt, chosen in zip(pairs["prompt"], pairs["chosen"], strict=True)]
    tokenizer = train_tokenizer(texts, vocabulary_size(args.shape))
    config = llama_config(tokenizer, args.shape)
    config.num_labels = 1

    results = {}
    rankers: list[tuple[Any, Any]] = [
        (PairwiseRanker, AutoModelForCausalLM),
        (RewardModelRanker, AutoModelForSequenceClassification),
    ]
    for ranker_class, auto_class in rankers:
        model = random_model(auto_class, config)
        sharing, unshared = (ranker_class(model, tokenizer, share_prefix=share) for share in (True, False))
        results[ranker_class.__name__] = measure(sharing, unshared, prompts, candidates, args.rounds)
        print(f"{ranker_class.__name__}:", json.dumps(results[ranker_class.__name__], indent=2), flush=True)

    ensemble = EnsembleRanker([sharing] * 3)
    cost = alternate(
        lambda: ensemble.score(prompts, candidates),
        lambda: [sharing.score(prompts, candidates) for _ in range(3)],
        args.rounds,
    )
    results["EnsembleRanker"] = cost
    print("EnsembleRanker:", json.dumps(cost, indent=2), flush=True)

    def mean_tokens(texts: list[str]) -> float:
        return round(float(np.mean([len(ids) for ids in tokenizer(texts)["input_ids"]])), 1)

    settings = vars(args) | {
        "data": Path(args.data).name,
        "mean_prompt_tokens": mean_tokens(prompts),
        "mean_candidate_tokens": mean_tokens([text for row in candidates for text in row]),
    }
    print("written to", write_results(f"ranking_{args.shape}_{DEVICE}", settings, results))


if __name__ == "__main__":
    main()
