import json
import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    ModernBertConfig,
    NystromformerConfig,
    OPTConfig,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl import RewardConfig, RewardTrainer

from prefopt_trl.rankers import RewardModelRanker
from prefopt_trl.shared_prefix.continuation import RowsAfterPrefix
from prefopt_trl.shared_prefix.packing import WholeRows

PROMPTS = ["What is the capital of France?", "Bake bread."]
COMPLETIONS = [
    [" Paris.", " The dog", " The capital of France is Paris, and no other town is."],
    [" Mix the flour.", ""],
]
TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_labels": 1}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 2}
TINY_XLNET = {"vocab_size": 300, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32, "num_labels": 1}


def as_messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


@pytest.fixture
def model(tiny_llama_dir):
    torch.manual_seed(0)  # the head is new
    return AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)


def reward_of_last_token(model, token_ids: list[int]) -> float:
    """Slow reference: one unpadded row in float64, and the head on its last position."""
    reference = AutoModelForSequenceClassification.from_pretrained(model.config.name_or_path, num_labels=1).double()
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        hidden = reference.model(input_ids=torch.tensor([token_ids])).last_hidden_state[0, -1]
        return reference.score(hidden).item()


@pytest.mark.parametrize("conversational", [False, True], ids=["plain", "conversational"])
def test_rewards_are_the_models_on_the_rows_of_trls_reward_trainer(model, tokenizer, conversational, tmp_path):
    prompts, completions = PROMPTS, COMPLETIONS
    if conversational:
        prompts = [as_messages("user", prompt) for prompt in PROMPTS]
        completions = [[as_messages("assistant", text) for text in row] for row in COMPLETIONS]
    pairs = [
        {"prompt": prompt, "chosen": completion, "rejected": completion}
        for prompt, row in zip(prompts, completions, strict=True)
        for completion in row
    ]
    trainer = RewardTrainer(
        model,
        RewardConfig(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    expected = [reward_of_last_token(model, token_ids) for token_ids in trainer.train_dataset["chosen_ids"]]

    rewards = RewardModelRanker(model, tokenizer, batch_size=2).score(prompts, completions)
    assert [len(row) for row in rewards] == [3, 2]
    assert np.concatenate(rewards) == pytest.approx(expected, abs=1e-5)


def test_equal_texts_written_otherwise_have_equal_rewards(model, tokenizer):
    ranker, prompt = RewardModelRanker(model, tokenizer), as_messages("user", "Why?")
    of_text, of_messages = ranker.score([prompt] * 2, [["So."], [as_messages("assistant", "So.")]])
    assert of_text == of_messages
    without_eos, with_eos = ranker.score(["Why?"], [[" So.", " So.</s>"]])[0]
    assert without_eos == with_eos


@pytest.mark.parametrize("of_the_model", [True, False])
def test_the_padding_is_the_models_or_else_eos(model, tokenizer, of_the_model):
    if of_the_model:  # whatever the tokenizer says
        model.config.pad_token_id = tokenizer.convert_tokens_to_ids("<|system|>")
    else:  # as in `RewardTrainer`: the reward is that of the last token before EOS
        model.config.pad_token_id = tokenizer.pad_token = None
    batched = RewardModelRanker(model, tokenizer, batch_size=8).score(PROMPTS, COMPLETIONS)
    assert model.config.pad_token_id == (3 if of_the_model else tokenizer.eos_token_id)
    for prompt, row, rewards in zip(PROMPTS, COMPLETIONS, batched, strict=True):
        texts = [prompt + text + "</s>" * of_the_model for text in row]
        expected = [reward_of_last_token(model, tokenizer(text).input_ids) for text in texts]
        assert rewards == pytest.approx(expected, abs=1e-5)


def test_equal_texts_are_run_once(model, tokenizer):
    rows = []
    model.register_forward_pre_hook(lambda module, args, kwargs: rows.extend(kwargs["input_ids"]), with_kwargs=True)
    rewards = RewardModelRanker(model, tokenizer).score(["a", "b", "a"], [["x", "y", "x"], ["x"], ["x"]])
    assert len(rows) == 3
    assert rewards[0][0] == rewards[0][2] == rewards[2][0] != rewards[1][0]


# What completions begin with


def with_large_weights(config):
    """A reward model whose rewards depend on all of its input, as those of a new one hardly do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.2)
    return model


def reward_models():
    llama_like = {**TINY, "num_key_value_heads": 2, "pad_token_id": 0}
    return [
        LlamaConfig(**llama_like),
        Qwen3Config(**llama_like, head_dim=8),
        Gemma2Config(**llama_like, head_dim=8, attn_implementation="eager"),
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, num_labels=1, pad_token_id=0),
        MistralConfig(**llama_like, sliding_window=512),
        OPTConfig(**TINY, ffn_dim=32, word_embed_proj_dim=32, pad_token_id=0),
    ]


CANDIDATES = [
    " Paris.",
    " The dog sleeps on.",
    " Paris.",
    "",
    " It is Paris, and no other town is.",
    " No.",
    " P",
    " b",
]


def shared_and_plain(*given, **options) -> list[RewardModelRanker]:
    return [RewardModelRanker(*given, share_prefix=share_prefix, **options) for share_prefix in (True, False)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("config", reward_models(), ids=lambda config: config.model_type)
def test_sharing_changes_no_reward(tokenizer, caplog, config, adapted, batch_size):
    model = with_large_weights(config)
    if adapted:
        torch.manual_seed(1)
        before = RewardModelRanker(model, tokenizer, share_prefix=False).score(PROMPTS[:1], [CANDIDATES])[0]
        lora = LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, target_modules="all-linear")
        model = get_peft_model(model, lora).eval()
        after = RewardModelRanker(model, tokenizer, share_prefix=False).score(PROMPTS[:1], [CANDIDATES])[0]
        assert np.abs(after - before).max() > 1e-2
    prompts = [*PROMPTS, "Why?", "What is the capital of France? What is the capital of France? Tell me how to bake."]
    completions = [CANDIDATES[:1], CANDIDATES[:2], CANDIDATES, CANDIDATES[4:]]
    for max_length in (None, 45):
        rankers = shared_and_plain(model, tokenizer, batch_size=batch_size, max_length=max_length)
        shared, plain = (ranker.score(prompts, completions) for ranker in rankers)
        assert [len(row) for row in shared] == [1, 2, 8, 4]
        assert np.concatenate(shared) == pytest.approx(np.concatenate(plain), abs=1e-5)
        assert np.ptp(shared[2]) > 0.1
    assert not any("not shared" in record.message for record in caplog.records)
    assert any("were cut on the left" in record.message for record in caplog.records)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_sharing_changes_no_reward_where_eos_is_padding(tokenizer, batch_size):
    model = with_large_weights(LlamaConfig(**reward_models()[0].to_diff_dict() | {"pad_token_id": None}))
    tokenizer.pad_token = None
    # Of BOS and EOS alone the model looks at BOS, which is all that the texts of an empty prompt have in common
    prompts, completions = ["Why?", "Bake bread.", ""], [["", " a", " a b"], ["", " No.", " No. No."], ["", "a", "b"]]
    rankers = shared_and_plain(model, tokenizer, batch_size=batch_size)
    shared, plain = (ranker.score(prompts, completions) for ranker in rankers)
    assert model.config.pad_token_id == tokenizer.eos_token_id
    assert np.concatenate(shared) == pytest.approx(np.concatenate(plain), abs=1e-5)


def alike(common: int, length: int, number: int) -> list[list[int]]:
    return [[*range(5, 5 + common), *[100 + row] * (length - common)] for row in range(number)]


@pytest.mark.parametrize(
    ("token_ids", "groups", "share_prefix", "expected"),
    [
        ([[5, 6, 7], [5, 6, 8]], [0, 0], True, RowsAfterPrefix),
        ([[5, 6, 7], [5, 6, 8], [9, 10]], [0, 0, 1], True, RowsAfterPrefix),
        ([[5, 6, 7], [5, 6, 8], [0, 5]], [0, 0, 1], True, RowsAfterPrefix),
        ([[5, 6, 7], [5, 6, 8]], [0, 0], False, WholeRows),
        ([[5, 6, 7], [5, 6, 8]], [0, 1], True, WholeRows),  # nothing to share
        # Nothing would follow what a row of one token shares, and padding is not read
        *[([[5, 6, 7], [5, 6, 8], row], [0, 0, 1], True, WholeRows) for row in ([5], [5, 0], [5, 0, 0], [0, 0])],
        # Of 4 x 10 tokens, 3 x 2 are saved and 34 are left, or 3 x 3 and 31: at most 32 are worth it
        (alike(common=2, length=10, number=4), [0] * 4, True, WholeRows),
        (alike(common=3, length=10, number=4), [0] * 4, True, RowsAfterPrefix),
        # Of 2 x 10 tokens, 3 are saved and 17 are left, or 4 and 16: at most 16 are worth it
        (alike(common=3, length=10, number=2), [0] * 2, True, WholeRows),
        (alike(common=4, length=10, number=2), [0] * 2, True, RowsAfterPrefix),
        (alike(common=9, length=10, number=2), [0] * 2, True, RowsAfterPrefix),
    ],
)
def test_a_batch_is_shared_where_it_pays(model, tokenizer, token_ids, groups, share_prefix, expected):
    ranker = RewardModelRanker(model, tokenizer, share_prefix=share_prefix)
    assert type(ranker.ranking_model.rows(token_ids, groups, pad_token_id=0)) is expected


def test_a_prompt_is_computed_once(model, tokenizer):
    prompt, completions = "What is the capital of France? " * 10, [f" {number}" for number in range(16)]
    ranker = RewardModelRanker(model, tokenizer)
    ranker.score(["p"], [["a", "b"]])  # the probe
    calls = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0]))
    ranker.score([prompt], [completions])
    assert [len(call) for call in calls] == [1, 1]
    assert calls[0][0].tolist() == tokenizer(prompt + " ").input_ids
    assert calls[1].numel() == 10 * 2 + 6 * 3  # one digit or two, and EOS


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**TINY),
        DebertaV2Config(**TINY, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        DistilBertConfig(vocab_size=300, dim=32, hidden_dim=32, n_layers=2, n_heads=2, num_labels=1),
        RobertaConfig(**TINY),
        ModernBertConfig(**TINY),
        ElectraConfig(**TINY, embedding_size=32),
        # These take only rows with as many EOS as each other
        T5Config(vocab_size=300, d_model=32, d_ff=32, num_layers=1, num_heads=2, num_labels=1, eos_token_id=2),
        BartConfig(vocab_size=300, d_model=32, encoder_layers=1, decoder_layers=1, num_labels=1, eos_token_id=2),
        # And these read padding
        XLNetConfig(**TINY_XLNET),
        NystromformerConfig(**TINY),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_shares_nothing_sees_the_whole_text_and_no_other(tokenizer, caplog, config):
    config.pad_token_id = config.decoder_start_token_id = tokenizer.pad_token_id
    model = with_large_weights(config)
    texts = [" Paris.", " No</s> or yes", " The dog sleeps on, and on.", "</s></s>", " Maybe"]
    ranker = RewardModelRanker(model, tokenizer, batch_size=8, max_length=120)
    for _ in range(2):
        (rewards,) = ranker.score(["Why?"], [texts])
    for text, reward in zip(texts, rewards, strict=True):
        ids = tokenizer("Why?" + text + ("" if text.endswith("</s>") else "</s>")).input_ids
        with torch.no_grad():
            assert reward == pytest.approx(model(input_ids=torch.tensor([ids])).logits.item(), abs=1e-4)
    assert np.ptp(rewards) > 1e-3
    said = [record.message for record in caplog.records if "Prompts are not shared" in record.message]
    assert len(said) == (config.model_type not in ("xlnet", "nystromformer"))  # whose rows are run one by one


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (RobertaConfig(**TINY, max_position_embeddings=34, pad_token_id=1), 32),  # they begin behind padding's
        (BertConfig(**TINY, max_position_embeddings=34, pad_token_id=0), 34),
        (XLNetConfig(**TINY_XLNET, pad_token_id=0), None),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_default_limit_is_what_the_model_has_positions_for(config, positions, tokenizer):
    ranker = RewardModelRanker(AutoModelForSequenceClassification.from_config(config), tokenizer)
    assert ranker.ranking_model.max_length == (positions or tokenizer.model_max_length)
    assert np.isfinite(ranker.score(["a b c d e f g " * 10], [[" No."]])[0]).all()


def test_a_long_prompt_loses_its_beginning_but_no_bos(model, tokenizer, caplog):
    prompt, completion = "Mix the flour, the water and the salt, then wait.", " Bread."
    token_ids = tokenizer(prompt + completion + "</s>").input_ids
    rewards = RewardModelRanker(model, tokenizer, max_length=20).score([prompt, "Hi"], [[completion], [completion]])
    assert rewards[0] == pytest.approx(reward_of_last_token(model, token_ids[:1] + token_ids[-19:]), abs=1e-5)
    messages = [record.message for record in caplog.records if record.name.startswith("prefopt_trl")]
    assert messages == ["1 of 2 texts exceeded max_length=20 tokens: their prompts were cut on the left."]

    # The whole prompt may go, but no token of the completion
    num_tokens = len(tokenizer(" Bread.</s>").input_ids)  # with BOS
    rewards = RewardModelRanker(model, tokenizer, max_length=num_tokens).score(["Bake"], [[" Bread."]])
    assert rewards[0] == RewardModelRanker(model, tokenizer).score([""], [[" Bread."]])[0]
    for one_prompt in ("Hi", as_messages("user", "Hi")):
        ranker = RewardModelRanker(model, tokenizer, max_length=num_tokens - 1)
        with pytest.raises(
            ValueError, match=r"Prompt row 1: .*exceeds `max_length` \(\d+ tokens\)\. Raise `max_length`"
        ):
            ranker.score(["Hi", one_prompt], [["H"], [" Bread." * 3]])


def test_eos_that_the_tokenizer_appends_is_no_second_one_and_no_part_of_the_prompt(
    model, tokenizer, appending_tokenizer
):
    expected = RewardModelRanker(model, tokenizer).score(PROMPTS, COMPLETIONS)
    found = RewardModelRanker(model, appending_tokenizer).score(PROMPTS, COMPLETIONS)
    assert np.concatenate(found) == pytest.approx(np.concatenate(expected), abs=1e-6)
    room = len(tokenizer(COMPLETIONS[0][0], add_special_tokens=False)["input_ids"]) + 2  # with BOS and EOS
    one = PROMPTS[:1], [COMPLETIONS[0][:1]]
    RewardModelRanker(model, appending_tokenizer, max_length=room).score(*one)
    with pytest.raises(ValueError, match="even without the prompt, a completion exceeds `max_length`"):
        RewardModelRanker(model, appending_tokenizer, max_length=room - 1).score(*one)


def test_another_day_is_another_setting_where_the_chat_template_writes_it(model, tokenizer, tmp_path):
    before = RewardModelRanker(model, tokenizer).settings()
    dated = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    (tmp_path / "dated.jinja").write_text(dated)
    of_file = RewardModelRanker(model, tokenizer, template=tmp_path / "dated.jinja").settings()
    (tmp_path / "plain.jinja").write_text(tokenizer.chat_template)
    tokenizer.chat_template = dated
    of_tokenizer = RewardModelRanker(model, tokenizer).settings()
    for settings in (of_file, of_tokenizer):
        assert set(settings) - set(before) == {"date_in_chat_template"}
    # The template of the file is used instead
    assert set(RewardModelRanker(model, tokenizer, template=tmp_path / "plain.jinja").settings()) == set(before)


def test_a_function_gets_completions_in_the_format_of_their_prompt(model, tokenizer):
    def template(prompt, completion):
        return prompt[-1]["content"] + completion[-1]["content"]

    prompt, long_prompt = (as_messages("user", text) for text in ("Why is it so?", "Why? " * 20 + "Why is it so?"))
    ranker = RewardModelRanker(model, tokenizer, template=template)
    expected = ranker.score([prompt], [[as_messages("assistant", " a")]])
    assert ranker.score([prompt], [[" a"]])[0] == expected[0]
    ids = tokenizer(template(long_prompt, as_messages("assistant", " a")))["input_ids"]
    cut = RewardModelRanker(model, tokenizer, template=template, max_length=12).score([long_prompt], [[" a"]])
    assert cut[0] == pytest.approx(reward_of_last_token(model, ids[:1] + ids[-11:]), abs=1e-5)


def test_settings_are_json_and_follow_the_weights(model, tokenizer):
    ranker = RewardModelRanker(model, tokenizer)
    before = ranker.settings()
    assert json.loads(json.dumps(before)) == before == RewardModelRanker(model, tokenizer).settings()
    assert RewardModelRanker(model, tokenizer, batch_size=3).settings() == {**before, "batch_size": 3}
    assert RewardModelRanker(model, tokenizer, share_prefix=False).settings() == {**before, "share_prefix": False}
    with torch.no_grad():
        model.score.weight += 1e-3
    assert {key for key, value in ranker.settings().items() if value != before[key]} == {"weights"}


def test_a_tokenizer_with_neither_padding_nor_eos_is_refused(model, tokenizer):
    model.config.pad_token_id = None
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"neither a padding token nor EOS.*Set `tokenizer\.pad_token`"):
        RewardModelRanker(model, tokenizer)


def test_messages_need_a_chat_template(model, tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"Prompt row 1 is a list of messages.*Set `tokenizer\.chat_template`"):
        RewardModelRanker(model, tokenizer).score(["Hi", as_messages("user", "Hi")], [["a"], ["b"]])


# Heads of other kinds, and what is worth sharing


class MeanPooled(LlamaForSequenceClassification):
    """Reads the mean of a row."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        weights = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mean = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        return SequenceClassifierOutputWithPast(logits=self.score(mean))


class AtMarker(LlamaForSequenceClassification):
    """Reads the first question mark of a row."""

    marker: int

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        place = (input_ids == self.marker).int().argmax(dim=1)
        return SequenceClassifierOutputWithPast(logits=self.score(hidden[torch.arange(len(hidden)), place]))


def with_head_of(head, tokenizer):
    model = head(LlamaConfig(**reward_models()[0].to_diff_dict())).eval()
    model.load_state_dict(with_large_weights(model.config).state_dict())
    model.marker = tokenizer.convert_tokens_to_ids("?")
    return model


def count_tokens(model):
    counts = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: counts.append(inputs[0].numel()))
    return counts


QUESTIONS = ["What is the capital of France" * 3, "Tell me how to bake bread" * 3]
ANSWERS = [[" of it? Paris.", " then? It is Paris", " ?"], ["?", " now? Mix the flour.", "? The dog sleeps on."]]


@pytest.mark.parametrize("head", [MeanPooled, AtMarker, LlamaForSequenceClassification])
def test_a_head_that_reads_more_than_the_last_token_is_given_whole_rows(tokenizer, caplog, head):
    model = with_head_of(head, tokenizer)
    shared, plain = shared_and_plain(model, tokenizer)
    expected = plain.score(QUESTIONS, ANSWERS)
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        shared.score(QUESTIONS, ANSWERS)  # the probes
        counts = count_tokens(model)
        found = shared.score(QUESTIONS, ANSWERS)
    num_shared = sum(counts)
    counts.clear()
    plain.score(QUESTIONS, ANSWERS)
    assert np.concatenate(found) == pytest.approx(np.concatenate(expected), abs=1e-5)
    assert min(np.ptp(row) for row in expected) > 1e-2
    reason = f"the head of {head.__name__} reads more of a row than its last token"
    said = [record.getMessage() for record in caplog.records]
    if head is LlamaForSequenceClassification:
        assert said == [] and num_shared < 0.6 * sum(counts)
    else:
        assert [reason in message for message in said] == [True] and num_shared == sum(counts)
