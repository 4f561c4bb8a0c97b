"""Sample models with recurrent layers: the state after a prompt, computed once and repeated for its completions."""

from typing import Any

import torch
from transformers import PreTrainedModel

from prefopt_trl.shared_prefix.attention import without_head
from prefopt_trl.shared_prefix.support import PROBE_TOLERANCE, evaluating, probe_rows, run_probe


def repeats_states(model: PreTrainedModel) -> bool:
    """Return whether `generate` samples a model with recurrent layers exactly from [`repeated_states`]: a probe."""
    return run_probe(_probe_states, model) is None


def repeated_states(model: PreTrainedModel, prompt_ids: torch.Tensor, num_completions: int) -> dict[str, Any]:
    """Return the argument of `generate` with the states of prompts, repeated for the completions of each.

    `prompt_ids` has shape `(num_prompts, length)`, without padding, which would change the states.
    """
    if prompt_ids.shape[1] == 1:  # `generate` computes the last token
        return {}
    with torch.no_grad():
        output = without_head(model)(input_ids=prompt_ids[:, :-1], use_cache=True)
    # `cache` since transformers 5.24
    name = next(
        name for name in ("cache", "past_key_values", "cache_params") if getattr(output, name, None) is not None
    )
    rows = torch.arange(len(prompt_ids), device=prompt_ids.device).repeat_interleave(num_completions)
    getattr(output, name).reorder_cache(rows)
    return {name: getattr(output, name)}


def _probe_states(model: Any) -> str | None:
    """Compare the scores of `generate` with and without repeated states; it would compute Mamba's prompt again."""
    ids = torch.tensor([row[:9] for row in probe_rows(model)], device=model.device)
    rows, lengths = ids.repeat_interleave(2, dim=0), []
    how = {"attention_mask": torch.ones_like(rows), "max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    try:
        with evaluating(model):
            runs = [model.generate(rows, **how, **states) for states in ({}, repeated_states(model, ids, 2))]
    finally:
        hook.remove()
    plain, shared = (torch.cat(run.logits).float().log_softmax(-1) for run in runs)
    is_close = (plain - shared).abs().mean().item() <= PROBE_TOLERANCE[model.dtype]
    return None if is_close and lengths[-3:] == [1, 1, 1] else "it computes prompts again, or otherwise"
