import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

from prefopt_trl.rankers import PairwiseRanker, pairwise_ranker_dataset
from prefopt_trl.rankers.templates import ANSWER_CUE, dialogue, rlhflow, summary

configure = AutoConfig.for_model
PROMPTS = ["What is the capital of France?", "Bake bread.", "Tell me how to bake bread, and then wait for the dog."]
FIRST = ["Paris.", "Mix the flour, the water and the salt.", "No."]
SFT_ON_CPU = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
TINY = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SECOND = ["The dog sleeps on, and on.", "Wait.", "The quick brown fox jumps over it."]


def randomise(model):
    """Give a model weights so large that its answers depend on its input, as those of a new one hardly do."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith("A_log"):
                parameter.normal_(std=0.3)
    return model


@pytest.fixture
def model(tiny_llama_dir):
    return randomise(AutoModelForCausalLM.from_pretrained(tiny_llama_dir))


def softmax_of_a(tokenizer, logits: torch.Tensor) -> float:
    """Softmax over the two answers, in float64."""
    odds = logits.double()[tokenizer.convert_tokens_to_ids(["A", "B"])]
    return odds.softmax(0)[0].item()


def probability_of_a(model, tokenizer, text: str) -> float:
    """Slow reference: one unpadded row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(text).input_ids])).logits[0, -1]
    return softmax_of_a(tokenizer, logits)


def over_both_orders(probability, write) -> list[float]:
    """Slow reference: the mean of both orders of each comparison, where A stands for the first completion shown."""
    return [
        (probability(write(prompt, first, second)) + 1 - probability(write(prompt, second, first))) / 2
        for prompt, first, second in zip(PROMPTS, FIRST, SECOND, strict=True)
    ]


def record_inputs(model) -> list[list[int]]:
    """Return a list that collects the token ids of every row the model is given, without padding."""
    rows: list[list[int]] = []

    def hook(module, args, kwargs):
        pairs = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        rows.extend(row[mask == 1].tolist() for row, mask in pairs)

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return rows


def logged(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("prefopt_trl")]


@pytest.mark.parametrize("share_prefix", [False, True])
def test_rlhflow_is_one_message_without_bos_in_the_chat_template(model, tokenizer, share_prefix):
    def as_in_the_models_example(text: str) -> float:
        ids = tokenizer(f"<|user|>{text}</s>", add_special_tokens=False).input_ids
        with torch.no_grad():
            return softmax_of_a(tokenizer, model(input_ids=torch.tensor([ids])).logits[0, -1])

    ranker = PairwiseRanker(model, tokenizer, template="rlhflow", batch_size=4, share_prefix=share_prefix)
    expected = over_both_orders(as_in_the_models_example, rlhflow)
    assert ranker.compare(PROMPTS, FIRST, SECOND) == pytest.approx(expected, abs=1e-5)
    assert max(abs(p - 0.5) for p in expected) > 0.05
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert ranker.compare(conversations, FIRST, SECOND) == pytest.approx(expected, abs=1e-5)
    assert ranker.arguments()["template"] == "'rlhflow'"


def test_rlhflow_needs_a_chat_template_and_is_not_trained(model, tokenizer):
    with pytest.raises(ValueError, match="`template='rlhflow'` is for models that exist"):
        pairwise_ranker_dataset(Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]), "rlhflow")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="`template='rlhflow'` needs a chat template, and the tokenizer has none"):
        PairwiseRanker(model, tokenizer, template="rlhflow")


@pytest.mark.parametrize(("name", "write"), [("dialogue", dialogue), ("summary", summary)])
def test_compare_is_the_softmax_over_the_answers_averaged_over_both_orders(model, tokenizer, name, write):
    ranker = PairwiseRanker(model, tokenizer, template=name, batch_size=4)
    expected = over_both_orders(lambda text: probability_of_a(model, tokenizer, text), write)
    assert max(abs(p - 0.5) for p in expected) > 0.05  # the order and the completions do matter to this model
    probabilities = ranker.compare(PROMPTS, FIRST, SECOND)
    assert probabilities.dtype == np.float64
    assert probabilities == pytest.approx(expected, abs=1e-5)
    assert probabilities + ranker.compare(PROMPTS, SECOND, FIRST) == pytest.approx(np.ones(3), abs=1e-12)


