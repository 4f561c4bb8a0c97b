"""Prompts to sample from: their tokens, and the checks that are made before anything is sampled."""

import re
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Prompt, check_prompts
from prefopt_trl.data.tokenization import ChatOptions, prompt_token_ids


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
    """Refuse prompts whose completions may go beyond the positions that the model, as GPT-2, has a table of."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tables = [tensor for name, tensor in tensors if re.search(r"(wpe|position\w*)(\.weight)?$", name)]
    sizes = {len(table) for table in tables if table.dim() == 2}
    if not sizes & {limit, limit + 2}:  # OPT and BART have two more, which no token is at
        return
    apart = model.config.is_encoder_decoder
    lengths = list(map(len, prompt_ids))
    # The last token that is drawn is not read
    needed = [max(length, max_new_tokens) if apart else length + max_new_tokens - 1 for length in lengths]
    too_long = [row for row, num_positions in enumerate(needed) if num_positions > limit]
    if too_long:
        row = too_long[0]
        raise ValueError(
            f"The prompt of row {row} has {lengths[row]} tokens, and with `max_new_tokens`={max_new_tokens} it needs "
            f"{needed[row]} positions, of which the model has {limit} ({len(too_long)} of {len(lengths)} prompts do). "
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
    """Return the token ids of each prompt, as training reads them; the `ValueError` names the row of an empty one.

    `chat` has the arguments of each prompt for `apply_chat_template` (see [`chat_options`]). An encoder reads a whole
    text, so with `for_encoder` what the tokenizer appends stays, such as T5's EOS.
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
