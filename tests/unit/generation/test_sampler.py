import copy
import itertools
import logging
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from prefopt_trl import GenerationOptions
from prefopt_trl.generation import sampler
from prefopt_trl.generation.sampler import (
    Candidates,
    sample_candidates,
    sample_completions,
    sizes_of_batch,
    tokenize_prompts,
)
from tests.unit.laws import CHANCE, p_value

PAD, EOS, TURN = 0, 1, 2
LETTERS = "abcdefghi"
NARROW = {
    "do_sample": True,
    "temperature": 0.2,
    "top_k": 2,
    "top_p": 0.3,
    "min_p": 0.2,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [3, 4],
    "max_new_tokens": 1,
}
PromptIds = Sequence[int]


def letter_tokenizer(words: Sequence[str] = tuple(LETTERS)) -> PreTrainedTokenizerFast:
    """One token per word, of which the text is split into single letters, and no BOS."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<|turn|>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|turn|>"],
    )


TINY = {"vocab_size": 12, "pad_token_id": PAD, "eos_token_id": EOS}
LLAMA_LIKE = {
    **TINY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": None,
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return letter_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return random_model()


def random_model(seed: int = 0) -> LlamaForCausalLM:
    """A LLaMA with weights so large that its next-token law is far from uniform and depends on all of the prompt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE))


def bigram_model(logits: torch.Tensor) -> LlamaForCausalLM:
    """A LLaMA whose next-token law is softmax(logits[last token]): one-hot embeddings, and layers that add nothing."""
    size = len(logits)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE | {"vocab_size": size, "hidden_size": size}, head_dim=2))
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(logits.T / math.sqrt(size))  # the norm makes a one-hot vector sqrt(size) long
    return model


def scripted_model(vocab_size: int, *scripts: Sequence[int]) -> LlamaForCausalLM:
    """A model that says the next token of a script, after any token of it, with a probability of 1 - 1e-40."""
    logits = torch.zeros(vocab_size, vocab_size)
    for token, following in itertools.chain.from_iterable(map(itertools.pairwise, scripts)):
        logits[token, following] = 100.0
    return bigram_model(logits)


