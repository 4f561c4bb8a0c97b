"""A decoding loop for `generate` that prefills each prompt once for many completions and stores its keys once."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode, logits_process
from transformers.generation import stopping_criteria as stopping
from transformers.utils import ModelOutput

from prefopt_trl.shared_prefix.attention import PrefixCache, attend_to_prefix, with_cache
from prefopt_trl.shared_prefix.support import architecture_reason, evaluating, log_reason, run_probe

# Finished rows stay in the batch, as padding, until they are this share of it: removing them copies all other rows
DEAD_SHARE = 0.125

DRAWS = {GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH}
SET_HERE = {"attention_mask", "position_ids", "use_cache", "logits_to_keep"}  # replaces what `generate` passes


class CountTokens(stopping.StoppingCriteria):
    """Report the number of new tokens to `count`, such as the `update` of a progress bar; never stop a row."""

    def __init__(self, count: Callable[[int], object]) -> None:
        self.count = count

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.count(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class StopStringsInCompletion(stopping.StopStringCriteria):
    """Stop a row at a stop string in its completion; transformers also matches one that begins in the prompt.

    Set `begin` to the column of the first completion token.
    """

    begin = 0

    def __call__(self, input_ids: Any, scores: torch.FloatTensor, **kwargs: object) -> torch.Tensor:
        return super().__call__(input_ids[:, self.begin :], scores, **kwargs)


# These treat each row separately and keep no state between steps, so finished rows can be removed. With any other
# processor or criterion, such as a user's, all rows stay to the end, as in `generate`.
STATELESS_NAMES = (
    "TemperatureLogitsWarper TopKLogitsWarper TopPLogitsWarper MinPLogitsWarper TypicalLogitsWarper "
    "EpsilonLogitsWarper EtaLogitsWarper RepetitionPenaltyLogitsProcessor NoRepeatNGramLogitsProcessor "
    "MinLengthLogitsProcessor MinNewTokensLengthLogitsProcessor NoBadWordsLogitsProcessor "
    "SequenceBiasLogitsProcessor SuppressTokensLogitsProcessor SuppressTokensAtBeginLogitsProcessor "
    "ForcedEOSTokenLogitsProcessor ExponentialDecayLengthPenalty InfNanRemoveLogitsProcessor LogitNormalization "
    "MaxLengthCriteria MaxTimeCriteria EosTokenCriteria StopStringCriteria"
)
STATELESS: set[type] = {
    CountTokens,
    StopStringsInCompletion,
    *(
        vars(module)[name]
        for module in (logits_process, stopping)
        for name in STATELESS_NAMES.split()
        if name in vars(module)
    ),
}


@dataclass
class SharedPrefixOutput(ModelOutput):
    """Output of [`decode_shared_prefix`] with `return_dict_in_generate=True`.

    Attributes:
        sequences (`torch.LongTensor` of shape `(num_prompts * num_completions, length)`):
            Prompts, padded on the left like the input, and completions, padded on the right.
        logps (`torch.Tensor` of shape `(num_prompts * num_completions,)`):
            Log-probability of each completion under the model, before any logits processor, in nats: summed over its
            tokens up to and including the last. Float64, from float32 logits.
    """

    sequences: torch.LongTensor | None = None
    logps: torch.Tensor | None = None


def decode_shared_prefix(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    num_completions: int = 1,
    **model_kwargs: Any,
) -> torch.Tensor | SharedPrefixOutput:
    """Sample completions like `generate`, with each prompt computed once and finished rows removed from the batch.

    Pass this as `custom_generate` to `generate`, which prepares the other arguments, with `num_completions` in place
    of `num_return_sequences`. All logits processors and stopping criteria apply. Rows are in the order of the prompts,
    `num_completions` for each. Completions have the same distribution as those of `generate`, but the draws differ
    for the same global random state. Greedy decoding gives the same tokens up to rounding.

    Decoding is exact if [`reason_not_to_share_prefix`] is None. The model runs in evaluation mode; its training mode
    and attention implementation are restored afterwards. No other thread may use the model meanwhile.

    `generate` does not forward `tokenizer`, `streamer`, `assistant_model` and `synced_gpus` to a custom function. Pass
    stop strings as `stopping_criteria=StoppingCriteriaList([StopStringCriteria(tokenizer, stop_strings)])`; the others
    have no effect.

    Args:
        num_completions (`int`, *optional*, defaults to `1`):
            Completions per prompt.

    Returns:
        `torch.LongTensor` of shape `(num_prompts * num_completions, length)`, or [`SharedPrefixOutput`] with
        `return_dict_in_generate=True`.

    Raises:
        RuntimeError: if all scores of a row are NaN or -inf.
        ValueError: for a model whose config rules out sharing, beam search, `num_return_sequences`, per-step outputs,
            guidance, a cache, and inputs other than text.

    Example:

    ```python
    sequences = model.generate(
        **inputs, do_sample=True, top_k=0, custom_generate=decode_shared_prefix, num_completions=64
    )
    ```
    """
    settings = _check(model, model_kwargs, logits_processor, generation_config, num_completions)
    with evaluating(model), torch.no_grad():
        rows = _Rows(input_ids, num_completions, generation_config, logits_processor, stopping_criteria)
        logits, cache, positions = _prefill(
            model,
            input_ids,
            model_kwargs.get("attention_mask"),
            model_kwargs.get("position_ids"),
            num_completions,
            rows.room,
            settings,
        )
        settings |= with_cache(model, cache)
        rows.append(logits)
        while rows.unfinished.any():
            kept = rows.drop_finished()
            if kept is not None:
                cache.keep_rows(kept)
                positions = positions[kept]
            with attend_to_prefix(model):  # not around logits processors, which may run a model too
                outputs = model(
                    input_ids=rows.last_tokens[:, None],
                    position_ids=positions[:, None],
                    **settings,
                )
            positions = positions + 1
            rows.append(outputs.logits[:, -1])
    sequences = rows.sequences()
    if not generation_config.return_dict_in_generate:
        return sequences
    return SharedPrefixOutput(sequences=cast(torch.LongTensor, sequences), logps=rows.all_logps)


def reason_not_to_decode(model: PreTrainedModel) -> str | None:
    """Say why `generate` of the installed transformers cannot run [`decode_shared_prefix`], or return None.

    Decode two tokens, so that an incompatible release disables sharing instead of failing the run. The reason is
    logged once per model. The model's own generation config must not request anything that is refused.
    """
    return log_reason(model, run_probe(_probe_generate, model))


def _probe_generate(model: PreTrainedModel) -> None:
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    config = GenerationConfig(max_new_tokens=2)
    generate: Any = model.generate
    generate(ids, attention_mask=ids, generation_config=config, custom_generate=decode_shared_prefix)


class _Rows:
    """The tokens of all rows, and the state of the rows that are still in the batch."""

    def __init__(
        self,
        input_ids: torch.Tensor,
        num_completions: int,
        config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
    ) -> None:
        self.length = input_ids.shape[1]
        self.room = config.max_length - self.length
        self.do_sample = config.do_sample
        self.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
        encoder_penalty = logits_process.EncoderRepetitionPenaltyLogitsProcessor
        changed = logits_process.RepetitionPenaltyLogitsProcessor, encoder_penalty  # modified below, so copied
        self.logits_processor = LogitsProcessorList(
            copy.copy(part) if type(part) in changed else part for part in logits_processor
        )
        for part in self.logits_processor:
            if type(part) is encoder_penalty:  # not needed once transformers 5.23, which does this, is the oldest
                repeated = part.encoder_input_ids.repeat_interleave(num_completions, dim=0)
                part.encoder_input_ids = cast(torch.LongTensor, repeated)
        self.stopping_criteria = stopping_criteria
        self.rows_may_leave = all(type(part) in STATELESS for part in [*logits_processor, *stopping_criteria])
        self._select_padding(lambda lengths: lengths.repeat_interleave(num_completions))
        prompts = input_ids.repeat_interleave(num_completions, dim=0)
        self.all_ids = torch.nn.functional.pad(prompts, (0, self.room), value=self.pad_token_id)
        exact = torch.float32 if input_ids.device.type == "mps" else torch.float64  # mps has no float64
        self.all_logps = torch.zeros(len(prompts), dtype=exact, device=input_ids.device)
        self.with_logps = config.return_dict_in_generate
        self.index = torch.arange(len(prompts), device=input_ids.device)  # index of each row in the batch among all
        self.unfinished = torch.ones_like(self.index, dtype=torch.bool)
        self.ids = self.all_ids.clone()

    @property
    def last_tokens(self) -> torch.Tensor:
        return self.ids[:, self.length - 1]

    def append(self, logits: torch.Tensor) -> None:
        """Choose the next token of each row in the batch from `logits` of shape `(num_rows, vocab_size)`."""
        logits = logits.to(self.ids.device, torch.float32)
        # Processors may modify their input in place
        scores = self.logits_processor(
            cast(torch.LongTensor, self.ids[:, : self.length]), logits.clone() if self.with_logps else logits
        )
        tokens = draw(scores) if self.do_sample else scores.argmax(dim=-1)
        if self.with_logps:
            logps = logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(dim=-1)
            self.all_logps[self.index] += logps.masked_fill(~self.unfinished, 0)
        self.ids[:, self.length] = tokens.masked_fill(~self.unfinished, self.pad_token_id)
        self.length += 1
        self.unfinished &= ~self.stopping_criteria(cast(torch.LongTensor, self.ids[:, : self.length]), None)

    def drop_finished(self) -> torch.Tensor | None:
        """Remove finished rows from the batch if they are many; return the indices of the others, or None."""
        num_left = int(self.unfinished.sum())
        if not self.rows_may_leave or num_left > (1 - DEAD_SHARE) * len(self.unfinished):
            return None
        self.all_ids[self.index] = self.ids
        kept = self.unfinished.nonzero().squeeze(1)
        self.index, self.ids, self.unfinished = self.index[kept], self.ids[kept], self.unfinished[kept]
        self._select_padding(lambda lengths: lengths[kept.to(lengths.device)])
        return kept

    def _select_padding(self, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Update the only per-row state of the processors: the end of each row's padding, for repetition penalty."""
        for part in self.logits_processor:
            ignored = getattr(part, "prompt_ignore_length", None)
            if type(part) is logits_process.RepetitionPenaltyLogitsProcessor and isinstance(ignored, torch.Tensor):
                part.prompt_ignore_length = select(ignored)

    def sequences(self) -> torch.Tensor:
        self.all_ids[self.index] = self.ids
        return self.all_ids[:, : self.length]


