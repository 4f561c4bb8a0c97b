"""Reward models as they are published: classifiers, other templates, OpenAssistant's GPT-NeoX models."""

import json

import numpy as np
import pytest
import torch
from jinja2 import UndefinedError
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
)

from prefopt_trl.rankers import RewardModelRanker
from prefopt_trl.rankers.gpt_neox_reward import GPTNeoXRewardModel
from prefopt_trl.rankers.inference import is_reward_model
from prefopt_trl.rankers.templates import conversation

TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
TINY |= {"num_attention_heads": 2, "eos_token_id": 2}
PROMPTS = ["What is the capital of France?", "Bake bread."]
COMPLETIONS = [[" Paris.", " It is Paris, and no other town.", ""], [" Mix the flour.", " No."]]


def with_large_weights(model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            parameter.data.normal_(std=0.2)
    return model.eval()


def classifier(config_class, **options):
    return with_large_weights(AutoModelForSequenceClassification.from_config(config_class(**TINY, **options)))


def logits_of(model, tokenizer, text, kept=slice(None)) -> torch.Tensor:
    """One row: the text, after BOS unless it begins with a special token."""
    input_ids = tokenizer(text, return_tensors="pt", add_special_tokens=not text.startswith("<")).input_ids
    with torch.no_grad():
        return model(input_ids=input_ids[:, kept]).logits[0]


# Labels


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("config_class", [BertConfig, LlamaConfig])
@pytest.mark.parametrize("names", [["bad", "good"], ["bad", "good", "neither"]], ids=len)
def test_the_reward_of_a_label_is_its_log_odds(tokenizer, names, config_class, batch_size):
    model = classifier(config_class, id2label=dict(enumerate(names)), label2id={})
    ranker = RewardModelRanker(model, tokenizer, label="good", batch_size=batch_size)
    rewards = np.concatenate(ranker.score(PROMPTS, COMPLETIONS))
    texts = [f"{prompt}{text}</s>" for prompt, row in zip(PROMPTS, COMPLETIONS, strict=True) for text in row]
    good = torch.stack([logits_of(model, tokenizer, text) for text in texts]).double().softmax(dim=1)[:, 1].numpy()
    assert rewards == pytest.approx(np.log(good) - np.log1p(-good), abs=1e-5)
    assert np.ptp(rewards) > 0.1
    by_index, other = (RewardModelRanker(model, tokenizer, label=label, batch_size=batch_size) for label in (1, 0))
    assert other.settings() != ranker.settings() == by_index.settings()
    assert ranker.arguments()["label"] == "1"


def test_an_output_that_excludes_no_other_is_the_reward_itself(tokenizer):
    model = classifier(LlamaConfig, num_labels=3, problem_type="multi_label_classification")
    (reward,) = RewardModelRanker(model, tokenizer, label="LABEL_2").score(["Why?"], [[" So."]])[0]
    assert reward == pytest.approx(logits_of(model, tokenizer, "Why? So.</s>")[2].item(), abs=1e-5)


@pytest.mark.parametrize(("num_labels", "label"), [(2, None), (2, "POSITIVE"), (3, 3), (1, 0)])
def test_a_label_that_the_model_has_not_is_refused(tokenizer, num_labels, label):
    with pytest.raises(ValueError, match=f"`label` is {label!r}, and `model` has the labels LABEL_0"):
        RewardModelRanker(classifier(LlamaConfig, num_labels=num_labels), tokenizer, label=label)


# Templates

HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nTwo paragraphs.\n\nHuman: Why?\n\nAssistant:"
HH_TURNS = [("user", "Hi"), ("assistant", "Hello.\n\nTwo paragraphs."), ("user", "Why?"), ("assistant", "So.")]
HH_OASST = "<|prompter|>Hi</s><|assistant|>Hello.\n\nTwo paragraphs.</s><|prompter|>Why?</s><|assistant|>So.</s>"


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        (HH, " So.", HH_TURNS),
        ("\n\nHuman: Why?", " So.", [("user", "Why?"), ("assistant", "So.")]),
        ("Why? ", " So.", [("user", "Why?"), ("assistant", "So.")]),
        (HH, " So.\n\nHuman: And?", [*HH_TURNS, ("user", "And?")]),
        (messages(*HH_TURNS[:-1]), "So.", HH_TURNS),
        (messages(*HH_TURNS[:-1]), messages(HH_TURNS[-1]), HH_TURNS),
    ],
)
def test_plain_text_is_split_into_turns(prompt, completion, expected):
    assert conversation(prompt, completion) == messages(*expected)


