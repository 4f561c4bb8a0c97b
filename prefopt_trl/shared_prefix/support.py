"""Decide which models can share a prompt exactly, from their config and from a probe of the model."""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel

from prefopt_trl.shared_prefix.attention import (
    PrefixCache,
    attend_to_prefix,
    check_attended,
    with_cache,
    without_head,
)
from prefopt_trl.shared_prefix.packing import (
    IGNORE_INDEX,
    PackedBatch,
    WholeRows,
    left_pad,
    pack_rows,
    pair_groups,
)

logger = logging.getLogger(__name__)

# A causal language model's forward pass, whose outputs have `.logits`: the model, or its own forward inside a wrapper
Forward: TypeAlias = Callable[..., Any]

# Largest mean difference of log-probabilities in the probe that counts as rounding, in nats, for log-probabilities
# around 10. Half precision rounds the hidden states, so two correct orders of summation differ by that much.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}

PROBE_LENGTH = 12  # tokens in the longest row
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}

# Hidden states of the tokens of a row from an index on: the index, and states of shape (num_tokens, size)
States: TypeAlias = tuple[int, torch.Tensor]

Reasons: TypeAlias = dict[Callable[..., str | None], str | None]  # by probe

_probed: weakref.WeakKeyDictionary[torch.nn.Module, Reasons] = weakref.WeakKeyDictionary()
_logged: weakref.WeakKeyDictionary[torch.nn.Module, set[str]] = weakref.WeakKeyDictionary()


def reason_not_to_share(model: PreTrainedModel, forward: Forward, row_length: int) -> str | None:
    """Say why this model's prompts must not be shared, or return None if sharing is exact.

    Each reason is logged once per model. `row_length` is the number of tokens of the longest unpacked row, which
    decides whether a sliding window matters.
    """
    reason = config_reason(model, PROBE_LENGTH)
    if reason is None:
        # Probe before checking the length: processes that share a model's weights must probe it together
        reason = run_probe(probe_reason, model, forward) or config_reason(model, row_length)
    return log_reason(model, reason)


def reason_not_to_pack(model: PreTrainedModel, packed: PackedBatch) -> str | None:
    """Say why this batch must not run packed on a model that may share, or return None. Logged once per reason."""
    return log_reason(model, place_reason(model, packed.input_ids.shape[1]))


def log_reason(model: PreTrainedModel, reason: str | None) -> str | None:
    """Return the reason why a model's prompts are not shared, if there is one, and log each once per model."""
    if reason is not None:
        log_once(model, f"Prompts are not shared, each completion is run as a separate row: {reason}.")
    return reason


def log_once(model: PreTrainedModel, message: str) -> None:
    """Log a warning once per model."""
    logged = _logged.setdefault(model, set())
    if message not in logged:
        logged.add(message)
        logger.warning(message)


