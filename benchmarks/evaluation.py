"""`evaluate_policy` against a script that samples with `generate(num_return_sequences=4)` and judges nothing.

64 HH-RLHF prompts with 4 completions each. Ours samples, computes log-probabilities, asks a judge (the
number of words) and writes every file; theirs generates, in left-padded batches of 16 prompts or for one prompt after
the other, and decodes to text. Both draw from the model itself. What counts is the ratio. Run from the project's root:

    .venv/bin/python benchmarks/evaluation.py --data path/to/hh_rlhf/harmless-base/test.jsonl.gz

The model is that of `benchmarks/sampling.py`.
"""

import argparse
import json
import tempfile
from pathlib import Path

from common import DEVICE, alternate, write_results
from sampling import Sampler, load_policy

from prefopt_trl import FunctionRanker, evaluate_policy, load_hh_rlhf

AT_ONCE = 16  # prompts in a batch of theirs: as many completions as in a shard of ours


def num_words(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    return [float(len(completion.split())) for completion in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="Anthropic/hh-rlhf", help="HH-RLHF: a file, a folder or the Hub id.")
    parser.add_argument("--split", default="test", help="Split of the data to take.")
    parser.add_argument("--model", type=Path, default=Path("outputs/benchmarks/llama_5m"), help="Folder of the model.")
    parser.add_argument("--prompts", type=int, default=64, help="Prompts.")
    parser.add_argument("--completions", type=int, default=4, help="Completions of each.")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Longest completion, in tokens.")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds counted, after one that is not.")
    args = parser.parse_args()
    args.shape = "5m"
    model, tokenizer = load_policy(args)
    tokenizer.padding_side = "left"
    sampler = Sampler(args, model, tokenizer, None)
    prompts = load_hh_rlhf(args.data, split=args.split)["prompt"][: args.prompts]

    def ours() -> None:
        sampler.seed += 1
        with tempfile.TemporaryDirectory() as folder:
            evaluate_policy(
                model,
                tokenizer,
                prompts,
                judges=FunctionRanker(num_words),
                reference="policy",
                num_completions=args.completions,
                max_new_tokens=args.max_new_tokens,
                seed=sampler.seed,
                output_dir=folder,
            )

    def theirs(at_once: int) -> None:
        for start in range(0, len(prompts), at_once):
            sampler.theirs(prompts[start : start + at_once], args.completions, args.max_new_tokens)

    results = {
        name: alternate(ours, lambda at_once=at_once: theirs(at_once), args.rounds)  # type: ignore[misc]
        for name, at_once in {"against_batches_of_16_prompts": AT_ONCE, "against_one_by_one": 1}.items()
    }
    print(json.dumps(results, indent=2))
    settings = vars(args) | {"data": Path(args.data).name, "model": args.model.name}
    print("written to", write_results(f"evaluation_5m_{DEVICE}", settings, results))


if __name__ == "__main__":
    main()
