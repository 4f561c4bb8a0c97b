"""LLaMA-7B on one GPU: training steps in full, with LoRA and with QLoRA, prompts shared and not.

On pairs (RSO) a step of RSOTrainer against one of TRL's DPOTrainer, on rankings of 4 (PRO) a step of PROTrainer
against its own with `share_prefix=False`, as TRL has no PRO. Prompts have 384 tokens and completions 128, PRO's 512, 2
prompts a step, as in memory_plan.py. Each side runs in a process of its own, in turn with the other; tokens per second
count prompt and completion once per completion on both sides, and the peak is of memory that torch allocated.

A full fine-tune is under ZeRO-3. AdamW has 12 bytes a parameter there, 81 GB for 7B, and weights, gradients and a
reference model 54 more: 141 GB hold it, 80 GB need the optimizer and the parameters on the host, 195 GB of memory.
Unless `--configs` name one, the memory plan decides. Nothing is downloaded, weights are random. Run from the project's
root, where `--configs` of an hour's run can be done one by one into the same results:

    .venv/bin/python benchmarks/gpu_7b.py

`--shape tiny` is the dry run, on any machine, whose results are printed and not written.
"""

import argparse
import json
import os
import random
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, DTYPE, RESULTS, in_own_process, process_memory, random_model, write_results
from datasets import Dataset
from memory_plan import PRO, RSO, Job, llama_7b, lora, sizes, total
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TrainerCallback
from trl import DPOConfig, DPOTrainer

from prefopt_trl import PROConfig, PROTrainer, RSOConfig, RSOTrainer
from prefopt_trl.data.tiny import word_tokenizer

ROOT = Path(__file__).parents[1]
JOBS = {"RSO": RSO, "PRO": PRO}
# Of the plan, those that one GPU can run; "ddp" on one is a plain full fine-tune
CONFIGS = ["zero3", "zero3_offload", "ddp", "ddp, LoRA", "ddp, QLoRA"]
SIDES: dict[tuple[str, str], tuple[Any, Any, dict[str, Any]]] = {
    ("RSO", "ours"): (RSOTrainer, RSOConfig, {}),
    ("RSO", "theirs"): (DPOTrainer, DPOConfig, {"beta": 0.05}),
    ("PRO", "ours"): (PROTrainer, PROConfig, {}),
    ("PRO", "theirs"): (PROTrainer, PROConfig, {"share_prefix": False}),
}
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
WARMUP = 2
WORDS = [f" {number:02d}" for number in range(100)]


class StepTimes(TrainerCallback):
    """Seconds of each step, from its batch to the optimizer's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = _now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(_now() - self._start)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def texts(job: Job, rows: int) -> Dataset:
    """Random words, each one token: prompts and completions of the job's lengths, once they have their EOS token."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choices(WORDS, k=length))

    prompts = [text(job.prompt_length) for _ in range(rows)]
    completions = [[text(job.completion_length - 1) for _ in range(job.completions)] for _ in range(rows)]
    if job.completions == 2:
        chosen, rejected = zip(*completions, strict=True)
        return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    rewards = [[float(-rank) for rank in range(job.completions)]] * rows
    return Dataset.from_dict({"prompt": prompts, "completions": completions, "rewards": rewards})


