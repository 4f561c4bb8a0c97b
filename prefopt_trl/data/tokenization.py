"""A prompt and its completions as token ids, cut where TRL's `DPOTrainer` cuts them."""

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

_told: weakref.WeakSet[PreTrainedTokenizerBase] = weakref.WeakSet()  # of the line about equal candidates


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of plain text without what the tokenizer appends by itself (EOS, SEP): the text goes on."""
    ids = tokenizer(text)["input_ids"]
    return ids[: len(ids) - num_appended_tokens(tokenizer)]


def num_appended_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens the tokenizer appends to every text, as with `add_eos_token=True`."""
    # A special token is in every vocabulary; where it is part of the text, the mask has 0 for it
    text = next(iter(tokenizer.all_special_tokens), "a")
    mask = tokenizer(text, return_special_tokens_mask=True)["special_tokens_mask"]
    return mask[::-1].index(0) if 0 in mask else 0


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, **chat_template_kwargs: Any) -> list[int]:
    """Return the token ids of a prompt, as sampling and training both read them."""
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    return _encode_messages(tokenizer, prompt, add_generation_prompt=True, **chat_template_kwargs)


def _encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> list[int]:
    template: Any = tokenizer.apply_chat_template  # which is typed for one of the values that it may return
    return template(messages, return_dict=True, **options)["input_ids"]


def chat_options(row: Row) -> ChatOptions:
    """Return the arguments for `apply_chat_template` in the columns `tools` and `chat_template_kwargs` of a row."""
    tools = row.get("tools")
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools} if tools else {}
    return options | (row.get("chat_template_kwargs") or {})


class WithoutAppendedTokens:
    """A tokenizer for TRL's `_prepare_dataset`, which would train on a second EOS where the tokenizer appends one.

    It may go once TRL leaves that out.
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
    """Tokenise a prompt with each of its completions, as TRL's `DPOTrainer` does for two; return the ids of each.

    A prompt and a completion are tokenised together, because tokens may merge where they meet; the completions begin
    where the first of them departs from the tokens of the prompt alone. A completion in plain text ends with one EOS
    (TRL leaves two where the tokenizer appends one by itself); the chat template ends one that is conversational.

    Raise `TypeError` if a completion is not in the prompt's format.
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
            "A prompt's tokens are not those that it has before a completion, because tokens merge where the two meet "
            "or the chat template writes it otherwise. The completion begins where they differ, and the policy learns "
            "in a context other than the one it samples in. End prompts where a token ends. (Said once, of "
            f"{tokenizer.decode(prompt_ids[end:])!r}.)"
        )
    return prompt_ids[:end], [ids[end:] for ids in both_ids]


def merge_equal_in_training(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], completions: Sequence[Sequence[Completion]]
) -> list[list[Completion]]:
    """Replace each candidate by the first of its prompt that the chat template writes alike.

    Templates of thinking models leave out what stands before `</think>`. Candidates that differ only there have equal
    tokens in training, so they are repeats. One logged line counts them. `rows` have `prompt`, and perhaps `tools` and
    `chat_template_kwargs`.
    """
    merged, num_merged = [list(candidates) for candidates in completions], 0
    for row, candidates in zip(rows, merged, strict=True):
        if isinstance(row["prompt"], str) or tokenizer.chat_template is None:  # plain text is read as it is
            continue
        first: dict[str, Completion] = {}
        for place, candidate in enumerate(candidates):
            messages = [*row["prompt"], *candidate]
            written = str(tokenizer.apply_chat_template(messages, tokenize=False, **chat_options(row)))
            candidates[place] = first.setdefault(written, candidate)
            num_merged += candidates[place] != candidate
    if num_merged and tokenizer not in _told:
        _told.add(tokenizer)
        logger.warning(
            "The chat template writes %d of %d candidates as it writes another of their prompt, as when it leaves out "
            "what stands before `</think>`. They have equal tokens in training and count as one. Set a "
            "`tokenizer.chat_template` that keeps the text, such as `trl.get_training_chat_template(tokenizer)`, or "
            "have the ranker judge what is left. (Said once, of the first candidates.)",
            num_merged,
            sum(map(len, merged)),
        )
    return merged


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel | PreTrainedConfig
) -> None:
    """Require that the model has an embedding for every token of the tokenizer. It may have more.

    Tokens that stand for images, videos or sounds are left out: a model of text alone, such as Gemma 3 of 1B, may
    share the tokenizer of one that sees.
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
    """Return the token that the decoder of an encoder-decoder begins with, or raise if the model names none."""
    for config in (model.generation_config, model.config):
        if (token := getattr(config, "decoder_start_token_id", None)) is not None:
            return token
    raise ValueError(
        f"{type(model).__name__} is an encoder-decoder without `decoder_start_token_id`. Set it in `model.config`."
    )