def draw(scores: torch.Tensor) -> torch.Tensor:
    """Draw one token per row from the softmax of `scores` `(num_rows, vocab_size)`, by inverse transform sampling.

    This draws one random number per row. `torch.multinomial` draws one per token of the vocabulary, which on a CPU
    takes longer than a small model's forward pass. Raise `RuntimeError` if scores are NaN, or -inf for all tokens.
    """
    dtype = torch.float32 if scores.device.type == "mps" else torch.float64
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=dtype)
    if not cumulative[:, -1].isfinite().all():
        raise RuntimeError(
            "A completion has no token to draw: its scores are NaN or infinite because the model overflows (load it "
            "in bfloat16 or float32), or logits processors rule all tokens out."
        )
    drawn = torch.rand(len(scores), 1, dtype=dtype, device=scores.device) * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the number drawn; never one of probability 0
    return torch.searchsorted(cumulative, drawn, right=True).squeeze(1).clamp(max=scores.shape[1] - 1)


def _prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,  # None if `generate` saw no padding
    position_ids: torch.Tensor | None,
    num_completions: int,
    room: int,
    settings: dict[str, object],
) -> tuple[torch.Tensor, PrefixCache, torch.Tensor]:
    """Run the prompts once; return the next-token logits of each row, the cache, and each row's next position."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    if position_ids is None:
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
    prompts = DynamicCache()
    outputs = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=position_ids,
        **settings,
        **with_cache(model, prompts),
    )
    counts = [num_completions] * len(input_ids)
    cache = PrefixCache(prompts, mask, counts, longest=room)
    next_positions = (position_ids[:, -1] + 1).repeat_interleave(num_completions)
    return outputs.logits[:, -1].repeat_interleave(num_completions, dim=0), cache, next_positions


def _check(
    model: PreTrainedModel,
    model_kwargs: dict[str, object],
    logits_processor: LogitsProcessorList,
    config: GenerationConfig,
    num_completions: int,
) -> dict[str, object]:
    """Raise `ValueError` for what cannot be shared, and return the settings to call the model with."""
    if reason := architecture_reason(model, config.max_length):
        raise ValueError(f"Completions of this model cannot share their prompt: {reason}. Use plain `generate`.")
    if num_completions < 1:
        raise ValueError(f"`num_completions` is {num_completions}. Give 1 or more.")
    if config.num_return_sequences != 1 or config.get_generation_mode() not in DRAWS:
        raise ValueError(
            "Completions that share their prompt are drawn independently: leave out `num_return_sequences`, "
            "`num_beams` and other search options, and set the number of completions with `num_completions`."
        )
    caches = [value for value in model_kwargs.values() if isinstance(value, Cache)]
    if config.cache_implementation is not None or any(cache.get_seq_length() > 0 for cache in caches):
        raise ValueError(
            "Completions that share their prompt use a special cache: leave out `cache_implementation` and "
            "`past_key_values`."
        )
    per_step = [
        name
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if getattr(config, name)
    ]
    if per_step:
        raise ValueError(f"`{per_step[0]}` is not supported. Leave it out, or use plain `generate`.")
    if any(
        isinstance(part, logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor) for part in logits_processor
    ):
        raise ValueError("`guidance_scale` runs the model a second time with another cache. Use plain `generate`.")
    # Decide by type, as `generate` passes more arguments with each release: None and an empty dictionary are absent
    # inputs, scalars hold for all rows, and anything else, such as a tensor, would have to be expanded
    settings: dict[str, object] = {"logits_to_keep": 1}
    for name, value in model_kwargs.items():
        if name in SET_HERE or value is None or isinstance(value, Cache) or (isinstance(value, dict) and not value):
            continue
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"{name} cannot be shared by completions. Use plain `generate`.")
        settings[name] = value
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in settings.items() if name in known}
