"""What a policy's own samples are worth: rewards, win rates against targets, and distance from the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Completion, Prompt, wrap_completion
from prefopt_trl.data.tokenization import ChatOptions, tokenize_prompts
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.generation.sampler import sample_candidates
from prefopt_trl.rankers.base import Columns, Ranker, ask_rewards
from prefopt_trl.sampling.logps import row_logps

BATCH_SIZE = 32  # samples whose log-probabilities are computed at a time


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error over prompts."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: np.ndarray, prompts: np.ndarray | None = None) -> "Estimate":
        """Return the mean of `values`, shape `(n,)`, one per prompt.

        With `prompts`, shape `(n,)`, values of equal prompts may depend on each other: the standard error is that of
        independent clusters. It is NaN for a single prompt.
        """
        values = np.asarray(values, dtype=np.float64)
        deviations = values - values.mean()
        if prompts is not None:
            deviations = np.bincount(np.unique(prompts, return_inverse=True)[1], weights=deviations)
        num_prompts = len(deviations)
        correction = num_prompts / (num_prompts - 1) if num_prompts > 1 else np.nan
        return cls(float(values.mean()), float(np.sqrt(correction * np.sum(deviations**2)) / len(values)))


def evaluate_policy(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ranker: Ranker,
    prompts: Sequence[Prompt],
    targets: Sequence[Completion],
    *,
    max_new_tokens: int,
    chat: Sequence[ChatOptions] | None = None,
    columns: Columns | None = None,
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
        prompts (`Sequence` of length `n`):
            Prompts, at least 2, as text or as messages.
        targets (`Sequence` of length `n`):
            Completions to win against, such as the SFT targets (RSO section 5), in the format of the prompts.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        chat (`Sequence[dict]` of length `n`, *optional*):
            Arguments of each prompt for the chat template, as [`chat_options`] reads them from the columns `tools` and
            `chat_template_kwargs` of a row.
        columns (`Mapping[str, Sequence]`, *optional*):
            Other columns of the prompts' dataset, for a ranker that reads them.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.
        true_reward (`Callable`, *optional*):
            Reward function in TRL's `reward_funcs` signature, where the truth is known.

    Returns:
        `dict[str, Estimate]`, means over prompts: `ranker_reward` (RSO eq. 9 with the target as the baseline, nats),
        `ranker_win_rate` (share of prompts whose sample the ranker prefers to the target, a tie counting half), `kl`
        (nats per completion: the mean of log policy - log reference over samples), and with `true_reward` also
        `true_reward` and `true_win_rate`. The first two leave out samples on which the ranker has no opinion.
    """
    prompt_ids = tokenize_prompts(tokenizer, prompts, chat)
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
    completions = [wrap_completion(prompt, one.texts[0]) for prompt, one in zip(prompts, sampled, strict=True)]
    candidates = [[completion] for completion in completions]
    scored, _ = ask_rewards(ranker, prompts, candidates, baselines=targets, columns=columns, may_abstain=True)
    rewards = np.concatenate(scored)
    if (known := ~np.isnan(rewards)).sum() < 2:
        raise ValueError("The ranker has an opinion on fewer than 2 of the samples. Use one that knows these prompts.")
    drawn = [(ids, one.sampled[0].ids) for ids, one in zip(prompt_ids, sampled, strict=True)]  # with the EOS token
    measured = {
        "ranker_reward": rewards[known],
        "ranker_win_rate": wins(rewards[known]),
        "kl": _logps(policy, drawn) - _logps(reference, drawn),
    }
    if true_reward is not None:
        measured["true_reward"] = np.array(true_reward(prompts=prompts, completions=completions))
        measured["true_win_rate"] = wins(
            measured["true_reward"] - np.array(true_reward(prompts=prompts, completions=targets))
        )
    return {name: Estimate.of(values) for name, values in measured.items()}


def wins(advantages: np.ndarray) -> np.ndarray:
    """Return 1 where positive, 0 where negative, and 0.5 for a tie."""
    return np.where(advantages == 0, 0.5, advantages > 0)


def _logps(model: PreTrainedModel, rows: list[tuple[list[int], list[int]]]) -> np.ndarray:
    return np.concatenate(
        [row_logps(model, rows[start : start + BATCH_SIZE]) for start in range(0, len(rows), BATCH_SIZE)]
    )
