"""Rejection sampling inside the training process: prompts go in, TRL's batch of pairs (or of rankings) comes out."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prefopt_trl.data.collators import DataCollatorForRanking
from prefopt_trl.data.formats import Completion, Prompt, Row, wrap_completion
from prefopt_trl.data.tokenization import (
    chat_options,
    check_prompts_fit,
    merge_equal_in_training,
    tokenize_completions,
    tokenize_prompts,
)
from prefopt_trl.generation.options import GenerationOptions, is_one_of
from prefopt_trl.generation.sampler import eos_token_ids, sample_candidates
from prefopt_trl.rankers.base import Ranker, ask_rewards, check_ranker
from prefopt_trl.runtime.processes import gathered
from prefopt_trl.sampling.options import PAIRINGS, RANKING, SamplingOptions
from prefopt_trl.sampling.pairing import Pairs
from prefopt_trl.sampling.selection import first_occurrences, keep, label_pairs, penalties_of, rank, user_columns

logger = logging.getLogger(__name__)


@dataclass
class DataCollatorForRejectionSampling(SamplingOptions, DataCollatorMixin):
    """
    Sample completions of a batch of prompts, rank, reject and pair them (RSO section 5), and collate the pairs.

    Each example has a `"prompt"`, plain text or messages, and optionally `"tools"` and `"chat_template_kwargs"`. Pairs
    are collated by TRL's `DataCollatorForPreference`, rankings by [`DataCollatorForRanking`]. Batch sizes, such as
    `per_device_train_batch_size`, count prompts. With n = `num_samples`, B prompts give

    - `"first-round"`: `B * (n // 2)` pairs, each of two rows;
    - `"tournament"`: `B * (n - 1)` pairs;
    - `"all"`: `B * n * (n - 1) / 2` pairs;
    - `"best-worst"`, `"best-quantile"`: B pairs;
    - `"ranking"`: B rankings, each of n rows.

    `"correct-wrong"` and `"best"` are for `build_preference_dataset` alone. Examples with `"prompt_ids"` are only
    collated.

    A batch depends only on `seed`, `epoch`, its prompts, the policy, the ranker and the options below, so it is the
    same after a restart. The global random state does not change. In your own training loop, call the collator at the
    beginning of a step: a `DataLoader` makes batches ahead, with a policy that has not learned from the latest one.

    With `"rso"` and `"top-k"`, a prompt with fewer distinct candidates than `num_samples` repeats their pairs, so that
    all prompts make the same number of pairs. A warning counts such prompts. A single candidate is paired with itself,
    as is one of a prompt whose pairs are all outside the margins, and `"sft"` may pair equal texts; losses of
    differences have zero gradient on such pairs.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to sample from, with its current weights.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with an EOS token.
        ranker ([`~prefopt_trl.rankers.Ranker`]):
            Scores candidates and labels pairs.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampling, rejection and pairing.
        max_length, truncation_mode, pad_to_multiple_of:
            As in [`DataCollatorForRanking`].
        while_sampling (`Callable`, *optional*):
            Makes a context to sample in, such as `disable_adapter` of a PEFT model.
        epoch (`int`, *optional*, defaults to `0`):
            Epoch of the batches, so that each epoch draws other completions. The trainer sets it.
        strategy, num_candidates, num_samples and so on:
            The fields of [`SamplingOptions`].

    Raises:
        TypeError: if `ranker` is not a ranker.
        ValueError: for an option out of range, a tokenizer without an EOS token, or a prompt that fills `max_length`.
        RuntimeError: inside a worker of a dataloader.

    Example:

    ```python
    collator = DataCollatorForRejectionSampling(model, tokenizer, ranker, num_candidates=16, max_new_tokens=64)
    batch = collator([{"prompt": "The sky is"}, {"prompt": "The sea is"}])  # 8 pairs: 16 rows
    ```
    """

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ranker: Ranker
    _: KW_ONLY
    seed: int = 0
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    while_sampling: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    epoch: int = 0
    return_tensors: str = "pt"
    num_short: int = field(default=0, init=False)  # prompts that had fewer distinct candidates than `num_samples`

    def __post_init__(self) -> None:
        super().__post_init__()
        is_one_of(self, "pairing", [RANKING, *(name for name in PAIRINGS if name != "correct-wrong")])
        check_ranker(self.ranker)
        eos_token_ids(self.policy, self.tokenizer)  # raises if there is none
        make = DataCollatorForRanking if self.pairing == RANKING else DataCollatorForPreference
        pad_token_id = self.tokenizer.pad_token_id
        self.data_collator = make(
            pad_token_id=self.tokenizer.eos_token_id if pad_token_id is None else pad_token_id,
            max_length=self.max_length,
            truncation_mode=self.truncation_mode,
            pad_to_multiple_of=self.pad_to_multiple_of,
        )

    def torch_call(self, examples: list[Row]) -> dict[str, torch.Tensor]:
        if "prompt_ids" in examples[0]:
            return self.data_collator(examples)
        if get_worker_info() is not None:
            raise RuntimeError(
                "`DataCollatorForRejectionSampling` generates inside the training process, not in a worker of the "
                "dataloader. Set `dataloader_num_workers=0`."
            )
        for index, example in enumerate(examples):
            if not isinstance(example, dict) or "prompt" not in example or "completions" in example:
                found = ", ".join(example) if isinstance(example, dict) else type(example).__name__
                raise ValueError(
                    f"Example {index} of the batch is {found}. Give prompts without completions, as "
                    "`{'prompt': ...}`; for given completions, use `build_preference_dataset`."
                )
        prompts = [example["prompt"] for example in examples]
        rows = [example.get("row") for example in examples]
        drawn = json.dumps([self.seed, self.epoch, rows, prompts]).encode()
        seed = int.from_bytes(hashlib.sha256(drawn).digest()[:4], "little")
        with gathered(self.policy, self.ranker.model):
            return self.data_collator(self._prefer(examples, prompts, seed))

    def _prefer(self, examples: list[Row], prompts: list[Prompt], seed: int) -> list[Row]:
        with self.while_sampling():
            completions, finished = sample_for(
                examples,
                self.policy,
                self.tokenizer,
                self.num_candidates,
                self,
                max_length=self.max_length,
                seed=seed,
                progress=False,
            )
        columns = {name: column for name, column in user_columns(examples).items() if name != "row"}  # the trainer's
        rewards, _ = ask_rewards(self.ranker, prompts, completions, columns=columns, may_abstain=True)
        penalties = [penalties_of(*row, self) for row in zip(completions, finished, strict=True)]
        rewards = [row - penalty for row, penalty in zip(rewards, penalties, strict=True)]
        completions = merge_equal_in_training(self.tokenizer, examples, completions)
        streams = [np.random.default_rng([seed, index]) for index in range(len(prompts))]
        kept = [
            keep(row_rewards, texts, self, stream)
            for texts, row_rewards, stream in zip(map(first_occurrences, completions), rewards, streams, strict=True)
        ]
        self._count_short(kept)
        # A single one meets itself, and so does the first of those on which the ranker has no opinion: its loss is
        # constant
        members = [np.resize(row if len(row) else [0], max(2, len(row))) for row in kept]

        known = list(map(np.nan_to_num, rewards))
        if self.pairing == RANKING:
            ranked = [rank(*scored) for scored in zip(completions, known, members, strict=True)]
            return [self._tokenize(example, **ranking) for example, ranking in zip(examples, ranked, strict=True)]
        of_prompts = (prompts, completions, rewards, penalties, columns, members)
        labeled = label_pairs(self.ranker, self, *of_prompts, self.pairing, streams)
        n = self.num_samples
        num_pairs = {"first-round": n // 2, "tournament": n - 1, "all": n * (n - 1) // 2}.get(self.pairing, 1)
        return [
            {
                **self._tokenize(example, [row[chosen], row[rejected]]),
                **{"chosen_reward": scores[chosen], "rejected_reward": scores[rejected], "label_probability": label},
            }
            for example, row, scores, pairs, member in zip(examples, completions, known, labeled, members, strict=True)
            # Repeated where there are few: TRL gathers a value of each pair, as many from every process
            for chosen, rejected, label in islice(cycle(self._decided(pairs, scores, member)), num_pairs)
        ]

    def _decided(self, pairs: Pairs, rewards: np.ndarray, members: np.ndarray) -> list[tuple[int, int, float]]:
        """Return the pairs within the margins on which the ranker has an opinion, or else one of equals."""
        is_known = np.isfinite(pairs.probability) & self.allows(rewards[pairs.chosen] - rewards[pairs.rejected])
        known = [pair for pair, is_so in zip(zip(*pairs, strict=True), is_known, strict=True) if is_so]
        return known or [(members[0], members[0], 0.5)]

    def _count_short(self, kept: list[np.ndarray]) -> None:
        short = sum(len(row) < self.num_samples for row in kept)
        if short and not self.num_short:
            logger.warning(
                "%d of %d prompts of a batch have fewer than `num_samples`=%d distinct candidates, and repeat their "
                "pairs. Raise `num_candidates`, `temperature` or `max_new_tokens`. (Logged once; `num_short` counts "
                "all.)",
                short,
                len(kept),
                self.num_samples,
            )
        self.num_short += short

    def _tokenize(self, example: Row, completions: list[Completion], rewards: list[float] | None = None) -> Row:
        prompt_ids, completion_ids = tokenize_completions(
            self.tokenizer, example["prompt"], completions, **chat_options(example)
        )
        if rewards is None:
            chosen_ids, rejected_ids = completion_ids
            return {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "rewards": rewards}


def sample_for(
    rows: Sequence[Row],
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_completions: int,
    options: GenerationOptions,
    max_length: int | None = None,
    **others: Any,
) -> tuple[list[list[Completion]], list[list[bool]]]:
    """Sample completions of the rows' prompts, in the format of the prompts, and return whether each ended by itself.

    Rows have `prompt` and optionally `tools` and `chat_template_kwargs`. `others` are arguments of
    [`sample_candidates`], such as `seed`. Raise `ValueError` for prompts that fill `max_length`.
    """
    prompt_ids = tokenize_prompts(tokenizer, [row["prompt"] for row in rows], list(map(chat_options, rows)))
    check_prompts_fit(prompt_ids, max_length)
    sampled = sample_candidates(policy, tokenizer, prompt_ids, num_completions, options, **others)
    wrapped = [
        [wrap_completion(row["prompt"], text) for text in candidates.texts]
        for row, candidates in zip(rows, sampled, strict=True)
    ]
    return wrapped, [candidates.finished for candidates in sampled]
