import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, BertConfig, LlamaConfig

from prefopt_trl import ProcessRewardRanker

TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
PROMPTS = ["What is 2 + 2 + 2?", "Why?"]
COMPLETIONS = [["2 + 2 is 4.\n4 + 2 is 6.\n", "2 + 2 is 5.", "\n\n2 + 2 is 4.\n\nSo it is.\n6"], ["Because.", ""]]
STEPS = [[["2 + 2 is 4.", "4 + 2 is 6."], ["2 + 2 is 5."], ["2 + 2 is 4.", "So it is.", "6"]], [["Because."], [""]]]


def model_of(config_class, **options):
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_config(config_class(**TINY, num_attention_heads=2, **options)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2)
    return model


def step_rewards(model, tokenizer, prompt_ids, steps, separator="\n") -> list[float]:
    """Tokenize as TRL's PRMTrainer and run one row: the separator's last token has the label of its step."""
    ids, ends = list(prompt_ids), []
    for step in steps:
        ids += tokenizer(step + separator, add_special_tokens=False).input_ids
        ends.append(len(ids) - 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, ends]
    return (logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]).tolist()


@pytest.mark.parametrize(("reduce", "batch_size"), [("min", 1), ("min", 8), ("last", 3), ("mean", 3)])
@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize("config_class", [LlamaConfig, BertConfig])
def test_each_step_is_rewarded_at_its_last_token(tokenizer, config_class, num_labels, reduce, batch_size):
    model = model_of(config_class, num_labels=num_labels)
    label = None if num_labels == 1 else "LABEL_1"
    ranker = ProcessRewardRanker(model, tokenizer, label=label, reduce=reduce, batch_size=batch_size)
    rewards = ranker.score(PROMPTS, COMPLETIONS)
    assert [len(row) for row in rewards] == [3, 2]
    reduced = {"min": min, "last": lambda values: values[-1], "mean": np.mean}[reduce]
    expected = [
        reduced(step_rewards(model, tokenizer, tokenizer(prompt).input_ids, steps))
        for prompt, of_prompt in zip(PROMPTS, STEPS, strict=True)
        for steps in of_prompt
    ]
    assert np.concatenate(rewards) == pytest.approx(expected, abs=1e-5)
    assert np.ptp(expected) > 1e-2


def test_messages_go_through_the_chat_template_and_separators_may_be_words(tokenizer):
    model = model_of(LlamaConfig, num_labels=1)
    ranker = ProcessRewardRanker(model, tokenizer, separator=" Step:", reduce="last")
    prompt = [{"role": "user", "content": "Why?"}]
    ids = tokenizer("<s><|user|>Why?</s><|assistant|>", add_special_tokens=False).input_ids
    expected = step_rewards(model, tokenizer, ids, ["a", " b"], " Step:")[-1]
    of_text, of_messages = ranker.score(
        [prompt, prompt], [["a Step: b"], [[{"role": "assistant", "content": "a Step: b"}]]]
    )
    assert of_text == of_messages == pytest.approx(expected, abs=1e-5)


def test_another_day_is_another_setting_where_the_chat_template_writes_it(tokenizer):
    model = model_of(LlamaConfig, num_labels=1)
    before = ProcessRewardRanker(model, tokenizer).settings()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    assert set(ProcessRewardRanker(model, tokenizer).settings()) - set(before) == {"date_in_chat_template"}


def test_a_long_prompt_loses_its_beginning(tokenizer, caplog):
    model = model_of(LlamaConfig, num_labels=1)
    ranker = ProcessRewardRanker(model, tokenizer, max_length=15)
    ids = tokenizer(PROMPTS[0]).input_ids
    length = len(tokenizer("4\n6\n", add_special_tokens=False).input_ids)
    kept = ids[:1] + ids[-(14 - length) :]
    expected = min(step_rewards(model, tokenizer, kept, ["4", "6"]))
    assert ranker.score(PROMPTS[:1], [["4\n6"]])[0] == pytest.approx(expected, abs=1e-5)
    assert "1 of 1 texts exceeded max_length=15" in caplog.text


def test_a_saved_ranker_is_made_again_by_its_arguments(tokenizer, tmp_path):
    ranker = ProcessRewardRanker(model_of(LlamaConfig, num_labels=2), tokenizer, label=1, reduce="last", temperature=2)
    ranker.save_pretrained(tmp_path)
    given = {name: eval(value) for name, value in ranker.arguments().items()}
    assert ProcessRewardRanker(tmp_path, **given).settings() == ranker.settings()
    assert 'ranker = ProcessRewardRanker("' in (tmp_path / "README.md").read_text(encoding="utf-8")
    for other in ({"reduce": "min"}, {"label": 0}, {"separator": "."}, {"temperature": 1}):
        assert ProcessRewardRanker(tmp_path, **given | other).settings() != ranker.settings()
    with pytest.raises(ValueError, match="`reduce` is 'max'. Give a text, and one of min, mean, last"):
        ProcessRewardRanker(tmp_path, label=1, reduce="max")
