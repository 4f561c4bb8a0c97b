"""Prompts computed once inside TRL's own trainers.

TRL's trainers call `model(input_ids, attention_mask, labels=..., fused_lm_head=True)` on padded rows and read
per-token values from the output. [`add_shared_prefix`] changes the model's forward in that case alone: rows are
packed, run, and unpacked to the layout TRL expects. So every loss, metric and reference path of TRL keeps working as
it is.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from prefopt_trl.shared_prefix.packing import pack_rows, pair_groups
from prefopt_trl.shared_prefix.scoring import is_right_padded
from prefopt_trl.shared_prefix.support import packed_inputs, reason_not_to_share

# Arguments of a text-only call of TRL's; others (images, router logits) have one entry per row and cannot be packed
PACKABLE_ARGUMENTS = {"input_ids", "attention_mask", "use_cache"}


def add_shared_prefix(model: PreTrainedModel) -> None:
    """Make a model with TRL's fused LM head compute each prompt of a preference batch once.

    Changes `model.forward` for calls with `fused_lm_head=True` on pairs (chosen rows, then rejected rows); all other
    calls, `generate` among them, are as before. Sharing is exact: where it would not be, rows are run as they come,
    and one logged line says why (see [`reason_not_to_share`]).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model on which [`~trl.trainer.utils.add_fused_lm_head`] has been called; a model that
            already shares is left as it is.
    """
    if getattr(model.forward, "shares_prefix", False):
        return
    fused_forward = model.forward

    # Keep the original signature: `generate` and `Trainer` look at it
    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs):
        given = {name for name, value in kwargs.items() if value is not None}  # PEFT names arguments it leaves at None
        packable = fused_lm_head and labels is not None and not args and given <= PACKABLE_ARGUMENTS
        if not packable or not _can_share(self, fused_forward, kwargs["input_ids"], kwargs["attention_mask"]):
            if fused_lm_head:
                kwargs["fused_lm_head"] = True
            if labels is not None:
                kwargs["labels"] = labels
            return fused_forward(*args, **kwargs)

        input_ids = kwargs["input_ids"]
        packed = pack_rows(input_ids, kwargs["attention_mask"], labels, pair_groups(len(input_ids), input_ids.device))
        outputs = fused_forward(**packed_inputs(self, packed), shift_labels=packed.shift_labels, fused_lm_head=True)
        # Without `loss`: it counts a token that two completions share once
        return type(outputs)(**{name: packed.unpack(value) for name, value in outputs.items() if name != "loss"})

    forward.shares_prefix = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _can_share(
    model: PreTrainedModel, forward: Callable[..., Any], input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> bool:
    if input_ids.shape[0] % 2 or input_ids.shape[1] < 2 or not is_right_padded(attention_mask):
        return False
    return reason_not_to_share(model, forward, row_length=input_ids.shape[1]) is None
