"""Sampling completions of the policy itself with transformers' `generate`, each prompt computed once."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMode
from transformers.utils import logging

from prefopt_trl.data.formats import Prompt
from prefopt_trl.data.tokenization import check_vocabulary, decoder_start_token_id
from prefopt_trl.runtime.processes import is_main_process
from prefopt_trl.sampling.prompts import check_positions, tokenize_prompts
from prefopt_trl.shared_prefix.attention import left_pad
from prefopt_trl.shared_prefix.continuation import WholeRows, partition_reason, reason_not_to_share_prefix
from prefopt_trl.shared_prefix.decoding import CountTokens, decode_shared_prefix, reason_not_to_decode
from prefopt_trl.shared_prefix.support import evaluating, log_reason

logger = logging.get_logger(__name__)

# Options of `GenerationConfig` that are set here, or that would change what `generate` returns
OWN_OPTIONS = {
    "do_sample",
    "eos_token_id",
    "max_length",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "return_dict_in_generate",
}
# Options whose law does not depend on padding. Others may: to `min_length` and `no_repeat_ngram_size` it is part of
# the prompt, to `repetition_penalty` before transformers 5.23. With them only prompts of equal length share a batch.
BLIND_TO_PADDING = {
    *("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "stop_strings"),
    *("max_new_tokens", "min_new_tokens", "exponential_decay_length_penalty", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens", "remove_invalid_values", "renormalize_logits"),
    "cache_implementation",
}
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # of byte fallback, as the decoder of `tokenizers` knows it
CONTEXT = 8  # tokens of the prompt that a completion is decoded after


@dataclass(frozen=True)
class Candidates:
    """Completions sampled for one prompt.

    Attributes:
        texts (`list[str]`):
            One text per completion, without special tokens. Texts may repeat.
        finished (`list[bool]`):
            Whether each completion ended by itself, with an EOS token or a stop string, within `max_new_tokens`. A
            stop string is not part of the text.
        sampled (`list[Sampled]`):
            What was drawn for each completion; empty unless it was asked for.
    """

    texts: list[str]
    finished: list[bool]
    sampled: list["Sampled"] = field(default_factory=list)


class Sampled(NamedTuple):
    """The tokens that were drawn for a completion, up to and including the EOS token, and their log-probability.

    `logp` is in nats, summed, under the model itself; None where the completion did not share its prompt.
    """

    ids: list[int]
    logp: float | None


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
    batch_size: int | None = None,
    memory_budget: float = 4.0,
    share_prefix: str | bool = "auto",
    generation_kwargs: dict[str, Any] | None = None,
) -> list[list[str]]:
    """Sample completions of each prompt from the model's own distribution.

    RSO's Algorithm 1 needs samples of the policy itself, so nothing narrows the distribution unless asked for here:
    the sampling settings of the model's own `generation_config` (and `generate`'s default `top_k=50`) are not used,
    only its end-of-sequence tokens are.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model, or encoder-decoder, on the device to sample on. Its training mode and generation
            config are as before when this returns or raises.
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
            Seed of the draws. The same seed, prompts, `batch_size`, `memory_budget` and `share_prefix` give the same
            completions; the global random state is left alone.
        batch_size (`int`, *optional*):
            Completions generated at a time, over all prompts. By default as many as `memory_budget` holds.
        memory_budget (`float`, *optional*, defaults to `4.0`):
            GiB for what sampling needs beside the model: keys, values and scores of completions as long as they may
            be. Raise it on a large GPU; lower it where memory runs out.
        share_prefix (`str` or `bool`, *optional*, defaults to `"auto"`):
            Compute each prompt once for all its completions (see [`decode_shared_prefix`]). `"auto"`: where that is
            exact for the model; one logged line says why where it is not, and plain `generate` samples. `True`: raise
            an error there. `False`: plain `generate`.
        generation_kwargs (`dict`, *optional*):
            Further options of [`~transformers.GenerationConfig`], such as `{"stop_strings": ["\\n\\nHuman:"]}`. A stop
            string is not part of the text. Where an option would read padding as part of the prompt (`min_length`,
            `no_repeat_ngram_size`), only prompts of equal length are sampled together.

    Returns:
        `list[list[str]]`: `num_completions` texts per prompt, in the order of `prompts`, without special tokens.

    Raises:
        ValueError: for a number out of range, an option given twice or unknown, an empty prompt (naming its row), a
            tokenizer without an EOS token or of another model's vocabulary, conversational prompts without a chat
            template, or `share_prefix=True` where it would not be exact.

    Example:

    ```python
    texts = sample_completions(model, tokenizer, ["The sky is"], 4, max_new_tokens=8)
    ```
    """
    options = generation_options(
        generation_kwargs, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k
    )
    prompt_ids = tokenize_prompts(tokenizer, prompts, for_encoder=model.config.is_encoder_decoder)
    check_vocabulary(tokenizer, model)
    candidates = sample_candidates(
        model,
        tokenizer,
        prompt_ids,
        num_completions,
        seed=seed,
        batch_size=batch_size,
        memory_budget=memory_budget,
        share_prefix=share_prefix,
        **options,
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


def sample_candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    num_completions: int,
    *,
    seed: int,
    batch_size: int | None = None,
    memory_budget: float = 4.0,
    share_prefix: str | bool = "auto",
    keep_logps: bool = False,
    progress: bool = True,
    **generation: Any,
) -> list[Candidates]:
    """As [`sample_completions`], for tokenised prompts, with all that is known of the completions."""
    check_sampling(num_completions, generation, batch_size, memory_budget, share_prefix)
    end_ids = eos_token_ids(model, tokenizer)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options = {name: value for name, value in generation.items() if name != "stop_strings"}
    config = GenerationConfig(do_sample=True, eos_token_id=end_ids, pad_token_id=pad_token_id, **options)
    stop_strings = generation.get("stop_strings") or []
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    # Not as an option of the config: `generate` would lose the tokenizer on the way to a decoding function of ours
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, stop_strings)] if stop_strings else [])
    check_positions(model, prompt_ids, config.max_new_tokens)
    in_decoder = model.config.is_encoder_decoder
    if in_decoder:
        config.decoder_start_token_id = decoder_start_token_id(model)
    longest = max(map(len, prompt_ids), default=0)
    shares = _shares_prefix(model, share_prefix, config, longest + config.max_new_tokens)
    prompts_at_once, completions_at_once = sizes_of_batch(
        model, num_completions, longest, config.max_new_tokens, batch_size, memory_budget, shares
    )
    generate = cast(Callable[..., Any], model.generate)
    # `generate` would wait for the other processes wherever ZeRO-3 is on, also where the weights are gathered
    synced = partition_reason(model) is not None and torch.distributed.is_initialized()

    # Prompts of like length go together; the order of results is that of `prompt_ids`
    by_length = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]), reverse=True)
    may_pad = generation.keys() <= BLIND_TO_PADDING
    groups = [list(rows) for _, rows in groupby(by_length, key=lambda row: may_pad or len(prompt_ids[row]))]
    batches = [rows[at : at + prompts_at_once] for rows in groups for at in range(0, len(rows), prompts_at_once)]
    starts = np.cumsum([0, *map(len, batches)]).tolist()
    results, sampled = [Candidates([], []) for _ in prompt_ids], 0
    bar = tqdm(
        total=len(prompt_ids) * num_completions * config.max_new_tokens,
        desc="Sampling",
        unit="token",
        unit_scale=True,
        leave=None,  # unless another bar counts prompts
        disable=not progress or not is_main_process(),
    )
    if not bar.disable:
        criteria.append(CountTokens(bar.update))
    with bar, _sampling_mode(model):
        for start, rows in zip(starts, batches, strict=False):
            inputs = _pad([prompt_ids[row] for row in rows], pad_token_id, model)
            begin = 1 if in_decoder else inputs["input_ids"].shape[1]  # of the completions
            for done in range(0, num_completions, completions_at_once):
                count = min(completions_at_once, num_completions - done)
                torch.manual_seed(int(np.random.SeedSequence([seed, start, done]).generate_state(1)[0]))
                logps = None
                if shares:
                    config.return_dict_in_generate = keep_logps
                    sequences = generate(
                        **inputs,
                        generation_config=config,
                        stopping_criteria=criteria,
                        custom_generate=decode_shared_prefix,
                        num_completions=count,
                    )
                    if keep_logps:
                        sequences, logps = sequences.sequences, sequences.logps.tolist()
                else:
                    config.num_return_sequences = count
                    sequences = generate(
                        **inputs, generation_config=config, stopping_criteria=criteria, synced_gpus=synced
                    )
                completions = sequences[:, begin:].tolist()
                for index, ids in enumerate(completions):
                    result = results[rows[index // count]]
                    before = [] if in_decoder else prompt_ids[rows[index // count]]
                    text, token_ids, finished = _read(tokenizer, before, ids, end_ids, stop_strings)
                    result.texts.append(text)
                    result.finished.append(finished)
                    if keep_logps:
                        result.sampled.append(Sampled(token_ids, None if logps is None else logps[index]))
                sampled += len(completions)
                bar.update(sampled * config.max_new_tokens - bar.n)  # those that ended early
    return results


def check_sampling(
    num_completions: int,
    generation: dict[str, Any],
    batch_size: int | None,
    memory_budget: float,
    share_prefix: str | bool,
) -> None:
    """Refuse what cannot be sampled with, before anything is.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in {"num_completions": num_completions, "batch_size": batch_size}.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"`{name}` must be a whole number, at least 1, got {value!r}.")
    if not isinstance(memory_budget, int | float) or not 0 < memory_budget < math.inf:
        raise ValueError(f"`memory_budget` must be a number of GiB, greater than 0 and finite, got {memory_budget!r}.")
    if share_prefix not in ("auto", True, False):
        raise ValueError(f"`share_prefix` must be 'auto', True or False, got {share_prefix!r}.")
    if generation.get("stop_strings") == "" or "" in list(generation.get("stop_strings") or []):
        raise ValueError("`stop_strings` has an empty text, which every completion begins with. Leave it out.")
    for name in ("max_new_tokens", "top_k"):
        if not isinstance(generation[name], int):
            raise ValueError(f"`{name}` must be a whole number, got {generation[name]!r}.")
    if not generation["temperature"] > 0:
        raise ValueError(f"`temperature` must be greater than 0, got {generation['temperature']}.")
    if not 0 < generation["top_p"] <= 1:
        raise ValueError(f"`top_p` must be in (0, 1], got {generation['top_p']}.")
    if generation["top_k"] < 0 or generation["max_new_tokens"] < 1:
        raise ValueError(
            f"`top_k`={generation['top_k']} must be at least 0 and `max_new_tokens`={generation['max_new_tokens']} "
            "at least 1."
        )


