"""Where candidates come from: one contract for the policy in this process, and for engines and servers beside it."""

import json
import logging
import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import transformers
from packaging.version import Version
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Prompt
from prefopt_trl.data.tokenization import ChatOptions, tokenize_prompts
from prefopt_trl.generation.chat_server import Answer, ChatServer, SavedAnswers, ServerError
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.generation.sampler import (
    Candidates,
    Sampled,
    bytes_per_token,
    check_generation_kwargs,
    eos_token_ids,
    read_row,
    sample_candidates,
    sampling_mode,
    sizes_of_batch,
)
from prefopt_trl.runtime.cards import public_name
from prefopt_trl.runtime.settings import Settings, model_fingerprint
from prefopt_trl.shared_prefix.support import reason_not_to_share_prefix

logger = logging.getLogger(__name__)

# Of the paged cache of `generate_batch`: its defaults in transformers 5.23
BLOCK = 256  # tokens of a block
BATCH_TOKENS = 8192  # tokens that go through the model at once
ROUNDS = 16  # requests of a shard per connection to a server: the last ones to end are few among them


class Generator(ABC):
    """Samples completions of prompts for [`build_preference_dataset`].

    Attributes:
        model ([`~transformers.PreTrainedModel`] or None):
            The policy, if it is in this process. Its weights are gathered before sampling where they are sharded.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or None):
            Its tokenizer.
    """

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @abstractmethod
    def generate(
        self,
        prompts: list[Prompt],
        num_completions: int,
        options: GenerationOptions,
        *,
        seed: int,
        chat: list[ChatOptions],
        keep_logps: bool = False,
    ) -> list[Candidates]:
        """Return `num_completions` completions of each prompt, in the order of `prompts`.

        `chat` has the arguments of each prompt's chat template. With `keep_logps`, [`Candidates`] also have the tokens
        drawn, with their log-probability or None.
        """

    @abstractmethod
    def settings(self, options: GenerationOptions) -> Settings:
        """Return what the completions depend on beside prompts, options and seed, for the manifest."""

    def prompts_at_once(
        self, prompt_ids: list[list[int]] | None, num_completions: int, options: GenerationOptions
    ) -> int:
        """Return how many prompts a shard has at most. The tokens of the prompts are None without a tokenizer."""
        return sys.maxsize  # the pipeline has its own bound


