"""Sampling completions of the policy itself with transformers' `generate`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import is_conversational

from prefopt_trl.data.formats import Prompt

# Options of `GenerationConfig` that are set here, or that would change what `generate` returns
OWN_OPTIONS = {
    "do_sample",
    "eos_token_id",
    "max_length",
    "num_return_sequences",
    "pad_token_id",
    "return_dict_in_generate",
}


@dataclass(frozen=True)
class Candidates:
    """Completions sampled for one prompt.

    Attributes:
        texts (`list[str]`):
            One text per completion, without special tokens. Texts may repeat.
        finished (`list[bool]`):
            Whether each completion ended by itself, with an EOS token or a stop string, within `max_new_tokens`. A
            stop string is not part of the text.
    """

    texts: list[str]
    finished: list[bool]


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    num_completions: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int = 64,
    generation_kwargs: dict[str, Any] | None = None,
) -> list[list[str]]:
    """Sample completions of each prompt from the model's own distribution.

    RSO's Algorithm 1 needs samples of the policy itself, so nothing narrows the distribution unless asked for here:
    the sampling settings of the model's own `generation_config` (and `generate`'s default `top_k=50`) are not used,
    only its end-of-sequence tokens are.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model, on the device to sample on. Its training mode and generation config are as before
            when this returns or raises.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with an EOS token (which pads where there is no other token for it); with a chat template
            for conversational prompts.
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts as plain text or as messages.
        num_completions (`int`):
            Completions per prompt.
        max_new_tokens (`int`):
            Longest completion, in tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Greater than 0.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus threshold in (0, 1]; 1 keeps the whole distribution.
        top_k (`int`, *optional*, defaults to `0`):
            Most likely tokens kept; 0 keeps them all.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws. The same seed, prompts and `batch_size` give the same completions; the global random
            state is left alone.
        batch_size (`int`, *optional*, defaults to `64`):
            Completions generated at a time, over all prompts.
        generation_kwargs (`dict`, *optional*):
            Further options of [`~transformers.GenerationConfig`], such as `{"stop_strings": ["\\n\\nHuman:"]}`. A stop
            string is not part of the text.

    Returns:
        `list[list[str]]`: `num_completions` texts per prompt, in the order of `prompts`, without special tokens.

    Raises:
        ValueError: for a number out of range, an option given twice or unknown, an empty prompt (naming its row), a
            tokenizer without an EOS token, or conversational prompts without a chat template.

    Example:

    ```python
    texts = sample_completions(model, tokenizer, ["The sky is"], 4, max_new_tokens=8)
    assert len(texts[0]) == 4
    ```
    """
    options = generation_options(
        generation_kwargs, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k
    )
    if isinstance(prompts, str):
        raise TypeError("`prompts` is a single text. Give a list of prompts: `[prompt]`.")
    prompt_ids = tokenize_prompts(tokenizer, prompts)
    candidates = sample_candidates(
        model, tokenizer, prompt_ids, num_completions, seed=seed, batch_size=batch_size, **options
    )
    return [candidate.texts for candidate in candidates]


def generation_options(generation_kwargs: dict[str, Any] | None, **options: Any) -> dict[str, Any]:
    """`options` and `generation_kwargs` in one, which must not give an option twice or one that is not used."""
    further = generation_kwargs or {}
    unknown = further.keys() - vars(GenerationConfig()).keys()
    if unknown:
        raise ValueError(f"`generation_kwargs` has {_names(unknown)}, which transformers' `GenerationConfig` has not.")
    taken = further.keys() & (options.keys() | OWN_OPTIONS)
    if taken:
        raise ValueError(
            f"`generation_kwargs` has {_names(taken)}, which sampling sets itself or takes as an argument of that "
            "name. Leave it out."
        )
    return {**options, **further}


def _names(names: set[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def check_unused_columns(dataset: Dataset, where: str) -> None:
    """Refuse columns that would change how prompts are tokenised for training, and that sampling does not use.

    Raises:
        ValueError: naming them.
    """
    unused = {"tools", "chat_template_kwargs"} & set(dataset.column_names)
    if unused:
        raise ValueError(
            f"{where} has the column {' and '.join(sorted(unused))}, which sampling does not use. Write its content "
            "into the prompts and remove it with `dataset.remove_columns`."
        )


def check_prompts_fit(prompt_ids: Sequence[Sequence[int]], max_length: int | None) -> None:
    """Refuse prompts that leave no room for a completion.

    Raises:
        ValueError: naming the first row, and how many there are.
    """
    too_long = [row for row, ids in enumerate(prompt_ids) if max_length is not None and len(ids) >= max_length]
    if too_long:
        raise ValueError(
            f"The prompt of row {too_long[0]} has {len(prompt_ids[too_long[0]])} tokens and fills "
            f"`max_length`={max_length} ({len(too_long)} of {len(prompt_ids)} prompts do). Raise `max_length` or "
            "leave those rows out."
        )


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, as TRL's `DPOTrainer` tokenises it for training."""
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str | list):
            raise ValueError(
                f"The prompt of row {row} is {type(prompt).__name__}, not text or a list of messages. Leave the row "
                "out."
            )
    encode: Any = tokenizer
    if len(prompts) and is_conversational({"prompt": prompts[0]}):
        if tokenizer.chat_template is None:
            raise ValueError(
                "`prompts` are conversational and the tokenizer has no chat template. Set `tokenizer.chat_template`, "
                "or give the prompts as plain text."
            )
        encode = partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=True)
    ids = [encode(prompt)["input_ids"] for prompt in prompts]
    for row, prompt_ids in enumerate(ids):
        if not prompt_ids:
            raise ValueError(f"The prompt of row {row} is empty: it has no tokens to start from. Leave the row out.")
    return ids


