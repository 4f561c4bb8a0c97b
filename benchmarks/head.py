"""Log-probabilities of labels without the logits: ours against TRL's fused head, forward and backward.

Both get the same hidden states, head and labels, and compute log-probabilities, entropies, mean logits and top-1. The
head is trained (full) or frozen, as with LoRA. Times are taken in turn in one process, peaks of memory each in a
process of its own. Run from the project's root:

    .venv/bin/python benchmarks/head.py
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from common import DEVICE, DTYPE, alternate, in_own_process, peak_memory, write_results
from trl.kernels import ChunkedLogProbFunction

from prefopt_trl.shared_prefix.label_statistics import _ChunkedHead

SHAPES = {"smollm2-135m": (576, 49152), "llama-1b": (2048, 128256)}  # hidden size, vocabulary
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
TRLS_CHUNK = 32768  # `_CHUNKED_LOGPROB_CHUNK_SIZE` in trl/trainer/utils.py


def sides(shape: str, num_tokens: int, is_trained: bool) -> dict[str, Callable[[], dict[str, torch.Tensor]]]:
    """The two, each a function that returns the log-probabilities and the gradients."""
    size, vocab_size = SHAPES[shape]
    generator = torch.Generator(DEVICE).manual_seed(0)
    drawn: dict[str, Any] = {"generator": generator, "device": DEVICE, "dtype": DTYPE}
    hidden = torch.randn(num_tokens, size, **drawn).requires_grad_()
    weight = (torch.randn(vocab_size, size, **drawn) / size**0.5).requires_grad_(is_trained)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator, device=DEVICE)

    def gradients(log_probs: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden.grad = weight.grad = None
        log_probs.sum().backward()
        found = {"log_probs": log_probs.detach(), "hidden": hidden.grad, "weight": weight.grad}
        return {name: value for name, value in found.items() if value is not None}

    def ours() -> dict[str, torch.Tensor]:
        return gradients(_ChunkedHead.apply(hidden, weight, None, labels, 1.0, None)[0])

    def theirs() -> dict[str, torch.Tensor]:
        values = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, TRLS_CHUNK, None, 1.0, OUTPUTS)
        return gradients(values[0])

    return {"ours": ours, "theirs": theirs}


def measure(shape: str, num_tokens: int, is_trained: bool, rounds: int) -> dict[str, Any]:
    both = sides(shape, num_tokens, is_trained)
    found, expected = both["ours"](), both["theirs"]()
    differences = {
        name: float((found[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected
    }
    case = [shape, str(num_tokens), str(int(is_trained))]
    peaks = {side: in_own_process("--peak", side, *case) for side in both}
    return {
        **alternate(both["ours"], both["theirs"], rounds),
        "largest_relative_difference": max(differences.values()),
        **{f"{side}_peak_mib": round(peak / 2**20) for side, peak in peaks.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--num_tokens", type=int, default=1024, help="labeled positions")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        side, shape, num_tokens, is_trained = args.peak
        print(json.dumps(peak_memory(sides(shape, int(num_tokens), bool(int(is_trained)))[side])))
        return
    results = {
        name: measure(args.shape, args.num_tokens, is_trained, args.rounds)
        for name, is_trained in {"full": True, "frozen head": False}.items()
    }
    print(json.dumps(results, indent=2))
    settings = {"shape": args.shape, "num_tokens": args.num_tokens, "rounds": args.rounds}
    print(write_results(f"head_{args.shape}_{DEVICE}", settings, results))


if __name__ == "__main__":
    main()
