"""A prompt and its completions as token ids, cut where TRL's `DPOTrainer` cuts them."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from prefopt_trl.data.formats import Completion, Prompt

logger = logging.get_logger(__name__)


def tokenize_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completions: Sequence[Completion],
    **chat_template_kwargs: Any,
) -> tuple[list[int], list[list[int]]]:
    """Tokenise a prompt with each of its completions, as TRL's `DPOTrainer` does for two of them.

    A prompt and a completion are tokenised together, because tokens may merge where they meet; the completions begin
    where the first of them departs from the tokens of the prompt alone. A completion in plain text ends with EOS; the
    chat template ends one that is conversational.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with an EOS token, and a chat template for conversational prompts.
        prompt (`str` or `list[dict]`):
            Prompt as plain text or as messages.
        completions (sequence of `str` or `list[dict]`):
            Its completions, in the same format.
        **chat_template_kwargs:
            Passed to `apply_chat_template`, such as `tools`.

    Returns:
        `tuple[list[int], list[list[int]]]`: ids of the prompt, and of each completion.

    Raises:
        TypeError: if a completion is not in the prompt's format.

    Example:

    ```python
    prompt_ids, completion_ids = tokenize_completions(tokenizer, "The sky is", [" blue", " green"])
    ```
    """

    template: Any = tokenizer.apply_chat_template

    def encode(prompt: Any, completion: Any = None) -> list[int]:
        if isinstance(prompt, str):
            return tokenizer(prompt + (completion or ""))["input_ids"]
        messages, is_prompt = prompt + (completion or []), completion is None
        return template(messages, add_generation_prompt=is_prompt, return_dict=True, **chat_template_kwargs)[
            "input_ids"
        ]

    for index, completion in enumerate(completions):
        if not isinstance(completion, type(prompt)):
            raise TypeError(
                f"Completion {index} is {type(completion).__name__} and its prompt is {type(prompt).__name__}: give "
                "both as plain text, or both as lists of messages."
            )
    if isinstance(prompt, str):
        eos: Any = tokenizer.eos_token
        completions = [text if str(text).endswith(eos) else str(text) + eos for text in completions]
    prompt_ids = encode(prompt)
    both_ids = [encode(prompt, completion) for completion in completions]
    end = min(_common_length(prompt_ids, ids) for ids in both_ids)
    if end < len(prompt_ids):
        logger.warning_once(
            "A prompt's tokens are not those that it has before a completion, because tokens merge where the two meet "
            "or the chat template writes it otherwise. The completion begins where they differ, and the policy learns "
            "in a context other than the one it samples in. End prompts where a token ends. (Said once, of "
            f"{tokenizer.decode(prompt_ids[end:])!r}.)"
        )
    return prompt_ids[:end], [ids[end:] for ids in both_ids]


def _common_length(ids: list[int], others: list[int]) -> int:
    together = zip(ids, others, strict=False)
    return next((place for place, (one, other) in enumerate(together) if one != other), min(len(ids), len(others)))


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel | PreTrainedConfig
) -> None:
    """Require that the model has an embedding for every token of the tokenizer. It may have more.

    Tokens that stand for images, videos or sounds are left out: a model of text alone, such as Gemma 3 of 1B, may
    share the tokenizer of one that sees.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`] or [`~transformers.PreTrainedConfig`]):
            Model, or the config of one that is not loaded yet.

    Raises:
        ValueError: naming the largest token id and the number of embeddings.
    """
    num_embeddings = None
    if not isinstance(model, PreTrainedConfig):
        num_embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)
        model = model.config
    num_embeddings = num_embeddings or getattr(model.get_text_config(), "vocab_size", None)
    not_text = {getattr(tokenizer, f"{kind}_token_id", None) for kind in ("image", "video", "audio")}
    largest = max((token for token in tokenizer.get_vocab().values() if token not in not_text), default=0)
    if num_embeddings and largest >= num_embeddings:
        raise ValueError(
            f"The tokenizer has token ids up to {largest}, and the model embeddings for {num_embeddings} tokens only: "
            "they do not belong together. Load the model's own tokenizer or, where tokens were added to it, call "
            "`model.resize_token_embeddings(len(tokenizer))` and give the model."
        )


def decoder_start_token_id(model: PreTrainedModel) -> int:
    """Token that the decoder of an encoder-decoder begins with.

    Raises:
        ValueError: if the model names none.
    """
    for config in (model.generation_config, model.config):
        if (token := getattr(config, "decoder_start_token_id", None)) is not None:
            return token
    raise ValueError(
        f"{type(model).__name__} is an encoder-decoder without `decoder_start_token_id`. Set it in `model.config`."
    )
