"""Where candidates come from: one contract for the policy in this process, and for engines and servers beside it."""

import json
import logging
import math
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
    check_generation_kwargs,
    eos_token_ids,
    read_row,
    sample_candidates,
    sampling_mode,
    sizes_of_batch,
)
from prefopt_trl.runtime.cards import public_name
from prefopt_trl.runtime.settings import Settings, model_fingerprint
from prefopt_trl.shared_prefix.states import repeats_states
from prefopt_trl.shared_prefix.support import (
    PROBE_TOLERANCE,
    has_recurrent_layers,
    probe_rows,
    reason_not_to_share_prefix,
    run_probe,
)

logger = logging.getLogger(__name__)

# Of `generate_batch`: tokens of a block of its cache, by default; at most, completions under way and tokens of a step
BLOCK, MOST_ROWS, STEP_TOKENS = 256, 1024, 2048
REQUESTS = 16  # of a shard, per connection to a server: the last ones to end are few among them


@dataclass(frozen=True)
class Request:
    """What a generator is asked for: `num_completions` of each prompt, drawn with `seed` as `options` say."""

    prompts: list[Prompt]
    chat: list[ChatOptions]  # the arguments of each prompt's chat template
    num_completions: int
    options: GenerationOptions
    seed: int
    keep_logps: bool = False  # whether candidates have the tokens drawn, each with its log-probability or None


class Generator(ABC):
    """Samples completions of prompts for [`build_preference_dataset`]."""

    model: PreTrainedModel | None = None  # the policy, if it is in this process
    tokenizer: PreTrainedTokenizerBase | None = None  # of the policy

    @abstractmethod
    def generate(self, request: Request) -> list[Candidates]:
        """Return the completions of each prompt, in the order of the prompts."""

    @abstractmethod
    def settings(self, options: GenerationOptions) -> Settings:
        """Return what the completions depend on beside prompts, options and seed, for the manifest."""

    def prompts_at_once(self, longest: int, num_completions: int, options: GenerationOptions) -> int:
        """Return how many prompts a shard has at most, if the longest has so many tokens (0 without a tokenizer)."""
        return sys.maxsize  # the pipeline has its own bound