def test_equal_comparisons_are_run_once_and_equal_completions_never(model, tokenizer):
    rows = record_inputs(model)
    ranker = PairwiseRanker(model, tokenizer, batch_size=2, share_prefix=False)
    probabilities = ranker.compare(["p"] * 4, ["a", "a", "b", "c"], ["b", "b", "a", "c"])
    assert len(rows) == 2
    assert probabilities[0] == probabilities[1] == 1 - probabilities[2]
    assert probabilities[3] == 0.5

    rows.clear()  # the longest ones are run first
    ranker.compare(["p" * 3, "p" * 90, "p" * 30], ["a"] * 3, ["b"] * 3)
    lengths = [len(row) for row in rows]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 3


def test_no_rows_give_no_probabilities_and_no_rewards(model, tokenizer):
    ranker = PairwiseRanker(model, tokenizer)
    assert ranker.compare([], [], []).shape == (0,)
    assert ranker.score([], []) == []
    assert [len(row) for row in ranker.score(["p", "q"], [[], ["a"]], baselines=["b", "b"])] == [0, 1]


# What comparisons begin with


CANDIDATES = ["Paris.", "The dog sleeps on.", "Paris.", "", "It is Paris, and no other town is.", "No."]
CANDIDATES += ["P", "Yes", "b"]


def shared_and_plain(*given, **options) -> list[PairwiseRanker]:
    return [PairwiseRanker(*given, share_prefix=share_prefix, **options) for share_prefix in (True, False)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("own_baselines", [True, False])
@pytest.mark.parametrize("max_length", [None, 90])
def test_sharing_changes_no_score(model, tokenizer, caplog, batch_size, own_baselines, max_length):
    prompts = [*PROMPTS, "Why did the dog sleep on and on, and what did the fox do in the end?"]
    completions = [CANDIDATES[:1], CANDIDATES[:2], CANDIDATES, CANDIDATES[4:]]
    baselines = ["Perhaps.", "Paris.", "No.", "Perhaps."] if own_baselines else None
    rankers = shared_and_plain(model, tokenizer, batch_size=batch_size, max_length=max_length)
    shared, plain = (ranker.score(prompts, completions, baselines) for ranker in rankers)
    assert [len(row) for row in shared] == [1, 2, 9, 5]
    assert np.concatenate(shared) == pytest.approx(np.concatenate(plain), abs=1e-5)
    assert np.ptp(shared[2]) > 0.1
    assert sum("were cut on the left" in message for message in logged(caplog)) == (0 if max_length is None else 2)
    assert not any("not shared" in message for message in logged(caplog))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_sharing_changes_no_comparison(model, tokenizer, batch_size):
    # Of one prompt: repeated, swapped, equal; and of prompts that come back further on
    prompts = [*["Bake bread."] * 6, "Why?", "Bake bread.", "Why?"]
    first = ["Mix.", "Mix.", "Wait.", "Mix.", "Wait.", "a", "So.", "b", "So."]
    second = ["Wait.", "Flour.", "Mix.", "Mix.", "Flour.", "b", "No.", "a", "Yes."]
    rankers = shared_and_plain(model, tokenizer, batch_size=batch_size)
    shared, plain = (ranker.compare(prompts, first, second) for ranker in rankers)
    assert shared == pytest.approx(plain, abs=1e-5)
    assert shared[3] == 0.5 and shared[0] == 1 - shared[2] and len(set(shared.round(4))) > 5


SHARING = [
    configure("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=300),
    configure("opt", **TINY, ffn_dim=32, word_embed_proj_dim=32),
    configure(  # transformers 5.17 has a softcap in eager attention alone
        "gemma2", **TINY, intermediate_size=32, num_key_value_heads=1, head_dim=16, attn_implementation="eager"
    ),
]
OTHERS = [
    configure("bloom", hidden_size=16, n_layer=2, n_head=2, vocab_size=300),
    configure("mpt", d_model=16, n_layers=2, n_heads=2, vocab_size=300),
    configure("mistral", **TINY, intermediate_size=32, num_key_value_heads=2, sliding_window=8),
    configure("mamba", hidden_size=16, num_hidden_layers=2, vocab_size=300, state_size=4),
]


@pytest.mark.parametrize("config", SHARING + OTHERS, ids=lambda config: config.model_type)
def test_neither_sharing_nor_the_others_of_a_batch_change_a_score_of_any_family(config, tokenizer, caplog):
    torch.manual_seed(0)
    model = randomise(AutoModelForCausalLM.from_config(config))
    alone = PairwiseRanker(model, tokenizer, batch_size=1, share_prefix=False).score(PROMPTS, [CANDIDATES] * 3)
    for batch_size in (6, 32):
        together = PairwiseRanker(model, tokenizer, batch_size=batch_size).score(PROMPTS, [CANDIDATES] * 3)
        assert np.concatenate(together) == pytest.approx(np.concatenate(alone), abs=2e-5)
    assert np.ptp(alone[0]) > 1e-3
    said = [message for message in logged(caplog) if "Prompts are not shared" in message]
    assert bool(said) == (config in OTHERS) and logged(caplog) == said


def record_tokens(model) -> list[torch.Tensor]:
    """Return a list that collects the token ids of every call of the model."""
    calls: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))
    return calls