def next_token_law(model: torch.nn.Module, prompt_ids: PromptIds) -> list[float]:
    """The model's own next-token law, in float64, from a forward pass of one unpadded row."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(prompt_ids)])).logits[0, -1].double().softmax(dim=-1).tolist()


def law_of_texts(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prompt_ids: PromptIds
) -> dict[str, float]:
    """Probability of every text that sampling at most two tokens may give."""
    law: dict[str, float] = defaultdict(float)
    for first, probability in enumerate(next_token_law(model, prompt_ids)):
        if first == EOS:
            law[""] += probability
            continue
        for second, then in enumerate(next_token_law(model, [*prompt_ids, first])):
            text = tokenizer.convert_ids_to_tokens([first, second])
            law["".join(word for word in text if word in LETTERS)] += probability * then
    return law


def end_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, **options) -> tuple[str, bool]:
    """A completion, and whether it ended by itself: the same for two of them, and whether they share their prompt."""
    kwargs = {"stop_strings": options.pop("stop_strings", None)}
    found = set()
    for share_prefix in (True, False):
        how = GenerationOptions(**{"max_new_tokens": 20, "share_prefix": share_prefix} | options)
        prompt_ids = [tokenizer(prompt)["input_ids"]]
        (row,) = sample_candidates(model, tokenizer, prompt_ids, 2, how, seed=0, generation_kwargs=kwargs)
        found.update(zip(row.texts, row.finished, strict=True))
    (end,) = found
    return end


# The law


@pytest.mark.parametrize("batch_size", [30_000, 700], ids=["all prompts at once", "each prompt in parts"])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_completions_follow_the_models_own_law_whatever_the_lengths_of_the_prompts(
    model, tokenizer, share_prefix: bool, batch_size: int
) -> None:
    prompts = ["abc", "d", "ihgfedcba", "bc"]
    completions = sample_completions(
        model, tokenizer, prompts, 4000, max_new_tokens=2, generation_batch_size=batch_size, share_prefix=share_prefix
    )
    laws = [law_of_texts(model, tokenizer, tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert [len(texts) for texts in completions] == [4000] * 4
    # That no prompt's completions follow the law of another one shows that the test can tell
    for one, other in itertools.product(range(4), repeat=2):
        assert (p_value(completions[one], laws[other]) > CHANCE) == (one == other)


@pytest.mark.parametrize("kind", ["model", "adapter on a model with a config", "adapter with a config of its own too"])
def test_the_models_generation_config_narrows_nothing_and_is_put_back(model, tokenizer, kind: str) -> None:
    prompt_ids = tokenizer("ab")["input_ids"]
    base_law = law_of_texts(model, tokenizer, prompt_ids)
    model.generation_config = inside = GenerationConfig(**NARROW)
    if kind != "model":
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    if "own" in kind:
        model.generation_config = GenerationConfig(**NARROW)
    outside, before = model.generation_config, copy.deepcopy(inside)
    texts = sample_completions(model, tokenizer, ["ab"], 4000, max_new_tokens=2)[0]
    assert p_value(texts, law_of_texts(model, tokenizer, prompt_ids)) > CHANCE
    assert (p_value(texts, base_law) < CHANCE) == (kind != "model")  # the adapter counts
    configs = [module.generation_config for module in model.modules() if "generation_config" in vars(module)]
    assert model.generation_config is outside and any(config is inside for config in configs)
    assert (outside is inside) == ("own" not in kind) and inside == before


def test_generates_default_of_the_50_most_likely_tokens_is_not_used() -> None:
    tokenizer = letter_tokenizer([chr(ord("一") + index) for index in range(97)])
    texts = sample_completions(bigram_model(torch.zeros(100, 100)), tokenizer, ["一"], 3000, max_new_tokens=1)[0]
    # Each of 97 letters is missed with a chance of 0.99 ** 3000, so any of them with one of 8e-12
    assert len(set(texts) - {""}) == 97


@pytest.mark.parametrize("share_prefix", [True, False])
def test_arguments_narrow_the_law_as_they_say(tokenizer, share_prefix: bool) -> None:
    probabilities = torch.tensor([0.0, 0.0, 0.0, 0.4, 0.3, 0.15, 0.1, 0.05, 0.0, 0.0, 0.0, 0.0])
    model = bigram_model(probabilities.clamp(min=1e-20).log().expand(12, 12))

    def sample(**options) -> list[str]:
        return sample_completions(
            model, tokenizer, ["i"], 4000, max_new_tokens=1, share_prefix=share_prefix, **options
        )[0]

    def law(*weights: float) -> dict[str, float]:
        return {letter: weight / sum(weights) for letter, weight in zip(LETTERS, weights, strict=False)}

    assert p_value(sample(), law(0.4, 0.3, 0.15, 0.1, 0.05)) > CHANCE
    assert p_value(sample(temperature=0.5), law(0.16, 0.09, 0.0225, 0.01, 0.0025)) > CHANCE
    assert p_value(sample(temperature=2.0), law(*(math.sqrt(p) for p in (0.4, 0.3, 0.15, 0.1, 0.05)))) > CHANCE
    assert p_value(sample(top_k=2), law(0.4, 0.3)) > CHANCE
    assert p_value(sample(top_p=0.8), law(0.4, 0.3, 0.15)) > CHANCE
    assert p_value(sample(generation_kwargs={"min_p": 0.2}), law(0.4, 0.3, 0.15, 0.1)) > CHANCE


SINCE_5_23 = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="fails in `generate`")


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize(
    "option",
    [
        {"min_length": 4},
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 4.0},  # after "i" both "i" and the padding before it are probable
        pytest.param({"encoder_repetition_penalty": 0.02}, marks=SINCE_5_23),  # reached the first rows alone
        {"encoder_no_repeat_ngram_size": 1},
        pytest.param({"sequence_bias": [[[PAD, 11, 9], 9.0]]}, marks=SINCE_5_23),  # refused token 0
        {"bad_words_ids": [[PAD, 11, 5]]},
        {"forced_bos_token_id": 6},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_read_the_prompt_have_the_law_of_one_unpadded_prompt(option: dict, share_prefix: bool) -> None:
    model, tokenizer = random_model(seed=3).eval(), letter_tokenizer()
    prompts = ["ihgfedcba", "i", "abcabc"]
    completions = sample_completions(
        model, tokenizer, prompts, 8000, max_new_tokens=1, share_prefix=share_prefix, generation_kwargs=option
    )
    for prompt, texts in zip(prompts, completions, strict=True):
        law = dict.fromkeys(["", *LETTERS], 0.0)
        how = {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "output_scores": True, **option}
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        scores = model.generate(**inputs, **how, eos_token_id=EOS, return_dict_in_generate=True).scores[0][0]
        for token, probability in enumerate(scores.double().softmax(-1).tolist()):
            law[LETTERS[token - 3] if token > 2 else ""] += probability
        counts = Counter(texts)
        variation = sum(abs(counts[text] / 8000 - chance) for text, chance in law.items()) / 2
        assert variation < 0.05  # of 10 texts: a chance of 2 ** 10 * exp(-2 * 8000 * 0.05 ** 2) = 4e-15 to fail


# Encoder-decoders

ENCODER_DECODERS = {
    "t5": transformers.T5Config(
        **TINY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=PAD
    ),
    "bart": transformers.BartConfig(
        **TINY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        decoder_start_token_id=EOS,  # as BART's is
        bos_token_id=None,
    ),
}


def encoder_decoder(family: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(ENCODER_DECODERS[family]).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.4)
    return model


def as_decoder_only(model: PreTrainedModel, prompt_ids: PromptIds) -> Callable:
    """The model for `next_token_law`: what stands behind the prompt is the decoder's, after its start."""

    def forward(input_ids: torch.Tensor) -> object:
        decoded = [model.config.decoder_start_token_id, *input_ids[0, len(prompt_ids) :].tolist()]
        return model(input_ids=torch.tensor([list(prompt_ids)]), decoder_input_ids=torch.tensor([decoded]))

    return forward


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_completions_of_an_encoder_decoder_follow_its_law_whatever_the_lengths_of_the_prompts(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer, prompts = encoder_decoder(family), letter_tokenizer(), ["b", "aifbdc", "ghi"]
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        completions = sample_completions(model, tokenizer, prompts, 4000, max_new_tokens=2)
    prompt_ids = tokenize_prompts(tokenizer, prompts)
    laws = [law_of_texts(as_decoder_only(model, ids), tokenizer, ids) for ids in prompt_ids]
    for row, other in itertools.product(range(3), repeat=2):
        assert (p_value(completions[row], laws[other]) > CHANCE) == (row == other)
    assert [f"{family} is an encoder-decoder" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_what_an_encoder_decoder_has_drawn_is_told_without_its_start(tokenizer, family: str) -> None:
    model = encoder_decoder(family)
    prompt_ids = tokenize_prompts(tokenizer, ["b", "aifbdc"])
    options = GenerationOptions(max_new_tokens=8, temperature=1e-4)
    found = sample_candidates(model, tokenizer, prompt_ids, 2, options, seed=0, keep_logps=True)
    for ids, candidates in zip(prompt_ids, found, strict=True):
        drawn: list[int] = []
        while len(drawn) < 8 and EOS not in drawn:
            drawn.append(int(np.argmax(next_token_law(as_decoder_only(model, ids), [*ids, *drawn]))))
        assert [sampled.ids for sampled in candidates.sampled] == [drawn] * 2
        assert candidates.texts == [tokenizer.decode(drawn, skip_special_tokens=True)] * 2
        assert candidates.finished == [drawn[-1] == EOS] * 2
        assert [sampled.logp for sampled in candidates.sampled] == [None] * 2


# Sharing


NOT_SHARING = {
    "recurrent layers": MambaConfig(**TINY, hidden_size=16, num_hidden_layers=1, state_size=4),
    "rows of up to 7 tokens exceed the attention window": MistralConfig(
        **LLAMA_LIKE, num_key_value_heads=1, sliding_window=6
    ),
}


@pytest.mark.parametrize("reason", NOT_SHARING)
def test_where_sharing_is_not_exact_plain_generate_samples_and_it_is_said_once(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(NOT_SHARING[reason])
    tokenizer, prompts = letter_tokenizer(), ["abc", "d"]
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        for seed in range(2):
            found = sample_completions(model, tokenizer, prompts, 3, max_new_tokens=4, seed=seed)
            plain = sample_completions(model, tokenizer, prompts, 3, max_new_tokens=4, seed=seed, share_prefix=False)
            assert found == plain
    said = [record.getMessage() for record in caplog.records if record.name.startswith("prefopt_trl")]
    assert len(said) == 1 and reason in said[0]


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"guidance_scale": 1.5}, {"cache_implementation": "static"}])
def test_what_only_generate_can_do_is_left_to_it(
    model, tokenizer, option: dict, caplog: pytest.LogCaptureFixture
) -> None:
    texts = sample_completions(model, tokenizer, ["a", "bc"], 2, max_new_tokens=2, generation_kwargs=option)
    assert [len(row) for row in texts] == [2, 2]
    said = [record.getMessage() for record in caplog.records if record.name.startswith("prefopt_trl")]
    assert len(said) == 1 and "that only `generate` has" in said[0]


