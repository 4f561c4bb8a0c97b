"""Completions sampled with shared prompts against `model.generate(num_return_sequences=n)`, of the same model.

- 64 completions of 8 HH-RLHF prompts, and of one of them, which is of median length;
- the first also against `generate` called for one prompt after the other;
- 1, 4, 16 and 64 completions of 8 prompts, for the cost of one completion as n grows;
- peak memory of the first, each side in a process of its own, less what it held before;
- transformers' continuous batching, `model.generate_batch`, where it runs.

`generate` gets the same prompts in one left-padded batch, with the same attention, and decodes to text as we do. Both
sides draw from the model itself: temperature 1, no top-k, no top-p. What counts is the ratio. Run from the project's
root:

    .venv/bin/python benchmarks/sampling.py --data path/to/hh_rlhf/harmless-base/test.jsonl.gz

The model has 5M parameters and is trained for some minutes on the chosen completions, so that its own have lengths as
real ones do; it is kept in `--model`. `--shape 7b` takes a LLaMA-7B with random weights instead, whose EOS token is
made likely enough for a mean of some 60 tokens.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    DEVICE,
    DTYPE,
    SHAPES,
    alternate,
    in_own_process,
    llama_config,
    peak_memory,
    random_model,
    vocabulary_size,
    write_results,
)
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from prefopt_trl import load_hh_rlhf, sample_completions
from prefopt_trl.experiments.tiny import tiny_llama, train_tokenizer

LONGEST_TRAINED = 256  # tokens
MEAN_LENGTH = 60  # tokens, of the completions of a model with random weights


def train_policy(pairs: Dataset, tokenizer: PreTrainedTokenizerFast) -> Any:
    """One epoch of SFT on the chosen completions, each with EOS, prompts not counting."""
    rows = []
    for prompt, chosen in zip(pairs["prompt"], pairs["chosen"], strict=True):
        prompt_ids, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + chosen + tokenizer.eos_token)["input_ids"]
        if len(ids) <= LONGEST_TRAINED:
            rows.append((torch.tensor(ids), torch.tensor([-100] * len(prompt_ids) + ids[len(prompt_ids) :])))
    rows.sort(key=lambda row: len(row[0]))
    batches = [rows[start : start + 16] for start in range(0, len(rows), 16)]
    np.random.default_rng(0).shuffle(batches)

    model: Any = tiny_llama(tokenizer)
    model.to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=len(batches))
    for step, batch in enumerate(batches):
        input_ids, labels = (
            torch.nn.utils.rnn.pad_sequence(list(column), batch_first=True, padding_value=padding).to(DEVICE)
            for column, padding in zip(zip(*batch, strict=True), (tokenizer.pad_token_id, -100), strict=True)
        )
        # Padding is on the right, where no token looks
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            print(f"training the policy: step {step} of {len(batches)}, loss {loss.item():.2f}", flush=True)
    return model


def load_policy(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model to sample from, made at first use."""
    if args.shape == "5m":
        if not (args.model / "config.json").exists():
            pairs = load_hh_rlhf(args.data, split=args.split)
            pairs = pairs.select(range(args.prompts, len(pairs)))  # not those to be sampled for
            tokenizer = train_tokenizer(texts_of(pairs), vocabulary_size(args.shape))
            train_policy(pairs, tokenizer).save_pretrained(args.model)
            tokenizer.save_pretrained(args.model)
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPE)
        return model.to(DEVICE).eval(), AutoTokenizer.from_pretrained(args.model)
    tokenizer = train_tokenizer(texts_of(load_hh_rlhf(args.data, split=args.split)), vocabulary_size(args.shape))
    return random_model(AutoModelForCausalLM, llama_config(tokenizer, args.shape)), tokenizer


def texts_of(pairs: Dataset) -> list[str]:
    return [prompt + chosen for prompt, chosen in zip(pairs["prompt"], pairs["chosen"], strict=True)]