def test_prompt_and_baseline_are_computed_once(model, tokenizer):
    prompt, baseline = "What is the capital of France? " * 30, "The dog sleeps on, and on."
    candidates = [f"{number} is the answer." for number in range(16)]
    ranker = PairwiseRanker(model, tokenizer, batch_size=32)
    ranker.compare(["p", "p"], ["a", "b"], ["b", "c"])  # the probe
    calls = record_tokens(model)
    ranker.score([prompt], [candidates], [baseline])
    assert [len(call) for call in calls] == [2, 1]  # what comparisons begin with, and all that follows
    beginnings = sorted((tokenizer.decode(row[row != tokenizer.pad_token_id]) for row in calls[0]), key=len)
    whole = "<s>" + dialogue(prompt.strip(), baseline, candidates[0])
    assert all(whole.startswith(beginning) for beginning in beginnings)
    assert baseline not in beginnings[0] and prompt.strip() in beginnings[0]
    assert baseline in beginnings[1]
    # All tokens of the comparisons but those that beginnings save
    texts = [dialogue(prompt.strip(), baseline, candidate) for candidate in candidates]
    texts += [dialogue(prompt.strip(), candidate, baseline) for candidate in candidates]
    num_tokens = [len(tokenizer(text).input_ids) for text in texts]
    lengths = [len(tokenizer(beginning, add_special_tokens=False).input_ids) for beginning in beginnings]
    assert calls[1].numel() == sum(num_tokens) - 16 * sum(lengths)
    shared = sum(call.numel() for call in calls)
    calls.clear()
    PairwiseRanker(model, tokenizer, batch_size=32, share_prefix=False).score([prompt], [candidates], [baseline])
    assert [len(call) for call in calls] == [32]
    assert sum(call.numel() for call in calls) > 5 * shared


# Encoder-decoders