@pytest.mark.parametrize("share_prefix", [True, False])
def test_what_was_drawn_is_kept_with_its_log_probability(model, tokenizer, share_prefix: bool) -> None:
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in ("abc", "d")]
    options = GenerationOptions(
        max_new_tokens=8, temperature=1.5, top_p=0.9, generation_batch_size=8, share_prefix=share_prefix
    )
    candidates = sample_candidates(model, tokenizer, prompt_ids, 12, options, seed=0, keep_logps=True)
    model.eval()
    for ids, row in zip(prompt_ids, candidates, strict=True):
        assert len(row.sampled) == 12 and len(set(map(len, (drawn for drawn, _ in row.sampled)))) > 1
        for text, finished, (drawn, logp) in zip(row.texts, row.finished, row.sampled, strict=True):
            assert tokenizer.decode(drawn, skip_special_tokens=True) == text
            assert finished == (drawn[-1] == EOS) and EOS not in drawn[:-1]
            assert finished or len(drawn) == 8
            if not share_prefix:
                assert logp is None
                continue
            expected = sum(
                math.log(next_token_law(model, [*ids, *drawn[:place]])[token]) for place, token in enumerate(drawn)
            )
            assert logp == pytest.approx(expected, abs=1e-3)


# The size of a batch


def sizes_at(
    model: PreTrainedModel, num_completions: int, num_bytes: float, shares: bool, batch_size: int | None = None
) -> tuple[int, int]:
    budget = num_bytes / 2**30
    options = GenerationOptions(max_new_tokens=5, generation_batch_size=batch_size, generation_memory_budget=budget)
    return sizes_of_batch(model, num_completions, 10, options, shares)


