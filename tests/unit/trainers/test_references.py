"""Which model is the reference, proved by its log-probabilities in every step of a training."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from prefopt_trl import FunctionRanker, ListwiseDPOTrainer, RSOTrainer

PAIRS = {
    "prompt": ["The capital of France is", "Why?", "Mix", "The quick brown"],
    "chosen": [" Paris", " Because.", " the flour", " fox"],
    "rejected": [" bread.", " No.", " it", " dog and dog"],
}
RANKINGS = {
    "prompt": PAIRS["prompt"],
    "completions": [list(pair) for pair in zip(PAIRS["chosen"], PAIRS["rejected"], strict=True)],
    "rewards": [[1.0, 0.0]] * 4,
}
DATA = {RSOTrainer: Dataset.from_dict(PAIRS), ListwiseDPOTrainer: Dataset.from_dict(RANKINGS)}
PROMPTS = Dataset.from_dict({"prompt": PAIRS["prompt"]})
NUM_STEPS = 3


def lora(modules: Sequence[str] = ("q_proj", "v_proj"), **given: Any) -> LoraConfig:
    return LoraConfig(target_modules=list(modules), r=4, task_type="CAUSAL_LM", **given)


@pytest.fixture(scope="module")
def adapter_dir(policy_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes its base model by nats."""
    folder = tmp_path_factory.mktemp("adapter")
    with_adapter(policy_dir).save_pretrained(folder)
    return folder


def with_adapter(policy_dir: str) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(policy_dir), lora(init_lora_weights=False))


