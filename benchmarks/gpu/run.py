# ruff: noqa: E402  # what the imports need must be found first
"""Measure training, sampling and ranking on one GPU, in one process, in under 8 minutes.

| part | ours | in turn with |
| --- | --- | --- |
| train_rso_7b, train_rso_1b | a step of RSOTrainer | TRL's DPOTrainer with SDPA and, if installed, FlashAttention 2 |
| train_pro_1b_n4, _n8 | a step of PROTrainer | itself with `share_prefix=False`; DPOTrainer on all pairs |
| sample_1b_8, _1b_64, _7b_8 | 64 completions of 8 or 64 prompts | `model.generate(num_return_sequences=64)` |
| generate_batch_1b_8 | 64 completions of 8 prompts | `model.generate_batch`, its set-up included |
| rank_1b, rank_7b | PairwiseRanker, 64 candidates of 8 prompts | itself with `share_prefix=False` |
| memory_7b_rso, memory_7b_pro | peak of LoRA on the jobs of memory_plan.py | - |

Models are LLaMAs with random bfloat16 weights, trained in full at 1B and with LoRA at 7B, with activation
checkpointing (TRL's default). Reference models have other weights than policies, so that equal losses mean something.
Prompts have 384 to 512 tokens and completions 64 to 192, drawn uniformly with `--seed`. Sampled completions end after
64 tokens on average and 128 at most. `generate` runs on 4 to 16 prompts at a time, fewer if memory runs out;
`sample_completions` may use half of the free memory.

The machine needs Python 3.12, torch 2.11, transformers 5.17, accelerate 1.15 and peft, or newer, and no network. If it
lacks trl or datasets, fetch their wheels beforehand and bring the folder wheels/:

    benchmarks/gpu/wheels.sh
    python3 benchmarks/gpu/run.py

Each part writes `benchmarks/results/gpu_<part>.json` when it ends, so a run cut short keeps what it measured. A part
that fails records its error and the next one starts. Parts run in order of importance; one that needs more time than
is left of `--budget` is skipped. `--shape tiny` is a rehearsal on a CPU, which writes to outputs/gpu_tiny.
"""

import argparse
import gc
import logging
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

START = time.perf_counter()
sys.path.insert(0, str(Path(__file__).parents[1]))  # the other benchmarks
sys.path.insert(0, str(Path(__file__).parents[2]))  # the package
sys.path.append(tempfile.mkdtemp())  # what is not installed; these wheels hold nothing that needs an installer
for _wheel in Path(__file__).parent.glob("wheels/*.whl"):
    zipfile.ZipFile(_wheel).extractall(sys.path[-1])
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import torch
from common import DEVICE, PRO, RESULTS, RSO, Job, llama_config, lora, random_model, write_results
from datasets import Dataset
from sampling import Sampler
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from train_step import CONFIGS, pairs_of
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import is_flash_attn_2_available
from trl import DPOTrainer

from prefopt_trl import PairwiseRanker, PROTrainer, RSOTrainer
from prefopt_trl.experiments.tiny import SPECIAL_TOKENS