def _shares_prefix(
    model: PreTrainedModel, share_prefix: str | bool, config: GenerationConfig, row_length: int
) -> bool:
    """Whether completions share their prompt; one logged line says why they do not, where they were to."""
    if not share_prefix:
        return False
    mode = config.get_generation_mode()
    reason = None
    if mode is not GenerationMode.SAMPLE or config.guidance_scale not in (None, 1) or config.cache_implementation:
        reason = "`generation_kwargs` ask for a cache, guidance or a search that only `generate` has"
        log_reason(model, reason)
    reason = reason or reason_not_to_share_prefix(model, row_length)
    if reason is None:
        with _sampling_mode(model):
            reason = reason_not_to_decode(model)
    if reason is not None and share_prefix is True:
        raise ValueError(f"`share_prefix=True` cannot be exact: {reason}. Set it to 'auto', or leave it out.")
    return reason is None


def sizes_of_batch(
    model: PreTrainedModel,
    num_completions: int,
    prompt_length: int,
    max_new_tokens: int,
    batch_size: int | None,
    memory_budget: float,
    shares: bool,
) -> tuple[int, int]:
    """How many prompts to sample at a time, and how many completions of each.

    Without a `batch_size`, as many as `memory_budget` GiB hold if every completion were as long as it may be. What is
    counted are keys and values (twice, while they are copied to grow) and the float32 scores of the next token with
    their working copies.
    """
    if batch_size is None:
        config: Any = model.config.get_text_config()
        all_heads = getattr(config, "num_attention_heads", 1)  # a recurrent model has none
        num_heads = getattr(config, "num_key_value_heads", None) or all_heads
        sizes = (getattr(config, name, None) for name in ("head_dim", "d_kv"))  # the latter in T5
        head_size = next(filter(None, sizes), config.hidden_size // all_heads)
        per_token = 2 * 2 * config.num_hidden_layers * num_heads * head_size * model.dtype.itemsize
        per_completion = per_token * (max_new_tokens + (0 if shares else prompt_length)) + 24 * config.vocab_size
        per_prompt = per_token * prompt_length if shares else 0
        budget = memory_budget * 2**30
        prompts = int(budget // (per_prompt + num_completions * per_completion))
        if prompts:
            return prompts, num_completions
        batch_size = max(int((budget - per_prompt) // per_completion), 1)
        logger.warning_once(
            f"`memory_budget`={memory_budget} GiB holds {batch_size} of the {num_completions} completions of a prompt "
            "at a time, so it is computed several times. Raise it where there is more memory."
        )
    return max(batch_size // num_completions, 1), min(batch_size, num_completions)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-sequence tokens of the tokenizer and of the model, which may have further ones for ends of turns."""
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` has no EOS token, so completions would never end. Set `tokenizer.eos_token`.")
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})


@contextmanager
def _sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, a random stream and generation config of our own; all as it was afterwards."""
    # `generate` fills unset options from the model's own config, which may narrow the distribution. A PEFT model may
    # have one beside that of the model inside it.
    configured: list[Any] = [module for module in model.modules() if "generation_config" in vars(module)]
    own_configs = [module.generation_config for module in configured]
    for module in configured:
        module.generation_config = GenerationConfig()
    every_accelerator = range(torch.accelerator.device_count())  # `torch.manual_seed` seeds them all
    try:
        with evaluating(model), torch.random.fork_rng(devices=every_accelerator):
            yield
    finally:
        for module, own_config in zip(configured, own_configs, strict=True):
            module.generation_config = own_config


def _pad(prompt_ids: list[list[int]], pad_token_id: int, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs of `generate`: a decoder goes on where its prompt ends, and an encoder counts from where it begins."""
    if model.config.is_encoder_decoder:
        return WholeRows(prompt_ids, pad_token_id, model.device).inputs
    inputs = left_pad(prompt_ids, pad_token_id, model.device)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _read(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    ids: list[int],
    eos_token_ids: list[int],
    stop_strings: list[str],
) -> tuple[str, list[int], bool]:
    """Text of a generated row up to its first EOS token or stop string, its tokens up to and including EOS, and
    whether it ended by itself."""

    def decode(skip_special_tokens: bool) -> str:
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        before, text = (cast(str, tokenizer.decode(part, **options)) for part in (context, context + ids[:end]))
        if text.startswith(before):
            return text[len(before) :]
        logger.warning_once(
            "The tokenizer decodes the end of a prompt otherwise before a completion. Completions are decoded without "
            f"it, which may cost them the space that they begin with. (Said once, of {before!r}.)"
        )
        return cast(str, tokenizer.decode(ids[:end], **options))

    # Decoded after the end of its prompt: LLaMA's decoder drops the space that the first word of a text begins with.
    # Not after bytes: the decoder reads neighboring bytes as one, and writes all as U+FFFD where some are invalid.
    last = len(prompt_ids)
    while last and BYTE_TOKEN.fullmatch(str(tokenizer.convert_ids_to_tokens(prompt_ids[last - 1]))):
        last -= 1
    context = prompt_ids[:last][-CONTEXT:]
    end = next((place for place, token in enumerate(ids) if token in eos_token_ids), len(ids))
    text = decode(skip_special_tokens=True)
    found = [text.index(stop) for stop in stop_strings if stop in text]
    # A stop string may itself be a special token, such as the one that ends a turn
    stopped = bool(found) or any(stop in decode(skip_special_tokens=False) for stop in stop_strings)
    return text[: min(found, default=len(text))], ids[: end + 1], end < len(ids) or stopped