def test_the_size_of_a_batch_is_what_the_budget_holds() -> None:
    # 2 copies of keys and values of 2 layers with 2 heads of 8 float32 numbers: 512 bytes a token; scores of 12 tokens
    # in float32 with their copies: 288 bytes a completion. With 10 tokens of prompt and 5 of completion:
    model, per_prompt, per_completion = random_model(), 5120, 5 * 512 + 288

    def sizes(num_bytes: int, shares: bool = True, batch_size: int | None = None) -> tuple[int, int]:
        return sizes_at(model, 4, num_bytes, shares, batch_size)

    one = per_prompt + 4 * per_completion
    assert [sizes(num_bytes) for num_bytes in (one, 2 * one - 1, 2 * one, 7 * one)] == [(1, 4), (1, 4), (2, 4), (7, 4)]
    assert sizes(one - 1) == sizes(per_prompt + 3 * per_completion) == (1, 3)
    assert sizes(per_prompt + 3 * per_completion - 1) == (1, 2)
    assert sizes(1) == sizes(per_prompt) == (1, 1)
    # Unshared, each has a copy of the prompt
    of_one = per_prompt + per_completion
    assert [sizes(num_bytes, shares=False) for num_bytes in (4 * of_one, 4 * of_one - 1)] == [(1, 4), (1, 3)]
    # What was asked for is what it is
    for batch_size, expected in {1: (1, 1), 3: (1, 3), 4: (1, 4), 7: (1, 4), 8: (2, 4), 9: (2, 4)}.items():
        assert sizes(1, batch_size=batch_size) == expected


def test_a_budget_too_small_for_the_completions_of_a_prompt_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    # 7 completions of 2848 bytes each and the prompt's 5120
    model, one = random_model(), 5120 + 7 * 2848
    for num_bytes, batch_size in ((one, None), (one / 2, 1)):
        sizes_at(model, 7, num_bytes, True, batch_size)
    assert caplog.records == []
    for _ in range(2):
        sizes_at(model, 7, one - 1, True)
    (record,) = caplog.records
    assert "GiB holds 6 of the 7 completions of a prompt at a time" in record.getMessage()


GROUPED_HEADS = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4}


@pytest.mark.parametrize(
    ("config", "dtype", "per_token"),  # copies, keys and values, layers, heads, size, bytes
    [
        (LlamaConfig(**LLAMA_LIKE | GROUPED_HEADS), torch.bfloat16, 2 * 2 * 3 * 2 * 4 * 2),
        (NOT_SHARING["recurrent layers"], torch.float32, 2 * 2 * 1 * 16 * 4),
    ],
    ids=["heads that share keys, in half precision", "no attention, counted by its width"],
)
def test_the_size_of_a_batch_of_other_models(config, dtype: torch.dtype, per_token: int) -> None:
    model, of_one = AutoModelForCausalLM.from_config(config, dtype=dtype), per_token * (10 + 5) + 24 * 12
    for num_bytes, num_prompts in ((2 * of_one, 1), (6 * of_one - 1, 2), (6 * of_one, 3)):
        assert sizes_at(model, 2, num_bytes, False) == (num_prompts, 2)


# Seeds and order


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_seed_decides(model, tokenizer, share_prefix: bool) -> None:
    prompts = ["ab", "ab", "cde"]

    def sample(seed: int) -> list[list[str]]:
        return sample_completions(
            model,
            tokenizer,
            prompts,
            20,
            max_new_tokens=8,
            seed=seed,
            generation_batch_size=16,
            share_prefix=share_prefix,
        )

    torch.manual_seed(0)
    first = sample(0)
    torch.manual_seed(1)
    assert sample(0) == first
    other = sample(1)
    assert all(ours != theirs for ours, theirs in zip(first, other, strict=True))
    assert first[0] != first[1]  # one prompt twice is two prompts
    assert first[0][:10] != first[0][10:]  # parts of one prompt's completions are not copies


def test_the_order_is_that_of_the_prompts_whatever_their_lengths(tokenizer) -> None:
    model = scripted_model(12, tokenizer("abcdefghi")["input_ids"])
    prompts = ["iiia", "b", "iic", "iiiiiid", "e", "if", "g", "iiiih"]
    completions = sample_completions(model, tokenizer, prompts, 2, max_new_tokens=1, generation_batch_size=4)
    assert completions == [[letter] * 2 for letter in "bcdefghi"]


