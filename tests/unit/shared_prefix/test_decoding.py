"""Decoding with shared prompts: token for token that of `generate` where nothing is drawn, and its law where it is."""

import functools
import itertools
import logging
import math

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy.stats import chi2_contingency, chisquare
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MistralConfig,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    WatermarkingConfig,
)

from prefopt_trl.shared_prefix import decoding
from prefopt_trl.shared_prefix.decoding import SharedPrefixOutput, decode_shared_prefix, draw, reason_not_to_decode
from prefopt_trl.shared_prefix.packing import left_pad
from prefopt_trl.shared_prefix.support import reason_not_to_share_prefix
from tests.unit.laws import CHANCE, p_value
from tests.unit.shared_prefix.families import (
    DYNAMIC_ROPE,
    LLAMA_LIKE,
    NOT_SHARING,
    SHARING,
    SHARING_IN_PACKED_ROWS,
    build,
)

PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [15]]


@pytest.fixture
def model():
    return build(SHARING["llama"])


def inputs_of(prompts=PROMPTS) -> dict[str, torch.Tensor]:
    inputs = left_pad(prompts, 0, torch.device("cpu"))
    del inputs["position_ids"]
    return inputs


def shared(model, num_completions: int = 1, prompts=PROMPTS, **options):
    return model.generate(
        **inputs_of(prompts), custom_generate=decode_shared_prefix, num_completions=num_completions, **options
    )


def check_as_generate(model, num_completions: int = 2, prompts=PROMPTS, **options) -> torch.Tensor:
    """Require that every completion is that of `generate`, greedy unless the options say otherwise, and return it."""
    options = {"do_sample": False} | options
    expected = model.generate(**inputs_of(prompts), **options)
    found = shared(model, num_completions, prompts, **options)
    assert torch.equal(found, expected.repeat_interleave(num_completions, dim=0))
    return expected


def sampled(model, num_completions: int, prompts=PROMPTS, seed: int = 0, **options) -> SharedPrefixOutput:
    """Draw from the model's own law, unless the options narrow it."""
    torch.manual_seed(seed)
    options = {"do_sample": True, "top_k": 0, "return_dict_in_generate": True} | options
    return shared(model, num_completions, prompts, **options)


