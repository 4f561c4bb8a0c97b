"""What is trained on every engine. The tests read it, and the processes that they start."""

from dataclasses import dataclass, field
from typing import Any

# The loss of a pair, of a pair without a reference model, and of rankings; each by trainer and configuration
TRAINERS = ["RSO", "SLiC", "PRO", "ListwiseDPO", "RRHF"]
ENGINES = ["ddp", "fsdp2", "zero2", "zero3"]


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        weights (`str`):
            `"full"`, `"tied"` (full, the embedding in the head), `"lora"` (a fresh adapter), `"adapter"` (a trained
            one, whose reference is a frozen copy), `"object"` (full, changed since they were loaded, whose reference
            is a copy) or `"qlora"` (nf4, double quantisation, `paged_adamw_8bit`).
        data (`str`):
            `"given"` completions; `"scored"` ones, to which a ranker gives rewards first; or prompts that are sampled
            `"offline"` or `"online"`. `"bootstrap"` adds samples to given completions. With `"judged"` ones, fresh
            samples choose the checkpoint that is loaded at the end.
    """

    trainer: str
    weights: str = "full"
    data: str = "given"
    share_prefix: bool = True
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # further arguments of the configuration

    def __str__(self) -> str:
        sharing = [] if self.share_prefix else ["not shared"]
        return ", ".join([self.trainer, self.weights, self.data, *sharing, *self.options])


def cells(engine: str) -> list[Cell]:
    """The trainings that run on an engine, or on `"alone"`, the one process to compare with."""
    return [
        *(
            Cell(trainer, weights, share_prefix=share_prefix)
            for trainer in TRAINERS
            for weights in ("full", "lora")
            for share_prefix in (True, False)
        ),
        *(Cell(trainer, options={"gradient_accumulation_steps": 2}) for trainer in ("RSO", "PRO")),
        Cell("RSO", "adapter"),
        *(Cell(trainer, "object") for trainer in ("RSO", "ListwiseDPO")),
        *(Cell("RSO", "tied", data) for data in ("given", "offline", "online")),
        # Without a reference model, which full fine-tunes have otherwise
        Cell("RSO", options={"precompute_ref_log_probs": True}),
        Cell("RSO", options={"soft_labels": True}),
        Cell("RSO", data="offline", options={"reference_logps": "sampled"}),
        *(Cell(trainer, weights, "offline") for trainer in ("RSO", "PRO") for weights in ("full", "lora")),
        *(Cell(trainer, weights, "online") for trainer in ("RSO", "ListwiseDPO") for weights in ("full", "lora")),
        Cell("SLiC", data="online"),
        *(Cell("RSO", weights, "online", options={"sampling_policy": "reference"}) for weights in ("full", "lora")),
        *(Cell("PRO", weights, "bootstrap") for weights in ("full", "lora")),
        Cell("PRO", data="scored"),
        *(Cell("RSO", weights, "judged") for weights in ("full", "lora")),
        *(Cell(trainer, options={"eval_strategy": "steps", "eval_steps": 1}) for trainer in ("RSO", "PRO")),
        *(Cell(trainer, "qlora") for trainer in TRAINERS if engine in ("alone", "ddp")),
        *(Cell("RSO", "qlora", data) for data in ("offline", "online") if engine in ("alone", "ddp")),
    ]