@dataclass(frozen=True, eq=False)
class SharedPrefixGenerator(Generator):
    """The policy in this process, each prompt computed once for all its completions: [`sample_completions`]."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    generation_kwargs: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_generation_kwargs(self.generation_kwargs)

    def generate(self, request: Request) -> list[Candidates]:
        in_encoder = self.model.config.is_encoder_decoder
        prompt_ids = tokenize_prompts(self.tokenizer, request.prompts, request.chat, for_encoder=in_encoder)
        what = (self.model, self.tokenizer, prompt_ids, request.num_completions, request.options)
        how: dict[str, Any] = {"seed": request.seed, "keep_logps": request.keep_logps}
        return sample_candidates(*what, generation_kwargs=self.generation_kwargs, **how)

    def settings(self, options: GenerationOptions) -> Settings:
        return {
            **self.generation_kwargs,
            # The result of the probe, which must be the same in every process and after a restart
            "prompts_are_shared": self._repeats(options) or self._shares(options),
            "eos_token_ids": eos_token_ids(self.model, self.tokenizer),
            "policy": model_fingerprint(self.model),
        }

    def prompts_at_once(self, longest: int, num_completions: int, options: GenerationOptions) -> int:
        return sizes_of_batch(self.model, num_completions, longest, options, self._shares(options))[0]

    def _shares(self, options: GenerationOptions) -> bool:
        may_share = options.share_prefix and not self._repeats(options)
        return may_share and reason_not_to_share_prefix(self.model, 2) is None

    def _repeats(self, options: GenerationOptions) -> bool:
        return options.share_prefix and has_recurrent_layers(self.model) and repeats_states(self.model)


@dataclass(frozen=True, eq=False)
class ContinuousBatchingGenerator(Generator):
    """The policy in this process, by `generate_batch` of transformers: paged caches, and rows refilled as they end.

    `generation_batch_size` and `generation_memory_budget` bound the completions under way, and `share_prefix` is
    whether they share the blocks of equal prefixes. The same seed may draw other completions on another machine.
    A model that `generate_batch` computes otherwise than its forward pass, such as with ALiBi, is a `ValueError`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def generate(self, request: Request) -> list[Candidates]:
        prompt_ids, number = tokenize_prompts(self.tokenizer, request.prompts, request.chat), request.num_completions
        options, end_ids = request.options, eos_token_ids(self.model, self.tokenizer)
        longest = max(map(len, prompt_ids))
        at_once = math.prod(sizes_of_batch(self.model, number, longest, options, shares=False))
        at_once = min(at_once, len(prompt_ids) * number, MOST_ROWS)
        # Before 5.23, `generate_batch` returned one of several sequences
        num_copies = number if Version(transformers.__version__) < Version("5.23") else 1
        config = GenerationConfig(
            do_sample=options.temperature > 0,
            max_new_tokens=options.max_new_tokens,
            num_return_sequences=number // num_copies,
            temperature=options.temperature or 1.0,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_token_id=end_ids,
        )
        cache = ContinuousBatchingConfig(
            num_blocks=1 + at_once * -(-(longest + options.max_new_tokens) // BLOCK),
            max_batch_tokens=STEP_TOKENS,
            max_requests_per_batch=at_once,
            allow_block_sharing=options.share_prefix,
            return_logprobs=request.keep_logps,
            seed=request.seed,
        )
        with sampling_mode(self.model):
            if (reason := run_probe(_probe_generate_batch, self.model)) is not None:
                raise ValueError(f"`generate_batch` cannot sample this model: {reason}. Use SharedPrefixGenerator.")
            inputs = [ids for ids in prompt_ids for _ in range(num_copies)]
            made = cast(Any, self.model).generate_batch(inputs, config, continuous_batching_config=cache)
        is_whole = options.is_whole_distribution()
        left = defaultdict(list)  # by prompt; one that failed is missing
        for output in made.values():
            if output.error is None:
                left[tuple(output.prompt_ids)].append(output)
        results = []
        for ids in prompt_ids:
            results.append(Candidates([], []))
            for output in [left[tuple(ids)].pop() for _ in range(min(number, len(left[tuple(ids)])))]:
                text, token_ids, finished = read_row(self.tokenizer, ids, output.generated_tokens, end_ids, [])
                results[-1].texts.append(text)
                results[-1].finished.append(finished)
                if request.keep_logps:
                    results[-1].sampled.append(Sampled(token_ids, sum(output.logprobs) if is_whole else None))
        return results

    def settings(self, options: GenerationOptions) -> Settings:
        eos = eos_token_ids(self.model, self.tokenizer)
        return {"generator": type(self).__name__, "eos_token_ids": eos, "policy": model_fingerprint(self.model)}


def _probe_generate_batch(model: Any) -> str | None:
    """Compare log-probabilities with those of a forward pass: attention of a model's own ignores the paged cache."""
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=4, eos_token_id=-1)
    cache = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=STEP_TOKENS, return_logprobs=True)
    differences = []
    for output in model.generate_batch(probe_rows(model), config, continuous_batching_config=cache).values():
        ids = torch.tensor([[*output.prompt_ids, *output.generated_tokens]], device=model.device)
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[-4:, 0]
        differences.append((logps - torch.tensor(output.logprobs, device=model.device)).abs().mean().item())
    if len(differences) == 4 and max(differences) <= PROBE_TOLERANCE[model.dtype]:
        return None
    return f"its log-probabilities of a {model.config.model_type} differ from a forward pass by {differences} nats"


