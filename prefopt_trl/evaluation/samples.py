"""Completions of policies, and what judges say of them: the steps of an evaluation, on some prompts at a time."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Completion, Row, wrap_completion
from prefopt_trl.data.tokenization import chat_options, tokenize_prompts
from prefopt_trl.generation.options import GenerationOptions, is_whole
from prefopt_trl.generation.sampler import check_generation_kwargs, sample_candidates
from prefopt_trl.rankers.base import Ranker, ask_rewards, sigmoid
from prefopt_trl.runtime.settings import Settings
from prefopt_trl.sampling.logps import drawn_logps
from prefopt_trl.sampling.selection import as_numbers, user_columns

Sample = dict[str, Any]  # a completion and what is known of it, as JSON


@dataclass(frozen=True)
class SamplingPlan:
    """How every policy of an evaluation is sampled."""

    num_completions: int
    options: GenerationOptions
    generation_kwargs: dict[str, object]

    def __post_init__(self) -> None:
        check_generation_kwargs(self.generation_kwargs)
        is_whole(self, "num_completions", 1)
        if self.num_completions > 1 and self.options.temperature == 0:
            raise ValueError("With `temperature`=0 all completions of a prompt are equal. Set `num_completions` to 1.")

    def settings(self) -> Settings:
        return {**vars(self.options), **self.generation_kwargs, "num_completions": self.num_completions}

    @property
    def is_of_policy(self) -> bool:
        """Whether samples follow the policy's own distribution, so that log-ratios of the tokens estimate a KL."""
        return self.options.is_whole_distribution(self.generation_kwargs)


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    plan: SamplingPlan,
    seed: int,
    progress: bool = False,
) -> list[list[Sample]]:
    """Sample completions of the prompts of rows: for each, samples with `completion`, `finished`, `ids` and `logp`.

    `ids` are the tokens drawn, with EOS. `logp` is their log-probability in nats, summed; None if the options narrow
    the policy's distribution or the model is an encoder-decoder.
    """
    for_encoder = model.config.is_encoder_decoder
    prompts = [row["prompt"] for row in rows]
    prompt_ids = tokenize_prompts(tokenizer, prompts, list(map(chat_options, rows)), for_encoder=for_encoder)
    drawn = sample_candidates(
        model,
        tokenizer,
        prompt_ids,
        plan.num_completions,
        plan.options,
        seed=seed,
        generation_kwargs=plan.generation_kwargs,
        keep_logps=True,  # and with them the tokens
        progress=progress,
    )
    knows_logps = plan.is_of_policy and not for_encoder
    sampled: list[list[Sample]] = [
        [
            {
                "completion": wrap_completion(prompt, text),
                "finished": finished,
                "ids": tokens.ids,
                "logp": tokens.logp if knows_logps else None,
            }
            for text, finished, tokens in zip(one.texts, one.finished, one.sampled, strict=True)
        ]
        for prompt, one in zip(prompts, drawn, strict=True)
    ]
    if knows_logps and sampled[0][0]["logp"] is None:  # prompts are not shared
        for samples, logps in zip(sampled, logps_of(sampled, model, tokenizer, rows), strict=True):
            for one, logp in zip(samples, logps, strict=True):
                one["logp"] = logp
    return sampled


def seed_of(seed: int, policy: str) -> int:
    """Return a seed for a policy, so that the samples of policies are independent of each other."""
    digest = hashlib.sha256(policy.encode()).digest()
    return int(np.random.SeedSequence([seed, int.from_bytes(digest[:8])]).generate_state(1)[0])


def given_samples(completions: Sequence[Completion]) -> list[Sample]:
    """Return given completions of a prompt as samples."""
    return [{"completion": one, "finished": None, "ids": None, "logp": None} for one in completions]


