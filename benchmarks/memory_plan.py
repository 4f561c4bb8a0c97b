"""Memory that training LLaMA-7B takes on 1, 2, 4 and 8 GPUs of 80 GB, for each of the configs in `ds_configs/`.

It prints the table of docs/scaling.md. All numbers are GB of 10^9 bytes on one GPU. A card of 80 GB has 80 GiB, 7 %
more than the 80 GB that count here: the rest is for CUDA, NCCL and fragmentation. What is trained:

- RSO: pairs, with a reference model, which LoRA does without; PRO: rankings of 4, without one;
- 2 prompts a GPU at a time, as in PRO, of 384 tokens and completions of 128: its 512 (RSO gives no length);
- the prompt once a row, as shared prefixes pack it; activation checkpointing and `bf16`, TRL's defaults;
- models loaded in bfloat16 with `model_init_kwargs`, except under plain DDP, where float32 weights are to be trained.

Run from the project's root (DeepSpeed has the estimators):

    .venv/bin/python benchmarks/memory_plan.py
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import LARGE_SHAPES, PRO, RESULTS, RSO, Job, lora
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

GB = 10**9
CARD = 80 * GB
GPUS = (1, 2, 4, 8)
# TRL's fused LM head has the scores of this many tokens at a time
SCORED_AT_A_TIME = 4096


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    model: int
    linear: int  # in the linear layers but the LM head: what bitsandbytes quantizes
    largest: int  # of a module by itself, as DeepSpeed's estimator counts
    decoder_layer: int
    adapter: int


def llama_7b() -> LlamaConfig:
    return LlamaConfig(vocab_size=32000, num_attention_heads=32, **LARGE_SHAPES["7b"])


def sizes(config: LlamaConfig) -> Sizes:
    """Count the parameters of a model that is not made: its tensors have shapes and no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        linear = sum(layer.weight.numel() for layer in model.model.modules() if isinstance(layer, nn.Linear))
        largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
        decoder_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
        adapter, _ = get_peft_model(model, lora()).get_nb_trainable_parameters()
    return Sizes(total, linear, largest, decoder_layer, adapter)


@dataclass(frozen=True)
class States:
    """Bytes on one GPU that do not depend on the batch, and those of host memory per machine."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    reference: float = 0
    host: float = 0


def ddp(size: Sizes, config: LlamaConfig, gpus: int) -> States:
    """Own formula. All in float32, and beside it autocast's bfloat16 weights and, from two GPUs on, DDP's buckets."""
    buckets = 4 * size.model if gpus > 1 else 0
    return States(4 * size.model, 4 * size.model, 8 * size.model, 2 * size.model + buckets, 4 * size.model)


def fsdp2(size: Sizes, config: LlamaConfig, gpus: int) -> States:
    """Own formula. A share of float32 weights, gradients and AdamW's two states, and of a bfloat16 reference model.

    Gathered are two decoder layers and the gradients of one in bfloat16, and the LM head in float32; and the reference
    model as a whole, which TRL's `prepare_fsdp` shards as one unit and not by layers.
    """
    gathered = 3 * 2 * size.decoder_layer + 4 * config.vocab_size * config.hidden_size
    share = size.model / gpus
    whole_reference = 2 * size.model if gpus > 1 else 0
    return States(4 * share, 4 * share, 8 * share, gathered, 2 * share + whole_reference)


def zero3(size: Sizes, config: LlamaConfig, gpus: int, optimizer_bytes: int = 12) -> States:
    """As DeepSpeed's estimator: 18 bytes of a share, and the largest module; and the parameters kept gathered.

    The 18 are bfloat16 weights, float32 gradients, and the optimizer's 12: float32 weights and AdamW's two states.
    """
    share = size.model / gpus
    return States(2 * share, 4 * share, optimizer_bytes * share, zero3_buffers(size), 2 * share)


def zero3_adafactor(size: Sizes, config: LlamaConfig, gpus: int) -> States:
    """As `zero3`, with one state, which Adafactor keeps whole: ZeRO's flat partitions have no rows and columns."""
    return zero3(size, config, gpus, optimizer_bytes=8)


def zero3_offload(size: Sizes, config: LlamaConfig, gpus: int) -> States:
    """DeepSpeed's estimator, with half as much again in reserve on the host, where the reference model is too."""
    host, _, _ = estimate_zero3_model_states_mem_needs(size.model, size.largest, num_gpus_per_node=gpus)
    return States(0, 0, 0, zero3_buffers(size), host=host + 2 * size.model)


def zero3_buffers(size: Sizes) -> float:
    *_, largest_module = estimate_zero3_model_states_mem_needs(size.model, size.largest)
    return largest_module + 2 * min(size.model, DeepSpeedZeroConfig().max_live_parameters)


def zero2_lora(size: Sizes, config: LlamaConfig, gpus: int) -> States:
    """As DeepSpeed's estimator for the adapter, beside a whole bfloat16 model; and the bucket of gradients."""
    share = size.adapter / gpus
    return States(2 * (size.model + size.adapter), 6 * share, 12 * share, 2 * config.hidden_size**2)


def ddp_lora(size: Sizes, config: LlamaConfig, gpus: int) -> States:
    """Own formula. A bfloat16 model; a float32 adapter with its gradients, AdamW's two states and DDP's buckets."""
    buckets = 4 * size.adapter if gpus > 1 else 0
    return States(2 * size.model + 4 * size.adapter, 4 * size.adapter, 8 * size.adapter, buckets)