def sample_candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    num_completions: int,
    *,
    seed: int,
    batch_size: int,
    progress: bool = True,
    **generation: Any,
) -> list[Candidates]:
    """As [`sample_completions`], for tokenised prompts, with whether each completion ended by itself."""
    if num_completions < 1 or batch_size < 1:
        raise ValueError(f"`num_completions`={num_completions} and `batch_size`={batch_size} must be at least 1.")
    if not generation["temperature"] > 0:
        raise ValueError(f"`temperature` must be greater than 0, got {generation['temperature']}.")
    if not 0 < generation["top_p"] <= 1:
        raise ValueError(f"`top_p` must be in (0, 1], got {generation['top_p']}.")
    if generation["top_k"] < 0 or generation["max_new_tokens"] < 1:
        raise ValueError(
            f"`top_k`={generation['top_k']} must be at least 0 and `max_new_tokens`={generation['max_new_tokens']} "
            "at least 1."
        )
    end_ids = eos_token_ids(model, tokenizer)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(do_sample=True, eos_token_id=end_ids, pad_token_id=pad_token_id, **generation)
    stop_strings = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or []
    matcher = {"tokenizer": tokenizer} if stop_strings else {}
    generate = cast(Callable[..., torch.Tensor], model.generate)

    # Prompts of like length go together; the order of results is that of `prompt_ids`
    by_length = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]), reverse=True)
    prompts_at_once = max(batch_size // num_completions, 1)
    results = [Candidates([], []) for _ in prompt_ids]
    bar = tqdm(
        total=len(prompt_ids) * num_completions, desc="Sampling completions", unit="completion", disable=not progress
    )
    with bar, _sampling_mode(model):
        for start in range(0, len(by_length), prompts_at_once):
            rows = by_length[start : start + prompts_at_once]
            inputs = _left_pad([prompt_ids[row] for row in rows], pad_token_id, model.device)
            for done in range(0, num_completions, batch_size):
                count = min(batch_size, num_completions - done)
                torch.manual_seed(int(np.random.SeedSequence([seed, start, done]).generate_state(1)[0]))
                config.num_return_sequences = count
                output = generate(**inputs, generation_config=config, **matcher)
                completions = output[:, inputs["input_ids"].shape[1] :].tolist()
                for index, ids in enumerate(completions):
                    row = rows[index // count]
                    text, finished = _read(tokenizer, prompt_ids[row], ids, end_ids, stop_strings)
                    results[row].texts.append(text)
                    results[row].finished.append(finished)
                bar.update(len(completions))
    return results


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-sequence tokens of the tokenizer and of the model, which may have further ones for ends of turns."""
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` has no EOS token, so completions would never end. Set `tokenizer.eos_token`.")
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})


@contextmanager
def _sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, a random stream and generation config of our own; all as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    # `generate` fills unset options from the model's own config, which may narrow the distribution. A PEFT model may
    # have one beside that of the model inside it.
    configured: list[Any] = [module for module in model.modules() if "generation_config" in vars(module)]
    own_configs = [module.generation_config for module in configured]
    model.eval()
    for module in configured:
        module.generation_config = GenerationConfig()
    every_accelerator = range(torch.accelerator.device_count())  # `torch.manual_seed` seeds them all
    try:
        with torch.random.fork_rng(devices=every_accelerator):
            yield
    finally:
        for module, own_config in zip(configured, own_configs, strict=True):
            module.generation_config = own_config
        for module in training:
            module.training = True


def _left_pad(ids: list[list[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    length = max(map(len, ids))
    padded = [[pad_token_id] * (length - len(row)) + row for row in ids]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in ids]
    return {
        "input_ids": torch.tensor(padded, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _read(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    ids: list[int],
    eos_token_ids: list[int],
    stop_strings: list[str],
) -> tuple[str, bool]:
    """Text of a generated row up to its first EOS token or stop string, and whether it ended by itself."""

    def decode(skip_special_tokens: bool) -> str:
        # Behind the end of its prompt: LLaMA's decoder would drop the space that the first word of a text begins with
        before = prompt_ids[-8:]
        prefix, text = (
            cast(
                str,
                tokenizer.decode(part, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False),
            )
            for part in (before, before + ids[:end])
        )
        return text.removeprefix(prefix)

    end = next((place for place, token in enumerate(ids) if token in eos_token_ids), len(ids))
    text = decode(skip_special_tokens=True)
    found = [text.index(stop) for stop in stop_strings if stop in text]
    # A stop string may itself be a special token, such as the one that ends a turn
    stopped = bool(found) or any(stop in decode(skip_special_tokens=False) for stop in stop_strings)
    return text[: min(found, default=len(text))], end < len(ids) or stopped