def logps_of(
    sampled: Sequence[Sequence[Sample]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
) -> list[list[float]]:
    """Return the log-probability of the tokens of each sample under a model, in nats, summed."""
    prompt_ids = tokenize_prompts(tokenizer, [row["prompt"] for row in rows], list(map(chat_options, rows)))
    return drawn_logps(model, prompt_ids, [[one["ids"] for one in samples] for samples in sampled])


def texts_of(sampled: Sequence[Sequence[Sample]]) -> list[list[Completion]]:
    return [[one["completion"] for one in samples] for samples in sampled]


def best_of(ranker: Ranker, rows: Sequence[Row], sampled: Sequence[Sequence[Sample]], n: int) -> list[list[Sample]]:
    """Keep the sample with the highest reward of each n of a prompt: best-of-n.

    A sample without a reward is never the best, unless none of them has one. `logp` is None, as that of a best-of-n
    policy is unknown.
    """
    prompts, columns = [row["prompt"] for row in rows], user_columns(rows)
    rewards, _ = ask_rewards(ranker, prompts, texts_of(sampled), columns=columns, may_abstain=True)
    kept = []
    for samples, of_prompt in zip(sampled, rewards, strict=True):
        known = np.nan_to_num(of_prompt, nan=-np.inf)
        starts = range(0, len(samples) - n + 1, n)
        kept.append([{**samples[start + int(np.argmax(known[start : start + n]))], "logp": None} for start in starts])
    return kept


def verdicts(
    judge: Ranker,
    rows: Sequence[Row],
    sampled: Mapping[str, Sequence[Sequence[Sample]]],
    against: str | None,
    known: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> dict[str, list[dict[str, list[float | None]]]]:
    """Ask a judge about all completions of each prompt at once.

    The i-th completion of a policy meets the opponent's i-th (modulo their number). Equal texts are a tie, unless the
    judge has no opinion.

    Args:
        against (`str`, *optional*):
            The policy among those of `sampled` that is the opponent. Without it there are no wins.
        known (`dict`, *optional*):
            The rewards of policies about which the judge is not asked again, for each prompt.

    Returns:
        `dict`: for each policy and prompt, `rewards` in nats and `wins` (1, 0.5 or 0), of each completion, None where
        the judge has no opinion. The rewards are the judge's own if it rewards each completion separately, and
        otherwise those against the opponent's completion (RSO eq. 9).
    """
    prompts, columns, numbers = [row["prompt"] for row in rows], user_columns(rows), range(len(rows))
    completions, known = {name: texts_of(of) for name, of in sampled.items()}, known or {}
    asked = [name for name in completions if name not in known and not (judge.draws_baselines and name == against)]
    flat = [[(name, place) for name in asked for place in range(len(completions[name][row]))] for row in numbers]
    texts = [[completions[name][row][place] for name, place in flat[row]] for row in numbers]
    rewards: list[np.ndarray] = [np.full(len(one), np.nan) for one in flat]
    if not judge.draws_baselines:
        rewards, _ = ask_rewards(judge, prompts, texts, columns=columns, may_abstain=True)
    elif against is not None:
        opponents = completions[against]
        for turn in range(max(map(len, opponents))):
            places = [
                [at for at, (_, place) in enumerate(flat[row]) if place % len(opponents[row]) == turn]
                for row in numbers
            ]
            meet = [row for row in numbers if places[row]]
            scored, _ = ask_rewards(
                judge,
                [prompts[row] for row in meet],
                [[texts[row][at] for at in places[row]] for row in meet],
                baselines=[opponents[row][turn] for row in meet],
                columns={name: [values[row] for row in meet] for name, values in columns.items()},
                may_abstain=True,
            )
            for row, of_row in zip(meet, scored, strict=True):
                rewards[row][places[row]] = of_row
    found: dict[str, list[dict[str, list[float | None]]]] = {name: [] for name in completions}
    for row in numbers:
        at = dict(zip(flat[row], rewards[row], strict=True))
        at |= {(name, place): reward for name, of in known.items() for place, reward in enumerate(of[row])}
        for name, of_policy in completions.items():
            own = np.array([at.get((name, place), 0.0) for place in range(len(of_policy[row]))])
            won = np.full(len(own), np.nan)
            if against is not None and (theirs := completions[against][row]):
                meets = [place % len(theirs) for place in range(len(own))]
                is_tie = [one == theirs[place] for one, place in zip(of_policy[row], meets, strict=True)]
                advantages = own if judge.draws_baselines else own - np.array([at[against, place] for place in meets])
                advantages = np.where(is_tie, 0 * advantages, advantages)
                won = judge.verdicts(sigmoid(advantages))
                own = advantages if judge.draws_baselines else own
            found[name].append({"rewards": as_numbers(own), "wins": as_numbers(won)})
    return found


def as_rows(
    policy: str,
    first_row: int,
    rows: Sequence[Row],
    sampled: Sequence[Sequence[Sample]],
    ref_logps: Sequence[Sequence[float]] | None,
    judged: Mapping[str, Sequence[Mapping[str, Sequence[float | None]]]],
) -> list[Row]:
    """Return the rows of `samples.jsonl` of a policy, for consecutive prompts; `judged` has its [`verdicts`]."""
    return [
        {
            "row": first_row + at,
            "sample": place,
            "policy": policy,
            "prompt": row["prompt"],
            "completion": one["completion"],
            "num_tokens": None if one["ids"] is None else len(one["ids"]),
            "finished": one["finished"],
            "logp": one["logp"],
            "ref_logp": None if ref_logps is None else ref_logps[at][place],
            "rewards": {judge: found[at]["rewards"][place] for judge, found in judged.items()},
            "wins": {judge: found[at]["wins"][place] for judge, found in judged.items()},
        }
        for at, row in enumerate(rows)
        for place, one in enumerate(sampled[at])
    ]
