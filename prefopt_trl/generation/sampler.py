"""Sample completions of the policy with transformers' `generate`, each prompt computed once."""

import re
from bisect import bisect_left
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
)
from transformers.generation import GenerationMode
from transformers.utils import logging

from prefopt_trl.data.formats import Prompt
from prefopt_trl.data.tokenization import check_positions, check_vocabulary, decoder_start_token_id, tokenize_prompts
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.runtime.processes import is_main_process
from prefopt_trl.shared_prefix.decoding import (
    CountTokens,
    StopStringsInCompletion,
    decode_shared_prefix,
    reason_not_to_decode,
)
from prefopt_trl.shared_prefix.packing import WholeRows, left_pad
from prefopt_trl.shared_prefix.states import repeated_states, repeats_states
from prefopt_trl.shared_prefix.support import (
    evaluating,
    has_recurrent_layers,
    log_reason,
    partition_reason,
    reason_not_to_share_prefix,
)

logger = logging.get_logger(__name__)

# Options of `GenerationConfig` that are set here or change what `generate` returns
OWN_OPTIONS = {
    "do_sample",
    "eos_token_id",
    "length_penalty",  # of beams; the name is one of ours
    "max_length",
    "max_new_tokens",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "return_dict_in_generate",
    "temperature",
    "top_k",
    "top_p",
}
# Options that ignore padding. `min_length`, `no_repeat_ngram_size` and, before transformers 5.23, `repetition_penalty`
# count it as part of the prompt, so with any other option only prompts of equal length share a batch.
BLIND_TO_PADDING = {
    *("top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "stop_strings"),
    *("min_new_tokens", "exponential_decay_length_penalty", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens", "remove_invalid_values", "renormalize_logits"),
    "cache_implementation",
}
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # of byte fallback, as the decoder of `tokenizers` knows it
CONTEXT = 8  # tokens of the prompt that are decoded before a completion


@dataclass(frozen=True)
class Candidates:
    """Completions sampled for one prompt."""

    texts: list[str]  # without special tokens and stop strings; may repeat
    finished: list[bool]  # whether each ended with an EOS token or a complete stop string
    sampled: list["Sampled"] = field(default_factory=list)  # the tokens of each, with `keep_logps`


class Sampled(NamedTuple):
    """The tokens drawn for a completion, up to and including EOS, and their log-probability.

    `logp` is in nats, summed, under the model; None if the completion did not share its prompt.
    """

    ids: list[int]
    logp: float | None


def sample_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    num_completions: int,
    options: GenerationOptions | None = None,
    *,
    seed: int = 0,
    generation_kwargs: dict[str, object] | None = None,
    **changes: object,
) -> list[list[str]]:
    """Sample completions of each prompt from the model's distribution.

    RSO's Algorithm 1 needs samples of the policy, so only the options given here narrow the distribution. Of the
    model's `generation_config` only the EOS tokens are used, and `generate`'s default `top_k=50` is off.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model or encoder-decoder, on the device to sample on. Its training mode and generation
            config are restored afterwards.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with an EOS token (also used for padding without a pad token), and with a chat template for
            conversational prompts.
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts as plain text or as messages.
        num_completions (`int`):
            Completions per prompt.
        options ([`GenerationOptions`] or [`SamplingOptions`], *optional*):
            How to sample: `max_new_tokens`, `temperature` and so on.
        seed (`int`, *optional*, defaults to `0`):
            The same seed, prompts and options give the same completions. The global random state does not change.
        generation_kwargs (`dict`, *optional*):
            Further options of [`~transformers.GenerationConfig`], such as `{"stop_strings": ["\\n\\nHuman:"]}`. A stop
            string ends a completion and is removed from its text; one that begins in the prompt has no effect.
            With an option that depends on padding (`min_length`, `no_repeat_ngram_size`), only prompts of equal length
            are sampled together.
        **changes:
            Fields of `options` by name, in place of those in `options`.

    Returns:
        `list[list[str]]`: `num_completions` texts per prompt, in the order of `prompts`, without special tokens.

    Raises:
        TypeError: for a name that is no option.
        ValueError: for a number out of range, an option that sampling sets itself, an empty prompt (naming its row), a
            tokenizer without an EOS token or of another model's vocabulary, or conversational prompts without a chat
            template.

    Example:

    ```python
    texts = sample_completions(model, tokenizer, ["The sky is"], 4, max_new_tokens=8)
    ```
    """
    options = GenerationOptions.of(options, **changes)
    if type(num_completions) is not int or num_completions < 1:
        raise ValueError(f"`num_completions` must be a whole number, at least 1, got {num_completions!r}.")
    check_generation_kwargs(generation_kwargs)
    prompt_ids = tokenize_prompts(tokenizer, prompts, for_encoder=model.config.is_encoder_decoder)
    check_vocabulary(tokenizer, model)
    candidates = sample_candidates(
        model, tokenizer, prompt_ids, num_completions, options, seed=seed, generation_kwargs=generation_kwargs
    )
    return [candidate.texts for candidate in candidates]


def check_generation_kwargs(generation_kwargs: dict[str, object] | None) -> None:
    """Refuse options that transformers does not know, or that sampling sets; the `ValueError` names them."""
    given = generation_kwargs or {}
    known = vars(GenerationConfig())
    for name in sorted(given):
        if name not in known:
            raise ValueError(f"`generation_kwargs` has `{name}`, which transformers' `GenerationConfig` lacks.")
        if name in OWN_OPTIONS:
            raise ValueError(
                f"`generation_kwargs` has `{name}`, which sampling sets or takes as an argument. Leave it out."
            )
    if "" in _stop_strings(given):
        raise ValueError("`stop_strings` has an empty text, which every completion begins with. Leave it out.")


def _stop_strings(generation_kwargs: dict[str, Any]) -> list[str]:
    given = generation_kwargs.get("stop_strings")
    return [given] if isinstance(given, str) else list(given or [])


def sample_candidates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    num_completions: int,
    options: GenerationOptions,
    *,
    seed: int,
    generation_kwargs: dict[str, object] | None = None,
    keep_logps: bool = False,
    progress: bool = True,
) -> list[Candidates]:
    """Sample like [`sample_completions`] from tokenized prompts, and return texts, ends and, if asked for, tokens."""
    end_ids = eos_token_ids(model, tokenizer)
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    further: dict[str, Any] = dict(generation_kwargs or {})
    may_pad = further.keys() <= BLIND_TO_PADDING
    # Not in the config: `generate` does not pass the tokenizer on to `custom_generate`
    stop_strings = _stop_strings(further)
    further.pop("stop_strings", None)
    stops = [StopStringsInCompletion(tokenizer, stop_strings)] if stop_strings else []
    criteria = StoppingCriteriaList(stops)
    config = GenerationConfig(
        do_sample=True,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature or 1.0,
        top_p=options.top_p,
        top_k=options.top_k if options.temperature else 1,  # greedy
        eos_token_id=end_ids,
        pad_token_id=pad_token_id,
        **further,
    )
    check_positions(model, prompt_ids, options.max_new_tokens)
    in_decoder = model.config.is_encoder_decoder  # only the completions are in its rows
    if in_decoder:
        config.decoder_start_token_id = decoder_start_token_id(model)
    longest = max(map(len, prompt_ids), default=0)
    is_plain = config.get_generation_mode() is GenerationMode.SAMPLE and config.guidance_scale in (None, 1)
    is_plain &= not config.cache_implementation
    repeats = options.share_prefix and is_plain and has_recurrent_layers(model) and repeats_states(model)
    may_pad &= not repeats  # which would change the states
    shares = options.share_prefix and not repeats and _shares_prefix(model, is_plain, longest + options.max_new_tokens)
    prompts_at_once, completions_at_once = sizes_of_batch(model, num_completions, longest, options, shares)
    config.return_dict_in_generate = with_logps = shares and keep_logps
    generate = cast(Callable[..., Any], model.generate)
    # By default, `generate` waits for the other processes under ZeRO-3, even if the weights are gathered
    synced = partition_reason(model) is not None and torch.distributed.is_initialized()

    # Prompts of similar length share a batch; results keep the order of `prompt_ids`
    by_length = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]), reverse=True)
    groups = [list(rows) for _, rows in groupby(by_length, key=lambda row: may_pad or len(prompt_ids[row]))]
    batches = [rows[at : at + prompts_at_once] for rows in groups for at in range(0, len(rows), prompts_at_once)]
    starts = np.cumsum([0, *map(len, batches)]).tolist()
    results, sampled = [Candidates([], []) for _ in prompt_ids], 0
    bar = tqdm(
        total=len(prompt_ids) * num_completions * options.max_new_tokens,
        desc="Sampling",
        unit="token",
        unit_scale=True,
        leave=None,  # unless another bar counts prompts
        disable=not progress or not is_main_process(),
    )
    if not bar.disable:
        criteria.append(CountTokens(bar.update))
    with bar, sampling_mode(model):
        for start, rows in zip(starts, batches, strict=False):
            inputs = _pad([prompt_ids[row] for row in rows], pad_token_id, model)
            begin = 1 if in_decoder else inputs["input_ids"].shape[1]  # of the completions
            for stop in stops:
                stop.begin = begin
            for done in range(0, num_completions, completions_at_once):
                count = min(completions_at_once, num_completions - done)
                torch.manual_seed(int(np.random.SeedSequence([seed, start, done]).generate_state(1)[0]))
                how = {"custom_generate": decode_shared_prefix, "num_completions": count}
                if not shares:
                    how, config.num_return_sequences = {"synced_gpus": synced}, count
                    how |= repeated_states(model, inputs["input_ids"], count) if repeats else {}
                output = generate(**inputs, generation_config=config, stopping_criteria=criteria, **how)
                completions = (output.sequences if with_logps else output)[:, begin:].tolist()
                logps = output.logps.tolist() if with_logps else [None] * len(completions)
                for index, (ids, logp) in enumerate(zip(completions, logps, strict=True)):
                    row = rows[index // count]
                    before = [] if in_decoder else prompt_ids[row]
                    text, token_ids, finished = read_row(tokenizer, before, ids, end_ids, stop_strings)
                    results[row].texts.append(text)
                    results[row].finished.append(finished)
                    if keep_logps:
                        results[row].sampled.append(Sampled(token_ids, logp))
                sampled += len(completions)
                bar.update(sampled * options.max_new_tokens - bar.n)  # those that ended early
    return results


def _shares_prefix(model: PreTrainedModel, is_plain: bool, row_length: int) -> bool:
    """Return whether completions can share their prompt; if not, log the reason once."""
    if not is_plain:
        log_reason(model, "`generation_kwargs` ask for a cache, guidance or a search that only `generate` has")
        return False
    if reason_not_to_share_prefix(model, row_length) is not None:
        return False
    with sampling_mode(model):
        return reason_not_to_decode(model) is None


def sizes_of_batch(
    model: PreTrainedModel, num_completions: int, prompt_length: int, options: GenerationOptions, shares: bool
) -> tuple[int, int]:
    """Return how many prompts to sample at a time, and how many completions of each.

    Without a `generation_batch_size`, as many as `generation_memory_budget` holds if every completion has
    `max_new_tokens`. Memory counts keys and values (twice, while they are copied to grow) and the float32 scores of
    the next token with their working copies.
    """
    batch_size = options.generation_batch_size
    if batch_size is None:
        config: Any = model.config.get_text_config()
        all_heads = getattr(config, "num_attention_heads", 1)  # a recurrent model has none
        num_heads = getattr(config, "num_key_value_heads", None) or all_heads
        sizes = (getattr(config, name, None) for name in ("head_dim", "d_kv"))  # the latter in T5
        head_size = next(filter(None, sizes), config.hidden_size // all_heads)
        per_token = 2 * 2 * config.num_hidden_layers * num_heads * head_size * model.dtype.itemsize
        num_tokens = options.max_new_tokens + (0 if shares else prompt_length)
        per_completion = per_token * num_tokens + 24 * config.vocab_size
        per_prompt = per_token * prompt_length if shares else 0
        budget = options.generation_memory_budget * 2**30
        prompts = int(budget // (per_prompt + num_completions * per_completion))
        if prompts:
            return prompts, num_completions
        batch_size = max(int((budget - per_prompt) // per_completion), 1)
        logger.warning_once(
            f"`generation_memory_budget`={options.generation_memory_budget} GiB holds {batch_size} of the "
            f"{num_completions} completions of a prompt at a time, so it is computed several times. Raise it where "
            "there is more memory."
        )
    return max(batch_size // num_completions, 1), min(batch_size, num_completions)


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the EOS tokens of the tokenizer and of the model, which may have others that end a turn."""
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` has no EOS token, so completions would never end. Set `tokenizer.eos_token`.")
    own = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})


@contextmanager
def sampling_mode(model: PreTrainedModel) -> Iterator[None]:
    """Within, use evaluation mode, a forked random state and an empty generation config."""
    # `generate` fills unset options from the model's config, which may narrow the distribution. A PEFT model may have
    # a second config.
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
    """Pad prompts for `generate`: left for decoder-only models, right for encoder-decoders."""
    if model.config.is_encoder_decoder:
        return WholeRows(prompt_ids, pad_token_id, model.device).inputs
    inputs = left_pad(prompt_ids, pad_token_id, model.device)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def read_row(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    ids: list[int],
    eos_token_ids: list[int],
    stop_strings: list[str],
) -> tuple[str, list[int], bool]:
    """Return the text of a row up to EOS or a stop string, its tokens including EOS, and whether it ended."""

    def decode(end: int, skip_special_tokens: bool) -> str:
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        before, text = (cast(str, tokenizer.decode(part, **options)) for part in (context, context + ids[:end]))
        if text.startswith(before):
            return text[len(before) :]
        logger.warning_once(
            "The tokenizer decodes the end of a prompt differently before a completion, so completions are decoded "
            f"without it and may lose their leading space. (Logged once, for {before!r}.)"
        )
        return cast(str, tokenizer.decode(ids[:end], **options))

    # Decode after the end of the prompt, because LLaMA's decoder drops the leading space of a text. Not after bytes,
    # because the decoder joins neighboring bytes and turns all of them into U+FFFD if some are invalid.
    last = len(prompt_ids)
    while last and BYTE_TOKEN.fullmatch(str(tokenizer.convert_ids_to_tokens(prompt_ids[last - 1]))):
        last -= 1
    context = prompt_ids[:last][-CONTEXT:]
    end = next((place for place, token in enumerate(ids) if token in eos_token_ids), len(ids))
    text = decode(end, skip_special_tokens=True)
    found = [text.index(stop) for stop in stop_strings if stop in text]

    def has_stopped(place: int) -> bool:  # a stop string may itself be a special token, such as the end of a turn
        return any(stop in decode(place + 1, special) for stop in stop_strings for special in (True, False))

    last = bisect_left(range(end), True, key=has_stopped)  # padding follows a stop string
    return text[: min(found, default=len(text))], ids[: last + 1], last < len(ids)
