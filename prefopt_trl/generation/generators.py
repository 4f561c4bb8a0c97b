"""Where candidates come from: one contract for the policy in this process, and for engines and servers beside it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Prompt
from prefopt_trl.data.tokenization import ChatOptions, check_positions, tokenize_prompts
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.generation.sampler import (
    Candidates,
    check_generation_kwargs,
    eos_token_ids,
    sample_candidates,
    sizes_of_batch,
)
from prefopt_trl.runtime.settings import Settings, model_fingerprint
from prefopt_trl.shared_prefix.support import reason_not_to_share_prefix


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
        """Return how many prompts a shard should have. The tokens of the prompts are None without a tokenizer.

        Raises:
            ValueError: for a prompt that is too long, naming its row.
        """
        return 1


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
        check_positions(self.model, prompt_ids, options.max_new_tokens)
        longest = max(map(len, prompt_ids))
        return sizes_of_batch(self.model, num_completions, longest, options, self._shares(options))[0]

    def _shares(self, options: GenerationOptions) -> bool:
        return options.share_prefix and reason_not_to_share_prefix(self.model, 2) is None