@pytest.mark.parametrize(
    ("option", "largest"),
    [
        *(({"generation_batch_size": size}, most) for size, most in {1: 1, 3: 3, 7: 7, 13: 7, 14: 14, 64: 21}.items()),
        ({"generation_memory_budget": 1e-9, "share_prefix": False}, 1),
        ({"generation_memory_budget": 1.0, "share_prefix": False}, 21),
    ],
    ids=str,
)
def test_any_batch_size_and_budget_give_as_many_completions_as_asked_for(
    model, tokenizer, option: dict, largest: int
) -> None:
    sizes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    completions = sample_completions(model, tokenizer, ["a", "bc", "d"], 7, max_new_tokens=2, **option)
    assert [len(texts) for texts in completions] == [7, 7, 7]
    assert max(sizes) == largest
    assert sample_completions(model, tokenizer, [], 7, max_new_tokens=2, **option) == []


# What is left as it was


def state_of(model: torch.nn.Module) -> tuple:
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        (model.config._attn_implementation, model.config.use_cache, model.generation_config.to_dict()),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),
        random.getstate(),
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before_also_after_an_error(model, tokenizer, fails: bool, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    sample_completions(model, tokenizer, ["ab"], 2, max_new_tokens=2)  # the probe
    model.generation_config = own = GenerationConfig(**NARROW)
    model.train()
    model.model.layers[0].eval()
    model.model.layers[0].mlp.train()
    seen = []

    def look(module: torch.nn.Module, inputs: tuple, output: object) -> None:
        seen.append((any(part.training for part in model.modules()), torch.is_grad_enabled()))
        if fails and len(seen) > 1:  # so in the first step after the prompts
            raise RuntimeError("out of memory")

    model.lm_head.register_forward_hook(look)
    before = state_of(model)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            sample_completions(model, tokenizer, ["ab"], 2, max_new_tokens=2)
    else:
        sample_completions(model, tokenizer, ["ab"], 2, max_new_tokens=2)
    assert state_of(model) == before
    assert model.generation_config is own
    assert set(seen) == {(False, False)}  # sampled in evaluation mode, without gradients


# Ends


def test_a_completion_ends_before_eos_and_is_finished(tokenizer) -> None:
    model = scripted_model(12, [*tokenizer("abcde")["input_ids"], EOS])
    assert end_of(model, tokenizer, "a") == ("bcde", True)
    assert end_of(model, tokenizer, "a", max_new_tokens=5) == ("bcde", True)
    assert end_of(model, tokenizer, "a", max_new_tokens=4) == ("bcde", False)
    assert end_of(model, tokenizer, "a", max_new_tokens=1) == ("b", False)
    assert end_of(model, tokenizer, "e") == ("", True)


def test_finished_is_told_for_each_row_of_a_batch(tokenizer) -> None:
    model = scripted_model(12, [*tokenizer("abcdefghi")["input_ids"], EOS])
    prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in ("a", "f", "d")]
    sampled = sample_candidates(model, tokenizer, prompt_ids, 1, GenerationOptions(max_new_tokens=5), seed=0)
    assert sampled == [Candidates(["bcdef"], [False]), Candidates(["ghi"], [True]), Candidates(["efghi"], [False])]


@pytest.mark.parametrize("own", [5, [5], [7, 5]])
def test_the_models_further_eos_tokens_end_too(tokenizer, own: int | list[int]) -> None:
    model = scripted_model(12, tokenizer("abcdefghi")["input_ids"])
    assert tokenizer.convert_ids_to_tokens(5) == "c"
    model.generation_config.eos_token_id = None
    assert end_of(model, tokenizer, "a", max_new_tokens=4) == ("bcde", False)
    model.generation_config.eos_token_id = own
    assert end_of(model, tokenizer, "a", max_new_tokens=4) == ("b", True)
    # and the tokenizer's still does
    assert end_of(scripted_model(12, [3, 4, EOS]), tokenizer, "a") == ("b", True)


@pytest.mark.parametrize(
    ("stop_strings", "text", "finished"),
    [
        ("de", "bc", True),
        (["de"], "bc", True),
        (["gh", "c"], "b", True),
        (["b"], "", True),
        (["fh"], "bcdefghi", False),
        (["ed"], "bcdefghi", False),
    ],
)
def test_stop_strings_are_cut_off(tokenizer, stop_strings: str | list[str], text: str, finished: bool) -> None:
    model = scripted_model(12, tokenizer("abcdefghi")["input_ids"])
    assert end_of(model, tokenizer, "a", stop_strings=stop_strings, max_new_tokens=8) == (text, finished)


