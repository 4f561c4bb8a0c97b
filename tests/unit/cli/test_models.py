"""Adapters, quantised bases, tokenizers and rankers as they are named on the command line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import ModelConfig

from prefopt_trl.cli.arguments import RankerArguments
from prefopt_trl.cli.models import load_tokenizer, model_to_run, model_to_train
from prefopt_trl.cli.rankers import load_ranker
from prefopt_trl.rankers import EnsembleRanker, FunctionRanker, PairwiseRanker, RewardModelRanker
from prefopt_trl.rankers.templates import resolve_template


@pytest.fixture
def adapter(tiny_llama_dir):
    """Folder of an adapter of the tiny model whose weights are not those of a new one."""
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    model.save_pretrained("adapter")
    return "adapter"


def arguments(**given):
    return SimpleNamespace(model_init_kwargs=None, trust_remote_code=False, **given)


def test_a_path_is_left_to_the_trainer_with_how_to_load_it(tiny_llama_dir):
    args = arguments()
    model = ModelConfig(tiny_llama_dir, dtype="bfloat16", attn_implementation="eager", use_peft=True, lora_r=3)
    trained = model_to_train(model, args)
    assert trained["model"] == tiny_llama_dir
    assert args.model_init_kwargs == {"revision": "main", "attn_implementation": "eager", "dtype": "bfloat16"}
    assert (trained["peft_config"].r, trained["quantization_config"]) == (3, None)


def test_qlora_is_trls_quantisation(tiny_llama_dir):
    model = ModelConfig(tiny_llama_dir, load_in_4bit=True, use_bnb_nested_quant=True, use_peft=True, dtype="bfloat16")
    config = model_to_train(model, arguments())["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16


def test_an_adapter_comes_on_its_base_ready_to_be_trained(adapter, tiny_llama_dir):
    trained = model_to_train(ModelConfig(adapter, dtype="float32"), arguments())
    assert isinstance(trained["model"], PeftModel)
    trainable = [name for name, value in trained["model"].named_parameters() if value.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    assert "peft_config" not in trained
    assert len(load_tokenizer(adapter, "main", False)) == len(AutoTokenizer.from_pretrained(tiny_llama_dir))

    ids = torch.tensor([[1, 5, 9]])
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        adapted = model_to_run(ModelConfig(adapter), "cpu", False)(ids).logits
        assert torch.allclose(trained["model"].eval()(ids).logits, adapted)
        assert not torch.allclose(base(ids).logits, adapted, atol=1e-3)


def test_a_frozen_copy_of_a_pretrained_adapter_is_the_reference(adapter, training, run_in_process):
    own = ["--model_name_or_path", adapter, "--output_dir", "out", "--save_strategy", "steps", "--logging_steps", "1"]
    run_in_process("rso", [*training, *own])
    history = json.loads(Path("out/checkpoint-1/trainer_state.json").read_text())["log_history"]
    # Against the base model the adapter would have rewards, and another loss than log 2
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_an_adapter_of_another_base_is_refused(adapter):
    config = LlamaConfig(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained("other")
    settings = json.loads(Path(adapter, "adapter_config.json").read_text())
    Path(adapter, "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "other"}))
    with pytest.raises(ValueError, match="the adapter adapter on its base other cannot be loaded .*size mismatch"):
        model_to_run(ModelConfig(adapter), "cpu", False)
    Path(adapter, "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="The adapter adapter names no base model"):
        model_to_run(ModelConfig(adapter), "cpu", False)


def test_an_adapter_on_top_of_an_adapter_is_refused(adapter):
    with pytest.raises(ValueError, match="adapter is an adapter already, and `use_peft` would put another on top"):
        model_to_train(ModelConfig(adapter, use_peft=True), arguments())


@pytest.mark.parametrize("name", ["sft", "rso"])
def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(name, tiny_llama_dir, training, run_in_process):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained("wrong")
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained("wrong")
    with pytest.raises(ValueError, match=f"token ids up to {size}, and the model embeddings for {size} tokens"):
        run_in_process(name, [*training, "--model_name_or_path", "wrong", "--output_dir", "out"])


def test_a_folder_without_a_tokenizer_is_named(tiny_llama_dir):
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained("bare")
    with pytest.raises(ValueError, match="'bare' has no tokenizer that can be loaded from bare .* save the model's"):
        load_tokenizer("bare", "main", False)


def test_a_base_that_cannot_be_read_is_named_with_its_adapter(adapter):
    settings = json.loads(Path(adapter, "adapter_config.json").read_text())
    Path(adapter, "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "no/base"}))
    with pytest.raises(ValueError, match="`model_name_or_path`='adapter' has no tokenizer .* loaded from no/base"):
        load_tokenizer(adapter, "main", False)
    message = "`base_model_name_or_path`='no/base' in adapter/adapter_config.json cannot be loaded"
    with pytest.raises(ValueError, match=message):
        model_to_run(ModelConfig(adapter), "cpu", False)


def test_what_is_neither_here_nor_on_the_hub_is_named_with_its_argument():
    named = "cannot be loaded .*. Check the path, or the Hub id"
    with pytest.raises(ValueError, match=f"`model_name_or_path`='no/model' {named}"):
        model_to_run(ModelConfig("no/model"), "cpu", False)
    with pytest.raises(ValueError, match=f"`ranker`='no/model' {named}"):
        load_ranker(RankerArguments(ranker="no/model"))


def test_rankers_by_name(tiny_llama_dir, adapter):
    def ranker(name):
        return load_ranker(RankerArguments(ranker=name, ranker_batch_size=3, ranker_template="summary"))

    pairwise = ranker(tiny_llama_dir)
    assert isinstance(pairwise, PairwiseRanker)
    assert pairwise.ranking_model.batch_size == 3
    assert pairwise.model is pairwise.ranking_model.model
    assert pairwise.template("p", "a", "b") == resolve_template("summary")("p", "a", "b")
    adapted = ranker(adapter)
    assert isinstance(adapted, PairwiseRanker)
    assert isinstance(adapted.model, PeftModel)
    LlamaForSequenceClassification(LlamaConfig.from_pretrained(tiny_llama_dir, num_labels=1)).save_pretrained("reward")
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained("reward")
    assert isinstance(ranker("reward"), RewardModelRanker)


LENGTH = "def length(prompts, completions):\n    return [len(text) for text in completions]\n"


@pytest.mark.parametrize(
    "name", ["my_reward:length", "my_reward.length", "my_reward.py:length", "./my_reward.py:length"]
)
def test_a_function_is_found_beside_the_data(name, tmp_path):
    (tmp_path / "my_reward.py").write_text(LENGTH)
    ranker = load_ranker(RankerArguments(ranker=name))
    assert isinstance(ranker, FunctionRanker)
    assert ranker.rewards(["a"], [["b", "cd"]]) == [[1, 2]]
    assert ranker.settings() == load_ranker(RankerArguments(ranker="my_reward:length")).settings()


def test_a_file_is_not_a_function():
    with pytest.raises(ValueError, match="`ranker`='own.py' is a file. Name a function in it as own.py:function"):
        load_ranker(RankerArguments(ranker="own.py"))


@pytest.mark.parametrize(
    "name", ["no_such_module.reward", "json.no_such_function", "math.sqrt", "no/such.py:reward", "no_such:reward"]
)
def test_a_function_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match="is not a folder, and cannot be imported as a function"):
        load_ranker(RankerArguments(ranker=name))


def test_a_file_describes_any_ranker(tiny_llama_dir, tmp_path):
    (tmp_path / "my_reward.py").write_text(LENGTH)
    (tmp_path / "ranker.yaml").write_text(
        f"""
        class: EnsembleRanker
        combine: min
        rankers:
          - {{class: PairwiseRanker, model: {tiny_llama_dir}, template: summary, batch_size: 3}}
          - {{class: FunctionRanker, function: "my_reward:length", temperature: 4}}
          - {{class: JudgeRanker, model: my-model, base_url: "http://localhost:8000/v1", prompt: dialogue, votes: 2}}
        """
    )
    ranker = load_ranker(RankerArguments(ranker="ranker.yaml"))
    assert isinstance(ranker, EnsembleRanker) and ranker.combine == "min"
    pairwise, function, judge = ranker.rankers
    assert pairwise.ranking_model.batch_size == 3
    assert function.score(["p"], [["ab"]])[0].tolist() == [0.5]
    assert function.settings()["temperature"] == 4
    assert (judge.settings()["model"], judge.votes) == ("my-model", 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("RewardModelRanker", "`class` is 'RewardModelRanker'. Name one of .*EnsembleRanker"),
        ("class: os.system", "`class` is 'os.system'. Name one of"),
        ("{class: EnsembleRanker, ranker: []}", "unexpected keyword argument 'ranker'"),
        ("{class: FunctionRanker, function: 'math:sqrt', temperature: 0}", "cannot be imported as a function"),
        (
            "{class: FunctionRanker, function: 'my_reward:length', temperature: 0}",
            "`temperature` is 0. Give a positive",
        ),
        ("{class: FunctionRanker}", "missing 1 required positional argument: 'function'"),
        ("[", "while parsing"),
        (None, "No such file"),
    ],
)
def test_a_mistake_in_the_file_is_named(content, message, tmp_path):
    (tmp_path / "my_reward.py").write_text(LENGTH)
    if content is not None:
        (tmp_path / "ranker.yaml").write_text(content)
    with pytest.raises(ValueError, match=f"In `ranker`='ranker.yaml': .*{message}"):
        load_ranker(RankerArguments(ranker="ranker.yaml"))


def test_an_option_without_effect_on_the_ranker_is_refused(tmp_path):
    (tmp_path / "my_reward.py").write_text(LENGTH)
    with pytest.raises(ValueError, match="`ranker_batch_size` has no effect on `ranker`='my_reward:length'"):
        load_ranker(RankerArguments(ranker="my_reward:length", ranker_batch_size=2))


@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM"])
def test_an_adapter_of_a_ranker_is_loaded_by_its_task_onto_the_device(task, tiny_llama_dir, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    if task == "SEQ_CLS":
        config = LlamaConfig.from_pretrained(tiny_llama_dir, num_labels=1)
        base, expected = LlamaForSequenceClassification(config), RewardModelRanker
    else:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)
        base, expected = T5ForConditionalGeneration(config), PairwiseRanker
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    modules = ["q_proj"] if task == "SEQ_CLS" else ["q"]
    loaded = type(base).from_pretrained(tmp_path / "base")
    get_peft_model(loaded, LoraConfig(task_type=task, target_modules=modules)).save_pretrained(
        str(tmp_path / "adapter")
    )
    moved = []
    monkeypatch.setattr(PeftModel, "to", lambda self, device: moved.append(device) or self)
    ranker = load_ranker(RankerArguments(ranker=str(tmp_path / "adapter")))
    assert type(ranker) is expected and type(ranker.model.get_base_model()) is type(base)
    assert torch.device("cpu") in moved
