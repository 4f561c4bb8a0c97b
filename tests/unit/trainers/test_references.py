"""Which model is the reference, proved by its log-probabilities in every step of a training."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from prefopt_trl import ListwiseDPOTrainer, RSOTrainer

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
NUM_STEPS = 3


def lora(**given) -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM", **given)


@pytest.fixture(scope="module")
def adapter_dir(policy_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes its base model by nats."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(policy_dir), lora(init_lora_weights=False)).save_pretrained(
        folder
    )
    return folder


def summed_logps(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Slow reference: each row by itself, in the precision of the model."""
    summed = []
    for ids, attended, in_completion in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool(), strict=True
    ):
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
    trainer = make(
        trainer_class,
        DATA[trainer_class],
        max_steps=NUM_STEPS,
        learning_rate=0.05,
        **given,
        per_device_train_batch_size=4,
    )
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