JINJA = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
HH_JINJA = HH_OASST.replace("|prompter|", "user").replace("|assistant|", "assistant")


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize(("name", "text"), [("oasst", HH_OASST), ("file", HH_JINJA), ("function", "<s>Why So")])
def test_a_template_writes_what_the_model_reads(tokenizer, tmp_path, caplog, name, text, share_prefix):
    file = tmp_path / "chat.jinja"
    file.write_text(JINJA, encoding="utf-8")
    template = {"oasst": "oasst", "file": str(file), "function": lambda prompt, completion: "Why" + completion[:3]}[
        name
    ]
    model = classifier(LlamaConfig, num_labels=1)
    ranker = RewardModelRanker(model, tokenizer, template=template, share_prefix=share_prefix)
    found, other = ranker.score([HH], [[" So.", " No, it is not so."]])[0]
    assert found == pytest.approx(logits_of(model, tokenizer, text).item(), abs=1e-5) != other
    assert ranker.settings()["template"] != RewardModelRanker(model, tokenizer).settings()["template"]
    if name == "function":
        assert ranker.arguments()["template"] == "your_template"
        return
    assert ranker.arguments()["template"] == repr(template)
    assert ranker.score([messages(*HH_TURNS[:-1])], [["So."]])[0] == pytest.approx(found, abs=1e-5)
    ranker.ranking_model.max_length = 40  # a long prompt loses its beginning
    expected = logits_of(model, tokenizer, text, slice(-40, None)).item()
    assert ranker.score([HH], [[" So."]])[0] == pytest.approx(expected, abs=1e-5)
    assert "1 of 1 texts exceeded max_length=40" in caplog.text
    with pytest.raises(ValueError, match="Prompt row 0: even without the prompt, a completion exceeds `max_length`"):
        ranker.score([HH], [["x" * 40]])


def test_an_unknown_template_or_role_is_refused(tokenizer):
    model = classifier(LlamaConfig, num_labels=1)
    with pytest.raises(UndefinedError, match="'tool'"):
        RewardModelRanker(model, tokenizer, template="oasst").score([messages(("tool", "4"))], [["a"]])
    with pytest.raises(ValueError, match="`template` is 'openassistant'. Give 'oasst'"):
        RewardModelRanker(model, tokenizer, template="openassistant")


# OpenAssistant's GPT-NeoX models


@pytest.mark.parametrize(("batch_size", "share_prefix"), [(1, True), (3, False), (8, True)])
def test_openassistants_models_load_and_reward_as_one_by_one(tokenizer, tmp_path, batch_size, share_prefix):
    torch.manual_seed(0)
    config = GPTNeoXConfig(**TINY | {"pad_token_id": None}, bos_token_id=1)
    backbone, head = with_large_weights(GPTNeoXModel(config)), with_large_weights(torch.nn.Linear(32, 1))
    # A folder as theirs: their names of weights, no labels, an older release's rotary settings
    GPTNeoXRewardModel.config_class.from_dict(config.to_dict()).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for name in ("id2label", "label2id", "rope_parameters"):
        written.pop(name)
    written |= {"architectures": ["GPTNeoXRewardModel"], "rotary_pct": 0.25, "rotary_emb_base": 10000}
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    weights = {f"gpt_neox.{name}": value for name, value in backbone.state_dict().items()}
    weights |= {f"out_proj.{name}": value for name, value in head.state_dict().items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    tokenizer.save_pretrained(tmp_path)

    assert is_reward_model(str(tmp_path))
    ranker = RewardModelRanker(tmp_path, template="oasst", batch_size=batch_size, share_prefix=share_prefix)
    rewards = np.concatenate(ranker.score([HH, "Why?"], [[" So.", " No.", ""], [" Because.", ""]]))
    beginnings = [HH_OASST.removesuffix("So.</s>")] * 3 + ["<|prompter|>Why?</s><|assistant|>"] * 2
    for beginning, end, reward in zip(beginnings, ["So.", "No.", "", "Because.", ""], rewards, strict=True):
        ids = tokenizer(f"{beginning}{end}</s>", return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            expected = head(backbone(input_ids=ids).last_hidden_state[0, -1]).item()
        assert reward == pytest.approx(expected, abs=1e-5)
    assert np.ptp(rewards) > 0.1

    ranker.save_pretrained(tmp_path / "again")
    again = RewardModelRanker(tmp_path / "again", template="oasst", batch_size=batch_size, share_prefix=share_prefix)
    assert again.settings() == ranker.settings()