class Sampler:
    """Samples n completions of each prompt in one way or another, and notes their lengths in tokens, EOS included."""

    def __init__(self, args: argparse.Namespace, model: Any, tokenizer: Any, mean_length: float | None) -> None:
        self.args, self.model, self.tokenizer = args, model, tokenizer
        self.further: dict[str, Any] = {}
        if mean_length is not None:  # of the completions of a model with random weights, in tokens
            self.further["sequence_bias"] = {(tokenizer.eos_token_id,): math.log(len(tokenizer) / mean_length)}
        self.lengths: dict[str, list[int]] = {"ours": [], "theirs": []}
        self.batching: dict[str, Any] = {}  # further arguments of `generate_batch`
        self.batch_forks = True  # whether `generate_batch` returns all `num_return_sequences`
        self.seed = 0  # another one for each run, as one draw's longest completion decides how long a run takes

    def ours(self, prompts: list[str], n: int, max_new_tokens: int) -> None:
        self.seed += 1
        with Recording(self.model, self.tokenizer.eos_token_id) as recording:
            sample_completions(
                self.model,
                self.tokenizer,
                prompts,
                n,
                max_new_tokens=max_new_tokens,
                seed=self.seed,
                generation_memory_budget=self.args.memory_budget,
                generation_kwargs=self.further,
            )
        self.lengths["ours"] += recording.lengths

    def theirs(self, prompts: list[str], n: int, max_new_tokens: int) -> None:
        self.seed += 1
        torch.manual_seed(self.seed)
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(DEVICE)
        with Recording(self.model, self.tokenizer.eos_token_id) as recording:
            output = self.model.generate(**inputs, generation_config=self.generation_config(n, max_new_tokens))
        self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.lengths["theirs"] += recording.lengths

    def theirs_one_by_one(self, prompts: list[str], n: int, max_new_tokens: int) -> None:
        """As a script that calls `generate` for each prompt: a CPU's caches like that better than one large batch."""
        for prompt in prompts:
            self.theirs([prompt], n, max_new_tokens)

    def continuous_batching(self, prompts: list[str], n: int, max_new_tokens: int) -> None:
        self.seed += 1
        torch.manual_seed(self.seed)
        ids = self.tokenizer(prompts)["input_ids"]
        outputs: dict[str, Any] = {}
        if self.batch_forks:
            outputs = self.model.generate_batch(ids, self.generation_config(n, max_new_tokens), **self.batching)
            self.batch_forks = len(outputs) > len(prompts) or n == 1
        if not self.batch_forks:  # transformers 5.17 returns one completion of each prompt, 5.23 all
            copies = [row for row in ids for _ in range(n)]
            outputs = self.model.generate_batch(copies, self.generation_config(1, max_new_tokens), **self.batching)
        ids = [output.generated_tokens for output in outputs.values()]
        if len(ids) < len(prompts) * n:
            raise RuntimeError(f"generate_batch returned {len(ids)} of {len(prompts) * n} completions")
        self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        self.lengths["theirs"] += map(len, ids)

    def generation_config(self, n: int, max_new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=True,
            top_k=0,
            num_return_sequences=n,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **self.further,
        )

    def compare(self, theirs: Callable[..., None], prompts: list[str], n: int) -> dict[str, Any]:
        """Both sides in turn, after a few tokens of each that are not counted."""
        for sample in (self.ours, theirs):
            sample(prompts, n, max_new_tokens=4)
        self.lengths = {"ours": [], "theirs": []}
        result = alternate(
            lambda: self.ours(prompts, n, self.args.max_new_tokens),
            lambda: theirs(prompts, n, self.args.max_new_tokens),
            self.args.rounds,
            warmup=0,
        )
        for side, lengths in self.lengths.items():
            mean_length, num_completions = sum(lengths) / len(lengths), len(prompts) * n
            seconds = result[f"{side}_seconds_median"]
            result[f"{side}_tokens_per_second"] = round(mean_length * num_completions / seconds)
            result[f"{side}_milliseconds_per_completion"] = round(1000 * seconds / num_completions, 2)
            result[f"{side}_mean_length"] = round(mean_length, 1)
            result[f"{side}_95_percent_length"] = round(float(np.quantile(lengths, 0.95)))
        return result


