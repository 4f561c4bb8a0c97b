import os

# Read by the libraries when they are imported, so set before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Models this small are no faster on more threads, and many times slower where a core is busy
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPO_ROOT = Path(__file__).parents[1]

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "What is the capital of France? The capital of France is Paris.",
    "Tell me how to bake bread. Mix the flour, the water and the salt, then wait.",
]
# The role names are special tokens, so the prompt's tokens are always a prefix of the prompt's and completion's.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


SHARED = Path(os.environ.get("PREFOPT_SHARED", REPO_ROOT.parent / "shared"))
SHARED_IS_MISSING = not SHARED.is_dir()


@pytest.hookimpl(tryfirst=True)  # before pytest reads the markers for -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reading = [item for item in items if "shared_dir" in getattr(item, "fixturenames", ())]
    for item in reading:
        item.add_marker("shared_data")
    if SHARED_IS_MISSING and not os.environ.get("CI"):
        config.hook.pytest_deselected(items=reading)
        items[:] = [item for item in items if item not in reading]


def pytest_report_header() -> str | None:
    if SHARED_IS_MISSING:
        return f"Left out are the tests that read HH-RLHF and the authors' losses: {SHARED} is no folder. {REMEDY}"
    return None


REMEDY = (
    "Set PREFOPT_SHARED to one with data/hh_rlhf/harmless-base/test.jsonl.gz, golden/pro.json and golden/rrhf.json."
)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with HH-RLHF comparisons (`data/hh_rlhf`) and the authors' losses (`golden`), which CI must have."""
    if SHARED_IS_MISSING:
        pytest.fail(f"{SHARED} is no folder. {REMEDY}", pytrace=False)
    return SHARED


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for any text, like LLaMA's: it puts BOS first, and EOS is the caller's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", pair="<s> $A $B", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=special_tokens[3:],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random float32 LLaMA of two layers and its tokenizer, the same weights in every session."""
    folder = str(tmp_path_factory.mktemp("tiny_llama"))
    tokenizer = byte_level_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(tiny_llama_dir: str) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_llama_dir)


@pytest.fixture
def tokenizer(tiny_llama_dir: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.fixture
def sampler(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return policy, tokenizer


@pytest.fixture
def appending_tokenizer(tiny_llama_dir: str) -> PreTrainedTokenizerFast:
    """The tokenizer of `tiny_llama_dir`, which appends EOS to every text by itself."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A $B </s>", special_tokens=special
    )
    return tokenizer
