"""Tokenizers and a LLaMA that are small enough to make from scratch, offline, in seconds.

The tokenizers are `PreTrainedTokenizerFast`, with distinct `<pad>`, `<bos>` and `<eos>` and padding on the left.
"""

import re
from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    It is lossless: `decode(encode(text)) == text` for every text. It adds no special tokens, so a prompt and a
    completion can be tokenized separately and concatenated. `vocab_size` includes the 3 special tokens and the 256
    bytes. Short texts may give a smaller vocabulary.

    >>> tokenizer = train_tokenizer(["the cook and the guest", "the guest and the cook"], vocab_size=280)
    >>> tokenizer.decode(tokenizer.encode("the café"))
    'the café'
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per given word, for a closed vocabulary.

    Words include their spaces: `" soup"` makes one token of the space and the word. If two words match, the longer one
    is used. Decoding joins the tokens, so it is lossless. Encoding a text with any other word raises an error.

    >>> tokenizer = word_tokenizer(["Take", " ginger", " and", " cream", "."])
    >>> tokenizer.tokenize("Take ginger and cream.")
    ['Take', ' ginger', ' and', ' cream', '.']
    """
    vocabulary = list(dict.fromkeys([*SPECIAL_TOKENS.values(), *words]))
    longest_first = sorted(vocabulary, key=len, reverse=True)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int = 256,
    num_layers: int = 5,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    max_position_embeddings: int = 1024,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Make a small LLaMA with random weights and tied embeddings, in float32 and evaluation mode.

    The defaults give 5.0 million parameters with a vocabulary of 4,096. Its generation config samples from the model's
    own distribution (temperature 1, no top-k, no top-p), which rejection sampling requires. The feed-forward layers
    are 3 times as wide as `hidden_size`. The weights are drawn from `seed`; the global random state does not change.

    >>> tokenizer = word_tokenizer([" leek", " cream"])
    >>> model = tiny_llama(tokenizer, hidden_size=64, num_layers=2)
    >>> len(model.model.layers)
    2
    """
    token_ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL_TOKENS}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        # LLaMA's 0.02 suits widths of thousands; at this width it costs hundreds of training steps.
        initializer_range=hidden_size**-0.5,
        **token_ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **token_ids)
    return model.eval()


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **SPECIAL_TOKENS
    )