def summed_logps(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Slow reference: each row by itself, in the precision of the model."""
    summed = []
    masks = batch["attention_mask"].bool(), batch["completion_mask"].bool()
    for ids, attended, in_completion in zip(batch["input_ids"], *masks, strict=True):
        ids, in_completion = ids[attended], in_completion[attended]
        with torch.no_grad():
            logps = model(ids[None]).logits[0, :-1].log_softmax(-1)
        summed.append(logps[range(len(ids) - 1), ids[1:]][in_completion[1:]].sum())
    return torch.stack(summed)


@pytest.mark.parametrize("trainer_class", [RSOTrainer, ListwiseDPOTrainer])
@pytest.mark.parametrize("how", ["full", "fresh adapter", "pretrained adapter", "reference model"])
def test_the_reference_stays_what_it_is(how, trainer_class, make, policy_dir, tiny_llama_dir, adapter_dir):
    """Without an adapter it is the policy as it was; a new adapter's is the base model; a pretrained one's is the base
    with a frozen copy of the adapter; and a `ref_model` is itself."""
    expected = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64)
    given = {}
    if how == "fresh adapter":
        given["peft_config"] = lora()
    elif how == "pretrained adapter":
        base = AutoModelForCausalLM.from_pretrained(policy_dir)
        given["model"] = PeftModel.from_pretrained(base, str(adapter_dir), is_trainable=True)
        expected = PeftModel.from_pretrained(expected, str(adapter_dir)).double()
    elif how == "reference model":
        given["ref_model"] = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
        expected = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64)
    given |= {"max_steps": NUM_STEPS, "learning_rate": 0.05, "per_device_train_batch_size": 4}
    trainer = make(trainer_class, DATA[trainer_class], **given)
    seen, compute_loss = [], trainer.compute_loss

    def record(model, inputs, *args, **kwargs):
        seen.append((inputs, summed_logps(trainer.accelerator.unwrap_model(model), inputs)))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = record
    trainer.train()

    logs = [log for log in trainer.state.log_history if "loss" in log]
    for log, (inputs, logps) in zip(logs, seen, strict=True):
        # The papers' implicit reward, gamma * (log pi - log pi_ref), has the reference in it
        rewards = trainer.args.beta * (logps - summed_logps(expected, inputs))
        chosen, rejected = rewards.chunk(2) if "group_ids" not in inputs else (rewards[::2], rewards[1::2])
        assert log["rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4, abs=1e-5)
        assert log["rewards/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-4, abs=1e-5)
    assert len(logs) == NUM_STEPS and abs(logs[-1]["rewards/rejected"]) > 0.05  # nats times gamma: it has left
    if how == "pretrained adapter":  # the base model would be another reference
        base = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float64)
        assert (summed_logps(base, seen[0][0]) - summed_logps(expected, seen[0][0])).abs().mean() > 1


# How an object comes to have other weights than those that its name stands for. Each changes them by nats.


def fine_tuned(policy_dir: str, tmp_path: Path) -> Any:
    """In memory, by TRL's `SFTTrainer`, which leaves a forward on the model that is bound to it."""
    given = {"max_steps": 2, "learning_rate": 0.05, "use_cpu": True, "bf16": False, "report_to": "none"}
    args = SFTConfig(str(tmp_path / "sft"), **given)
    trainer = SFTTrainer(policy_dir, args=args, train_dataset=Dataset.from_dict({"text": PAIRS["chosen"]}))
    trainer.train()
    return trainer.model


def with_noise(policy_dir: str, tmp_path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) / 10
    return model


def merged(policy_dir: str, tmp_path: Path) -> Any:
    return with_adapter(policy_dir).merge_and_unload().requires_grad_(True)


def resized(policy_dir: str, tmp_path: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    torch.manual_seed(0)  # of the rows that are added
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    return model


def with_loaded_adapter(policy_dir: str, tmp_path: Path) -> Any:
    """With transformers' own `load_adapter`, which is no `PeftModel`."""
    with_adapter(policy_dir).save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    model.load_adapter(str(tmp_path / "adapter"), is_trainable=True)
    return model


CHANGES: list[Callable[[str, Path], Any]] = [fine_tuned, with_noise, merged, resized, with_loaded_adapter]
SAMPLING = {"num_candidates": 6, "num_samples": 4, "max_new_tokens": 4}
DATA_PATHS: dict[str, dict[str, Any]] = {
    "given": {},
    "offline": SAMPLING,
    "online": {**SAMPLING, "sampling": "online"},
    "sampled log-probabilities": {**SAMPLING, "reference_logps": "sampled"},
    "precomputed": {"precompute_ref_log_probs": True},
}


def assert_starts_at_its_reference(make, trainer_class, how="given", rel=1e-6, **given) -> None:
    """Where policy and reference are equal, sigmoid-norm is ln 2 and a ranking of two too, and rewards are 0."""
    data = DATA[trainer_class]
    if how not in ("given", "precomputed"):
        data = PROMPTS
        given["ranker"] = FunctionRanker(lambda prompts, completions, **_: [float(len(text)) for text in completions])
    pairing = {} if trainer_class is RSOTrainer else {"num_samples": 2}  # n = 2, whose loss is ln 2
    options = {**DATA_PATHS[how], **(pairing if DATA_PATHS[how] else {})}
    evaluated = data if how == "sampled log-probabilities" else DATA[trainer_class]
    trainer = make(trainer_class, data, eval_dataset=evaluated, learning_rate=0.0, **options, **given)
    trainer.train()
    log = trainer.state.log_history[0]
    for found in (log, {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}):
        assert found["loss"] == pytest.approx(math.log(2), rel=rel)
        assert found["rewards/chosen"] == pytest.approx(0, abs=1e-4)
        assert found["rewards/rejected"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("how", DATA_PATHS)
@pytest.mark.parametrize("changed", CHANGES)
def test_an_object_is_its_own_reference(changed, how, make, policy_dir, tmp_path):
    model = changed(policy_dir, tmp_path)
    assert_starts_at_its_reference(make, RSOTrainer, how, rel=1e-4, model=model)  # padded and packed sums differ
    if how in ("given", "online"):
        assert_starts_at_its_reference(make, ListwiseDPOTrainer, how, rel=1e-4, model=model)


def test_the_copy_does_not_move_with_the_policy(make, policy_dir, tmp_path):
    """Nor its plain forward, which a model that was trained before would lend it."""
    model = fine_tuned(policy_dir, tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits.detach()
    trainer = make(RSOTrainer, DATA[RSOTrainer], model=model, max_steps=2, learning_rate=0.05)
    trainer.train()
    assert (model(ids).logits - before).abs().max() > 0.1
    torch.testing.assert_close(trainer.ref_model(ids).logits, before)
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_hinge_norm_begins_at_one(make, policy_dir, tmp_path):
    trainer = make(RSOTrainer, DATA[RSOTrainer], model=with_noise(policy_dir, tmp_path), loss_type="hinge-norm")
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(1, rel=1e-4)


CAUSAL: Any = {"task_type": "CAUSAL_LM"}
ADAPTERS: dict[str, Any] = {
    "LoRA, embeddings": lambda: lora(["embed_tokens", "q_proj"]),
    "LoRA, tokens": lambda: lora(["q_proj"], trainable_token_indices=[5, 6, 7]),
    "LoRA, saved modules": lambda: lora(["q_proj"], modules_to_save=["norm"]),
    "DoRA": lambda: lora(["q_proj"], use_dora=True),
    "LoRA, parameters": lambda: lora([], target_parameters=["q_proj.weight"]),
    "PiSSA": lambda: lora(["q_proj"], init_lora_weights="pissa"),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL),
    "LoKr": lambda: peft.LoKrConfig(target_modules=["q_proj"], **CAUSAL),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["q_proj"], **CAUSAL),
    "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, **CAUSAL),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4, **CAUSAL),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8, **CAUSAL),
    "BOFT": lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=8, **CAUSAL),
    "HRA": lambda: peft.HRAConfig(target_modules=["q_proj"], **CAUSAL),
    "MiSS": lambda: peft.MissConfig(target_modules=["q_proj"], r=8, **CAUSAL),
    "VB-LoRA": lambda: peft.VBLoRAConfig(target_modules=["q_proj"], vector_length=8, num_vectors=4),
    "RandLoRA": lambda: peft.RandLoraConfig(target_modules=["q_proj"], r=8, **CAUSAL),
    "FourierFT": lambda: peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=8, **CAUSAL),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[5, 6, 7], **CAUSAL),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["norm"], **CAUSAL),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL),
}