def tiny_encoder_decoder(family: str):
    special = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 2, "d_model": 32}
    bart = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    bart |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 2, "bos_token_id": 1}
    config = {
        "t5": configure("t5", **special, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
        "bart": configure("bart", **special, **bart),
    }[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(AutoModelForSeq2SeqLM.from_config(config)).eval()


def ending_with_eos(tokenizer, beginning: str = ""):
    """As T5's tokenizer, or with `<s>` at the beginning as BART's."""
    special_tokens = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"{beginning} $A </s>".strip(), special_tokens=special_tokens
    )
    return tokenizer


def answer_of_decoder(model, tokenizer, text: str, before_answer: list[int]) -> float:
    """Slow reference: P(A) after the decoder's first tokens, for a text without the answer cue."""
    assert text.endswith(ANSWER_CUE)
    input_ids = torch.tensor([tokenizer(text[: -len(ANSWER_CUE)]).input_ids])
    with torch.no_grad():
        logits = model(input_ids=input_ids, decoder_input_ids=torch.tensor([before_answer])).logits[0, -1]
    return softmax_of_a(tokenizer, logits)


@pytest.mark.parametrize(
    ("family", "beginning", "before_answer"), [("t5", "", [0]), ("bart", "<s>", [2, 1])], ids=["t5", "bart"]
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_encoder_decoder_answers_in_its_decoder(tokenizer, caplog, family, beginning, before_answer, batch_size):
    model, tokenizer = tiny_encoder_decoder(family), ending_with_eos(tokenizer, beginning)
    for template, write in (("dialogue", dialogue), ("summary", summary)):
        expected = over_both_orders(lambda text: answer_of_decoder(model, tokenizer, text, before_answer), write)
        assert max(abs(p - 0.5) for p in expected) > 0.002
        ranker = PairwiseRanker(model, tokenizer, template=template, batch_size=batch_size, max_length=512)
        assert ranker.compare(PROMPTS, FIRST, SECOND) == pytest.approx(expected, abs=1e-6)
    rewards = ranker.score(PROMPTS[:1], [[FIRST[0], "No."]], baselines=SECOND[:1])[0]
    assert rewards[0] == pytest.approx(math.log(expected[0] / (1 - expected[0])), abs=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_loads_from_its_folder(tokenizer, tmp_path, family):
    model, tokenizer = tiny_encoder_decoder(family), ending_with_eos(tokenizer)
    tokenizer.model_max_length = 200
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ranker, expected = PairwiseRanker(str(tmp_path)), PairwiseRanker(model, tokenizer)
    assert ranker.compare(PROMPTS, FIRST, SECOND) == pytest.approx(expected.compare(PROMPTS, FIRST, SECOND), abs=1e-6)
    assert ranker.settings() == expected.settings()
    assert ranker.settings()["max_length"] == 200 and ranker.settings()["model"] == type(model).__name__


def test_an_encoder_decoder_cuts_a_long_prompt_and_keeps_its_eos(tokenizer, caplog):
    model, tokenizer = tiny_encoder_decoder("t5"), ending_with_eos(tokenizer)
    prompt = "".join(chr(ord("a") + place % 26) for place in range(200))
    whole = len(tokenizer(dialogue(prompt, "yes", "no")[: -len(ANSWER_CUE)]).input_ids)
    rows = record_inputs(model.encoder)
    PairwiseRanker(model, tokenizer, max_length=whole - 10).compare([prompt], ["yes"], ["no"])
    (message,) = logged(caplog)
    assert message == f"2 of 2 texts exceeded max_length={whole - 10} tokens: their prompts were cut on the left."
    for row, texts in zip(sorted(rows), (("no", "yes"), ("yes", "no")), strict=True):
        text = tokenizer.decode(row)
        kept = text.removeprefix("[CONTEXT] ").split(" ")[0]
        assert len(row) <= whole - 10 and prompt.endswith(kept) and len(kept) > 150
        assert text == dialogue(kept, *texts)[: -len(ANSWER_CUE)] + "</s>"


def test_a_tokenizer_that_does_not_know_the_answers_is_refused(model):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "yes": 1, "no": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(ValueError, match="The decoder: the tokenizer does not write the answers A and B as one token"):
        PairwiseRanker(tiny_encoder_decoder("t5"), tokenizer)
    with pytest.raises(ValueError, match=r"Prompt row 0: the tokenizer does not write the answers.*another tokenizer"):
        PairwiseRanker(model, tokenizer).compare(["p"], ["yes"], ["no"])


def test_the_answer_is_read_where_trls_sft_trainer_puts_it(model, tokenizer, tmp_path):
    pairs = Dataset.from_dict({"prompt": PROMPTS, "chosen": FIRST, "rejected": SECOND})
    trainer = SFTTrainer(
        model,
        SFTConfig(str(tmp_path), **SFT_ON_CPU, max_length=None),
        train_dataset=pairwise_ranker_dataset(pairs),
        processing_class=tokenizer,
    )
    contexts, answers = [], []
    for row in trainer.train_dataset:
        start = next(place for place, label in enumerate(row["labels"]) if label != -100)
        contexts.append(row["input_ids"][:start])
        answers.append(row["input_ids"][start:])
    assert {tokenizer.decode(answer) for answer in answers} == {"A</s>", "B</s>"}
    assert all(len(answer) == 2 for answer in answers)

    seen = record_inputs(model)
    PairwiseRanker(model, tokenizer, share_prefix=False).compare(PROMPTS, FIRST, SECOND)
    assert len(seen) == 6
    assert all(context in seen for context in contexts)


def test_an_eos_that_the_tokenizer_appends_is_not_read(model, tokenizer):
    expected = PairwiseRanker(model, tokenizer).compare(PROMPTS, FIRST, SECOND)
    tokenizer = ending_with_eos(tokenizer, "<s>")
    assert tokenizer("Hi").input_ids[-1] == tokenizer.eos_token_id
    assert PairwiseRanker(model, tokenizer).compare(PROMPTS, FIRST, SECOND) == pytest.approx(expected, abs=1e-6)


def test_a_merge_of_the_cue_with_both_answers_is_one_token_each(model, tokenizer):
    # Its vocabulary has " A" and " B", so the space before the answer belongs to it, as it would to `SFTTrainer`
    tokenizer.add_tokens([" A", " B"])
    model.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[-2:] = torch.tensor([[0.5], [-0.5]]) * torch.arange(32)

    def with_space(prompt: str, first: str, second: str) -> str:
        return f"{prompt} {first} or {second}? "

    context = torch.tensor([tokenizer("p a or b?").input_ids])
    swapped = torch.tensor([tokenizer("p b or a?").input_ids])
    odds = [model(input_ids=ids).logits[0, -1, -2:].double().softmax(0)[0].item() for ids in (context, swapped)]
    ranker = PairwiseRanker(model, tokenizer, template=with_space)
    assert ranker.compare(["p"], ["a"], ["b"]) == pytest.approx((odds[0] + 1 - odds[1]) / 2, abs=1e-5)


@pytest.mark.parametrize(
    "vocabulary",
    [
        ["yA"],  # one token, where "yB" is two
        ["?yA", "yB"],  # two tokens after the template's "?y", which begin at different places
    ],
)
def test_answers_that_are_not_one_token_each_are_refused(model, tokenizer, vocabulary):
    tokenizer.add_tokens(vocabulary)
    model.resize_token_embeddings(len(tokenizer))

    def into_a_word(prompt: str, first: str, second: str) -> str:
        return f"{prompt} {first} {second}?y"

    ranker = PairwiseRanker(model, tokenizer, template=into_a_word)
    with pytest.raises(ValueError, match="Prompt row 0: the tokenizer does not write the answers.*End the `template`"):
        ranker.compare(["p"], ["a"], ["b"])


def test_a_long_prompt_loses_its_beginning_and_nothing_else(model, tokenizer, caplog):
    prompt = "".join(chr(ord("a") + place % 26) for place in range(200))
    whole = len(tokenizer(dialogue(prompt, "yes", "no")).input_ids)
    rows = record_inputs(model)
    ranker = PairwiseRanker(model, tokenizer, max_length=whole - 10, share_prefix=False)
    ranker.compare([prompt, "p"], ["yes"] * 2, ["no"] * 2)
    seen = [tokenizer.decode(row) for row in rows]
    (message,) = logged(caplog)
    assert message == f"2 of 4 texts exceeded max_length={whole - 10} tokens: their prompts were cut on the left."
    longest = max(seen, key=len)
    assert longest.startswith("<s>[CONTEXT] ")
    context = longest.removeprefix("<s>[CONTEXT] ").split(" ")[0]
    assert prompt.endswith(context) and len(context) < 200
    assert seen[0][-40:] == dialogue("", "yes", "no")[-40:]
    # As much is kept as fits
    kept = [dialogue(prompt[-size:], "yes", "no") for size in (len(context), len(context) + 1)]
    assert len(tokenizer(kept[0]).input_ids) <= whole - 10 < len(tokenizer(kept[1]).input_ids)

    exact = PairwiseRanker(model, tokenizer, max_length=whole, share_prefix=False).compare([prompt], ["yes"], ["no"])
    assert exact == PairwiseRanker(model, tokenizer, share_prefix=False).compare([prompt], ["yes"], ["no"])
    assert len(logged(caplog)) == 1


@pytest.mark.parametrize("call", ["compare", "score"])
def test_completions_that_exceed_max_length_name_their_row(model, tokenizer, call):
    ranker = PairwiseRanker(model, tokenizer, max_length=100)
    with pytest.raises(ValueError, match=r"Prompt row 1: .*exceed `max_length` \(100 tokens\).*Raise `max_length`"):
        if call == "compare":
            ranker.compare(["p", "q"], ["a", "x" * 100], ["b", "b"])
        else:
            ranker.score(["p", "q"], [["a", "b", "c"], ["x" * 100]], baselines=["b", "b"])


def test_scores_are_the_logit_against_the_baseline(model, tokenizer):
    ranker = PairwiseRanker(model, tokenizer)
    rewards = ranker.score(PROMPTS[:2], [["No.", "Paris."], ["Wait.", "Mix.", "Flour."]], baselines=["Yes.", "Mix."])
    prompts, baselines = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, ["Yes."] * 2 + ["Mix."] * 2
    probabilities = ranker.compare(prompts, ["No.", "Paris.", "Wait.", "Flour."], baselines)
    expected = [math.log(p / (1 - p)) for p in probabilities]
    assert rewards[0] == pytest.approx(expected[:2], abs=1e-5)
    assert rewards[1][[0, 2]] == pytest.approx(expected[2:], abs=1e-5)
    assert rewards[1][1] == 0.0


def test_the_baseline_depends_on_the_seed_and_the_prompts_candidates_alone(model, tokenizer):
    prompts = [f"Question {number}" for number in range(12)]
    completions = [["a", "b", "c", "d"]] * 12

    def baselines(ranker: PairwiseRanker, prompts: list[str]) -> list[int]:
        rewards = ranker.score(prompts, completions[: len(prompts)])
        zeros = [np.flatnonzero(row == 0.0) for row in rewards]
        assert all(len(indices) == 1 for indices in zeros)
        return [int(indices[0]) for indices in zeros]

    ranker = PairwiseRanker(model, tokenizer)
    drawn = baselines(ranker, prompts)
    assert len(set(drawn)) > 1
    assert baselines(ranker, prompts) == drawn
    assert baselines(ranker, prompts[::-1]) == drawn[::-1]
    assert baselines(ranker, prompts[5:6]) == drawn[5:6]
    assert baselines(PairwiseRanker(model, tokenizer, batch_size=3), prompts) == drawn
    assert baselines(PairwiseRanker(model, tokenizer, seed=1), prompts) != drawn


def test_the_baseline_is_drawn_evenly(tokenizer, model):
    # 2000 draws among 4: each count has mean 500, standard deviation 19.4; a limit of 5 of them fails once in 400,000
    # seeds, and the seed is fixed
    ranker = PairwiseRanker(model, tokenizer)
    counts = np.zeros(4)
    for number in range(2000):
        counts["abcd".index(ranker._draw_baseline(0, f"Question {number}", list("abcd")))] += 1
    assert np.abs(counts - 500).max() < 5 * 19.4


def test_certainty_is_a_large_finite_reward_and_said_once_but_no_number_is_none(model, tokenizer, caplog):
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    digits = [str(number) for number in range(1, 10)]
    ranker = PairwiseRanker(model, tokenizer, template=lambda prompt, first, second: f"{prompt} {first} {second}")
    probabilities = ranker.compare(["p"] * 9, digits, ["0"] * 9)
    rewards = ranker.score(["p"], [digits], baselines=["0"])[0]
    assert set(probabilities) == {0.0, 0.5, 1.0}
    largest = math.log((1 - 1e-6) / 1e-6)
    expected = np.select([probabilities == 0, probabilities == 1], [-largest, largest], 0)
    assert rewards == pytest.approx(expected, abs=1e-9)
    assert logged(caplog) == [
        f"{(expected != 0).sum()} of 9 probabilities were closer than 1e-06 to 0 or 1 and were clamped: these rewards "
        "are -13.8 or 13.8."
    ]
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert np.isnan(ranker.score(["p"], [digits[:1]], baselines=["0"])[0]).all()
    assert len(logged(caplog)) == 1


def test_a_prompt_without_completions_names_its_row(model, tokenizer):
    with pytest.raises(ValueError, match="Prompt row 1 has no completions to draw a baseline from. Drop the row."):
        PairwiseRanker(model, tokenizer).score(["p", "q"], [["a"], []])


def test_bfloat16_is_close(model, tokenizer):
    expected = PairwiseRanker(model, tokenizer).compare(PROMPTS, FIRST, SECOND)
    probabilities = PairwiseRanker(model.bfloat16(), tokenizer).compare(PROMPTS, FIRST, SECOND)
    assert probabilities == pytest.approx(expected, abs=0.05)


def test_settings_are_json_and_change_with_the_results(model, tokenizer):
    def mine(prompt: str, first: str, second: str) -> str:
        return f"{prompt} {first} {second}\n"

    def changed(other: PairwiseRanker) -> set[str]:
        return {key for key, value in other.settings().items() if value != settings[key]}

    ranker = PairwiseRanker(model, tokenizer)
    settings = ranker.settings()
    assert json.loads(json.dumps(settings)) == settings == PairwiseRanker(model, tokenizer).settings()
    others = {"batch_size": 1, "share_prefix": False, "seed": 1, "max_length": 64, "template": "summary"}
    for name, value in [*others.items(), ("template", mine)]:  # also the batch's size, which changes the rounding
        assert changed(PairwiseRanker(model, tokenizer, **{name: value})) == {name}
    with torch.no_grad():
        model.lm_head.weight += 1e-3
    assert changed(ranker) == {"weights"}


def questions(number: int, chosen: str, rejected: str) -> Dataset:
    prompts = [f"Question {number}" for number in range(number)]
    return Dataset.from_dict({"prompt": prompts, "chosen": [chosen] * number, "rejected": [rejected] * number})


def test_pairs_become_prompts_with_the_chosen_completion_in_either_place():
    pairs = questions(400, "yes", "no")
    dataset = pairwise_ranker_dataset(pairs, template="summary")
    assert dataset.column_names == ["prompt", "completion"]
    for number, row in enumerate(dataset):
        texts = ("yes", "no") if row["completion"] == "A" else ("no", "yes")
        assert row == {"prompt": summary(f"Question {number}", *texts), "completion": row["completion"]}
    # 400 fair draws: 5 standard deviations of 10, exceeded once in 1.7 million seeds, and the seed is fixed
    assert abs(dataset["completion"][:].count("A") - 200) < 50
    assert dataset["completion"][:] == pairwise_ranker_dataset(pairs)["completion"][:]
    assert dataset["completion"][:] != pairwise_ranker_dataset(pairs, seed=1)["completion"][:]


def test_a_conversation_and_its_transcript_are_the_same(model, tokenizer):
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("Hello", "Go away"))
    pair = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": chosen, "rejected": rejected}
    plain = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Go away"}
    datasets = [pairwise_ranker_dataset(Dataset.from_list([row])).to_list() for row in (pair, plain)]
    assert datasets[0] == datasets[1]
    ranker = PairwiseRanker(model, tokenizer)
    of_messages, of_text = (ranker.compare(*([value] for value in row.values())) for row in (pair, plain))
    assert of_messages == of_text != 0.5


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (Dataset.from_dict({"prompt": ["p"], "chosen": ["a"]}), "pairs lacks the column rejected"),
        (Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}), "pairs is empty"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused(pairs, message):
    with pytest.raises(ValueError, match=message):
        pairwise_ranker_dataset(pairs)


def test_a_model_trained_by_trl_on_a_simple_rule_ranks_by_it(tiny_llama_dir, tmp_path):
    pairs = questions(300, "the the the the", "fox fox fox fox")
    settings = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "bf16": False}
    arguments = SFTConfig(str(tmp_path), **settings, **SFT_ON_CPU, save_strategy="no")
    trainer = SFTTrainer(tiny_llama_dir, arguments, train_dataset=pairwise_ranker_dataset(pairs))
    untrained = PairwiseRanker(tiny_llama_dir)
    trainer.train()
    ranker = PairwiseRanker(trainer.model, trainer.processing_class)

    prompts = [f"New question {number}" for number in range(20)]
    good, bad = ["the the the the"] * 20, ["fox fox fox fox"] * 20
    assert untrained.compare(prompts, good, bad) == pytest.approx(np.full(20, 0.5), abs=0.05)
    assert ranker.compare(prompts, good, bad).min() > 0.8
    assert ranker.compare(prompts, bad, good).max() < 0.2
    assert all(row[0] > 1 > row[1] for row in ranker.score(prompts, [[good[0], bad[0]]] * 20, baselines=bad))
    assert ranker.settings()["weights"] != untrained.settings()["weights"]


def test_a_model_that_is_not_there_or_a_reward_model_is_refused(tiny_llama_dir, tmp_path):
    with pytest.raises(ValueError, match="`model`='no/model' is neither a local folder that contains a model nor"):
        PairwiseRanker("no/model")
    reward_model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    reward_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a reward model. Give it to `RewardModelRanker`."):
        PairwiseRanker(tmp_path)