class Recording:
    """While it is entered, notes the lengths of the completions that `model.generate` returns."""

    def __init__(self, model: Any, eos_token_id: int) -> None:
        self.model, self.eos_token_id = model, eos_token_id
        self.lengths: list[int] = []

    def __enter__(self) -> "Recording":
        generate = self.model.generate

        def recorded(input_ids: torch.Tensor, **options: Any) -> Any:
            output = generate(input_ids=input_ids, **options)
            sequences = output if isinstance(output, torch.Tensor) else output.sequences
            ended = (sequences[:, input_ids.shape[1] :] == self.eos_token_id).cumsum(dim=1)
            ended = torch.nn.functional.pad(ended, (1, -1))  # a token counts unless one before it was EOS
            self.lengths += (ended == 0).sum(dim=1).tolist()
            return output

        self.model.generate = recorded
        return self

    def __exit__(self, *_: object) -> None:
        del self.model.generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="Anthropic/hh-rlhf", help="HH-RLHF: a file, a folder or the Hub id.")
    parser.add_argument("--split", default="test", help="Split of the data to take.")
    parser.add_argument("--shape", choices=SHAPES, default="5m", help="Size of the model; 1b and 7b are random.")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("outputs/benchmarks/llama_5m"),
        help="Folder of the trained model, which is made where it is missing.",
    )
    parser.add_argument("--prompts", type=int, default=8, help="Prompts sampled for.")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="Longest completion, in tokens.")
    parser.add_argument("--memory_budget", type=float, default=4.0, help="GiB that `sample_completions` may take.")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds counted, after a short one that is not.")
    parser.add_argument("--peak_memory_of", choices=("ours", "theirs"), help=argparse.SUPPRESS)  # how it calls itself
    args = parser.parse_args()

    sampler = Sampler(args, *load_policy(args), None if args.shape == "5m" else MEAN_LENGTH)
    prompts = load_hh_rlhf(args.data, split=args.split)["prompt"][: args.prompts]
    num_tokens = list(map(len, sampler.tokenizer(prompts)["input_ids"]))
    if args.peak_memory_of:
        side = getattr(sampler, args.peak_memory_of)
        side(prompts, 1, max_new_tokens=4)
        print(json.dumps(peak_memory(lambda: side(prompts, 64, args.max_new_tokens))))
        return

    peaks = {
        f"{side}_peak_memory_mib": round(in_own_process("--peak_memory_of", side) / 2**20)
        for side in ("ours", "theirs")
    }
    print(f"{args.prompts} prompts x 64, peak memory:", json.dumps(peaks, indent=2), flush=True)

    median = sorted(range(len(prompts)), key=num_tokens.__getitem__)[len(prompts) // 2]
    results: dict[str, Any] = {}
    for some_prompts, n in [(prompts, 64), ([prompts[median]], 64), (prompts, 16), (prompts, 4), (prompts, 1)]:
        name = f"{len(some_prompts)}_prompts_x_{n}"
        results[name] = sampler.compare(sampler.theirs, some_prompts, n)
        print(f"{name}:", json.dumps(results[name], indent=2), flush=True)
    results[f"{args.prompts}_prompts_x_64"] |= peaks

    name = f"{args.prompts}_prompts_x_64_against_one_by_one"
    results[name] = sampler.compare(sampler.theirs_one_by_one, prompts, 64)
    print(f"{name}:", json.dumps(results[name], indent=2), flush=True)

    try:
        against_batching = sampler.compare(sampler.continuous_batching, prompts, 64)
    except Exception as error:
        against_batching = {"does_not_run": f"{type(error).__name__}: {error}".splitlines()[0]}
    results["against_generate_batch"] = against_batching
    print("against generate_batch:", json.dumps(against_batching, indent=2), flush=True)

    settings = vars(args) | {"data": Path(args.data).name, "model": args.model.name, "prompt_tokens": num_tokens}
    print("written to", write_results(f"sampling_{args.shape}_{DEVICE}", settings, results))


if __name__ == "__main__":
    main()
