"""The folder that the engines train in, and the table at the end."""

from typing import Any

import engines as started
import pytest
import torch
from engines import Engines
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def engines(tiny_llama_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    folder = tmp_path_factory.mktemp("engines")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    config = LlamaConfig.from_pretrained(tiny_llama_dir)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16  # 4-bit weights come in blocks of 64
    with torch.random.fork_rng():
        for seed, name in enumerate(("policy", "ranker", "tied")):
            torch.manual_seed(seed)
            config.tie_word_embeddings = name == "tied"
            model = LlamaForCausalLM(config)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.data.normal_(0, 0.2)  # so that a wrong mask or position moves the losses
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder / "policy"),
            LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
        )
        adapted.save_pretrained(str(folder / "adapter"))
    return Engines(folder)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if started.results:
        terminalreporter.section("engines, two processes each, against one process", sep="=")
        terminalreporter.write_line(started.table())