Lengths = tuple[int, int]  # in tokens, the shortest and the longest
# Runs once, for warming up or not; returns its `seconds` and `tokens`, and perhaps `values` that others should equal
Side = Callable[[bool], dict[str, Any]]


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that is measured."""

    shapes: dict[str, str]  # one of common.py's `SHAPES` for each size in the names of parts
    vocabulary: int = 32000
    prompt: Lengths = (384, 512)
    completion: Lengths = (64, 192)
    new_tokens: int = 128
    pairs: int = 8  # a step
    rankings: int = 2  # a step
    steps: int = 3  # counted in each block of steps, after one that is not
    rounds: int = 5
    completions: int = 64  # sampled or ranked, of each prompt


SCALES = {
    "gpu": Scale({"1b": "1b", "7b": "7b"}),
    "tiny": Scale({"1b": "5m", "7b": "5m"}, 1000, (24, 32), (4, 12), 8, 2, 2, 1, 1, 4),
}


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def spread(name: str, values: list[float], digits: int) -> dict[str, Any]:
    """The median of values, and their range."""
    middle, low, high = (round(f(values), digits) for f in (statistics.median, min, max))
    return {name: middle, f"{name}_range": [low, high]}


def failure(error: Exception) -> dict[str, Any]:
    traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    at = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return {"error": f"{type(error).__name__}: {error}", "at": at}


def compare(make_sides: Mapping[str, Callable[[], Side]], rounds: int, deadline: float) -> dict[str, Any]:
    """Measure sides in turn, another one first in each round, until the rounds or the time (of `now`) are over.

    Each side is made and warmed up before the first round. One that fails there is left out of the rounds.

    Returns:
        `dict`: for each side the median and range of its speed, its first values and, on a GPU, the peak in GB that
        torch allocates for it alone; for sides other than "ours" also the median and range of `ratio`, above 1 where
        ours is faster, and the largest difference of their values from ours.
    """
    base, results = torch.cuda.memory_allocated(), {}
    sides: dict[str, Side] = {}
    held: dict[str, int] = {}
    for name, make in make_sides.items():
        before = torch.cuda.memory_allocated()
        try:
            side = make()
            side(True)
        except TimeoutError:
            raise
        except Exception as error:
            results[name] = failure(error)
            continue
        gc.collect()
        sides[name], held[name] = side, torch.cuda.memory_allocated() - before

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds if sides else 0):
        if number and now() > deadline:
            break
        first = number % len(sides)
        for name in [*sides][first:] + [*sides][:first]:
            before = torch.cuda.memory_allocated()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            run = sides[name](False)
            run["speed"] = run["tokens"] / run["seconds"]
            if DEVICE == "cuda":
                run["peak"] = base + held[name] + torch.cuda.max_memory_allocated() - before
            runs[name].append(run)

    for name, measured in runs.items():
        speeds = [run["speed"] for run in measured]
        one = results[name] = {"rounds": len(measured), **spread("tokens_per_second", speeds, 1)}
        one |= spread("seconds", [run["seconds"] for run in measured], 4)
        if DEVICE == "cuda":
            one["peak_memory_gb"] = round(max(run["peak"] for run in measured) / 10**9, 2)
        values = measured[0].get("values", [])
        one["first_values"] = values[:8]
        if name != "ours" and "ours" in runs:
            one |= spread("ratio", [run["speed"] / speed for run, speed in zip(runs["ours"], speeds, strict=True)], 3)
            if values:
                pairs = zip(runs["ours"][0]["values"], values, strict=True)
                one["largest_difference"] = max(abs(ours - theirs) for ours, theirs in pairs)
    return results


class Texts:
    """Random texts of numbers, each one token, with a tokenizer as large as the model's vocabulary.

    The tokenizer knows the printable characters as well, for a ranker's template.
    """

    def __init__(self, scale: Scale, seed: int) -> None:
        self.scale, self.draw = scale, random.Random(seed)
        others = [*SPECIAL_TOKENS.values(), "\n", *map(chr, range(32, 127))]
        self.words = [f" {number:05d}" for number in range(scale.vocabulary - len(others))]
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(others + self.words)}))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" \d{5}|[\s\S]"), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **SPECIAL_TOKENS)

    def text(self, lengths: Lengths) -> str:
        return "".join(self.draw.choices(self.words, k=self.draw.randint(*lengths)))

    def rankings(self, rows: int, n: int, prompt: Lengths, completion: Lengths) -> Dataset:
        """Rows of a prompt and n completions, whose EOS token is counted in their length."""
        completion = (completion[0] - 1, completion[1] - 1)
        return Dataset.from_dict(
            {
                "prompt": [self.text(prompt) for _ in range(rows)],
                "completions": [[self.text(completion) for _ in range(n)] for _ in range(rows)],
                "rewards": [[float(-rank) for rank in range(n)]] * rows,
            }
        )

    def num_tokens(self, rankings: Dataset) -> int:
        """Tokens of completions, each with its prompt."""
        texts = (row["prompt"] + text for row in rankings for text in row["completions"])
        return sum(len(text) // len(self.words[0]) + 1 for text in texts)

    def model(self, size: str, seed: int = 0, attention: str = "sdpa") -> Any:
        config = llama_config(self.tokenizer, self.scale.shapes[size])
        return random_model(AutoModelForCausalLM, config, seed, attn_implementation=attention)


class StepTimes(TrainerCallback):
    """Seconds of each step, from its batch to the end of the optimizer's work."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(now() - self._start)