def run_probe(probe: Callable[..., str | None], model: PreTrainedModel, *arguments: object) -> str | None:
    """Return the reason that a probe of the model gives, or None if it finds no fault. It runs once per model.

    An error in the probe is a reason too: a later transformers may break assumptions made here. Running out of memory
    is not, as it says nothing about the model.
    """
    reasons = _probed.setdefault(model, {})
    if probe not in reasons:
        try:
            reasons[probe] = probe(model, *arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reasons[probe] = f"{model.config.model_type} fails in a probe ({type(error).__name__}: {error})"
    return reasons[probe]


def config_reason(model: PreTrainedModel, row_length: int) -> str | None:
    """Say why the config of this model rules out packed rows, which need attention with a mask, or return None."""
    if model.training and getattr(model.get_input_embeddings(), "neftune_noise_alpha", None):
        return "NEFTune noise (`neftune_noise_alpha`) depends on the length of the embedded row"
    implementation = getattr(model.config.get_text_config(), "_attn_implementation", None)
    reason = architecture_reason(model, row_length)
    if reason is None and implementation not in ("sdpa", "eager"):
        return (
            f"attn_implementation={implementation!r} takes no custom mask (load the model with "
            "attn_implementation='sdpa' to share)"
        )
    return reason


def architecture_reason(model: PreTrainedModel, row_length: int) -> str | None:
    """Say why the architecture of this model rules out sharing, or return None.

    Sharing is correct if attention uses the keys and position ids passed to it, and wrong if a layer derives them
    from a token's index in the row (ALiBi, windows, recurrence).
    """
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            return "prompt-learning adapters put virtual tokens before every row"
        if getattr(model.active_peft_config, "alora_invocation_tokens", None):
            return "an activated LoRA looks for its invocation in each row"
        model = model.get_base_model()
    config = model.config.get_text_config()
    name = config.model_type
    if config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    layer_types = set(getattr(config, "layer_types", None) or [])
    if has_recurrent_layers(model):
        return f"{name} has recurrent layers, which carry one completion's state into the next"
    attention = getattr(config, "attn_config", None)
    if getattr(config, "alibi", False) or getattr(attention, "alibi", False) or name == "bloom":
        return f"{name} uses ALiBi, which computes distances from indices in the row"
    if "local" in (getattr(config, "attention_layers", None) or []):
        return f"{name} has local attention over the last {config.window_size} tokens in the row"
    if not layer_types or layer_types - {"full_attention"}:
        for key in ("sliding_window", "attention_chunk_size"):
            window = getattr(config, key, None)
            if window is not None and row_length > window:
                return f"rows of up to {row_length} tokens exceed the attention window of {name} (`{key}`={window})"
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
    if rope.get("rope_type") in ("dynamic", "longrope") and original is not None and row_length > original:
        return f"the rotary frequencies of {name} change with the longest row beyond {original} tokens"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return f"{name} takes no position_ids"
    return None


def has_recurrent_layers(model: PreTrainedModel) -> bool:
    """Return whether some layers carry a state from token to token."""
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    return bool(layer_types - ATTENTION_LAYERS) or getattr(model, "_is_stateful", False)


def place_reason(model: PreTrainedModel, embedded_length: int) -> str | None:
    """Say why a row must not have this many tokens, or return None.

    Some models depend on a token's index in the row beyond a limit. The probe is too short to reach these limits, and
    `position_ids` do not change them.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", False) and embedded_length >= config.floor_scale:
        return (
            f"the attention temperature of {config.model_type} changes from token {config.floor_scale} of a row "
            f"(`floor_scale`), and a packed row would have {embedded_length} tokens"
        )
    # A causal mask among the model's buffers, with one row per position
    squares = (mask.shape[-1] for mask in model.buffers() if mask.dim() == 4 and mask.shape[-1] == mask.shape[-2])
    longest = min((size for size in squares if size > 1), default=embedded_length)
    if embedded_length > longest:
        return f"{config.model_type} takes rows of at most {longest} tokens, not {embedded_length}, as packed here"
    return None


def probe_reason(model: PreTrainedModel, forward: Forward) -> str | None:
    """Run a few random tokens shared and unshared, and report a difference that is more than rounding."""
    device = model.device
    vocab_size = model.config.get_text_config().vocab_size
    # Two prompts with two completions each, all of different lengths
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocab_size, (4, PROBE_LENGTH), generator=generator).to(device)
    rows[2:, :5] = rows[:2, :5]
    lengths = torch.tensor([PROBE_LENGTH, 9, 8, 11], device=device)
    attention_mask = (torch.arange(PROBE_LENGTH, device=device) < lengths[:, None]).long()
    packed = pack_rows(
        rows, attention_mask, rows.masked_fill(attention_mask == 0, IGNORE_INDEX), pair_groups(4, device)
    )
    # Under mixed precision a prepared model returns float32, whatever dtype its logits were computed in
    computed_in: list[torch.dtype] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda head, inputs, logits: computed_in.append(logits.dtype))
    try:
        with evaluating(model), torch.no_grad():  # dropout would differ between the two runs
            plain = forward(input_ids=rows, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
            shared = forward(**packed_inputs(model, packed)).logits
    finally:
        hook.remove()
    plain_logps = plain[packed.row_labels].float().log_softmax(-1)
    shared_logps = shared.flatten(0, 1)[packed.row_index[packed.row_labels]].float().log_softmax(-1)
    difference = (plain_logps - shared_logps).abs().mean().item()
    if not difference <= PROBE_TOLERANCE[computed_in[0] if computed_in else plain.dtype]:
        return (
            f"shared and unshared log-probabilities of {model.config.model_type} differ by {difference:.1e} nats in a "
            "probe"
        )
    return None


def reason_not_to_share_prefix(
    model: PreTrainedModel, row_length: int, probe: Callable[[PreTrainedModel], str | None] | None = None
) -> str | None:
    """Say why rows of this model must not share the keys of a prompt, or return None if sharing is exact.

    The model may have any head. `row_length` is the number of tokens of the longest row, prompt included. `probe`
    tests how the rows will run: [`probe_steps`] (the default) or [`probe_segments`]. The reason is logged once per
    model.
    """
    reason = architecture_reason(model, row_length) or partition_reason(model)
    if reason is None and getattr(model.config.get_text_config(), "attn_temperature_tuning", False):
        reason = "its attention temperature depends on a token's index in the cache (`attn_temperature_tuning`)"
    return log_reason(model, reason or run_probe(probe or probe_steps, model))


def partition_reason(model: torch.nn.Module) -> str | None:
    """Say why all processes must take part in each forward pass of this model, or return None."""
    is_fsdp1 = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if is_fsdp1 or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "its weights are sharded by FSDP"
    if any(hasattr(parameter, "ds_id") and parameter.numel() == 0 for parameter in model.parameters()):
        return "its weights are partitioned by ZeRO-3, and not gathered"
    return None


def hidden_states_reason(
    model: PreTrainedModel, run_shared: Callable[[PreTrainedModel, list[list[int]]], list[States]]
) -> str | None:
    """Run a few random tokens with and without a shared prefix, and report a difference in the last hidden states.

    `run_shared` gets the model and four rows, two for each of two prefixes, and returns states of each row.
    """
    rows = probe_rows(model)
    with evaluating(model), torch.no_grad():  # dropout would differ between the two runs
        plain = without_head(model)(**WholeRows(rows, 0, model.device).inputs).last_hidden_state
        shared = run_shared(model, rows)
    difference = size = 0.0
    for row, (start, states) in zip(plain, shared, strict=True):
        expected = row[start : start + len(states)].float()
        difference += (expected - states.float()).abs().sum().item()
        size += expected.abs().sum().item()
    if not difference <= PROBE_TOLERANCE[plain.dtype] * size:
        name = model.config.get_text_config().model_type
        return (
            f"hidden states of {name} with a shared prompt differ by {difference / size:.1e} of their size in a probe"
        )
    return None


def probe_rows(model: PreTrainedModel) -> list[list[int]]:
    """Return two groups of random rows with prefixes of 7 and 4 tokens, the same for each vocabulary size."""
    vocab_size = model.config.get_text_config().vocab_size
    tokens = torch.randint(1, vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    tokens[1, :7], tokens[3, :4] = tokens[0, :7], tokens[2, :4]
    return [tokens[0, :12].tolist(), tokens[1, :10].tolist(), tokens[2, :9].tolist(), tokens[3, :11].tolist()]


def probe_steps(model: PreTrainedModel) -> str | None:
    """Compare hidden states of tokens that are decoded one by one after two prompts with those of whole rows."""
    return hidden_states_reason(model, _run_steps)


def _run_steps(model: PreTrainedModel, rows: list[list[int]]) -> list[States]:
    prompts = left_pad([rows[0][:7], rows[2][:4]], 0, model.device)
    cache, inner = DynamicCache(), without_head(model)
    inner(**prompts, **with_cache(model, cache))
    steps = PrefixCache(cache, prompts["attention_mask"], [2, 2], longest=3)
    starts = [7, 7, 4, 4]
    states = []
    with attend_to_prefix(model):
        for step in range(3):
            tokens = [[row[start + step]] for row, start in zip(rows, starts, strict=True)]
            inputs = {
                "input_ids": torch.tensor(tokens, device=model.device),
                "position_ids": torch.tensor(starts, device=model.device)[:, None] + step,
            }
            states.append(inner(**inputs, **with_cache(model, steps)).last_hidden_state)
    check_attended(steps)
    return list(zip(starts, torch.cat(states, dim=1), strict=True))


def packed_inputs(model: PreTrainedModel, packed: PackedBatch) -> dict[str, torch.Tensor | bool]:
    """Return the forward arguments for a packed batch.

    The mask is boolean for SDPA and additive for eager attention, which would add a boolean mask to the scores.
    """
    mask = packed.visible
    if model.config.get_text_config()._attn_implementation != "sdpa":
        dtype = model.dtype if model.dtype.is_floating_point else torch.float32
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return {
        "input_ids": packed.input_ids,
        "position_ids": packed.position_ids,
        "attention_mask": mask,
        "use_cache": False,
    }


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode inside the context, then restore the mode of each module.

    The 4-bit layers of bitsandbytes stay in training mode: on a CPU, evaluation mode packs their weights for inference
    and blocks gradients from then on (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078). Remove
    this exception once the oldest supported bitsandbytes unpacks the weights of a layer that is trained again.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = type(module).__module__.startswith("bitsandbytes.")
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
