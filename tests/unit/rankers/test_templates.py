import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from prefopt_trl.rankers.templates import ANSWERS, Texts, dialogue, resolve_template, rlhflow, summary

# As LLaMA 3 and Qwen have it: a word takes one preceding sign along, but no line break
LLAMA_3_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def test_templates_are_the_papers_inputs_and_a_cue():
    assert dialogue("Hi", "Hello.", "Go.") == "[CONTEXT] Hi [RESPONSE A] Hello. [RESPONSE B] Go. [ANSWER]\n"
    assert summary("A text.", "Text.", "A.") == "[CONTEXT] A text. [SUMMARY A] Text. [SUMMARY B] A. [ANSWER]\n"


def test_a_name_or_a_function_resolves_to_a_function():
    def mine(prompt: str, first: str, second: str) -> str:
        return prompt + first + second

    assert resolve_template("dialogue") is dialogue
    assert resolve_template("summary") is summary
    assert resolve_template(mine) is mine
    with pytest.raises(ValueError, match="`template` is 'chat'. Give one of 'dialogue', 'summary', 'rlhflow', or a"):
        resolve_template("chat")


# The chat template with which RLHFlow's example writes the context of a comparison
PLAIN_TURNS = (
    "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}{% else %}"
    "\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
)


@pytest.mark.parametrize("turns", [["Why?"], ["Hi", "Hello.\n\nTwo paragraphs.", "Why?"]])
def test_rlhflow_writes_what_its_models_read(tiny_llama_dir, turns):
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir, chat_template=PLAIN_TURNS)
    context = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = f"[CONTEXT] {context} [RESPONSE A] So. [RESPONSE B] No. \n"
    assert rlhflow(*Texts.of(messages, "So.", "No.")) == expected
    if len(turns) == 1:
        assert rlhflow("Why?", "So.", "No.") == expected


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ],
    ids=["gpt2", "llama3"],
)
def test_no_tokenizer_merges_the_answer_with_the_cue_however_often_it_has_seen_the_two(pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    text = dialogue("Hi", "yes", "no")
    tokenizer.train_from_iterator([text + ANSWERS[0]] * 100, trainer)
    assert tokenizer.encode("[ANSWER]").tokens != list("[ANSWER]")  # it did learn to merge
    for answer in ANSWERS:
        assert tokenizer.encode(text + answer).ids == tokenizer.encode(text).ids + tokenizer.encode(answer).ids
