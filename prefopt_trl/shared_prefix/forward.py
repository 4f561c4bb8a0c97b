"""Prompts computed once inside TRL's own trainers.

TRL's trainers call `model(input_ids, attention_mask, labels=..., fused_lm_head=True)` on padded rows and read
per-token values from the output. The trainers for this package's losses pass `label_statistics=True` instead and read
[`LabelStatistics`]. [`add_shared_prefix`] changes the model's forward in only these two cases: it packs the rows, runs
them and unpacks the outputs. So every loss, metric and reference path of TRL keeps working. Rows that are not TRL's
pairs pass the index of their prompt in `group_ids`.
"""

import functools
import types
from collections.abc import Mapping
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from prefopt_trl.shared_prefix.label_statistics import label_statistics
from prefopt_trl.shared_prefix.packing import is_right_padded, pack_rows, pair_groups
from prefopt_trl.shared_prefix.support import (
    Forward,
    log_reason,
    packed_inputs,
    reason_not_to_pack,
    reason_not_to_share,
)

# The arguments that TRL passes for a text batch; others (images, router logits) belong to rows and cannot be packed
ROWS = {"input_ids", "attention_mask", "labels"}
SETTINGS = {"use_cache", "fused_lm_head"}


def add_shared_prefix(model: PreTrainedModel) -> None:
    """Make a model compute each prompt of a preference batch once.

    Change `model.forward` for calls with `fused_lm_head=True`, if TRL has added its fused head, and for calls with
    `label_statistics=True`, which return [`LabelStatistics`]. The former take pairs (chosen rows, then rejected rows)
    or `group_ids` (`torch.LongTensor` of shape `(num_rows,)`, see [`pack_rows`]). The latter share prompts only with
    `group_ids`. All other calls, such as those of `generate`, are unchanged. Sharing is exact: if it cannot be, each
    row is run separately and the reason is logged once (see [`reason_not_to_share`]).

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model. A model that already shares is not changed.

    Example:

    ```python
    add_shared_prefix(model)
    labels = input_ids.masked_fill(completion_mask == 0, -100)
    rows = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    log_probs = model(**rows, group_ids=group_ids, label_statistics=True).log_probs
    ```
    """
    if getattr(model.forward, "shares_prefix", False):
        return
    bound_forward = cast(types.MethodType, model.forward)

    # Keep the original signature: `generate` and `Trainer` inspect it
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: object, **kwargs: Any) -> ModelOutput:
        compute: Forward = types.MethodType(bound_forward.__func__, self)  # `self` may be a copy of `model`
        own_forward, group_ids = compute, kwargs.pop("group_ids", None)
        if kwargs.pop("label_statistics", False):
            compute = functools.partial(label_statistics, self, own_forward)
            shares = group_ids is not None
        else:
            shares = kwargs.get("fused_lm_head", False)
        if not shares or not _can_share(self, own_forward, args, kwargs, group_ids):
            return compute(*args, **kwargs)
        input_ids, attention_mask, labels = kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"]
        if group_ids is None:
            group_ids = pair_groups(len(input_ids), input_ids.device)
        packed = pack_rows(input_ids, attention_mask, labels, group_ids)
        if reason_not_to_pack(self, packed) is not None:
            return compute(*args, **kwargs)
        asked = {name: kwargs[name] for name in ("fused_lm_head",) if name in kwargs}
        try:
            outputs = compute(**packed_inputs(self, packed), shift_labels=packed.shift_labels, **asked)
            # Drop `loss`: it counts a token that two completions share only once
            return type(outputs)(**{name: packed.unpack(value) for name, value in outputs.items() if name != "loss"})
        except (TypeError, AttributeError, IndexError) as error:
            if not asked:
                raise
            # A later TRL may change its head
            log_reason(self, f"the fused LM head of this TRL takes no packed rows ({type(error).__name__}: {error})")
            return compute(*args, **kwargs)

    forward.shares_prefix = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _can_share(
    model: PreTrainedModel,
    forward: Forward,
    args: tuple[object, ...],
    kwargs: Mapping[str, Any],
    group_ids: torch.Tensor | None,
) -> bool:
    given = {name for name, value in kwargs.items() if value is not None}  # PEFT passes arguments that are None
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        given.add("output_router_logits")  # set in the config; the router loss is over the tokens of the rows
    if args or not ROWS <= given <= ROWS | SETTINGS:
        others = ", ".join(sorted(given - SETTINGS - ROWS)) or "not all of " + ", ".join(sorted(ROWS))
        log_reason(model, f"it is called with {others}, which cannot be packed")
        return False
    input_ids = kwargs["input_ids"]
    if (group_ids is None and len(input_ids) % 2) or not is_right_padded(kwargs["attention_mask"]):
        log_reason(model, "the batch is not pairs, chosen and then rejected, padded on the right")
        return False
    if input_ids.shape[1] < 2:
        return False  # no token to predict
    return reason_not_to_share(model, forward, row_length=input_ids.shape[1]) is None
