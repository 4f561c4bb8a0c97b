"""What the rankers that run a model have in common."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefopt_trl.rankers import PairwiseRanker, RewardModelRanker

PROMPTS = ["What is the capital of France?", "Bake bread."]
COMPLETIONS = [["Paris.", "The dog"], ["Mix the flour.", ""]]


@pytest.fixture
def tokenizer(tiny_llama_dir):
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.fixture(params=[PairwiseRanker, RewardModelRanker])
def ranker_class(request):
    return request.param


@pytest.fixture
def model(ranker_class, tiny_llama_dir):
    torch.manual_seed(0)
    if ranker_class is PairwiseRanker:
        return AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    return AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)


def test_every_part_of_the_model_is_left_in_its_mode(ranker_class, model, tokenizer):
    model.config.attention_dropout = 0.5
    model.train()
    model.model.layers[0].eval()  # frozen
    before = [module.training for module in model.modules()]
    assert any(before) and not all(before)
    once, again = (ranker_class(model, tokenizer).score(PROMPTS, COMPLETIONS) for _ in range(2))
    assert (np.concatenate(once) == np.concatenate(again)).all()  # no dropout
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="Prompt row 0"):
        ranker_class(model, tokenizer, max_length=5).score(["Why?"], [["x" * 30, "y"]])
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("adapted", [False, True])
def test_a_folder_loads_the_model_and_the_tokenizer_or_an_adapters_base(
    ranker_class, model, tokenizer, tmp_path, adapted
):
    if adapted:  # without a tokenizer
        task_type = "CAUSAL_LM" if ranker_class is PairwiseRanker else "SEQ_CLS"
        model = get_peft_model(model, LoraConfig(task_type=task_type, init_lora_weights=False))
    else:
        tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    rankers = [ranker_class(model, tokenizer), ranker_class(tmp_path), ranker_class(str(tmp_path))]
    expected, found, _ = (np.concatenate(ranker.score(PROMPTS, COMPLETIONS)) for ranker in rankers)
    assert found == pytest.approx(expected, abs=1e-6)
    given, loaded, again = (ranker.settings() for ranker in rankers)
    # The head of a reward model's base is another random one each time that it is loaded, and is not read
    assert loaded == again and (loaded == given or ranker_class is RewardModelRanker)
    assert all(ranker.model is ranker.ranking_model.model for ranker in rankers)


def test_the_default_limit_is_the_lower_of_the_models_and_the_tokenizers(ranker_class, model, tokenizer):
    assert ranker_class(model, tokenizer).settings()["max_length"] == 1024
    tokenizer.model_max_length = 512
    assert ranker_class(model, tokenizer).settings()["max_length"] == 512


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "`batch_size` is 0. Give 1 or more"),
        ({"max_length": 0}, "`max_length` is 0. Give 1 or more"),
        ({"share_prefix": "auto"}, "`share_prefix` is 'auto'. Give True or False"),
        ({"share_prefix": 1}, "`share_prefix` is 1. Give True or False"),
        ({"tokenizer": None}, "`tokenizer` is missing"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(ranker_class, model, tokenizer, given, message):
    model.config.name_or_path = ""
    with pytest.raises(ValueError, match=message):
        ranker_class(model, **{"tokenizer": tokenizer, **given})