def completions_of(sequences: torch.Tensor, end_ids=(2,), prompts=PROMPTS) -> list[list[int]]:
    """The tokens of each completion up to and including the one that ended it."""
    rows = sequences[:, max(map(len, prompts)) :].tolist()
    ends = [next((place + 1 for place, token in enumerate(row) if token in end_ids), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


def teacher_forced(model, completions: list[list[int]], prompts=PROMPTS) -> list[float]:
    """Slow reference: one unpadded row at a time, without a cache, log-softmax in float64, summed."""
    per_prompt, logps = len(completions) // len(prompts), []
    for row, completion in enumerate(completions):
        prompt = prompts[row // per_prompt]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].double()
        steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        logps.append(steps[torch.arange(len(completion)), completion].sum().item())
    return logps


# Every family that shares


@pytest.mark.parametrize("family", SHARING)
def test_greedy_decoding_is_that_of_generate_token_for_token(family):
    model = build(SHARING[family])
    assert reason_not_to_share_prefix(model, 64) is None
    endless = check_as_generate(model, max_new_tokens=16, eos_token_id=None)[:, 6:].tolist()
    end_ids = [endless[0][3], endless[1][9]]  # so that rows end at different times, or not at all
    ending = check_as_generate(model, 3, max_new_tokens=16, eos_token_id=end_ids)
    assert len({len(row) for row in completions_of(ending, end_ids)}) > 1


@pytest.mark.parametrize("family", SHARING)
def test_logps_are_those_of_the_returned_tokens_under_the_plain_model(family):
    model = build(SHARING[family])
    end_ids = [2, 3, 4, 5, 6, 7, 8]
    narrowed = {"temperature": 0.7, "top_p": 0.95, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3}
    for options in ({}, narrowed):
        output = sampled(model, 5, max_new_tokens=12, eos_token_id=end_ids, **options)
        completions = completions_of(output.sequences, end_ids)
        assert len({len(completion) for completion in completions}) > 2
        assert output.logps.dtype == torch.float64
        assert output.logps.tolist() == pytest.approx(teacher_forced(model, completions), abs=1e-3)
        assert output.logps.min() < -5  # a wrong mask or position would show


def test_logps_of_a_thousand_tokens_do_not_drift():
    config = LlamaConfig(**LLAMA_LIKE | {"num_hidden_layers": 1, "max_position_embeddings": 2048})
    model, prompts = build(config), [PROMPTS[0]]
    output = sampled(model, 2, prompts, max_new_tokens=1024, eos_token_id=None)
    completions = completions_of(output.sequences, (), prompts)
    assert [len(completion) for completion in completions] == [1024, 1024]
    expected = teacher_forced(model.double(), completions, prompts)
    assert output.logps.tolist() == pytest.approx(expected, abs=1e-3, rel=0)
    assert max(expected) < -1000


NO_PREFIX = {
    **NOT_SHARING,
    # GPT-J shares its prompts from transformers 5.24 on
    **{family: (config, family) for family, config in SHARING_IN_PACKED_ROWS.items() if family != "gptj"},
    "llama4": (
        transformers.Llama4TextConfig(**LLAMA_LIKE, head_dim=8, intermediate_size_mlp=48, num_local_experts=2),
        "`attn_temperature_tuning`",
    ),
    "gpt_oss": (
        transformers.GptOssConfig(**LLAMA_LIKE, head_dim=8, num_local_experts=4, sliding_window=64),
        "s_aux",
    ),
    "dynamic rope beyond its length": (
        LlamaConfig(**LLAMA_LIKE | {"max_position_embeddings": 59}, **DYNAMIC_ROPE),
        "rotary frequencies of llama change with the longest row beyond 59",
    ),
}


@pytest.mark.parametrize(("config", "reason"), NO_PREFIX.values(), ids=NO_PREFIX)
def test_where_it_would_not_be_exact_there_is_a_reason_and_it_is_logged_once(config, reason, caplog):
    model = build(config)
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        assert reason in reason_not_to_share_prefix(model, 60)
        assert reason in reason_not_to_share_prefix(model, 60)
    assert [record.getMessage().startswith("Prompts are not shared") for record in caplog.records] == [True]


def test_virtual_tokens_are_a_reason():
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "virtual tokens" in reason_not_to_share_prefix(get_peft_model(build(SHARING["llama"]), tuning), 20)


# The law


def law_of_sequences(model, prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
    """Probability of every completion of at most that many tokens, in float64, EOS being 2."""
    law: dict[tuple[int, ...], float] = {}
    beginnings = {(): 1.0}
    for _ in range(length):
        following: dict[tuple[int, ...], float] = {}
        for beginning, probability in beginnings.items():
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *beginning]])).logits[0, -1].double()
            for token, then in enumerate(logits.softmax(0).tolist()):
                (law if token == 2 else following)[*beginning, token] = probability * then
        beginnings = following
    return law | beginnings


def test_samples_follow_the_exact_law_of_all_sequences():
    model, num = build(LlamaConfig(**LLAMA_LIKE | {"vocab_size": 6}), seed=1), 6000
    prompts = [[3, 4, 5, 1], [5, 3]]
    completions = completions_of(sampled(model, num, prompts, max_new_tokens=3).sequences, prompts=prompts)
    laws = [law_of_sequences(model, prompt, 3) for prompt in prompts]
    assert len(laws[0]) == 1 + 5 + 25 * 6
    for prompt, other in itertools.product(range(2), repeat=2):
        samples = list(map(tuple, completions[num * prompt : num * (prompt + 1)]))
        # That no prompt's samples follow the law of the other shows that the test can tell
        assert (p_value(samples, laws[other]) > CHANCE) == (prompt == other)