def test_a_stop_string_that_begins_in_the_prompt_ends_nothing(tokenizer) -> None:
    model = scripted_model(12, [*tokenizer("abcdefghi")["input_ids"], EOS])
    assert end_of(model, tokenizer, "ab", stop_strings=["bc", "abcd"]) == ("cdefghi", True)
    assert end_of(model, tokenizer, "ab", stop_strings=["bc", "fg"]) == ("cde", True)
    # The same stop string ends the completion that has all of it, also in one batch with the other
    how = {"max_new_tokens": 9, "generation_kwargs": {"stop_strings": "bc"}}
    assert sample_completions(model, tokenizer, ["ab", "a"], 1, **how) == [["cdefghi"], [""]]


def test_a_stop_string_may_begin_inside_a_token_and_be_a_special_token() -> None:
    tokenizer = letter_tokenizer([*"abcdefg", "cd", "ef"])
    a, b, g, cd, ef = tokenizer.convert_tokens_to_ids(["a", "b", "g", "cd", "ef"])
    model = scripted_model(12, [a, b, cd, ef, TURN, g, EOS])
    assert end_of(model, tokenizer, "a") == ("bcdefg", True)
    assert end_of(model, tokenizer, "a", stop_strings=["de"]) == ("bc", True)
    assert end_of(model, tokenizer, "a", stop_strings=["d", "c"]) == ("b", True)
    assert end_of(model, tokenizer, "a", stop_strings=["<|turn|>"]) == ("bcdef", True)
    # One that only the text without special tokens has is cut off all the same
    assert end_of(model, tokenizer, "a", stop_strings=["fg"], max_new_tokens=5) == ("bcde", True)


@pytest.mark.parametrize("stop_strings", [None, ["c"]])
def test_without_a_pad_token_eos_pads(tokenizer, stop_strings: list[str] | None) -> None:
    model = scripted_model(12, [*tokenizer("abcdef")["input_ids"], EOS])
    options = {"max_new_tokens": 9, "generation_kwargs": {"stop_strings": stop_strings}}
    expected = sample_completions(model, tokenizer, ["e", "a", "abc"], 2, **options)
    assert expected == (
        [["f"] * 2, ["b"] * 2, ["def"] * 2] if stop_strings else [["f"] * 2, ["bcdef"] * 2, ["def"] * 2]
    )
    tokenizer.pad_token = None
    assert sample_completions(model, tokenizer, ["e", "a", "abc"], 2, **options) == expected


# Text


