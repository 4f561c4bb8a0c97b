"""Log-probabilities under the policy that was sampled, so that training need not hold it as a reference model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Completion, Prompt
from prefopt_trl.data.tokenization import tokenize_completions
from prefopt_trl.sampling.generation import Candidates
from prefopt_trl.shared_prefix.scoring import completion_logps
from prefopt_trl.shared_prefix.support import evaluating

PAIRS_AT_ONCE = 4


def sampled_logps(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completions: Sequence[Completion],
    candidates: Candidates,
    max_length: int | None,
    **chat_template_kwargs: Any,
) -> list[float | None]:
    """Log-probabilities that the decoder summed, for the completions that training reads as the same tokens.

    It does not where a completion was cut at `max_new_tokens` (training ends it with EOS), where a stop string was cut
    off, where its text has other tokens than those drawn, or where `max_length` cuts it.

    Args:
        completions (`Sequence`):
            The texts of `candidates`, in the format of the prompt.
        candidates ([`Candidates`]):
            With what was `sampled`.
        max_length (`int`, *optional*):
            Most tokens of prompt and completion in training.

    Returns:
        `list[float | None]`: in nats, summed over tokens; None where training reads other tokens.
    """
    logps: list[float | None] = []
    for completion, (ids, logp) in zip(completions, candidates.sampled, strict=True):
        prompt_ids, (trained_ids,) = tokenize_completions(tokenizer, prompt, [completion], **chat_template_kwargs)
        fits = max_length is None or len(prompt_ids) + len(trained_ids) <= max_length
        logps.append(logp if trained_ids == ids and fits else None)
    return logps


def pair_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    pairs: Sequence[tuple[Completion, Completion]],
    max_length: int | None,
    **chat_template_kwargs: Any,
) -> np.ndarray:
    """Log-probabilities of pairs, as TRL's `DPOTrainer` would compute those of its reference model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy that was sampled.
        prompts (`Sequence` of length `n`):
            Prompts.
        pairs (`Sequence` of length `n`):
            Two completions of each.
        max_length (`int`, *optional*):
            Most tokens of prompt and completion; a completion loses its end.

    Returns:
        `np.ndarray` of shape `(n, 2)`: in nats, summed over the completion's tokens, EOS among them.
    """
    with evaluating(model):
        parts = [
            _logps(
                model,
                tokenizer,
                prompts[start : start + PAIRS_AT_ONCE],
                pairs[start : start + PAIRS_AT_ONCE],
                max_length,
                **chat_template_kwargs,
            )
            for start in range(0, len(prompts), PAIRS_AT_ONCE)
        ]
    return np.concatenate([np.empty((0, 2)), *parts])


def _logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    pairs: Sequence[tuple[Completion, Completion]],
    max_length: int | None,
    **chat_template_kwargs: Any,
) -> np.ndarray:
    rows: list[tuple[int, list[int]]] = []
    for prompt, pair in zip(prompts, pairs, strict=True):
        prompt_ids, completion_ids = tokenize_completions(tokenizer, prompt, pair, **chat_template_kwargs)
        rows += [(len(prompt_ids), (prompt_ids + ids)[:max_length]) for ids in completion_ids]
    longest = max(len(ids) for _, ids in rows)
    place = torch.arange(longest)
    lengths = torch.tensor([len(ids) for _, ids in rows])[:, None]
    before = torch.tensor([length for length, _ in rows])[:, None]
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in rows])
    with torch.no_grad():
        logps, _ = completion_logps(
            model,
            input_ids.to(model.device),
            attention_mask=(place < lengths).long().to(model.device),
            completion_mask=((place >= before) & (place < lengths)).long().to(model.device),
            group_ids=torch.arange(len(prompts), device=model.device).repeat_interleave(2),
        )
    return logps.double().cpu().view(-1, 2).numpy()