def save_model(folder: str, shape: str) -> None:
    """A random LLaMA of this shape, and a tokenizer whose tokens are a few of the model's."""
    tokenizer = word_tokenizer(WORDS)
    config = llama_7b() if shape == "7b" else LlamaConfig(**TINY)
    config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    random_model(AutoModelForCausalLM, config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def options(config: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a config of the plan adds to the trainer's configuration, and to the trainer."""
    dtype = "float32" if config == "ddp" else str(DTYPE).removeprefix("torch.")
    arguments: dict[str, Any] = {"model_init_kwargs": {"dtype": dtype}, "use_cpu": DEVICE == "cpu"}
    if config.startswith("zero3"):
        return {**arguments, "deepspeed": str(ROOT / f"ds_configs/{config}.json"), "use_cpu": False}, {}
    if config == "ddp":
        return arguments, {}
    if config == "ddp, LoRA":
        return arguments, {"peft_config": lora()}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPE,
    )
    return {**arguments, "optim": "paged_adamw_8bit"}, {"peft_config": lora(), "quantization_config": nf4}


def one_process_for_deepspeed() -> None:
    """What a launcher would set for a single process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(port))


def run_side(model: str, config: str, job_name: str, side: str, steps: int) -> dict[str, Any]:
    """Train for some steps.

    Returns:
        `dict`: tokens per second (median of the steps), peak memory in GB, and the loss of every step.
    """
    trainer_class, config_class, extra = SIDES[job_name, side]
    job, (arguments, trainer_options) = JOBS[job_name], options(config)
    if config.startswith("zero3"):
        one_process_for_deepspeed()
    times = StepTimes()
    trainer = trainer_class(
        model,
        args=config_class(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=job.prompts,
            max_length=job.prompt_length + job.completion_length,
            max_steps=WARMUP + steps,
            train_sampling_strategy="sequential",
            bf16=DEVICE == "cuda",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **arguments,
            **extra,
        ),
        train_dataset=texts(job, job.prompts * (WARMUP + steps)),
        callbacks=[times],
        **trainer_options,
    )
    trainer.train()
    tokens = job.prompts * job.completions * (job.prompt_length + job.completion_length)
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else process_memory("VmHWM")
    return {
        "tokens_per_second": round(tokens / statistics.median(times.seconds[WARMUP:]), 1),
        "peak_memory_gb": round(peak / 10**9, 2),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def compare(run: Any, rounds: int) -> dict[str, Any]:
    """Run both sides in turn, the first to run changing every round.

    Returns:
        `dict`: for each side medians and ranges, and the median, smallest and largest ratio ours / theirs of the
        tokens per second of a round, so above 1 where ours is faster.
    """
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        for side in list(runs) if number % 2 else reversed(list(runs)):
            runs[side].append(run(side))
    results: dict[str, Any] = {}
    for side, measured in runs.items():
        results[side] = {}
        for name in ("tokens_per_second", "peak_memory_gb"):
            values = [one[name] for one in measured]
            results[side] |= {f"{name}_median": statistics.median(values), f"{name}_range": [min(values), max(values)]}
    pairs = list(zip(runs["ours"], runs["theirs"], strict=True))
    ratios = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]
    results["ratio_median"] = round(statistics.median(ratios), 3)
    results["ratio_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    results["largest_difference_of_losses"] = max(
        abs(our - their) for ours, theirs in pairs for our, their in zip(ours["losses"], theirs["losses"], strict=True)
    )
    return results


def default_configs(memory: int) -> list[str]:
    """ZeRO-3 where the plan says that this many bytes hold it, else with offload; LoRA and QLoRA."""
    config = llama_7b()
    held = total("zero3", 1, RSO, config, sizes(config))
    return ["zero3" if held <= memory else "zero3_offload", "ddp, LoRA", "ddp, QLoRA"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["7b", "tiny"], default="7b", help="'tiny' is the dry run.")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, help="By default LoRA, QLoRA and a ZeRO-3 that fits.")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS), help="What to train on.")
    parser.add_argument("--rounds", type=int, default=3, help="Runs of each side.")
    parser.add_argument("--steps", type=int, default=5, help=f"Steps counted of a run, after {WARMUP} that are not.")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)  # how this script calls itself
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.side:
        print(json.dumps(run_side(args.model, args.configs[0], args.jobs[0], args.side, args.steps)))
        return
    if args.shape == "7b" and DEVICE == "cpu":
        parser.error("no GPU is seen, and LLaMA-7B needs one. `--shape tiny` is the dry run.")
    memory = torch.cuda.get_device_properties(0).total_memory if DEVICE == "cuda" else 0
    configs = args.configs or default_configs(memory)

    path = RESULTS / "gpu_7b.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as model:
        save_model(model, args.shape)
        for config in configs:
            results[config] = {}
            for job in args.jobs:
                chosen = ["--model", model, "--configs", config, "--jobs", job, "--side"]
                results[config][job] = compare(lambda side, chosen=chosen: in_own_process(*chosen, side), args.rounds)
                print(f"{config}, {job}:", json.dumps(results[config][job], indent=2), flush=True)
    if args.shape == "7b":
        for config, jobs in results.items():
            earlier[config] = earlier.get(config, {}) | jobs
        settings = {
            "steps": args.steps,
            "rounds": args.rounds,
            "jobs": {name: vars(job) for name, job in JOBS.items()},
        }
        print("written to", write_results("gpu_7b", settings, earlier))


if __name__ == "__main__":
    main()
