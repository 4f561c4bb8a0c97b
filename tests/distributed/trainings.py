"""The training of one cell, in each process of an engine."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from cells import Cell
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import prefopt_trl
from prefopt_trl import PairwiseRanker, WinRateCallback
from prefopt_trl.evaluation import win_rate
from prefopt_trl.sampling import pipeline
from prefopt_trl.sampling.shards import Shards

PROMPTS = ["The capital of France is", "Why?", "Mix", "The quick brown", "Tell me", "A", "The dog", "What is"]
WORDS = ["blue", "green and yellow", "wet", "seven of them", "a very long completion, it seems", "bb", "no", "dddd"]
GLOBAL_BATCH = 4
NUM_STEPS = 3
SAMPLING: dict[str, dict[str, Any]] = {
    "given": {},
    "scored": {},
    "offline": {"num_candidates": 6, "num_samples": 4, "max_new_tokens": 6},
    "online": {"num_candidates": 6, "num_samples": 4, "max_new_tokens": 6, "sampling": "online"},
    "bootstrap": {"bootstrap_parts": 2, "max_new_tokens": 6},
    "judged": {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "eval_reward"},
}


def train(cell: Cell, engine: str, folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Train, save, evaluate, and train once more from the first checkpoint; what was seen on the way."""
    output_dir = Path(folder, engine, str(cell).replace(", ", "-"))
    shards = []
    with count_shards(shards):
        trainer = make(cell, engine, folder, output_dir, arguments)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    record = {
        "world_size": trainer.accelerator.num_processes,
        "wrapper": [base.__name__ for base in type(trainer.model_wrapped).__mro__],
        "stage": trainer.model_wrapped.zero_optimization_stage() if engine in ("zero2", "zero3") else None,
        "spread": is_spread(trainer.model),
        "reference_units": num_units(trainer.ref_model),
        "shards": len(shards),
        "losses": [log["loss"] for log in logs],
        "grad_norms": [log["grad_norm"] for log in logs],
        "holds_reference_model": trainer.ref_model is not None,
    }
    if cell.data == "judged":
        record["best"] = Path(trainer.state.best_model_checkpoint).name
        record["evaluations"] = [log for log in trainer.state.log_history if "eval_win_rate" in log]
        record["after"] = trainer.evaluate()["eval_reward"]
    trainer.save_model(str(output_dir / "saved"))
    if cell.data == "given":
        record["eval_loss"] = trainer.evaluate()["eval_loss"]
    trainer = make(cell, engine, folder, output_dir, arguments)
    trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-1"))
    record["resumed_losses"] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    record["resumed_evaluations"] = [log for log in trainer.state.log_history if "eval_win_rate" in log]
    return record


@contextmanager
def count_shards(made: list[int]) -> Iterator[None]:
    """Sample before training in shards of one prompt, so that each process has some, and write down which it makes."""
    make_shard, pipeline.SHARD_COMPLETIONS = Shards.make, 1

    def make_and_count(self: Shards, shard: int) -> None:
        made.append(shard)
        make_shard(self, shard)

    Shards.make = make_and_count  # type: ignore[method-assign]
    yield
    Shards.make = make_shard  # type: ignore[method-assign]


def num_units(model: torch.nn.Module | None) -> int:
    """Parts of a model whose weights FSDP2 gathers together."""
    return 0 if model is None else sum(isinstance(module, FSDPModule) for module in model.modules())


def is_spread(model: torch.nn.Module) -> bool:
    """Whether this process holds a part of each weight only."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return all(
        getattr(parameter, "ds_id", None) is not None and not parameter.numel() for parameter in model.parameters()
    )


def make(cell: Cell, engine: str, folder: Path, output_dir: Path, arguments: dict[str, Any]) -> Any:
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    num_processes = 1 if engine == "alone" else 2
    # What is sampled online depends on the prompts of a batch: one process has those of two, one after the other
    online_alone = cell.data == "online" and engine == "alone"
    accumulation = 2 if online_alone else cell.options.get("gradient_accumulation_steps", 1)
    config_class = getattr(prefopt_trl, f"{cell.trainer}Config")
    args = config_class(
        str(output_dir),
        per_device_train_batch_size=GLOBAL_BATCH // num_processes // accumulation,
        per_device_eval_batch_size=GLOBAL_BATCH // num_processes,
        max_steps=NUM_STEPS,
        save_steps=1,
        logging_steps=1,
        learning_rate=1e-3,
        report_to="none",
        disable_tqdm=True,
        share_prefix=cell.share_prefix,
        optim="paged_adamw_8bit" if cell.weights == "qlora" else "adamw_torch",
        **arguments,
        **SAMPLING[cell.data],
        **{"gradient_accumulation_steps": accumulation, **cell.options},
    )
    model: Any = str(folder / ("tied" if cell.weights == "tied" else "policy"))
    others: dict[str, Any] = {}
    if cell.weights == "adapter":
        base = AutoModelForCausalLM.from_pretrained(model)
        model = PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True)
    if cell.weights == "object":
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(model)
            for parameter in model.parameters():
                with gathered_to_change(parameter):
                    parameter *= 1.25
    if cell.weights in ("lora", "qlora"):
        torch.manual_seed(1)  # of the adapter's own weights
        others["peft_config"] = LoraConfig(task_type="CAUSAL_LM")
    if cell.weights == "qlora":
        others["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    if cell.data in ("given", "judged"):
        others["eval_dataset"] = examples(cell)
    else:
        others["ranker"] = PairwiseRanker(str(folder / "ranker"))
    trainer_class = getattr(prefopt_trl, f"{cell.trainer}Trainer")
    trainer = trainer_class(model, args=args, train_dataset=examples(cell), **others)
    if cell.data == "judged":
        against = "reference" if cell.weights == "lora" else str(folder / "tied")  # which each process loads
        win_rate.PROMPTS_AT_ONCE = 8  # for each of two processes
        prompts = PROMPTS + [f"Now: {prompt}" for prompt in PROMPTS]
        judge = PairwiseRanker(str(folder / "ranker"))
        trainer.add_callback(WinRateCallback(judge, prompts, against, trainer=trainer, max_new_tokens=6))
    return trainer


def gathered_to_change(parameter: torch.nn.Parameter) -> Any:
    """While entered, a parameter that ZeRO-3 partitioned as it was loaded is whole on the process that changes it."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def examples(cell: Cell) -> Dataset:
    """Prompts, pairs or rankings of three."""
    if cell.data in ("offline", "online"):
        return Dataset.from_dict({"prompt": PROMPTS})
    completions = [[" " + WORDS[(3 * row + place) % 8] for place in range(3)] for row in range(len(PROMPTS))]
    if cell.trainer in ("RSO", "SLiC"):
        pairs = {"chosen": [row[0] for row in completions], "rejected": [row[1] for row in completions]}
        labels = [0.5 + row / 16 for row in range(len(PROMPTS))]
        return Dataset.from_dict({"prompt": PROMPTS, **pairs, "label_probability": labels})
    rewards = {} if cell.data == "scored" else {"rewards": [[2.0, 0.5, -1.0]] * len(PROMPTS)}
    return Dataset.from_dict({"prompt": PROMPTS, "completions": completions, **rewards})
