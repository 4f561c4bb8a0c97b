"""What the rankers that run a model have in common."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    GPTNeoXForSequenceClassification,
)

from prefopt_trl.cli.arguments import RankerArguments
from prefopt_trl.cli.rankers import load_ranker
from prefopt_trl.rankers import PairwiseRanker, RewardModelRanker

PROMPTS = ["What is the capital of France?", "Bake bread."]
COMPLETIONS = [["Paris.", "The dog"], ["Mix the flour.", ""]]


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
        ({"temperature": 0}, "`temperature` is 0. Give a positive, finite number"),
        ({"temperature": "2"}, "`temperature` is '2'"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "`model_init_kwargs` has no effect on a loaded model"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(ranker_class, model, tokenizer, given, message):
    model.config.name_or_path = ""
    with pytest.raises(ValueError, match=message):
        ranker_class(model, **{"tokenizer": tokenizer, **given})


# `model_init_kwargs`


def rewards_of(ranker: Any) -> np.ndarray:
    return np.concatenate(ranker.score(PROMPTS, COMPLETIONS, baselines=["No.", "Yes."]))


def one_by_one(ranker: Any) -> np.ndarray:
    ranker.ranking_model.share_prefix, ranker.ranking_model.batch_size = False, 1
    return rewards_of(ranker)


@pytest.fixture
def folders(ranker_class, model, tokenizer, tmp_path):
    """A model whose rewards depend on its input, and an adapter for it."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM" if ranker_class is PairwiseRanker else "SEQ_CLS", init_lora_weights=False)
    get_peft_model(type(model).from_pretrained(tmp_path / "base"), lora).save_pretrained(tmp_path / "adapter")
    return tmp_path


FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_a_model_is_quantized_as_it_is_loaded(ranker_class, folders, name):
    exact = rewards_of(ranker_class(folders / name))
    ranker = ranker_class(folders / name, model_init_kwargs={"quantization_config": FOUR_BITS})
    quantized = rewards_of(ranker)
    assert ranker.model.is_quantized and sum("4bit" in type(part).__name__ for part in ranker.model.modules()) >= 14
    assert quantized == pytest.approx(one_by_one(ranker), abs=1e-5)
    assert np.abs(quantized - exact).max() > 1e-3


@pytest.mark.parametrize("given", [{"dtype": "bfloat16"}, {"device_map": "auto"}])
def test_arguments_of_from_pretrained_reach_the_model(ranker_class, model, folders, monkeypatch, given):
    if "device_map" in given:
        monkeypatch.setattr(type(model), "to", lambda *arguments: pytest.fail("a model with a device map was moved"))
    ranker = ranker_class(folders / "base", model_init_kwargs=given)
    assert ranker.model.dtype == (torch.bfloat16 if "dtype" in given else torch.float32)
    assert rewards_of(ranker) == pytest.approx(one_by_one(ranker), abs=0.2 if "dtype" in given else 1e-5)


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_the_revision_is_that_of_every_file(ranker_class, folders, monkeypatch, name):
    asked = set()
    for auto_class in (AutoConfig, AutoTokenizer):
        load = auto_class.from_pretrained

        def spy(path, *arguments, load=load, **options):
            if options.get("trust_remote_code"):  # not the calls of the libraries
                asked.add((Path(path).name, options.get("revision")))
            return load(path, *arguments, **options)

        monkeypatch.setattr(auto_class, "from_pretrained", spy)
    ranker_class(str(folders / name), model_init_kwargs={"revision": "v2", "trust_remote_code": True})
    # An adapter names the revision of its base, here none
    assert asked == {("base", "v2" if name == "base" else None)}


OWN_CODE = """
from transformers import GPTNeoXConfig, GPTNeoXForSequenceClassification

class MyConfig(GPTNeoXConfig):
    model_type = "mine"

class MyRewardModel(GPTNeoXForSequenceClassification):
    config_class = MyConfig
"""


def test_a_model_of_its_own_code_runs_if_it_is_trusted(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GPTNeoXConfig(vocab_size=300, num_labels=1, pad_token_id=0, **sizes)
    model = GPTNeoXForSequenceClassification(config)
    folder = tmp_path / "mine"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "mine.py").write_text(OWN_CODE, encoding="utf-8")
    own = {"AutoConfig": "mine.MyConfig", "AutoModelForSequenceClassification": "mine.MyRewardModel"}
    written = {**config.to_dict(), "model_type": "mine", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(ValueError, match="trust_remote_code"):
        RewardModelRanker(folder)
    ranker = RewardModelRanker(folder, model_init_kwargs={"trust_remote_code": True})
    assert type(ranker.model).__name__ == "MyRewardModel"
    assert rewards_of(ranker) == pytest.approx(rewards_of(RewardModelRanker(model, tokenizer)), abs=1e-5)
    assert ranker.arguments()["model_init_kwargs"] == repr({"trust_remote_code": True})
    named = load_ranker(RankerArguments(ranker=str(folder)), trust_remote_code=True)  # by a command
    assert named.settings() == ranker.settings()