def test_a_draw_follows_the_law_down_to_small_probabilities():
    law = np.array([0.5, 1e-4, 0.0, 0.3, 2e-4, 0.1997, 0.0])
    scores = torch.tensor(law).log().float()
    assert torch.isneginf(scores).sum() == 2
    torch.manual_seed(0)
    for shift in (0.0, 80.0):  # scores need not be normalised
        tokens = draw((scores + shift).expand(400_000, -1))
        observed = np.bincount(tokens.numpy(), minlength=7)
        assert observed[2] == observed[6] == 0
        assert chisquare(observed[law > 0], 400_000 * law[law > 0]).pvalue > CHANCE


def test_each_row_draws_from_its_own_scores():
    # Ten neighbours with laws of their own; drawing all from one row, or all with one number, would show
    torch.manual_seed(0)
    scores = torch.randn(10, 8)
    tokens = draw(scores.repeat(20_000, 1)).view(20_000, 10)
    for row in range(10):
        observed = np.bincount(tokens[:, row].numpy(), minlength=8)
        assert chisquare(observed, 20_000 * scores[row].double().softmax(0).numpy()).pvalue > CHANCE
    together = np.zeros((8, 8))  # the first two rows are independent
    np.add.at(together, (tokens[:, 0].numpy(), tokens[:, 1].numpy()), 1)
    assert chi2_contingency(together).pvalue > CHANCE


@pytest.mark.parametrize("scores", [[0.0, math.nan, 1.0], [-math.inf] * 3, [0.0, math.inf, 1.0]], ids=str)
def test_a_row_without_a_token_to_draw_is_refused(scores):
    fine = [0.0, 1.0, -math.inf]
    assert draw(torch.tensor([fine, fine])).max() < 2
    with pytest.raises(RuntimeError, match="A completion has no token to draw: its scores are NaN or infinite"):
        draw(torch.tensor([fine, scores]))


def test_the_ends_of_the_random_numbers_are_possible_tokens(monkeypatch):
    scores = torch.full((1, 6), -torch.inf)
    scores[0, [1, 4]] = 0.0
    for number, token in ((0.0, 1), (1 - 2**-53, 4)):
        monkeypatch.setattr(torch, "rand", lambda *size, number=number, **kwargs: torch.full(size, number, **kwargs))
        assert draw(scores).tolist() == [token]


# Options


OPTIONS = {
    "none": {},
    "temperature": {"temperature": 0.4},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.1},
    "top_h": {"top_h": 0.4},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "min_length": {"min_length": 12},
    "min_new_tokens": {"min_new_tokens": 9},
    "bad_words_ids": {"bad_words_ids": [[20], [21], [30, 31], [40]]},
    "suppress_tokens": {"suppress_tokens": list(range(10, 40))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(10, 55))},
    "sequence_bias": {"sequence_bias": [[[33], 3.0], [[34, 35], 9.0]]},
    "one end": {"eos_token_id": 7},
    "many ends": {"eos_token_id": list(range(2, 20))},
    "forced_eos_token_id": {"forced_eos_token_id": 44},
    "forced_bos_token_id": {"forced_bos_token_id": 44},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.5)},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True, "top_p": 0.8},
    "max_length": {"max_new_tokens": None, "max_length": 13},
    "one token": {"max_new_tokens": 1},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(2, 30))[len(ids) % 3 :: 3]},
    "several": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.4, "min_new_tokens": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("do_sample", [True, False])
def test_every_option_gives_the_tokens_of_generate(model, name, do_sample, monkeypatch):
    options = {"do_sample": do_sample, "max_new_tokens": 16, "top_k": 0, "eos_token_id": [2, 3, 4, 5]} | OPTIONS[name]

    def invert(probabilities: torch.Tensor) -> torch.Tensor:
        """The token at 0.6 of the distribution function: another one where anything about the law is."""
        return (probabilities.double().cumsum(-1) > 0.6).int().argmax(dim=-1)

    monkeypatch.setattr(torch, "multinomial", lambda probabilities, num_samples: invert(probabilities)[:, None])
    monkeypatch.setattr(decoding, "draw", lambda scores: invert(scores.softmax(dim=-1)))
    check_as_generate(model, **options)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="no penalty knows of padding")
