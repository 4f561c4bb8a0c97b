"""Small random models of many families, with weights so large that a wrong mask or position moves results by nats."""

import copy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

VOCAB_SIZE = 61
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = {"vocab_size": VOCAB_SIZE, **SPECIAL}
SIZES = {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
NEOX_LIKE = {**SIZES, "intermediate_size": 48}
LLAMA_LIKE = {**NEOX_LIKE, "num_key_value_heads": 2}
GPT_LIKE = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
NEO_LIKE = {**IDS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128}
DYNAMIC_ROPE = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}

SHARING = {
    "llama": transformers.LlamaConfig(**LLAMA_LIKE),
    "llama dynamic rope": transformers.LlamaConfig(**LLAMA_LIKE, **DYNAMIC_ROPE),
    "qwen2": transformers.Qwen2Config(**LLAMA_LIKE),
    "qwen3": transformers.Qwen3Config(**LLAMA_LIKE, head_dim=8),
    "mistral below its window": transformers.MistralConfig(**LLAMA_LIKE, sliding_window=64),
    "phi": transformers.PhiConfig(**LLAMA_LIKE),
    "phi3": transformers.Phi3Config(**LLAMA_LIKE),
    "mixtral": transformers.MixtralConfig(**LLAMA_LIKE, num_local_experts=4),
    "gemma": transformers.GemmaConfig(**LLAMA_LIKE, head_dim=8),
    # Three whose logits are capped or scaled
    "gemma2": transformers.Gemma2Config(
        **LLAMA_LIKE, head_dim=8, attn_implementation="eager", attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "granite": transformers.GraniteConfig(**LLAMA_LIKE, logits_scaling=0.5),
    "cohere": transformers.CohereConfig(**LLAMA_LIKE, logit_scale=0.25),
    "gemma3": transformers.Gemma3TextConfig(**LLAMA_LIKE, head_dim=8),
    "gpt2": transformers.GPT2Config(**GPT_LIKE),
    "gpt_neox": transformers.GPTNeoXConfig(**NEOX_LIKE),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "olmo2": transformers.Olmo2Config(**LLAMA_LIKE),
    "stablelm": transformers.StableLmConfig(**LLAMA_LIKE),
    "starcoder2": transformers.Starcoder2Config(**LLAMA_LIKE),
    "smollm3": transformers.SmolLM3Config(**LLAMA_LIKE),
}
# These share in packed rows, and have an attention of their own, which takes no keys from elsewhere
SHARING_IN_PACKED_ROWS = {
    "gpt_neo": transformers.GPTNeoConfig(**NEO_LIKE, attention_types=[[["global"], 2]]),
    "falcon": transformers.FalconConfig(**SIZES),
    "gptj": transformers.GPTJConfig(**GPT_LIKE, rotary_dim=4),
}
NOT_SHARING = {
    "mistral": (transformers.MistralConfig(**LLAMA_LIKE, sliding_window=8), "attention window of mistral"),
    "gemma3": (transformers.Gemma3TextConfig(**LLAMA_LIKE, head_dim=8, sliding_window=8), "attention window"),
    "gpt_neo, local": (
        transformers.GPTNeoConfig(**NEO_LIKE, attention_types=[[["global", "local"], 1]], window_size=8),
        "gpt_neo has local attention over the last 8 tokens",
    ),
    "mpt": (transformers.MptConfig(**IDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=128), "mpt uses ALiBi"),
    "falcon, ALiBi": (transformers.FalconConfig(**SIZES, alibi=True), "falcon uses ALiBi"),
    "bloom": (transformers.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4), "bloom uses ALiBi"),
    "mamba": (transformers.MambaConfig(**IDS, hidden_size=32, num_hidden_layers=2), "mamba has recurrent layers"),
}


def build(config: Any, seed: int = 0, auto_class: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """Return a model in evaluation mode; `options` are arguments of `from_config`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class.from_config(copy.deepcopy(config), **options).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith("A_log"):
                parameter.data.normal_(std=0.2)
    model.generation_config = GenerationConfig(**SPECIAL)
    return model
