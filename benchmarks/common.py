"""What the benchmarks share: two sides timed in turn, and the machine they ran on."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig, PreTrainedTokenizerFast

from prefopt_trl.experiments.tiny import tiny_llama
from prefopt_trl.runtime.settings import versions

RESULTS = Path(__file__).parent / "results"
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

LARGE_SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_key_value_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
}
SHAPES = ("5m", *LARGE_SHAPES)


@dataclass(frozen=True)
class Job:
    """What a GPU trains on at a time in the memory plan."""

    completions: int
    prompts: int = 2
    prompt_length: int = 384
    completion_length: int = 128

    @property
    def row_length(self) -> int:
        """Tokens of a packed row: the prompt once, then its completions."""
        return self.prompt_length + self.completions * self.completion_length


RSO, PRO = Job(completions=2), Job(completions=4)


def alternate(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, warmup: int = 1) -> dict[str, Any]:
    """Time two functions in turn, the first to run changing every round.

    Returns:
        `dict`: median seconds of each side, and the median, smallest and largest ratio theirs / ours of a round, so
        above 1 where ours is faster. Ratios hold where seconds do not: the speed of a shared machine drifts.
    """
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for round_number in range(warmup + rounds):
        sides = [("ours", ours), ("theirs", theirs)]
        for name, run in sides if round_number % 2 else reversed(sides):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "ours_seconds_median": round(statistics.median(seconds["ours"]), 4),
        "theirs_seconds_median": round(statistics.median(seconds["theirs"]), 4),
        "rounds": rounds,
    }


def vocabulary_size(shape: str) -> int:
    """Tokens that a tokenizer of a model of this shape has at most."""
    return 4096 if shape == "5m" else 32000


def llama_config(tokenizer: PreTrainedTokenizerFast, shape: str) -> LlamaConfig:
    """A LLaMA of one of the `SHAPES`: 5M parameters for a CPU, 1B and 7B (LLaMA-7B's own) for a GPU."""
    if shape == "5m":
        return tiny_llama(tokenizer).config
    return LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=32,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **LARGE_SHAPES[shape],
    )


def random_model(auto_class: Any, config: LlamaConfig, seed: int = 0, **options: Any) -> Any:
    """A model with random weights, the same for the same seed, on the device and in its precision."""
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return auto_class.from_config(config, dtype=DTYPE, **options).eval()


def lora(**options: Any) -> LoraConfig:
    """A new one each time: PEFT writes the names of the model's layers into it."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", **options)


def process_memory(field: str) -> int:
    """Bytes of memory of this process, now (`"VmRSS"`) or at its peak (`"VmHWM"`)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that `run` needs at its peak, beyond those in use before it. Only the first call in a process is right."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = process_memory("VmRSS")
    run()
    return process_memory("VmHWM") - before


def in_own_process(*arguments: str) -> Any:
    """Start the running script once more, with these arguments after its own; returns the JSON that it prints last."""
    command = [sys.executable, *sys.argv, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def environment() -> dict[str, Any]:
    """Versions and the machine, as far as a reader needs them to compare."""
    return {
        **versions(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda,
    }


def write_results(name: str, settings: dict[str, Any], results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `<folder>/<name>.json`: settings, results and environment."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"settings": settings, "results": results, "environment": environment()}
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