def test_a_penalty_knows_the_padding_of_every_row_and_is_left_as_it_was(model):
    # Of the first prompt all tokens count, of the second the last three, of the third none; and all that is decoded
    penalty = RepetitionPenaltyLogitsProcessor(4.0, prompt_ignore_length=torch.tensor([2, 3, 6]))
    options = {"max_new_tokens": 16, "logits_processor": LogitsProcessorList([penalty])}
    endless = check_as_generate(model, **options, eos_token_id=None)[:, 6:].tolist()
    end_ids = [endless[0][2], endless[1][6], endless[2][11]]  # so that rows leave
    ending = check_as_generate(model, 3, **options, eos_token_id=end_ids)
    assert len({len(row) for row in completions_of(ending, end_ids)}) > 1
    assert torch.equal(penalty.prompt_ignore_length, torch.tensor([2, 3, 6]))
    # The same number for all rows, and a processor that is not told anything
    for other in (RepetitionPenaltyLogitsProcessor(4.0, 3), RepetitionPenaltyLogitsProcessor(4.0)):
        options["logits_processor"] = LogitsProcessorList([other])
        check_as_generate(model, 3, **options, eos_token_id=end_ids)


def test_positions_that_are_given_are_used():
    model = build(SHARING["gpt2"])
    given = torch.tensor([[0, 0, 3, 5, 6, 20], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 40]])
    placed = check_as_generate(model, max_new_tokens=12, position_ids=given)
    assert not torch.equal(check_as_generate(model, max_new_tokens=12)[[0, 2]], placed[[0, 2]])


class Witness:
    """A user's own, with a memory of its rows, which must not move, and a state that a copy would not share."""

    def __init__(self, *given):
        super().__init__(*given)
        self.seen, self.num_calls = [], 0

    def look(self, input_ids):
        self.seen.append(input_ids.tolist())
        self.num_calls += 1