@dataclass(frozen=True, eq=False)
class SharedPrefixGenerator(Generator):
    """The policy in this process, each prompt computed once for all its completions: [`sample_completions`].

    [`build_preference_dataset`] makes it of its arguments `policy`, `tokenizer` and `generation_kwargs`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    generation_kwargs: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_generation_kwargs(self.generation_kwargs)

    def generate(
        self,
        prompts: list[Prompt],
        num_completions: int,
        options: GenerationOptions,
        *,
        chat: list[ChatOptions],
        **how: Any,
    ) -> list[Candidates]:
        in_encoder = self.model.config.is_encoder_decoder
        prompt_ids = tokenize_prompts(self.tokenizer, prompts, chat, for_encoder=in_encoder)
        how["generation_kwargs"] = self.generation_kwargs
        return sample_candidates(self.model, self.tokenizer, prompt_ids, num_completions, options, **how)

    def settings(self, options: GenerationOptions) -> Settings:
        return {
            **self.generation_kwargs,
            # The result of the probe, which must be the same in every process and after a restart
            "prompts_are_shared": self._shares(options),
            "eos_token_ids": eos_token_ids(self.model, self.tokenizer),
            "policy": model_fingerprint(self.model),
        }

    def prompts_at_once(
        self, prompt_ids: list[list[int]] | None, num_completions: int, options: GenerationOptions
    ) -> int:
        assert prompt_ids is not None
        longest = max(map(len, prompt_ids))
        return sizes_of_batch(self.model, num_completions, longest, options, self._shares(options))[0]

    def _shares(self, options: GenerationOptions) -> bool:
        return options.share_prefix and reason_not_to_share_prefix(self.model, 2) is None


@dataclass(frozen=True, eq=False)
class ContinuousBatchingGenerator(Generator):
    """The policy in this process, by `generate_batch` of transformers: paged caches, and rows refilled as they end.

    `generation_batch_size` bounds the completions under way, `generation_memory_budget` the paged cache, and
    `share_prefix` is whether blocks of equal prefixes are shared. Where another number of processes, device or
    version of transformers batches otherwise, the same seed draws other completions, with the same law.

    Example:

    ```python
    generator = ContinuousBatchingGenerator(model, tokenizer)
    pairs = build_preference_dataset(prompts, None, None, ranker, "outputs/pairs", generator=generator)
    ```
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def generate(
        self,
        prompts: list[Prompt],
        num_completions: int,
        options: GenerationOptions,
        *,
        seed: int,
        chat: list[ChatOptions],
        keep_logps: bool = False,
    ) -> list[Candidates]:
        prompt_ids = tokenize_prompts(self.tokenizer, prompts, chat)
        end_ids, model = eos_token_ids(self.model, self.tokenizer), cast(Any, self.model)
        longest = BLOCK * -(-(max(map(len, prompt_ids)) + options.max_new_tokens) // BLOCK)
        # What scores take of a token: a row of the attention mask, in float32
        budget = options.generation_memory_budget * 2**30 // (bytes_per_token(self.model) + 4 * BATCH_TOKENS)
        tokens = min(max(int(budget), longest), longest * len(prompts) * num_completions)
        cache = ContinuousBatchingConfig(
            num_blocks=1 + tokens // BLOCK,
            max_batch_tokens=BATCH_TOKENS,
            max_requests_per_batch=options.generation_batch_size,
            allow_block_sharing=options.share_prefix,
            return_logprobs=keep_logps,
            seed=seed,
        )
        # Before 5.23, `generate_batch` returned one of several sequences
        num_copies = num_completions if Version(transformers.__version__) < Version("5.23") else 1
        config = GenerationConfig(
            do_sample=options.temperature > 0,
            max_new_tokens=options.max_new_tokens,
            num_return_sequences=num_completions // num_copies,
            temperature=options.temperature or 1.0,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_token_id=end_ids,
        )
        with sampling_mode(self.model):
            torch.manual_seed(seed)
            inputs = [ids for ids in prompt_ids for _ in range(num_copies)]
            made = model.generate_batch(inputs, generation_config=config, continuous_batching_config=cache)
        left = defaultdict(list)  # by prompt: what fails is missing
        for output in made.values():
            if output.error is None:
                left[tuple(output.prompt_ids)].append(output)
        is_whole = (options.temperature, options.top_k, options.top_p) == (1, 0, 1)  # the policy's own distribution
        results = []
        for ids in prompt_ids:
            result = Candidates([], [])
            for _ in range(min(num_completions, len(left[tuple(ids)]))):
                output = left[tuple(ids)].pop()
                text, token_ids, finished = read_row(self.tokenizer, ids, output.generated_tokens, end_ids, [])
                result.texts.append(text)
                result.finished.append(finished)
                if keep_logps:
                    result.sampled.append(Sampled(token_ids, sum(output.logprobs) if is_whole else None))
            results.append(result)
        return results

    def settings(self, options: GenerationOptions) -> Settings:
        return {
            "generator": type(self).__name__,
            "eos_token_ids": eos_token_ids(self.model, self.tokenizer),
            "policy": model_fingerprint(self.model),
        }


class OpenAIGenerator(Generator):
    """A server of OpenAI's API: vLLM, SGLang, llama.cpp, `transformers serve` and others.

    A completion is a request of its own. Conversational prompts go to `/chat/completions`, where the server applies
    the chat template, and plain text goes to `/completions`. Each request has `temperature`, `top_p`, `top_k`
    (-1 for all tokens), `min_p`, `repetition_penalty`, `max_tokens` and a seed, because servers apply the defaults of
    a model otherwise. `transformers serve` gets them as its `generation_config`.

    Nothing shows whether the weights at the server have changed, and the same seed need not draw the same completions.
    The manifest has the model's name, and its owner and the server's version where it tells them.

    Args:
        model (`str`):
            Name of the model at the server.
        base_url (`str`):
            Address of the server, such as `"http://localhost:8000/v1"`. The key is the environment's
            `OPENAI_API_KEY`.
        concurrency (`int`, *optional*, defaults to `8`):
            Requests under way at a time, of each process.
        request_options (`dict`, *optional*):
            Further fields of each request, which the manifest shows, such as `{"stop": ["\\n\\nHuman:"]}`. None
            removes a field.

    Raises:
        ImportError: if the package openai is missing.
        ValueError: for an argument out of range, and for prompts with tools.
        ConnectionError: by `generate` and `settings`, if the server refuses a request or fails in every attempt.

    Example:

    ```python
    generator = OpenAIGenerator("my-org/my-sft-model", "http://localhost:8000/v1", concurrency=64)
    pairs = build_preference_dataset(prompts, None, None, ranker, "outputs/pairs", generator=generator)
    ```
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        concurrency: int = 8,
        request_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.request_options = model, dict(request_options or {})
        self.server = ChatServer(base_url, AnswersOfShard(None), concurrency, None)
        self.in_config = False  # whether the server takes options of sampling in a `generation_config`

    def generate(
        self,
        prompts: list[Prompt],
        num_completions: int,
        options: GenerationOptions,
        *,
        seed: int,
        chat: list[ChatOptions],
        keep_logps: bool = False,
    ) -> list[Candidates]:
        self.server.saved.clear()
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts) * num_completions) >> 1  # 31 bits
        asked = [
            {**_question(prompt, how), "seed": int(seeds[row * num_completions + number]), "vote": number}
            for row, (prompt, how) in enumerate(zip(prompts, chat, strict=True))
            for number in range(num_completions)
        ]
        try:
            answers = self._answers(asked, options)
        except ServerError as error:
            if self.in_config or "top_k" not in str(error):
                raise
            self.in_config = True
            logger.info("The server takes no `top_k`. It is asked with a `generation_config` instead.")
            answers = self._answers(asked, options)
        of_prompts = [answers[at : at + num_completions] for at in range(0, len(answers), num_completions)]
        return [
            Candidates([one.text for one in several], [one.finish_reason == "stop" for one in several])
            for several in of_prompts
        ]

    def _answers(self, asked: list[dict[str, Any]], options: GenerationOptions) -> list[Answer]:
        sampling: dict[str, Any] = {"temperature": options.temperature, "top_p": options.top_p}
        neutral = {"min_p": 0.0, "repetition_penalty": 1.0}
        if self.in_config:
            sampling["generation_config"] = json.dumps({"do_sample": True, "top_k": options.top_k, **neutral})
        else:
            sampling |= {"top_k": options.top_k or -1, **neutral}  # SGLang refuses 0
        sampling |= {"model": self.name, "max_tokens": options.max_new_tokens}
        return self.server.answers([{**sampling, **one, **self.request_options} for one in asked])

    def settings(self, options: GenerationOptions) -> Settings:
        told = self.server.describe(self.name)
        logger.info(
            "Completions come from %s at a server (%s). Its weights have no fingerprint: sample into another "
            "`output_dir` when they change.",
            self.name,
            told or "which tells nothing of itself",
        )
        return {
            "generator": {
                "class": type(self).__name__,
                "model": public_name(self.name),
                "request_options": self.request_options,
                **told,
            }
        }

    def prompts_at_once(
        self, prompt_ids: list[list[int]] | None, num_completions: int, options: GenerationOptions
    ) -> int:
        return ROUNDS * self.server.concurrency // num_completions


class AnswersOfShard(SavedAnswers):
    """Answers to the shard under way."""

    def __str__(self) -> str:
        return f"{len(self)} completions of the shard under way are lost"


def _question(prompt: Prompt, how: ChatOptions) -> dict[str, Any]:
    """Return the fields of a request that hold its prompt."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if "tools" in how:
        raise ValueError(
            "`prompts` have `tools`, and a server returns calls of them apart from the text. Leave them out."
        )
    return {"messages": prompt, **({"chat_template_kwargs": how} if how else {})}
