"""What a policy's own samples are worth: rewards, win rates against targets, and distance from the reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.rankers.base import Ranker, check_rewards
from prefopt_trl.sampling.generation import Candidates, sample_candidates
from prefopt_trl.sampling.options import GenerationOptions
from prefopt_trl.sampling.prompts import tokenize_prompts
from prefopt_trl.shared_prefix.scoring import completion_logps

BATCH_SIZE = 32  # samples whose log-probabilities are computed at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Estimate":
        values = np.asarray(values, dtype=np.float64)
        return cls(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def evaluate_policy(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ranker: Ranker,
    prompts: list[str],
    targets: list[str],
    *,
    max_new_tokens: int,
    seed: int = 0,
    true_reward: Callable[..., list[float]] | None = None,
) -> dict[str, Estimate]:
    """Sample one completion per prompt and measure it.

    Args:
        policy ([`~transformers.PreTrainedModel`]):
            Policy to sample from.
        reference ([`~transformers.PreTrainedModel`]):
            Policy to measure the distance from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of both.
        ranker ([`~prefopt_trl.rankers.Ranker`]):
            Judge.
        prompts (`list[str]` of length `n`):
            Prompts, at least 2.
        targets (`list[str]` of length `n`):
            Completions to win against, such as the SFT targets (RSO section 5).
        max_new_tokens (`int`):
            Longest completion, in tokens.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.
        true_reward (`Callable`, *optional*):
            Reward function in TRL's `reward_funcs` signature, where the truth is known.

    Returns:
        `dict[str, Estimate]`, means over prompts: `ranker_reward` (RSO eq. 9 with the target as the baseline, nats),
        `ranker_win_rate` (share of prompts whose sample the ranker prefers to the target, a tie counting half), `kl`
        (nats per completion: the mean of log policy - log reference over samples), and with `true_reward` also
        `true_reward` and `true_win_rate`.
    """
    prompt_ids = tokenize_prompts(tokenizer, prompts)
    sampled = sample_candidates(
        policy,
        tokenizer,
        prompt_ids,
        1,
        GenerationOptions(max_new_tokens=max_new_tokens),
        seed=seed,
        keep_logps=True,  # and with them the tokens that were drawn
        progress=False,
    )
    completions = [candidates.texts[0] for candidates in sampled]
    candidates = [[text] for text in completions]
    scored = ranker.score(prompts, candidates, baselines=targets)
    rewards = np.concatenate(check_rewards(scored, prompts, candidates, type(ranker).__name__))
    measured: dict[str, Any] = {
        "ranker_reward": rewards,
        "ranker_win_rate": _wins(rewards),
        "kl": _log_ratios(policy, reference, prompt_ids, sampled),
    }
    if true_reward is not None:
        measured["true_reward"] = np.array(true_reward(prompts=prompts, completions=completions))
        measured["true_win_rate"] = _wins(
            measured["true_reward"] - np.array(true_reward(prompts=prompts, completions=targets))
        )
    return {name: Estimate.of(values) for name, values in measured.items()}


def _wins(advantages: np.ndarray) -> np.ndarray:
    return np.where(advantages == 0, 0.5, advantages > 0)


def _log_ratios(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    prompt_ids: list[list[int]],
    sampled: list[Candidates],
) -> np.ndarray:
    """log policy - log reference of the tokens of each sample, its EOS token included where it ended by itself."""
    rows = [(prompt, candidates.sampled[0].ids) for prompt, candidates in zip(prompt_ids, sampled, strict=True)]
    batches = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    return np.concatenate([_log_ratios_of_batch(policy, reference, batch) for batch in batches])


def _log_ratios_of_batch(
    policy: PreTrainedModel, reference: PreTrainedModel, rows: list[tuple[list[int], list[int]]]
) -> np.ndarray:
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    place = torch.arange(length)
    input_ids = torch.tensor([p + c + [0] * (length - len(p) - len(c)) for p, c in rows])
    attention_mask = torch.stack([place < len(p) + len(c) for p, c in rows]).long()
    completion_mask = attention_mask * torch.stack([place >= len(p) for p, _ in rows])
    with torch.no_grad():
        logps = [
            completion_logps(
                model,
                input_ids.to(model.device),
                attention_mask.to(model.device),
                completion_mask.to(model.device),
                share_prefix=False,  # one completion per prompt has nothing to share
            )[0].cpu()
            for model in (policy, reference)
        ]
    return (logps[0] - logps[1]).numpy()
