import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from prefopt_trl.rankers.templates import ANSWERS, dialogue, resolve_template, rlhflow, summary

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


def test_rlhflow_writes_what_its_models_read():
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nAnd more.\n\nHuman: Why?\n\nAssistant:"
    # As the chat template of RLHFlow's example writes it
    turns = "\n<turn> user\n Hi\n<turn> assistant\n Hello.\n\nAnd more.\n<turn> user\n Why?"
    assert rlhflow(prompt, "So.", "No.") == f"[CONTEXT] \n{turns}\n [RESPONSE A] So. [RESPONSE B] No. \n"
    assert rlhflow("Why?", "a", "b") == "[CONTEXT] \n\n<turn> user\n Why?\n [RESPONSE A] a [RESPONSE B] b \n"


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
