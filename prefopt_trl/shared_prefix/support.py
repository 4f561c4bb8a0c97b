"""Which models can share a prompt exactly: what their config says, then a probe of the model itself."""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from prefopt_trl.shared_prefix.packing import IGNORE_INDEX, PackedBatch, pack_rows, pair_groups

logger = logging.getLogger(__name__)

# Log-probabilities of the probe may differ by rounding only: on average by this many nats, relative to a
# log-probability of 10. Half precision rounds the hidden states, so two correct orders of summation differ that much.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}

PROBE_LENGTH = 12  # of the longest row, in tokens

_probed: weakref.WeakKeyDictionary[torch.nn.Module, str | None] = weakref.WeakKeyDictionary()
_logged: weakref.WeakKeyDictionary[torch.nn.Module, set[str]] = weakref.WeakKeyDictionary()


def reason_not_to_share(model: PreTrainedModel, forward: Callable[..., Any], row_length: int) -> str | None:
    """Why this model's prompts must not be shared, or None where sharing is exact. Logged once per model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, for its config.
        forward (`Callable`):
            What to call for a forward pass that returns `.logits`: the model, or its own forward inside a wrapper.
        row_length (`int`):
            Length in tokens of the longest unpacked row, which decides whether a sliding window matters.

    Returns:
        `str` or `None`: one clause in plain words.
    """
    reason = config_reason(model, PROBE_LENGTH)
    if reason is None:
        # Before the length is looked at: processes that share a model's weights must probe it together
        if model not in _probed:
            _probed[model] = probe_reason(model, forward)
        reason = _probed[model] or config_reason(model, row_length)
    if reason is not None:
        log_reason(model, reason)
    return reason


def reason_not_to_pack(model: PreTrainedModel, packed: PackedBatch) -> str | None:
    """Why this batch must not be run packed, by a model that may share, or None. Logged once per model and reason."""
    reason = place_reason(model, packed.input_ids.shape[1])
    if reason is not None:
        log_reason(model, reason)
    return reason


def log_reason(model: PreTrainedModel, reason: str) -> None:
    """Say why a model's prompts are not shared, once per model and reason."""
    logged = _logged.setdefault(model, set())
    if reason not in logged:
        logged.add(reason)
        logger.warning("Prompts are not shared, each completion is run as a row of its own: %s.", reason)


def config_reason(model: PreTrainedModel, row_length: int) -> str | None:
    """Why the config of this model rules packed rows out, or None: they need attention that takes a mask."""
    if model.training and getattr(model.get_input_embeddings(), "neftune_noise_alpha", None):
        return "the noise of NEFTune (`neftune_noise_alpha`) depends on the length of what is embedded"
    implementation = getattr(model.config.get_text_config(), "_attn_implementation", None)
    reason = architecture_reason(model, row_length)
    if reason is None and implementation not in ("sdpa", "eager"):
        return (
            f"attn_implementation={implementation!r} takes no mask of its own (load the model with "
            "attn_implementation='sdpa' to share)"
        )
    return reason


def architecture_reason(model: PreTrainedModel, row_length: int) -> str | None:
    """Why the architecture of this model rules sharing out, or None.

    Sharing is correct where attention takes the keys and the positions it is given. It is not where a layer derives
    either from a token's place in the row (ALiBi, windows, recurrence).
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
    other_layers = layer_types - {"full_attention", "sliding_attention", "chunked_attention"}
    if other_layers or getattr(model, "_is_stateful", False):
        return f"{name} has recurrent layers, which carry one completion's state into the next"
    attention = getattr(config, "attn_config", None)
    if getattr(config, "alibi", False) or getattr(attention, "alibi", False) or name == "bloom":
        return f"{name} uses ALiBi, which takes distances from places in the row"
    if "local" in (getattr(config, "attention_layers", None) or []):
        row_window = config.window_size
        return f"{name} has local attention over the last {row_window} places in the row"
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


def place_reason(model: PreTrainedModel, embedded_length: int) -> str | None:
    """Why so many tokens must not stand in one row, or None: some models go by a token's place, from some place on.

    A probe is too short to find these limits, and positions do not move them.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_temperature_tuning", False) and embedded_length >= config.floor_scale:
        return (
            f"the attention of {config.model_type} has another temperature from place {config.floor_scale} of a row "
            f"on (`floor_scale`), and {embedded_length} tokens would stand in one"
        )
    # A causal mask that the model holds, of as many places as it has positions
    squares = (mask.shape[-1] for mask in model.buffers() if mask.dim() == 4 and mask.shape[-1] == mask.shape[-2])
    longest = min((size for size in squares if size > 1), default=embedded_length)
    if embedded_length > longest:
        return f"{config.model_type} takes rows of at most {longest} tokens, and {embedded_length} would stand in one"
    return None


def probe_reason(model: PreTrainedModel, forward: Callable[..., Any]) -> str | None:
    """Run a few random tokens shared and unshared, and say by how much they differ where that is more than
    rounding."""
    device = model.device
    vocab_size = model.config.get_text_config().vocab_size
    # Two prompts with two completions each, lengths all different, from a stream of its own
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(vocab_size, (4, PROBE_LENGTH), generator=generator).to(device)
    rows[2:, :5] = rows[:2, :5]
    lengths = torch.tensor([PROBE_LENGTH, 9, 8, 11], device=device)
    attention_mask = (torch.arange(PROBE_LENGTH, device=device) < lengths[:, None]).long()
    packed = pack_rows(
        rows, attention_mask, rows.masked_fill(attention_mask == 0, IGNORE_INDEX), pair_groups(4, device)
    )
    # Under mixed precision a prepared model returns float32, whatever its logits were computed in
    computed_in: list[torch.dtype] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda head, inputs, logits: computed_in.append(logits.dtype))
    try:
        with evaluating(model), torch.no_grad():  # dropout would differ between the two runs
            plain = forward(input_ids=rows, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
            try:
                shared = forward(**packed_inputs(model, packed)).logits
            except torch.OutOfMemoryError:  # says nothing of the model
                raise
            except Exception as error:  # of any kind: a later transformers may have changed what this relies on
                return f"{model.config.model_type} does not take a packed row ({type(error).__name__}: {error})"
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


def packed_inputs(model: PreTrainedModel, packed: PackedBatch) -> dict[str, Any]:
    """Forward arguments for a packed batch: the mask is boolean for SDPA, additive for eager attention.

    Eager attention adds what it is given to the scores, so a boolean mask would silently do nothing there.
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
    """While entered, the model is in evaluation mode; afterwards each of its modules is in the mode it was in.

    The 4-bit layers of bitsandbytes are in training mode. They do the same in both, except on a CPU: in evaluation
    mode they pack their weights for inference, and from then on let no gradient through. That may go once a layer
    which is trained again unpacks them (bitsandbytes 0.50, `Linear4bit.forward`).
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = type(module).__module__.startswith("bitsandbytes.")
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
