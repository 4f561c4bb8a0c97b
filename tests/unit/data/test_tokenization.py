import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from prefopt_trl import FunctionRanker, PairwiseRanker, build_preference_dataset, sample_completions
from prefopt_trl.data.tokenization import check_vocabulary, merge_equal_in_training, tokenize_completions
from prefopt_trl.experiments.tiny import train_tokenizer
from prefopt_trl.trainers.rso_config import RSOConfig
from prefopt_trl.trainers.rso_trainer import RSOTrainer

ROWS = [
    ("The quick brown fox", " jumps over", " sleeps on the lazy dog."),
    ("What is the capital", " of France?</s>", ""),
    ("Tell me", " how", " how to bake bread"),
    ("ends in a space ", "x", " y"),
    ("wa", "ter", "it"),  # tokens merge where the two meet
]
PLAIN = Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*ROWS, strict=True)), strict=True)))


def messages(row):
    return {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


@pytest.mark.parametrize("case", ["text", "text without BOS", "messages"])
def test_rows_are_tokenised_as_by_trl(case, tokenizer, tiny_llama_dir, tmp_path):
    dataset = PLAIN.map(messages) if case == "messages" else PLAIN
    if case == "text without BOS":
        tokenizer = train_tokenizer((text for row in ROWS for text in row), vocab_size=320)
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    by_trl = DPOTrainer(tiny_llama_dir, args=args, train_dataset=dataset, processing_class=tokenizer).train_dataset
    for row, expected in zip(dataset, by_trl, strict=True):
        prompt_ids, completion_ids = tokenize_completions(tokenizer, row["prompt"], [row["chosen"], row["rejected"]])
        assert prompt_ids == expected["prompt_ids"]
        assert completion_ids == [expected["chosen_ids"], expected["rejected_ids"]]
        if case != "messages":  # which the template ends, whatever they end in
            assert all(ids[-1] == tokenizer.eos_token_id and ids.count(ids[-1]) == 1 for ids in completion_ids)


def test_completions_begin_where_the_first_of_them_departs_from_the_prompt(tokenizer):
    alone, merged = tokenizer("wa")["input_ids"], tokenizer("water</s>")["input_ids"]
    assert merged[: len(alone)] != alone  # else the test shows nothing
    completions = ["x", "ter"]
    prompt_ids, (first, second) = tokenize_completions(tokenizer, "wa", completions)
    assert prompt_ids + first == tokenizer("wax</s>")["input_ids"] and prompt_ids + second == merged
    assert len(prompt_ids) < len(alone)


def test_the_template_gets_its_arguments(tokenizer):
    tokenizer.chat_template = "{{ style }}" + tokenizer.chat_template
    row = messages(PLAIN[0])
    ids, _ = tokenize_completions(tokenizer, row["prompt"], [row["chosen"]], style="terse")
    assert tokenizer.decode(ids).startswith("terse")


def test_eos_that_a_tokenizer_appends_is_read_once_also_by_trls_tokenisation(
    appending_tokenizer, tokenizer, tiny_llama_dir, tmp_path
):
    args = RSOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = RSOTrainer(tiny_llama_dir, args=args, train_dataset=PLAIN, processing_class=appending_tokenizer)
    for row, trained in zip(PLAIN, trainer.train_dataset, strict=True):
        completions = [row["chosen"], row["rejected"]]
        expected = tokenize_completions(tokenizer, row["prompt"], completions)
        assert tokenize_completions(appending_tokenizer, row["prompt"], completions) == expected
        assert (trained["prompt_ids"], [trained["chosen_ids"], trained["rejected_ids"]]) == expected


def test_what_the_template_leaves_out_is_counted_and_said_once(tokenizer, caplog):
    rows = [messages(PLAIN[0]), PLAIN[0]]
    said = [
        [{"role": "assistant", "content": text}] for text in ("a</think>yes", "b</think> yes ", "b</think>yes", "no")
    ]
    plain = ["a</think>yes", "b</think>yes"]
    assert merge_equal_in_training(tokenizer, rows, [said, plain]) == [said, plain]
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "['content']", "['content'].split('</think>')[-1] | trim"
    )
    assert caplog.records == []
    for _ in range(2):
        assert merge_equal_in_training(tokenizer, rows, [said, plain]) == [[said[0]] * 3 + [said[3]], plain]
    (record,) = caplog.records
    assert "formats 2 of 6 candidates like another" in record.getMessage()


# The vocabulary


def with_tokens(model_dir, number, **special):
    tokenizer = AutoTokenizer.from_pretrained(model_dir, **special)
    tokenizer.add_tokens([f"<more {index}>" for index in range(number)])
    return tokenizer


@pytest.mark.parametrize("how", ["model", "config", "adapter"])
def test_a_tokenizer_of_more_tokens_than_embeddings_is_refused(how, tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    rows = model.get_input_embeddings().weight.shape[0]
    given = model.config if how == "config" else model
    if how == "adapter":
        given = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    check_vocabulary(with_tokens(tiny_llama_dir, 0), given)
    # The ids are 0 to `rows`: one too many
    message = rf"token ids up to {rows}, and the model embeddings for {rows} tokens only.*resize_token"
    with pytest.raises(ValueError, match=message):
        check_vocabulary(with_tokens(tiny_llama_dir, 1), given)
    model.resize_token_embeddings(rows + 64)  # padded, as embeddings often are
    check_vocabulary(with_tokens(tiny_llama_dir, 64), given)
    with pytest.raises(ValueError, match=f"up to {rows + 64}, .* {rows + 64} tokens"):
        check_vocabulary(with_tokens(tiny_llama_dir, 65), given)


def test_a_token_for_images_needs_no_embedding_in_a_model_of_text(tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    tokenizer = with_tokens(tiny_llama_dir, 0, extra_special_tokens={"image_token": "<image>"})
    assert tokenizer.image_token_id == model.config.vocab_size
    check_vocabulary(tokenizer, model)
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ValueError, match=f"up to {model.config.vocab_size + 1}"):
        check_vocabulary(tokenizer, model)


def test_sampling_and_ranking_refuse_it_before_they_begin(tiny_llama_dir, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama_dir), with_tokens(tiny_llama_dir, 1)
    ranker = FunctionRanker(lambda prompts, completions: [0.0] * len(completions))
    for run in (
        lambda: sample_completions(model, tokenizer, ["Why?"], 2, max_new_tokens=2),
        lambda: build_preference_dataset(["Why?"], model, tokenizer, ranker, output_dir=tmp_path),
        lambda: PairwiseRanker(model, tokenizer),
        lambda: PairwiseRanker(tiny_llama_dir, tokenizer),
    ):
        with pytest.raises(ValueError, match="they do not belong together"):
            run()
    assert list(tmp_path.iterdir()) == []