class OpenAIGenerator(Generator):
    """A server of OpenAI's API: vLLM, SGLang, llama.cpp, `transformers serve` and others.

    Conversational prompts go to `/chat/completions`, where the server applies the chat template, and plain text goes
    to `/completions`. Each completion is a request, with every option of sampling and a seed, because servers apply
    the defaults of a model otherwise. Nothing shows whether the weights at the server have changed: the manifest has
    the model's name, and its owner and the server's version if the server tells them. The same seed need not draw the
    same completions.

    Args:
        model (`str`):
            Name of the model at the server.
        base_url (`str`):
            Address of the server. The key is the environment's `OPENAI_API_KEY`.
        concurrency (`int`, *optional*, defaults to `8`):
            Requests under way at a time, of each process.
        request_options (`dict`, *optional*):
            Further fields of each request, which the manifest shows, such as `{"stop": ["\\n\\nHuman:"]}`. None
            removes a field.

    Raises:
        ValueError: for an argument out of range, and for prompts with tools.
        ConnectionError: if the server refuses a request or fails in every attempt.

    Example:

    ```python
    generator = OpenAIGenerator("my-org/my-sft-model", "http://localhost:8000/v1", concurrency=64)
    pairs = build_preference_dataset(prompts, None, None, ranker, "outputs/pairs", generator=generator)
    ```
    """

    def __init__(
        self, model: str, base_url: str, *, concurrency: int = 8, request_options: Mapping[str, Any] | None = None
    ) -> None:
        self.name, self.request_options = model, dict(request_options or {})
        self.server = ChatServer(base_url, AnswersOfShard(None), concurrency, None)
        self.takes_top_k = True  # until it refuses one

    def generate(self, request: Request) -> list[Candidates]:
        self.server.saved.clear()
        number = request.num_completions
        seeds = np.random.SeedSequence(request.seed).generate_state(len(request.prompts) * number) >> 1  # 31 bits
        asked = [
            {**_question(prompt, how), "seed": int(seeds[row * number + place]), "vote": place}
            for row, (prompt, how) in enumerate(zip(request.prompts, request.chat, strict=True))
            for place in range(number)
        ]
        try:
            answers = self._answers(asked, request.options)
        except ServerError as error:
            if not self.takes_top_k or "top_k" not in str(error):
                raise
            self.takes_top_k = False  # `transformers serve` takes it in a `generation_config`
            answers = self._answers(asked, request.options)
        return [
            Candidates([one.text for one in several], [one.finish_reason == "stop" for one in several])
            for several in (answers[at : at + number] for at in range(0, len(answers), number))
        ]

    def _answers(self, asked: list[dict[str, Any]], options: GenerationOptions) -> list[Answer]:
        how: dict[str, Any] = {"model": self.name, "temperature": options.temperature, "top_p": options.top_p}
        neutral = {"min_p": 0.0, "repetition_penalty": 1.0}
        if self.takes_top_k:
            how |= {"top_k": options.top_k or -1, **neutral}  # SGLang refuses 0
        else:
            how["generation_config"] = json.dumps({"do_sample": True, "top_k": options.top_k, **neutral})
        how["max_tokens"] = options.max_new_tokens
        return self.server.answers([how | one | self.request_options for one in asked])

    def settings(self, options: GenerationOptions) -> Settings:
        made_by = {"class": type(self).__name__, "model": public_name(self.name), **self.server.describe(self.name)}
        logger.info("Completions come from a server, %s, whose weights have no fingerprint.", made_by)
        return {"generator": {**made_by, "request_options": self.request_options}}

    def prompts_at_once(self, longest: int, num_completions: int, options: GenerationOptions) -> int:
        return REQUESTS * self.server.concurrency // num_completions


class AnswersOfShard(SavedAnswers):
    def __str__(self) -> str:
        return f"{len(self)} completions of the shard under way are lost"


def _question(prompt: Prompt, how: ChatOptions) -> dict[str, Any]:
    """Return the fields of a request that hold its prompt."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if "tools" in how:
        raise ValueError("`prompts` have `tools`, whose calls a server returns apart from the text. Leave them out.")
    return {"messages": prompt, "chat_template_kwargs": how or None}
