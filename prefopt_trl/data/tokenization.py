"""Tokenize a prompt and its completions, split at the same token as in TRL's `DPOTrainer`."""

import json
import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from prefopt_trl.data.formats import Completion, Message, Prompt, Row
from prefopt_trl.shared_prefix.continuation import common_length

logger = logging.get_logger(__name__)

ChatOptions: TypeAlias = dict[str, Any]  # arguments for `apply_chat_template`

_warned: weakref.WeakSet[PreTrainedTokenizerBase] = weakref.WeakSet()  # tokenizers with equal candidates


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of plain text, without the special tokens (EOS, SEP) that the tokenizer appends."""
    ids = tokenizer(text)["input_ids"]
    return ids[: len(ids) - num_appended_tokens(tokenizer)]


def num_appended_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens the tokenizer appends to every text, as with `add_eos_token=True`."""
    # Every vocabulary has its special tokens; one that is part of the text has 0 in the mask
    text = next(iter(tokenizer.all_special_tokens), "a")
    mask = tokenizer(text, return_special_tokens_mask=True)["special_tokens_mask"]
    return mask[::-1].index(0) if 0 in mask else 0


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, **chat_template_kwargs: Any) -> list[int]:
    """Return the token ids of a prompt, for sampling and for training."""
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    return _encode_messages(tokenizer, prompt, add_generation_prompt=True, **chat_template_kwargs)


def _encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> list[int]:
    template: Any = tokenizer.apply_chat_template  # its return annotation is a union of all its options
    return template(messages, return_dict=True, **options)["input_ids"]


def chat_options(row: Row) -> ChatOptions:
    """Return the arguments for `apply_chat_template` from the columns `tools` and `chat_template_kwargs` of a row."""
    tools = row.get("tools")
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools} if tools else {}
    return options | (row.get("chat_template_kwargs") or {})


class WithoutAppendedTokens:
    """A tokenizer for TRL's `_prepare_dataset`, which would train on a second EOS if the tokenizer appends one.

    Remove this once TRL strips the appended token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.apply_chat_template, self.decode = tokenizer.apply_chat_template, tokenizer.decode

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": encode_text(self.tokenizer, text)}


def tokenize_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    completions: Sequence[Completion],
    **chat_template_kwargs: Any,
) -> tuple[list[int], list[list[int]]]:
    """Tokenize a prompt with each of its completions, like TRL's `DPOTrainer`; return the ids of the prompt and each.

    A prompt and a completion are tokenized together, because tokens may merge at the boundary. All completions begin
    at the first token where any of these sequences differs from the tokens of the prompt alone. A plain-text
    completion ends with exactly one EOS; the chat template ends a conversational one.

    Raise `TypeError` if a completion is not in the format of the prompt.
    """
    for index, completion in enumerate(completions):
        if not isinstance(completion, type(prompt)):
            raise TypeError(
                f"Completion {index} is {type(completion).__name__} and its prompt is {type(prompt).__name__}: give "
                "both as plain text, or both as lists of messages."
            )

    def encode(completion: Completion) -> list[int]:
        if isinstance(prompt, str) or isinstance(completion, str):
            eos = str(tokenizer.eos_token)
            return encode_text(tokenizer, f"{prompt}{str(completion).removesuffix(eos)}{eos}")
        return _encode_messages(tokenizer, [*prompt, *completion], **chat_template_kwargs)

    prompt_ids = prompt_token_ids(tokenizer, prompt, **chat_template_kwargs)
    both_ids = [encode(completion) for completion in completions]
    end = common_length([prompt_ids, *both_ids])
    if end < len(prompt_ids):
        logger.warning_once(
            "The tokens of a prompt differ from the start of the tokenized prompt + completion, because tokens merge "
            "at the boundary or the chat template formats the prompt differently. The completion begins where they "
            "differ, so the policy trains and samples in different contexts. End prompts at a token boundary. (Logged "
            f"once, for {tokenizer.decode(prompt_ids[end:])!r}.)"
        )
    return prompt_ids[:end], [ids[end:] for ids in both_ids]


def merge_equal_in_training(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], completions: Sequence[Sequence[Completion]]
) -> list[list[Completion]]:
    """Replace each candidate with the first one of its prompt that the chat template formats equally.

    Templates of thinking models drop the text before `</think>`. Candidates that differ only there have equal tokens
    in training, so they are duplicates; their number is logged once. Each row has `prompt`, and optionally `tools`
    and `chat_template_kwargs`.
    """
    merged, num_merged = [list(candidates) for candidates in completions], 0
    for row, candidates in zip(rows, merged, strict=True):
        if isinstance(row["prompt"], str) or tokenizer.chat_template is None:
            continue
        first: dict[str, Completion] = {}
        for place, candidate in enumerate(candidates):
            messages = [*row["prompt"], *candidate]
            written = str(tokenizer.apply_chat_template(messages, tokenize=False, **chat_options(row)))
            candidates[place] = first.setdefault(written, candidate)
            num_merged += candidates[place] != candidate
    if num_merged and tokenizer not in _warned:
        _warned.add(tokenizer)
        logger.warning(
            "The chat template formats %d of %d candidates like another candidate of their prompt, as when it drops "
            "the text before `</think>`. They have equal tokens in training and count as one. Set a "
            "`tokenizer.chat_template` that keeps the text, such as `trl.get_training_chat_template(tokenizer)`, or "
            "have the ranker score the text that the template keeps. (Logged once, for the first candidates.)",
            num_merged,
            sum(map(len, merged)),
        )
    return merged


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel | PreTrainedConfig
) -> None:
    """Raise `ValueError` unless the model has an embedding for every token of the tokenizer. It may have more.

    Image, video and audio tokens are ignored, because a text-only model, such as Gemma 3 1B, may share the tokenizer
    of a multimodal one.
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
    """Return the decoder start token of an encoder-decoder model; raise `ValueError` if its config has none."""
    for config in (model.generation_config, model.config):
        if (token := getattr(config, "decoder_start_token_id", None)) is not None:
            return token
    raise ValueError(
        f"{type(model).__name__} is an encoder-decoder without `decoder_start_token_id`. Set it in `model.config`."
    )
