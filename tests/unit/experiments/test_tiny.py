import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_trl.experiments.tiny import tiny_llama, train_tokenizer, word_tokenizer

CORPUS = ["The cook asks the guest, and the guest asks the cook."] * 4
WORDS = ["Ada", " wants", " a", " and", " soup", "Take", " Take", " peas", ",", "."]

ANY_TEXTS = [
    "the guest",
    "",
    " two  spaces , a space before a comma . do n't",
    "\r\n\ttabs\n\n and lines \n",
    "na\u00efve caf\u00e9, cafe\u0301, \u6f22\u5b57, \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\U0001f469\u200d\U0001f373 \ufeff \u00a0 \x00 \uffff",
]


@pytest.mark.parametrize("text", ANY_TEXTS)
def test_trained_tokenizer_is_lossless_for_any_text(text):
    tokenizer = train_tokenizer(CORPUS, vocab_size=300)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_trained_tokenizer_learns_merges_up_to_the_size_asked_for():
    tokenizer = train_tokenizer(CORPUS, vocab_size=270)
    assert len(tokenizer) == 270
    assert len(tokenizer.encode("the guest")) < len("the guest")


@pytest.mark.parametrize("tokenizer", [train_tokenizer(CORPUS, 280), word_tokenizer(WORDS)], ids=["bpe", "words"])
def test_special_tokens_are_distinct_and_never_added(tokenizer):
    special_ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert len(set(special_ids)) == 3 and None not in special_ids
    assert tokenizer.encode("") == []
    assert tokenizer.encode("Take<eos>")[-1] == tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    assert tokenizer.clean_up_tokenization_spaces is False


@pytest.mark.parametrize("tokenizer", [train_tokenizer(CORPUS, 280), word_tokenizer(WORDS)], ids=["bpe", "words"])
def test_model_and_tokenizer_are_the_same_after_saving(tokenizer, tmp_path):
    model = tiny_llama(tokenizer, hidden_size=32, num_layers=1)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "Ada wants a soup. Take peas, peas and peas.<eos>"
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert loaded.padding_side == "left"
    loaded_model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer(text, return_tensors="pt")
    assert torch.equal(loaded_model(**ids).logits, model(**ids).logits)
    assert loaded_model.generation_config.top_k == 0  # transformers takes 50 where nothing is said


def test_word_tokenizer_gives_one_token_per_word():
    tokenizer = word_tokenizer(WORDS)
    text = "Ada wants a soup. Take peas, peas and peas."
    tokens = ["Ada", " wants", " a", " soup", ".", " Take", " peas", ",", " peas", " and", " peas", "."]
    assert tokenizer.tokenize(text) == tokens
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(" Take peas.")) == " Take peas."  # the first space stays


def test_word_tokenizer_takes_words_literally_and_the_longest_first():
    tokenizer = word_tokenizer(["a", "ab", "a.c", "[X] ", "\n"])
    assert tokenizer.tokenize("aba.c[X] \na") == ["ab", "a.c", "[X] ", "\n", "a"]


def test_word_tokenizer_refuses_what_it_has_no_word_for():
    tokenizer = word_tokenizer(WORDS)
    with pytest.raises(Exception, match="Missing"):
        tokenizer.encode("Ada wants a pie.")


def test_default_llama_has_five_million_parameters():
    tokenizer = word_tokenizer([f" word{index}" for index in range(4096 - 3)])
    # Embeddings; per layer q and o, k and v, the three feed-forward matrices, two norms; the last norm.
    layer = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768 + 2 * 256
    assert tiny_llama(tokenizer).num_parameters() == 4096 * 256 + 5 * layer + 256


def test_llama_depends_on_its_seed_and_leaves_the_global_one():
    tokenizer = word_tokenizer(WORDS)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, again, other = (tiny_llama(tokenizer, hidden_size=32, num_layers=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight is first.model.embed_tokens.weight
    # 32**-0.5 = 0.177. Of 13 * 32 draws the standard deviation is within 20% but for a chance below 1e-8.
    assert first.lm_head.weight[1:].std().item() == pytest.approx(32**-0.5, rel=0.2)


def test_llama_samples_from_its_own_law():
    """Total variation between 20,000 sampled tokens and the softmax.

    Over 53 outcomes it is 0.02 on average, and one draw moves it by at most 1 / 20,000: by McDiarmid's inequality it
    exceeds 0.04 with a chance below exp(-2 * 20000 * 0.02**2) = 1e-7. Top-k 50 on logits that are made nearly flat
    would give 0.05.
    """
    tokenizer = word_tokenizer([f" {index:02d}" for index in range(60 - 3)])
    model = tiny_llama(tokenizer, hidden_size=32, num_layers=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
    inputs = tokenizer([" 07"], return_tensors="pt")
    with torch.no_grad():
        law = model(**inputs).logits[0, -1].softmax(-1)
    torch.manual_seed(0)
    with torch.no_grad():
        samples = model.generate(**inputs, max_new_tokens=1, num_return_sequences=20_000)[:, -1]
    frequencies = torch.bincount(samples, minlength=60) / 20_000
    assert 0.5 * (frequencies - law).abs().sum() < 0.04
    assert law.sort().values[:10].sum() > 0.1  # what top-k 50 would lose