class SeenByProcessor(Witness, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.look(input_ids)
        return scores if self.num_calls % 2 else -scores


class SeenByWarper(Witness, TopKLogitsWarper):
    def __call__(self, input_ids, scores):  # as transformers' own does, which rows may leave
        self.look(input_ids)
        return super().__call__(input_ids, scores)


class SeenByCriterion(Witness, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.look(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("logits_processor", lambda: LogitsProcessorList([SeenByProcessor()])),
        ("logits_processor", lambda: LogitsProcessorList([SeenByWarper(5)])),
        ("stopping_criteria", lambda: StoppingCriteriaList([SeenByCriterion()])),
    ],
)
def test_a_users_own_processor_or_criterion_sees_all_rows_to_the_end(model, argument, make):
    theirs, ours = make(), make()
    options = {"do_sample": False, "max_new_tokens": 16}
    endless = model.generate(**inputs_of(), **options, eos_token_id=None, **{argument: make()})[:, 6:].tolist()
    options["eos_token_id"] = end = endless[0][0]
    assert end not in endless[1] + endless[2]  # so the first row ends at once, and the others never
    expected = model.generate(**inputs_of(), **options, **{argument: theirs})
    assert torch.equal(shared(model, 1, **options, **{argument: ours}), expected)
    assert ours[0].seen == theirs[0].seen and ours[0].num_calls == 16
    assert {len(rows) for rows in ours[0].seen} == {3}


class Contrasting(LogitsProcessor):
    """Asks the model that is decoding what it would say after the last token alone."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores):
        return scores - 0.5 * self.model(input_ids=input_ids[:, -1:], use_cache=False).logits[:, -1]


def test_a_processor_may_run_the_model_itself(model):
    processors = LogitsProcessorList([Contrasting(model)])
    contrasted = check_as_generate(model, max_new_tokens=10, eos_token_id=None, logits_processor=processors)
    assert not torch.equal(check_as_generate(model, max_new_tokens=10, eos_token_id=None), contrasted)


def test_rows_that_have_ended_leave_the_batch(model):
    sizes = []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[:2]))
    output = sampled(model, 64, max_new_tokens=30, eos_token_id=list(range(2, 10)))
    lengths = [len(completion) for completion in completions_of(output.sequences, range(2, 10))]
    assert sizes[0] == (3, 6)  # each prompt once
    steps = [rows for rows, _ in sizes[1:]]
    assert all(tokens == 1 for _, tokens in sizes[1:])
    for step, rows in enumerate(steps, start=1):
        unfinished = sum(length > step for length in lengths)
        assert unfinished <= rows <= max(unfinished / (1 - decoding.DEAD_SHARE), 1)
    assert len(steps) == max(lengths) - 1 and steps[0] > 4 * steps[-1]


@pytest.mark.parametrize(("prompts", "num_completions"), [([[5, 6, 7]], 1), ([[5, 6, 7]], 64), ([[5], [6], [7]], 1)])
def test_one_prompt_one_completion_and_no_padding(model, prompts, num_completions):
    output = sampled(model, num_completions, prompts, max_new_tokens=6)
    assert output.sequences.shape[0] == len(prompts) * num_completions
    completions = completions_of(output.sequences, prompts=prompts)
    assert output.logps.tolist() == pytest.approx(teacher_forced(model, completions, prompts), abs=1e-3)
    expected = check_as_generate(model, num_completions, prompts, max_new_tokens=6)
    # and without a mask, which `generate` then makes
    options = {"custom_generate": decode_shared_prefix, "num_completions": num_completions, "do_sample": False}
    found = model.generate(inputs_of(prompts)["input_ids"], **options, max_new_tokens=6)
    assert torch.equal(found, expected.repeat_interleave(num_completions, dim=0))


# What is left as it was, and models of all kinds


def test_a_model_with_dropout_and_gradient_checkpointing_in_training_gives_the_same():
    model = build(LlamaConfig(**LLAMA_LIKE, attention_dropout=0.5))
    expected = shared(model, 2, do_sample=False, max_new_tokens=8)
    model.gradient_checkpointing_enable()
    model.train()
    model.config.use_cache = False
    assert torch.equal(shared(model, 2, do_sample=False, max_new_tokens=8), expected)
    assert model.training and model.is_gradient_checkpointing and model.config.use_cache is False


def test_bfloat16_sums_what_the_model_says():
    model = build(SHARING["llama"]).bfloat16()
    output = sampled(model, 8, max_new_tokens=8)
    expected = teacher_forced(model, completions_of(output.sequences))
    # bfloat16 rounds a logit by up to 1/256 of it, in either order of summation; the mean over 24 completions less
    assert np.abs(output.logps.numpy() - expected).mean() < 0.05 * 8
    assert output.logps.dtype == torch.float64


def test_an_adapter_counts_only_while_it_is_active():
    base = build(SHARING["llama"])
    plain = check_as_generate(base, max_new_tokens=8)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    assert reason_not_to_share_prefix(model, 20) is None
    assert not torch.equal(check_as_generate(model, max_new_tokens=8), plain)
    output = sampled(model, 4, max_new_tokens=8)
    assert output.logps.tolist() == pytest.approx(teacher_forced(model, completions_of(output.sequences)), abs=1e-3)
    with model.disable_adapter():
        assert torch.equal(check_as_generate(model, max_new_tokens=8), plain)
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", init_lora_weights=True))
    model.set_adapter("other")  # which adds nothing yet
    assert torch.equal(check_as_generate(model, max_new_tokens=8), plain)


def test_a_model_of_four_bits_gives_the_same(tmp_path):
    config = LlamaConfig(**LLAMA_LIKE | {"hidden_size": 64, "intermediate_size": 64})
    build(config).save_pretrained(tmp_path)
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization_config, dtype=torch.float32, device_map="cpu"
    ).eval()
    assert model.is_loaded_in_4bit and model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert reason_not_to_share_prefix(model, 20) is None
    check_as_generate(model, max_new_tokens=6)
    # Its matrix products round a little differently for one row and for many
    output = sampled(model, 3, max_new_tokens=6)
    expected = teacher_forced(model, completions_of(output.sequences))
    assert output.logps.tolist() == pytest.approx(expected, abs=1e-2)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_completions": 0}, "`num_completions` is 0. Give 1 or more"),
        ({"num_return_sequences": 2, "do_sample": True}, "leave out `num_return_sequences`, `num_beams`"),
        ({"num_beams": 2}, "leave out `num_return_sequences`, `num_beams` and other search options"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "other search options"),
        ({"cache_implementation": "static"}, "leave out `cache_implementation` and `past_key_values`"),
        ({"output_scores": True, "return_dict_in_generate": True}, "`output_scores` is not supported"),
        ({"guidance_scale": 2.0}, "`guidance_scale` runs the model a second time"),
        ({"inputs_embeds": torch.zeros(3, 6, 32)}, "inputs_embeds cannot be shared by completions"),
    ],
)
def test_what_cannot_be_shared_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        shared(model, **{"num_completions": 2, "max_new_tokens": 4} | options)


def test_a_model_whose_config_rules_it_out_is_refused():
    bloom = build(NOT_SHARING["bloom"][0])
    with pytest.raises(ValueError, match="cannot share their prompt: bloom uses ALiBi.* Use plain `generate`"):
        shared(bloom, 2, max_new_tokens=4)
    model = build(MistralConfig(**LLAMA_LIKE, sliding_window=10))
    # The longest prompt has 6 tokens: with 4 more a row fills the window, with 5 it would leave it
    check_as_generate(model, max_new_tokens=4, eos_token_id=None)
    message = r"rows of up to 11 tokens exceed the attention window of mistral \(`sliding_window`=10\)"
    with pytest.raises(ValueError, match=message):
        shared(model, 2, max_new_tokens=5)


def test_a_cache_that_has_tokens_is_refused(model):
    cache = model(input_ids=torch.tensor([[5], [6], [7]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="leave out `cache_implementation` and `past_key_values`"):
        shared(model, 2, max_new_tokens=4, past_key_values=cache)


@pytest.mark.parametrize("novel", [None, {}, 3, True, "text", DynamicCache()], ids=repr)
def test_what_generate_passes_anew_is_taken_where_it_is_no_input(model, novel):
    options = {"do_sample": False, "max_new_tokens": 4, "num_completions": 2}
    passing_more = functools.partial(decode_shared_prefix, novel=novel)
    found = model.generate(**inputs_of(), **options, custom_generate=passing_more)
    assert torch.equal(found, shared(model, **options))


@pytest.mark.parametrize("breaks", ["generate", "attention"])
def test_a_transformers_with_other_names_costs_the_sharing_alone(model, breaks, monkeypatch, caplog):
    generate = LlamaForCausalLM.generate

    def passing_more(self, *args, custom_generate, **kwargs):
        novel = functools.partial(custom_generate, novel=torch.zeros(1, 2))
        return generate(self, *args, custom_generate=novel, **kwargs)

    if breaks == "attention":
        monkeypatch.setattr(AttentionInterface, "register", None)
        message, reason = "llama fails in a probe (TypeError", lambda: reason_not_to_share_prefix(model, 20)
    else:
        monkeypatch.setattr(LlamaForCausalLM, "generate", passing_more)
        message = "llama fails in a probe (ValueError: novel"
        reason = functools.partial(reason_not_to_decode, model)
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        assert [message in reason() for _ in range(2)] == [True, True]
    assert len(caplog.records) == 1 and message in caplog.text
