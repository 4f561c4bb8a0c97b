"""Copies of the weights that training holds, with a reference model (TRL's DPOTrainer) and without (SLiC, PRO, RRHF).

Each trainer makes a few steps of SGD, which keeps no state, in a process of its own. Two numbers are taken:

- held: the bytes of the parameters of all models alive during a step, counted exactly;
- peak: the process's peak memory, less what it had before a model was loaded (on CUDA, the peak of what is allocated).

Both are in copies of the policy's weights. Run from the project's root, on Linux:

    .venv/bin/python benchmarks/memory.py

A LLaMA of 85M parameters in float32 is made from scratch, unless `--model` names another one.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from typing import Any

import torch
from common import process_memory, write_results
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer

from prefopt_trl import (
    ListwiseDPOConfig,
    ListwiseDPOTrainer,
    PROConfig,
    PROTrainer,
    RRHFConfig,
    RRHFTrainer,
    SLiCConfig,
    SLiCTrainer,
)
from prefopt_trl.experiments.tiny import tiny_llama, train_tokenizer

PROMPT, COMPLETIONS = "The sky is", [" blue.", " wet.", " green."]
PAIRS = {"prompt": [PROMPT], "chosen": COMPLETIONS[:1], "rejected": COMPLETIONS[1:2]}
RANKINGS: dict[str, Any] = {"prompt": [PROMPT], "completions": [COMPLETIONS], "rewards": [[2.0, 0.5, -1.0]]}
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "SLiCTrainer": (SLiCTrainer, SLiCConfig, PAIRS, {}),
    "PROTrainer": (PROTrainer, PROConfig, RANKINGS, {}),
    "RRHFTrainer": (RRHFTrainer, RRHFConfig, RANKINGS, {}),
    "ListwiseDPOTrainer": (ListwiseDPOTrainer, ListwiseDPOConfig, RANKINGS, {}),
    "TRL's DPOTrainer": (DPOTrainer, DPOConfig, PAIRS, {}),
    "TRL's DPOTrainer, LoRA": (DPOTrainer, DPOConfig, PAIRS, {"peft_config": LoraConfig(task_type="CAUSAL_LM")}),
}


def parameter_bytes(models: list[PreTrainedModel]) -> int:
    """Bytes of the models' parameters, each storage counted once: embeddings may be tied, models may share."""
    return sum({p.data_ptr(): p.nbytes for model in models for p in model.parameters()}.values())


class HeldParameters(TrainerCallback):
    """The most parameters that were alive at the end of a step."""

    num_bytes = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # `issubclass` of the type, as `isinstance` would wake the lazy modules among the objects
        alive = [thing for thing in gc.get_objects() if issubclass(type(thing), PreTrainedModel)]
        self.num_bytes = max(self.num_bytes, parameter_bytes(alive))


def train(name: str, model: str) -> dict[str, int]:
    """Make three steps; returns the bytes of parameters held and of memory at the peak."""
    trainer_class, config_class, data, options = TRAINERS[name]
    args = config_class(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        max_steps=3,
        optim="sgd",
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    held, before = HeldParameters(), process_memory("VmRSS")
    trainer = trainer_class(model, args=args, train_dataset=Dataset.from_dict(data), callbacks=[held], **options)
    trainer.train()
    on_cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if on_cuda else process_memory("VmHWM") - before
    return {"held": held.num_bytes, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Model to measure with, instead of a random one of 85M parameters.")
    parser.add_argument("--of", choices=TRAINERS, help=argparse.SUPPRESS)  # how this script calls itself
    args = parser.parse_args()

    model = args.model
    if args.of:
        print(json.dumps(train(args.of, model)))
        return
    if model is None:
        model = tempfile.mkdtemp()
        tokenizer = train_tokenizer([PROMPT, *COMPLETIONS], vocab_size=4096)
        tiny_llama(tokenizer, hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=6).save_pretrained(model)
        tokenizer.save_pretrained(model)
    one_copy = parameter_bytes([AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)])

    results = {}
    print(f"One copy of the weights: {one_copy / 2**20:,.0f} MiB\n")
    print(f"{'trainer':<24}{'held, copies':>14}{'peak, copies':>14}{'peak, MiB':>12}")
    for name in TRAINERS:
        command = [sys.executable, __file__, "--model", model, "--of", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        measured = json.loads(output.splitlines()[-1])
        results[name] = {
            "held_copies": round(measured["held"] / one_copy, 3),
            "peak_copies": round(measured["peak"] / one_copy, 2),
            "peak_mib": round(measured["peak"] / 2**20),
        }
        held, peak, mib = results[name].values()
        print(f"{name:<24}{held:>14.3f}{peak:>14.2f}{mib:>12,}", flush=True)
    print(
        "\nThe peak includes activations and gradients, which are one more copy in every row; with LoRA, a small part."
    )
    settings = {"model": args.model or "LLaMA, 85M, random", "one_copy_mib": round(one_copy / 2**20)}
    print("written to", write_results("memory", settings, results))


if __name__ == "__main__":
    main()
