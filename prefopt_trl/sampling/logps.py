"""Log-probabilities under the sampled policy, so that training needs no reference model."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Completion, Prompt
from prefopt_trl.data.tokenization import tokenize_completions
from prefopt_trl.generation.sampler import Candidates
from prefopt_trl.shared_prefix.packing import WholeRows
from prefopt_trl.shared_prefix.scoring import completion_logps
from prefopt_trl.shared_prefix.support import evaluating

PAIRED_AT_ONCE, DRAWN_AT_ONCE = 8, 32  # completions


def sampled_logps(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completions: Sequence[Completion],
    candidates: Candidates,
    max_length: int | None,
    **chat_template_kwargs: object,
) -> list[float | None]:
    """Return the log-probability that the decoder summed for each completion, or None if training reads other tokens.

    They differ if a completion was cut at `max_new_tokens` (training adds EOS) or at a stop string, if its text is
    tokenized differently, or if `max_length` cuts it. `completions` are the texts of `candidates` in the format of the
    prompt.
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
    **chat_template_kwargs: object,
) -> np.ndarray:
    """Compute the log-probabilities of pairs as TRL's `DPOTrainer` computes those of its reference model.

    Return a float64 array of shape `(num_pairs, 2)`, in nats, summed over the tokens of a completion, including EOS.
    A prompt and completion longer than `max_length` tokens are cut at the end.
    """
    tokenized = [
        tokenize_completions(tokenizer, prompt, pair, **chat_template_kwargs)
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    prompt_ids, completion_ids = [ids for ids, _ in tokenized], [both for _, both in tokenized]
    return np.array(drawn_logps(model, prompt_ids, completion_ids, max_length, PAIRED_AT_ONCE)).reshape(-1, 2)


def drawn_logps(
    model: PreTrainedModel,
    prompt_ids: Sequence[list[int]],
    drawn: Sequence[Sequence[list[int]]],
    max_length: int | None = None,
    at_once: int = DRAWN_AT_ONCE,
) -> list[list[float]]:
    """Return the log-probability of the tokens of each completion under a model, in nats, summed.

    `drawn` are the tokens of the completions of each prompt, as they were drawn, with EOS if it was. Those beyond
    `max_length` of prompt and completion do not count.
    """
    rows = [(ids, one, row) for row, (ids, of) in enumerate(zip(prompt_ids, drawn, strict=True)) for one in of]
    logps: list[float] = []
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        groups = torch.tensor([row - part[0][2] for _, _, row in part])  # rows of a prompt are adjacent
        logps += row_logps(model, [(prompt, ids) for prompt, ids, _ in part], max_length, groups).tolist()
    left = iter(logps)
    return [[next(left) for _ in of] for of in drawn]


def row_logps(
    model: PreTrainedModel,
    rows: Sequence[tuple[list[int], list[int]]],
    max_length: int | None = None,
    group_ids: torch.Tensor | None = None,
) -> np.ndarray:
    """Compute the log-probabilities of completions from rows of prompt ids and completion ids.

    Rows of the same group share their prompt. Return a float64 array of shape `(num_rows,)`, in nats, summed over the
    tokens of the completion within `max_length`.
    """
    inputs = WholeRows([(prompt + completion)[:max_length] for prompt, completion in rows], 0, model.device).inputs
    begin = torch.tensor([[len(prompt)] for prompt, _ in rows], device=model.device)
    place = torch.arange(inputs["input_ids"].shape[1], device=model.device)
    completion_mask = inputs["attention_mask"] * (place >= begin)
    groups = None if group_ids is None else group_ids.to(model.device)
    with evaluating(model), torch.no_grad():
        logps, _ = completion_logps(
            model, **inputs, completion_mask=completion_mask, group_ids=groups, share_prefix=groups is not None
        )
    return logps.double().cpu().numpy()
