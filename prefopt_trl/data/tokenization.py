"""Tokenize a prompt and its completions, split at the same token as in TRL's `DPOTrainer`."""

import json
import re
import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from prefopt_trl.data.formats import Completion, Message, Prompt, Row, check_prompts
from prefopt_trl.shared_prefix.packing import common_length

logger = logging.get_logger(__name__)

ChatOptions: TypeAlias = dict[str, object]  # arguments for `apply_chat_template`

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


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, **chat_template_kwargs: object) -> list[int]:
    """Return the token ids of a prompt, for sampling and for training."""
    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    return _encode_messages(tokenizer, prompt, add_generation_prompt=True, **chat_template_kwargs)


def _encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: object) -> list[int]:
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
    **chat_template_kwargs: object,
) -> tuple[list[int], list[list[int]]]:
    """Tokenize a prompt with each of its completions, like TRL's `DPOTrainer`; return the ids of the prompt and each.

    A prompt and a completion are tokenized together, because tokens may merge at the boundary. All completions begin
    at the first token where any of these sequences differs from the tokens of the prompt alone. A plain-text
    completion ends with exactly one EOS; the chat template ends a conversational one. Completions have the format of
    the prompt.
    """

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
            apply: Any = tokenizer.apply_chat_template
            written = apply(messages, tokenize=False, **chat_options(row))
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


def check_prompts_fit(prompt_ids: Sequence[Sequence[int]], max_length: int | None) -> None:
    """Refuse prompts that leave no room for a completion; the `ValueError` names the first row."""
    too_long = [row for row, ids in enumerate(prompt_ids) if max_length is not None and len(ids) >= max_length]
    if too_long:
        raise ValueError(
            f"The prompt of row {too_long[0]} has {len(prompt_ids[too_long[0]])} tokens and fills "
            f"`max_length`={max_length} ({len(too_long)} of {len(prompt_ids)} prompts do). Raise `max_length` or "
            "leave those rows out."
        )


def check_positions(model: PreTrainedModel, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuse prompts whose completions may exceed the learned position embeddings of a model such as GPT-2."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tables = [tensor for name, tensor in tensors if re.search(r"(wpe|position\w*)(\.weight)?$", name)]
    sizes = {len(table) for table in tables if table.dim() == 2}
    if not sizes & {limit, limit + 2}:  # OPT and BART have two unused ones more
        return
    apart = model.config.is_encoder_decoder
    lengths = list(map(len, prompt_ids))
    # The last sampled token is not an input
    needed = [max(length, max_new_tokens) if apart else length + max_new_tokens - 1 for length in lengths]
    too_long = [row for row, num_positions in enumerate(needed) if num_positions > limit]
    if too_long:
        row = too_long[0]
        raise ValueError(
            f"The prompt of row {row} has {lengths[row]} tokens and with `max_new_tokens`={max_new_tokens} needs "
            f"{needed[row]} positions, but the model has {limit} ({len(too_long)} of {len(lengths)} prompts do). "
            "Lower `max_new_tokens` or leave those rows out; the commands leave out those that exceed "
            f"`max_length`, so give them `max_length`={limit}."
        )


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    chat: Sequence[ChatOptions] | None = None,
    *,
    for_encoder: bool = False,
) -> list[list[int]]:
    """Return the token ids of each prompt, as in training; raise `ValueError` with the row of an empty one.

    `chat` has the arguments of each prompt for `apply_chat_template` (see [`chat_options`]). With `for_encoder` the
    special tokens that the tokenizer appends are kept, such as T5's EOS.
    """
    check_prompts(prompts)
    made = []
    for row, (prompt, options) in enumerate(zip(prompts, chat or [{}] * len(prompts), strict=True)):
        if not isinstance(prompt, str) and tokenizer.chat_template is None:
            raise ValueError(
                "`prompts` are conversational and the tokenizer has no chat template. Set `tokenizer.chat_template`, "
                "or give the prompts as plain text."
            )
        is_whole = for_encoder and isinstance(prompt, str)
        ids = tokenizer(prompt)["input_ids"] if is_whole else prompt_token_ids(tokenizer, prompt, **options)
        if not ids:
            raise ValueError(f"The prompt of row {row} is empty: it has no tokens to start from. Leave the row out.")
        made.append(ids)
    return made


def check_tokens(dataset: Dataset, columns: list[str], name: str) -> None:
    """Raise `ValueError` for a row without a prompt and warn about equal completions, in the first 10,000 rows."""
    rows = dataset.select(range(min(len(dataset), 10_000)))
    for row, (ids, prompt) in enumerate(zip(rows["prompt_ids"], rows["prompt"], strict=True)):
        if "prompt" in columns and prompt and not ids:
            raise ValueError(
                f"The prompt of row {row} of the {name} dataset, {prompt!r}, is left without a token: the tokenizer "
                "merges it with the completion. Begin the completion with a space, or leave the row out."
            )
        if not ids or ("prompt" not in columns and not prompt):
            raise no_prompt(row, name, columns)
    if "completion_ids" in rows.column_names:
        all_ids, all_texts = rows["completion_ids"], rows["completions"]
    else:
        all_ids = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
        all_texts = zip(rows["chosen"], rows["rejected"], strict=True)
    equal = sum(
        len(set(map(tuple, ids))) < len(set(map(repr, texts))) for ids, texts in zip(all_ids, all_texts, strict=True)
    )
    if equal:
        logger.warning(
            "%d of the first %d rows of the %s dataset have completions of different text and equal tokens, as when "
            "the chat template drops the text before `</think>`. Nothing is learned from comparing them. Set a "
            "`tokenizer.chat_template` that keeps the text, or leave the rows out.",
            equal,
            len(rows),
            name,
        )


def warn_of_full_prompts(num_rows: int, num_left: int, name: str, max_length: int | None) -> None:
    """Warn about rows left out because their prompt fills `max_length`; raise `ValueError` if all were."""
    if num_left == num_rows:
        return
    message = (
        f"{num_rows - num_left} of {num_rows} rows of the {name} dataset have a prompt that fills "
        f"`max_length`={max_length} and leaves no room for a completion"
    )
    if num_left == 0:
        raise ValueError(f"{message}. Raise `max_length` or shorten the prompts.")
    logger.warning("%s; they are left out, as TRL does. Raise `max_length` to keep them.", message)


def no_prompt(row: int, name: str, columns: list[str]) -> ValueError:
    return ValueError(
        f"Row {row} of the {name} dataset has no prompt; its columns are {', '.join(columns)}. Without a column "
        "`prompt`, the prompt is the common beginning of `chosen` and `rejected`. Rename yours with "
        "`dataset.rename_column(old, new)`."
    )