def ddp_qlora(size: Sizes, config: LlamaConfig, gpus: int) -> States:
    """Own formula. nf4 with double quantization, a bfloat16 adapter and `paged_adamw_8bit`.

    Computing takes one linear layer at a time in bfloat16.
    """
    weights = nf4_bytes(size.linear) + 2 * (size.model - size.linear) + 2 * size.adapter
    buckets = 2 * size.adapter if gpus > 1 else 0
    return States(
        weights,
        2 * size.adapter,
        2 * size.adapter * (1 + 4 / 256),  # two states of a byte, and a float32 scale for 256 of each
        buckets + 2 * config.hidden_size * config.intermediate_size,
    )


def nf4_bytes(parameters: int) -> float:
    """Half a byte each, a byte of scale for 64 of them, a float32 scale for 256 of those; without the codebooks."""
    return parameters * (1 / 2 + 1 / 64 + 4 / (64 * 256))


CONFIGS: dict[str, Callable[[Sizes, LlamaConfig, int], States]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "zero3": zero3,
    "zero3, Adafactor": zero3_adafactor,
    "zero3_offload": zero3_offload,
    "zero2, LoRA": zero2_lora,
    "ddp, LoRA": ddp_lora,
    "ddp, QLoRA": ddp_qlora,
}


def layer_activations(config: LlamaConfig, rows: int, row_length: int) -> int:
    """Bytes that one decoder layer saves for its backward pass in bfloat16, with attention of torch (`sdpa`).

    For each token 12 vectors of the hidden size (in each norm one in float32 and one after it, inputs of the linear
    layers, queries, keys, values and the attention's output), 4 of the MLP's, the rotary cosines and sines, the
    attention's normalizers and the norms', and its row of the mask.
    """
    per_token = 24 * config.hidden_size + 8 * config.intermediate_size
    per_token += 4 * config.hidden_size // config.num_attention_heads  # cosines and sines, as long as a head
    per_token += 4 * config.num_attention_heads + 8 + 2 * row_length
    return rows * row_length * per_token


def activations(config: LlamaConfig, job: Job, trains_head: bool) -> float:
    """Bytes of activations: each layer's input, all of one layer, which is run again, and the LM head."""
    tokens = job.prompts * job.row_length
    scored = job.prompts * job.completions * job.completion_length
    inputs = config.num_hidden_layers * tokens * 2 * config.hidden_size
    head = 2 * min(scored, SCORED_AT_A_TIME) * config.vocab_size + 4 * scored * config.hidden_size
    if trains_head:
        head += 4 * config.vocab_size * config.hidden_size  # its gradient is summed in float32
    return inputs + layer_activations(config, job.prompts, job.row_length) + head


def total(name: str, gpus: int, job: Job, config: LlamaConfig, size: Sizes) -> float:
    """Bytes on one GPU."""
    states = CONFIGS[name](size, config, gpus)
    held = states.weights + states.gradients + states.optimizer + states.buffers
    held += states.reference if job is RSO else 0
    return held + activations(config, job, trains_head="LoRA" not in name)


def table(measured: dict[str, dict[str, float]]) -> str:
    """The plan as a table in Markdown.

    Args:
        measured (`dict[str, dict[str, float]]`):
            Peak in GB on one GPU, of a config and a job (`"RSO"` or `"PRO"`).
    """
    config = llama_7b()
    size = sizes(config)
    header = ["config", "GPUs", "weights", "gradients", "optimizer", "buffers", "reference"]
    for column in ("activations", "total"):
        header += [f"{column}, RSO", f"{column}, PRO"]
    header += ["fits in 80 GB", "host", "measured, RSO", "measured, PRO"]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for name, states_of in CONFIGS.items():
        for gpus in GPUS:
            states = states_of(size, config, gpus)
            totals = {job: total(name, gpus, job, config, size) for job in (RSO, PRO)}
            peaks = measured.get(name, {}) if gpus == 1 else {}
            parts = [states.weights, states.gradients, states.optimizer, states.buffers, states.reference]
            parts += [activations(config, job, trains_head="LoRA" not in name) for job in (RSO, PRO)]
            cells = [name, str(gpus), *(f"{part / GB:.1f}" for part in (*parts, *totals.values()))]
            cells += [verdict(totals), f"{states.host / GB:.0f}" if states.host else "-"]
            cells += [f"{peaks[job]:.1f}" if job in peaks else "not measured" for job in ("RSO", "PRO")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(totals: dict[Job, float]) -> str:
    """Whether both jobs fit, and if not by how much."""
    over = {job: (held - CARD) / GB for job, held in totals.items()}
    if over[RSO] <= 0:
        return "yes"
    return f"PRO only: RSO is {over[RSO]:.0f} over" if over[PRO] <= 0 else f"no: {over[PRO]:.0f} over"


def measured_peaks() -> dict[str, dict[str, float]]:
    """Peaks in GB of our trainers with LoRA on one GPU, if benchmarks/gpu/run.py measured them."""
    peaks = {}
    for job in ("RSO", "PRO"):
        path = RESULTS / f"gpu_memory_7b_{job.lower()}.json"
        results = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
        if "peak_memory_gb" in results.get("ours", {}):
            peaks[job] = results["ours"]["peak_memory_gb"]
    return {"ddp, LoRA": peaks} if peaks else {}


if __name__ == "__main__":
    print(table(measured_peaks()))