def test_texts_are_the_tokens_without_special_ones(tiny_llama_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    text = "é☂ ,n't\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids) > len(text)  # a character may take several tokens, and no token comes twice
    start, user = tokenizer.convert_tokens_to_ids(["<s>", "<|user|>"])
    script = [start, *ids[:3], user, *ids[3:], tokenizer.pad_token_id, tokenizer.eos_token_id]
    texts = sample_completions(scripted_model(len(tokenizer), script), tokenizer, [""], 2, max_new_tokens=40)
    assert texts == [[text] * 2]


def test_spaces_are_not_cleaned_up_whatever_the_tokenizer_does() -> None:
    tokenizer = letter_tokenizer(["a", " ", ",", "."])
    tokenizer.clean_up_tokenization_spaces = True
    assert tokenizer.decode([4, 5]) == ","
    assert end_of(scripted_model(8, [3, 4, 5, EOS]), tokenizer, "a") == (" ,", True)


QUESTION = [{"role": "user", "content": "The dog?"}]


def test_conversations_go_through_the_chat_template(tiny_llama_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    written = "<s><|user|>The dog?</s><|assistant|>"
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert tokenize_prompts(tokenizer, [QUESTION]) == [ids]
    answer = tokenizer("Paris", add_special_tokens=False)["input_ids"]
    model = scripted_model(len(tokenizer), [ids[-1], *answer, tokenizer.eos_token_id])
    longer = [QUESTION[0], {"role": "assistant", "content": "It sleeps on."}, {"role": "user", "content": "Why?"}]
    texts = sample_completions(model, tokenizer, [QUESTION, longer], 2, max_new_tokens=20)
    assert texts == [["Paris"] * 2] * 2


def test_plain_prompts_are_tokenised_as_they_are(tiny_llama_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    assert tokenize_prompts(tokenizer, ["The dog", ""]) == [
        [tokenizer.bos_token_id, *tokenizer("The dog", add_special_tokens=False)["input_ids"]],
        [tokenizer.bos_token_id],
    ]


# Models of text and images


def text_and_images(family: str) -> PreTrainedModel:
    text = {**LLAMA_LIKE, "head_dim": 8, "num_key_value_heads": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "llava":
            config = transformers.LlavaConfig(
                text_config=LlamaConfig(**text),
                vision_config=transformers.CLIPVisionConfig(**vision),
                image_token_index=TURN,
            )
            return transformers.LlavaForConditionalGeneration(config).eval()
        config = transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**text),
            vision_config=transformers.SiglipVisionConfig(**vision),
            image_token_index=TURN,
            mm_tokens_per_image=4,
        )
        return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("family", ["gemma3", "llava"])
def test_a_model_of_text_and_images_samples_text_and_shares_prompts(family: str, caplog) -> None:
    model, tokenizer, prompts = text_and_images(family), letter_tokenizer(), ["abcgh", "d"]
    sample_completions(model, tokenizer, prompts, 1, max_new_tokens=1)  # the probe
    rows: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        completions = sample_completions(model, tokenizer, prompts, 1500, max_new_tokens=2)
    assert caplog.records == []
    assert rows[0] == 2 and sum(rows) <= 2 + 2 * 1500  # both prompts once
    laws = [law_of_texts(model, tokenizer, tokenizer(prompt)["input_ids"]) for prompt in prompts]
    for one, other in itertools.product(range(2), repeat=2):
        assert (p_value(completions[one], laws[other]) > CHANCE) == (one == other)


# Errors


def test_a_weight_that_is_nan_is_told_and_nothing_is_sampled(model, tokenizer) -> None:
    with torch.no_grad():
        model.lm_head.weight[5, 3] = math.nan
    with pytest.raises(RuntimeError, match="A completion has no token to draw: its scores are NaN or infinite"):
        sample_completions(model, tokenizer, ["ab", "c"], 3, max_new_tokens=2)


@pytest.mark.parametrize(
    ("eos_token", "prompts", "message"),
    [
        ("</s>", [QUESTION], "`prompts` are conversational and the tokenizer has no chat template"),
        ("</s>", ["a", "b", "", ""], "The prompt of row 2 is empty"),
        (None, ["a"], "`tokenizer` has no EOS token.*Set `tokenizer.eos_token`"),
    ],
)
def test_prompts_and_tokenizers_to_sample_with_are_checked(
    tokenizer, eos_token: str | None, prompts: list, message: str
) -> None:
    tokenizer.eos_token = eos_token
    with pytest.raises(ValueError, match=message):
        sample_completions(random_model(), tokenizer, prompts, 2, max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_completions": 0}, "`num_completions` must be a whole number, at least 1, got 0"),
        ({"generation_batch_size": 2.5}, "`generation_batch_size` must be a whole number, at least 1, got 2.5"),
        ({"generation_kwargs": {"top_k": 5}}, "`generation_kwargs` has `top_k`, .* Leave it out"),
        *(({"generation_kwargs": {"stop_strings": stop}}, "has an empty text") for stop in ("", [""], ["a", ""])),
        (
            {"generation_kwargs": {"min_p": 0.1, "num_return_sequences": 5}},
            "has `num_return_sequences`, which sampling",
        ),
        ({"generation_kwargs": {"stop_string": "a", "seed": 1}}, "has `seed`, which .* lacks"),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_completions(
            random_model(), letter_tokenizer(), ["a"], **({"num_completions": 2, "max_new_tokens": 2} | options)
        )


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_progress_bar_moves_with_each_token(share_prefix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Bar(sampler.tqdm):
        def update(self, n=1):
            super().update(n)
            seen.extend([] if self.disable else [self.n])

    monkeypatch.setattr(sampler, "tqdm", Bar)
    options = GenerationOptions(max_new_tokens=8, share_prefix=share_prefix)

    def sample(**given):
        prompt_ids = [[3], [4, 5]]
        return sample_candidates(random_model(), letter_tokenizer(), prompt_ids, 30, options, seed=0, **given)

    watched = sample()
    assert seen[:2] == [60, 120] and seen == sorted(seen) and seen[-1] == 480
    assert len(seen) == 9  # the last one for those that have ended
    assert any(all(row.finished) is False and any(row.finished) for row in watched)
    assert sample(progress=False) == watched  # also where rows leave
    monkeypatch.setenv("RANK", "1")
    assert sample() == watched and len(seen) == 9


TABLES = {
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=16),
    "gptj": transformers.GPTJConfig(n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=16),
    "opt": transformers.OPTConfig(
        hidden_size=12, num_hidden_layers=1, ffn_dim=16, word_embed_proj_dim=12, max_position_embeddings=16
    ),
}


@pytest.mark.parametrize("name", [*TABLES, "adapter"])
def test_a_prompt_beyond_the_positions_of_the_model_is_refused_before_it_is_sampled(name: str) -> None:
    tokenizer, config = letter_tokenizer(), TABLES.get(name, TABLES["gpt2"])
    config.update({"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD})
    model = AutoModelForCausalLM.from_config(config)
    if name == "adapter":
        model = get_peft_model(model, LoraConfig(target_modules=["c_attn"], r=2))
    options = {"max_new_tokens": 7, "generation_kwargs": {"min_new_tokens": 7}}
    fits = "a" * 10  # with 6 of the 7 tokens, as the last one is not read
    assert len(sample_completions(model, tokenizer, [fits], 2, **options)[0]) == 2
    with pytest.raises(ValueError, match="row 1 has 11 tokens.*=7 needs 17 positions, but the model has 16 .1"):
        sample_completions(model, tokenizer, [fits, fits + "a"], 2, **options)


def test_rotary_positions_are_no_limit(model) -> None:
    model.config.max_position_embeddings = 16
    assert sample_completions(model, letter_tokenizer(), ["a" * 20], 2, max_new_tokens=3)


def byte_fallback_tokenizer(algorithm: str, strips: bool) -> PreTrainedTokenizerFast:
    """Characters outside "Answ: Hi" are bytes; with `strips`, a text begins with a space that decoding drops."""
    words = ["<unk>", "</s>", "<|assistant|>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁Answ:Hi", "▁Hi"]
    if algorithm == "BPE":
        vocabulary = {word: index for index, word in enumerate(words)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    else:
        tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space] if strips else [space])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|assistant|>"],
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}<|assistant|>\n",
    )


@pytest.mark.parametrize(
    "prompt", ["Answer:\n", "Answ:", "\n", "日本語日本語", [{"role": "user", "content": "Hi"}]], ids=str
)
@pytest.mark.parametrize("strips", [True, False], ids=["LLaMA", "Gemma"])
@pytest.mark.parametrize("algorithm", ["BPE", "Unigram"])
def test_nothing_of_a_prompt_that_ends_in_bytes_is_part_of_a_completion(
    algorithm: str, strips: bool, prompt: str | list, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_fallback_tokenizer(algorithm, strips)
    (prompt_ids,) = tokenize_prompts(tokenizer, [prompt])
    for drawn, text in {
        "<0xF0> <0x9F>": "\ufffd\ufffd",
        "<0xF0> <0x9F> <0x98> <0x80>": "😀",
        "<0x9F> <0x0A> ▁Hi": "\ufffd\ufffd Hi",  # the decoder knows a run of bytes as a whole
        "▁Hi <0x0A>": " Hi\n",
        "H i": "Hi",
    }.items():
        ids = [*tokenizer.convert_tokens_to_ids(drawn.split()), tokenizer.eos_token_id]
        assert sampler.read_row(tokenizer, prompt_ids, ids, [tokenizer.eos_token_id], []) == (text, ids, True)
    assert caplog.records == []


def test_a_decoder_that_changes_the_end_of_a_prompt_is_told_of(tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "")])
    a, b, c = tokenizer("abc")["input_ids"]
    assert tokenizer.decode([c, a]) == "ca" and tokenizer.decode([c, a, b, c]) == "cc"
    assert sampler.read_row(tokenizer, [c, a], [b, c], [EOS], []) == ("bc", [b, c], False)
    (record,) = caplog.records
    assert "decodes the end of a prompt differently before a completion" in record.getMessage()


def test_eos_that_a_tokenizer_appends_is_no_part_of_a_prompt_but_for_an_encoder(
    tiny_llama_dir: str, appending_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts, chat = ["The dog", "", "ends in </s>"], [[{"role": "user", "content": "Hi"}]]
    expected = tokenize_prompts(AutoTokenizer.from_pretrained(tiny_llama_dir), prompts)
    eos = appending_tokenizer.eos_token_id
    assert appending_tokenizer("The dog")["input_ids"] == [*expected[0], eos]
    assert tokenize_prompts(appending_tokenizer, prompts) == expected
    assert tokenize_prompts(appending_tokenizer, prompts, for_encoder=True) == [[*ids, eos] for ids in expected]
    for for_encoder in (False, True):
        ids = tokenize_prompts(appending_tokenizer, chat, for_encoder=for_encoder)
        assert ids == tokenize_prompts(AutoTokenizer.from_pretrained(tiny_llama_dir), chat)
    model = scripted_model(len(appending_tokenizer), [*expected[0], 70, eos], [eos, 71])
    assert sample_completions(model, appending_tokenizer, ["The dog"], 1, max_new_tokens=2) == [["a"]]


def test_a_single_text_and_a_prompt_that_is_none_are_refused(tiny_llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    with pytest.raises(TypeError, match="`prompts` is a single text"):
        tokenize_prompts(tokenizer, "a prompt")
    with pytest.raises(TypeError, match="`prompts` is a single list of messages. Give a list of prompts."):
        tokenize_prompts(tokenizer, [{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match="The prompt of row 1 is NoneType"):
        tokenize_prompts(tokenizer, ["a", None])
    with pytest.raises(ValueError, match="The prompt of row 0 is an empty list"):
        tokenize_prompts(tokenizer, [[]])
    message = (
        "The prompt of row 2 is a list of messages, and that of row 0 is text. Give all prompts in the same format."
    )
    with pytest.raises(ValueError, match=message):
        tokenize_prompts(tokenizer, ["a", "b", [{"role": "user", "content": "c"}]])
