"""Compute log-probabilities of completions under a causal language model, with each prompt computed once."""

import torch
from transformers import PreTrainedModel

from prefopt_trl.shared_prefix.packing import IGNORE_INDEX, is_right_padded, pack_rows, pair_groups
from prefopt_trl.shared_prefix.support import packed_inputs, reason_not_to_pack, reason_not_to_share


def completion_logps(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
    group_ids: torch.Tensor | None = None,
    share_prefix: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-probabilities of the completions in a padded batch, such as TRL's `DataCollatorForPreference` makes.

    The common prefix of the rows of a group is run once (see [`pack_rows`]). If that is not exact for this model, each
    row is run separately and the reason is logged once.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model. Gradients flow unless the caller disables them.
        input_ids (`torch.LongTensor` of shape `(num_rows, row_length)`):
            Prompt and completion, right-padded.
        attention_mask (`torch.Tensor` of shape `(num_rows, row_length)`):
            1 for tokens, 0 for padding.
        completion_mask (`torch.Tensor` of shape `(num_rows, row_length)`):
            1 for completion tokens, 0 for prompt tokens and padding.
        group_ids (`torch.LongTensor` of shape `(num_rows,)`, *optional*):
            Index of each row's prompt, from 0. By default the rows are TRL's: chosen rows, then rejected rows.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Whether to run a common prefix once. `False` runs one row per completion.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, each of shape `(num_rows,)`: log-probability of each completion in nats,
        summed over its tokens, float32 at least; and its number of tokens (long).

    Raises:
        ValueError: if the batch is not right-padded.

    Example:

    ```python
    logps, counts = completion_logps(model, **batch)   # batch: input_ids, attention_mask, completion_mask
    mean_logps = logps / counts.clamp(min=1)
    ```
    """
    if not is_right_padded(attention_mask):
        raise ValueError(
            "`attention_mask` has padding on the left. Pad on the right, as TRL's `DataCollatorForPreference` does."
        )
    labels = input_ids.masked_fill(completion_mask == 0, IGNORE_INDEX)
    counts = (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)
    packed = None
    if share_prefix and reason_not_to_share(model, model, row_length=input_ids.shape[1]) is None:
        if group_ids is None:
            group_ids = pair_groups(len(input_ids), input_ids.device)
        packed = pack_rows(input_ids, attention_mask, labels, group_ids)
    if packed is not None and reason_not_to_pack(model, packed) is None:
        logits = model(**packed_inputs(model, packed)).logits
        token_logps = packed.unpack(_label_logps(logits, packed.shift_labels))
    else:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        token_logps = _label_logps(logits[:, :-1], labels[:, 1:])
    return token_logps.sum(dim=1), counts


def _label_logps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities of the labels, in float32 at least; zero where the label is `-100`."""
    asked = labels != IGNORE_INDEX
    dtype = torch.promote_types(logits.dtype, torch.float32)
    picked = logits[asked].to(dtype).log_softmax(dim=-1).gather(1, labels[asked][:, None]).squeeze(1)
    return torch.zeros(labels.shape, dtype=dtype, device=logits.device).masked_scatter(asked, picked)