def training(
    texts: Texts, trainer_class: Any, size: str, rankings: Dataset, batch: int, attention: str = "sdpa", **options: Any
) -> Side:
    """A block of steps of `trainer.train()`, always on the same rankings, `batch` of them a step."""
    n, takes_pairs = len(rankings[0]["completions"]), trainer_class is not PROTrainer
    args = CONFIGS[trainer_class](
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch * n // 2 if takes_pairs else batch,
        gradient_accumulation_steps=n - 1 if takes_pairs else 1,  # so a step has all pairs of its rankings
        max_steps=len(rankings) // batch,
        train_sampling_strategy="sequential",
        bf16=DEVICE == "cuda",
        use_cpu=DEVICE == "cpu",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trained: dict[str, Any] = {"model": texts.model(size, attention=attention)}
    if size == "7b":
        trained["peft_config"] = lora(init_lora_weights=False)
    elif takes_pairs:
        trained["ref_model"] = texts.model(size, seed=1, attention=attention)
    torch.manual_seed(0)  # of the adapter
    data, times = pairs_of(rankings) if takes_pairs else rankings, StepTimes()
    trainer = trainer_class(
        **trained, args=args, train_dataset=data, processing_class=texts.tokenizer, callbacks=[times]
    )
    trainer.remove_callback(PrinterCallback)
    tokens = texts.num_tokens(rankings.select(range(batch, len(rankings))))

    def block(warm_up: bool) -> dict[str, Any]:
        trainer.train()
        run = {"seconds": sum(times.seconds[1:]), "tokens": tokens}
        if n > 2 and takes_pairs:  # another loss than PRO's
            return run
        return run | {"values": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}

    return block


def train_rso(texts: Texts, deadline: float, size: str) -> dict[str, Any]:
    scale = texts.scale
    rankings = texts.rankings(scale.pairs * (1 + scale.steps), 2, scale.prompt, scale.completion)
    side = partial(training, texts, size=size, rankings=rankings, batch=scale.pairs, beta=0.05)
    sides = {"ours": partial(side, RSOTrainer), "trl_sdpa": partial(side, DPOTrainer)}
    if is_flash_attn_2_available():
        sides["trl_flash_attention_2"] = partial(side, DPOTrainer, attention="flash_attention_2")
    return compare(sides, scale.rounds, deadline)


def train_pro(texts: Texts, deadline: float, n: int) -> dict[str, Any]:
    scale = texts.scale
    rankings = texts.rankings(scale.rankings * (1 + scale.steps), n, scale.prompt, scale.completion)
    side = partial(training, texts, size="1b", rankings=rankings, batch=scale.rankings)
    sides = {"ours": partial(side, PROTrainer), "unshared": partial(side, PROTrainer, share_prefix=False)}
    return compare(sides | {"trl_all_pairs": partial(side, DPOTrainer)}, scale.rounds, deadline)


def plan_memory(texts: Texts, deadline: float, job: Job) -> dict[str, Any]:
    prompt, completion = (job.prompt_length,) * 2, (job.completion_length,) * 2
    rankings = texts.rankings(2 * job.prompts, job.completions, prompt, completion)
    side = partial(training, texts, size="7b", rankings=rankings, batch=job.prompts)
    ours = partial(side, RSOTrainer, beta=0.05) if job == RSO else partial(side, PROTrainer)
    return compare({"ours": ours}, 1, deadline)


def sample(
    texts: Texts, deadline: float, size: str, num_prompts: int, at_once: int, name: str = "generate"
) -> dict[str, Any]:
    scale, model = texts.scale, texts.model(size)
    prompts = [texts.text(scale.prompt) for _ in range(num_prompts)]
    budget = 0.5 * torch.cuda.mem_get_info()[0] / 2**30 if DEVICE == "cuda" else 1.0
    sampler = Sampler(argparse.Namespace(memory_budget=budget), model, texts.tokenizer, scale.new_tokens / 2)
    if DEVICE == "cpu":  # or its keys and values take most of the machine's memory
        sampler.batching["continuous_batching_config"] = ContinuousBatchingConfig(max_memory_percent=0.02)

    def side(method: Callable[..., None], lengths: list[int], at_once: int) -> Side:
        def run(warm_up: bool) -> dict[str, Any]:
            nonlocal at_once
            lengths.clear()
            start, count = now(), min(at_once, 16) if warm_up else num_prompts
            try:
                for first in range(0, count, at_once):
                    method(prompts[first:count][:at_once], scale.completions, scale.new_tokens)
            except torch.OutOfMemoryError:
                if not warm_up or at_once == 1:
                    raise
                at_once //= 2
            else:
                return {"seconds": now() - start, "tokens": sum(lengths)}
            free_memory()
            return run(warm_up)

        return run

    theirs = sampler.theirs if name == "generate" else sampler.continuous_batching
    sides: dict[str, Callable[[], Side]] = {
        "ours": partial(side, sampler.ours, sampler.lengths["ours"], num_prompts),
        name: partial(side, theirs, sampler.lengths["theirs"], at_once),
    }
    return compare(sides, scale.rounds, deadline)


def rank(texts: Texts, deadline: float, size: str) -> dict[str, Any]:
    scale, model = texts.scale, texts.model(size)
    rankings = texts.rankings(8, scale.completions, scale.prompt, scale.completion)
    tokens = texts.num_tokens(rankings)

    def side(share_prefix: bool) -> Side:
        ranker = PairwiseRanker(model, texts.tokenizer, share_prefix=share_prefix)

        def score(warm_up: bool) -> dict[str, Any]:
            rows = rankings.select(range(1)) if warm_up else rankings
            start = now()
            rewards = ranker.score(rows["prompt"], rows["completions"])
            seconds = now() - start
            return {"seconds": seconds, "tokens": tokens, "values": [float(one) for row in rewards for one in row]}

        return score

    return compare({"ours": partial(side, True), "unshared": partial(side, False)}, scale.rounds, deadline)


# The most important first, with the seconds after which a part begins no further round
PARTS: dict[str, tuple[int, Callable[[Texts, float], dict[str, Any]]]] = {
    "train_rso_7b": (60, partial(train_rso, size="7b")),
    "train_rso_1b": (30, partial(train_rso, size="1b")),
    "sample_1b_8": (40, partial(sample, size="1b", num_prompts=8, at_once=8)),
    "rank_1b": (30, partial(rank, size="1b")),
    "train_pro_1b_n4": (30, partial(train_pro, n=4)),
    "train_pro_1b_n8": (40, partial(train_pro, n=8)),
    "memory_7b_rso": (15, partial(plan_memory, job=RSO)),
    "memory_7b_pro": (15, partial(plan_memory, job=PRO)),
    "sample_1b_64": (90, partial(sample, size="1b", num_prompts=64, at_once=16)),
    "generate_batch_1b_8": (40, partial(sample, size="1b", num_prompts=8, at_once=8, name="generate_batch")),
    "sample_7b_8": (50, partial(sample, size="7b", num_prompts=8, at_once=4)),
    "rank_7b": (40, partial(rank, size="7b")),
}


def run_part(name: str, scale: Scale, seed: int, time_left: float) -> dict[str, Any]:
    """Run a part; returns its results, or the error that ended it, and the package's warnings."""
    seconds, part = PARTS[name]

    def stop(*_: Any) -> None:
        raise TimeoutError(f"{name} took far longer than {seconds} s")

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("prefopt_trl").addHandler(handler)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(int(min(2 * seconds, time_left + 20)))
    try:
        results = part(Texts(scale, seed), now() + seconds)
    except Exception as error:
        results = failure(error)
    finally:
        signal.alarm(0)
        logging.getLogger("prefopt_trl").removeHandler(handler)
    return results | {"warnings": warnings}


def table_rows(part: str, results: dict[str, Any]) -> Iterator[str]:
    for side, values in {"": results, **results}.items():
        if "error" in values:
            yield f"{part:<21}{side:<23}{values['error'].splitlines()[0]}"
        elif side and isinstance(values, dict):
            low, high = (f"{speed:,.0f}" for speed in values["tokens_per_second_range"])
            cells = [f"{values['tokens_per_second']:,.0f}", f"{low}-{high}", values.get("peak_memory_gb", "-")]
            difference = values.get("largest_difference")
            cells += [values.get("ratio", "-"), "-" if difference is None else f"{difference:.0e}"]
            yield f"{part:<21}{side:<23}" + "".join(f"{cell:>16}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SCALES), default="gpu", help="'tiny' is the rehearsal on a CPU.")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="What to measure.")
    parser.add_argument("--budget", type=float, default=450, help="Seconds in all.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the texts.")
    parser.add_argument("--output_dir", type=Path, help="Folder of the results.")
    args = parser.parse_args()
    if args.shape == "gpu" and DEVICE == "cpu":
        parser.error("no GPU is seen. `--shape tiny` is the rehearsal on a CPU.")

    scale = SCALES[args.shape]
    folder = args.output_dir or (RESULTS if args.shape == "gpu" else Path("outputs/gpu_tiny"))
    settings = {**asdict(scale), "seed": args.seed, "flash_attention_2": is_flash_attn_2_available()}
    header = ("tokens/s", "range", "peak GB", "ratio", "difference")
    table = [f"{'part':<21}{'side':<23}" + "".join(f"{cell:>16}" for cell in header)]
    for name in args.parts:
        start, time_left = now(), args.budget - (now() - START)
        if time_left < PARTS[name][0]:
            table.append(f"{name:<21}not measured: {time_left:.0f} s of the budget were left")
            continue
        results = run_part(name, scale, args.seed, time_left)
        free_memory()
        write_results(f"gpu_{name}", settings | {"seconds": round(now() - start, 1)}, results, folder)
        rows = list(table_rows(name, results))
        table += rows
        print("\n".join(rows), flush=True)
    print("\n".join(["", *table, f"written to {folder}"]))


if __name__ == "__main__":
    main()