def trained(policy_dir: str, adapter: str) -> PeftModel:
    """An adapter whose weights have moved far from those that it begins with."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy_dir), ADAPTERS[adapter]())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 4
    return model


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_trained_adapter_of_any_type_is_its_own_reference(adapter, make, policy_dir):
    model = trained(policy_dir, adapter)
    if adapter == "LoRA, parameters" and Version(peft.__version__) < Version("0.20"):
        with pytest.raises(ValueError, match="Install peft>=0.20, or pass a `ref_model`"):
            make(RSOTrainer, DATA[RSOTrainer], model=model)
        return
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = model.eval()(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - before[:, -4:]).abs().max() > 0.01  # without it, it would be another reference
    # transformers checkpoints activations without the virtual keys of prefix tuning, which fails in TRL as well
    options = {"gradient_checkpointing": False} if adapter == "prefix tuning" else {}
    assert_starts_at_its_reference(make, RSOTrainer, rel=1e-4, model=model, **options)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, before)  # nor has the copy changed the policy


def test_an_adapter_that_is_trained_twice_has_a_new_reference(make, policy_dir):
    model = trained(policy_dir, "LoRA, embeddings")
    make(RSOTrainer, DATA[RSOTrainer], model=model, max_steps=2, learning_rate=0.05).train()
    with pytest.raises(ValueError, match=r"Call `model.delete_adapter\('ref'\)`"):
        make(RSOTrainer, DATA[RSOTrainer], model=model)
    model.delete_adapter("ref")
    assert_starts_at_its_reference(make, RSOTrainer, rel=1e-4, model=model)


def test_the_copy_of_an_adapter_stays_when_new_data_are_evaluated(make, policy_dir):
    given = {"precompute_ref_log_probs": True, "learning_rate": 1e-2, "max_steps": 3, "eval_dataset": DATA[RSOTrainer]}
    trainer = make(RSOTrainer, DATA[RSOTrainer], model=with_adapter(policy_dir), **given)
    trainer.train()
    before = trainer.evaluate()["eval_loss"]
    assert abs(before - math.log(2)) > 1e-3
    other = Dataset.from_dict({name: rows[::-1] for name, rows in PAIRS.items()})  # not in the cache of TRL
    assert trainer.evaluate(other)["eval_loss"] == pytest.approx(before, rel=1e-5)


def test_an_adapter_may_be_the_reference_model(make, policy_dir, adapter_dir):
    def load() -> PeftModel:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy_dir), str(adapter_dir))

    model = load().merge_and_unload().requires_grad_(True)
    assert_starts_at_its_reference(make, RSOTrainer, rel=1e-4, model=model, ref_model=load())


def test_an_init_that_changes_the_base_is_refused_as_a_fresh_adapter(make):
    with pytest.raises(ValueError, match="`init_lora_weights='pissa'` changes the base weights.*get_peft_model"):
        make(RSOTrainer, DATA[RSOTrainer], peft_config=lora(init_lora_weights="pissa"))


@pytest.mark.parametrize("trainer_class", [RSOTrainer, ListwiseDPOTrainer])
def test_what_cannot_be_trained_is_refused_before_sampling(trainer_class, make, policy_dir, adapter_dir, tmp_path):
    asked = []
    ranker = FunctionRanker(lambda prompts, completions, **_: asked.append(prompts))
    base = AutoModelForCausalLM.from_pretrained(policy_dir)
    named = AutoModelForCausalLM.from_pretrained(policy_dir)
    named = PeftModel.from_pretrained(named, str(adapter_dir), adapter_name="sft", is_trainable=True)
    for model, message in [
        (PeftModel.from_pretrained(base, str(adapter_dir)), "Load the adapter with `is_trai"),
        (merged(policy_dir, tmp_path).requires_grad_(False), "Call `model.requires_grad_"),
        (named, "active adapter of `model` is 'sft'"),
        (str(adapter_dir), "is an adapter. Load it on its base"),
        ("./no/such/model", "There is no folder"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            make(trainer_class, PROMPTS, model=model, ranker=ranker, **SAMPLING)
        assert not asked, message
    with pytest.raises(TypeError, match="`ref_model` is the path .* Load it"):
        make(trainer_class, PROMPTS, ref_model=str(adapter_dir), ranker=ranker, **SAMPLING)


def beside(policy_dir: str, name: str) -> Any:
    """LoRA whose base has trainable parameters too, so that no adapter holds all that moves."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(policy_dir), lora())
    model.get_parameter(name).requires_grad = True
    return {"model": model}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            lambda path: {"peft_config": lora(bias="all")},
            "`bias='all'` of the adapter trains biases of the base model",
        ),
        (
            lambda path: beside(path, "base_model.model.model.norm.weight"),
            "1 parameters of the base model are trained",
        ),
        (
            lambda path: (lambda m: {"model": m, "ref_model": m.get_base_model()})(trained(path, "LoKr")),
            "is a part of",
        ),
    ],
)
def test_a_reference_that_would_move_is_refused(given, message, make, policy_dir):
    with pytest.raises(ValueError, match=message):
        make(ListwiseDPOTrainer, DATA[ListwiseDPOTrainer], **given(policy_dir))


def test_trained_tokens_of_tied_embeddings_are_read_from_the_logits(make, policy_dir, tmp_path):
    """Their rows of the head stand in a wrapper, which neither TRL's head nor ours reads."""
    model = AutoModelForCausalLM.from_pretrained(policy_dir, tie_word_embeddings=True)
    config = lora(trainable_token_indices=[5, 6, 7])
    with pytest.raises(ValueError, match="`trainable_token_indices` trains rows of the LM head"):
        make(RSOTrainer, DATA[RSOTrainer], model=model, peft_config=config)
    model = AutoModelForCausalLM.from_pretrained(policy_dir, tie_word_embeddings=True)
    trainer = make(ListwiseDPOTrainer, DATA[ListwiseDPOTrainer], model=model, peft_config=config)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 1.0
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    rows = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found = trainer.model(**rows, labels=labels, label_statistics=True).log_probs.sum(dim=1)
    torch.testing.assert_close(found, summed_logps(trainer.model, batch), rtol=1e-4, atol=1e-4)
