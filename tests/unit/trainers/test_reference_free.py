"""SLiC, PRO and RRHF load one model, and hold no copy of its weights while they train and evaluate."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from prefopt_trl import FunctionRanker
from prefopt_trl.trainers.listwise_dpo_trainer import ListwiseDPOTrainer
from prefopt_trl.trainers.pro_trainer import PROTrainer
from prefopt_trl.trainers.rrhf_trainer import RRHFTrainer
from prefopt_trl.trainers.slic_config import SLiCConfig
from prefopt_trl.trainers.slic_trainer import SLiCTrainer

PAIRS = Dataset.from_dict(
    {"prompt": ["Why?", "The dog"], "chosen": [" So.", " sleeps"], "rejected": [" I will not say.", " is"]}
)
PROMPTS = Dataset.from_dict({"prompt": ["Why?", "The dog"]})
REFERENCE_FREE = [SLiCTrainer, PROTrainer, RRHFTrainer]
LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4}


def held() -> dict[int, int]:
    """Number of values in each storage that belongs to a parameter of any model, wherever it is kept."""
    parameters = [value for value in gc.get_objects() if type(value) is torch.nn.Parameter]
    return {value.untyped_storage().data_ptr(): value.numel() for value in parameters}


@dataclass
class Models:
    """How often weights were loaded, and how many were held besides those from before the test."""

    before: set[int]
    held_when_loading: list[int] = field(default_factory=list)

    def count(self) -> int:
        return sum(size for storage, size in held().items() if storage not in self.before)

    @property
    def num_loaded(self) -> int:
        return len(self.held_when_loading)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    gc.collect()
    models = Models(set(held()))
    load = PreTrainedModel.from_pretrained.__func__

    def counting(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        models.held_when_loading.append(models.count())
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counting))
    yield models


class HeldInStep(TrainerCallback):
    def __init__(self, models: Models) -> None:
        self.models, self.counts = models, []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.counts.append(self.models.count())

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.counts.append(self.models.count())


def given_as(how: str, policy_dir: str) -> dict[str, Any]:
    if how in ("path", "path, LoRA"):
        return {"model": policy_dir, **({"peft_config": LoraConfig(**LORA)} if how == "path, LoRA" else {})}
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    if how == "instance":
        return {"model": model}
    if how == "instance, LoRA":
        return {"model": model, "peft_config": LoraConfig(**LORA)}
    return {"model": get_peft_model(model, LoraConfig(**LORA, init_lora_weights=False))}


def train_and_evaluate(make: Any, trainer_class: Any, models: Models, **given: Any) -> tuple[Any, list[int]]:
    """The trainer, and the values held after its construction, in a step of training and in one of evaluation."""
    in_step = HeldInStep(models)
    trainer = make(trainer_class, PAIRS, eval_dataset=PAIRS, callbacks=[in_step], **given)
    gc.collect()
    counts = [models.count()]
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0
    trainer.evaluate()
    assert len(in_step.counts) == 2
    return trainer, counts + in_step.counts


@pytest.mark.parametrize("trainer_class", REFERENCE_FREE)
@pytest.mark.parametrize("how", ["path", "instance", "path, LoRA", "instance, LoRA", "pretrained adapter"])
def test_one_model_is_loaded_and_held(how, trainer_class, make, models, policy_dir):
    given = given_as(how, policy_dir)
    trainer, counts = train_and_evaluate(make, trainer_class, models, **given)
    assert models.held_when_loading == [0]
    assert trainer.ref_model is None
    assert counts == [sum(parameter.numel() for parameter in trainer.model.parameters())] * 3
    if isinstance(trainer.model, PeftModel):
        assert list(trainer.model.peft_config) == ["default"]
        assert {name.split(".")[-2] for name, value in trainer.model.named_parameters() if value.requires_grad} == {
            "default"
        }


@pytest.mark.parametrize("trainer_class", [DPOTrainer, ListwiseDPOTrainer])
@pytest.mark.parametrize(("how", "copies"), [("path", 2), ("instance", 2), ("path, LoRA", 1)])
def test_with_a_reference_model_the_same_counts_show_two(how, copies, trainer_class, make, models, policy_dir):
    trainer, counts = train_and_evaluate(make, trainer_class, models, **given_as(how, policy_dir))
    own = sum(parameter.numel() for parameter in trainer.model.parameters())
    # The reference of an instance is a copy, also of weights that have changed since they were loaded
    is_copied = how == "instance" and trainer_class is ListwiseDPOTrainer
    assert models.num_loaded == copies - is_copied and models.held_when_loading[0] == 0
    assert counts == [copies * own] * 3


def test_a_copied_adapter_would_be_counted(make, models, policy_dir):
    trainer, counts = train_and_evaluate(make, DPOTrainer, models, **given_as("pretrained adapter", policy_dir))
    assert list(trainer.model.peft_config) == ["default", "ref"]
    without = sum(parameter.numel() for name, parameter in trainer.model.named_parameters() if ".ref." not in name)
    assert counts[0] > without


@pytest.mark.parametrize("trainer_class", REFERENCE_FREE)
def test_sampling_leaves_one_model(trainer_class, make, models):
    """From a path, the model that is sampled from is gone before the one that is trained is loaded."""
    trainer = make(
        trainer_class,
        PROMPTS,
        num_candidates=6,
        num_samples=2,
        max_new_tokens=4,
        ranker=FunctionRanker(lambda prompts, completions, **kwargs: [float(len(text)) for text in completions]),
    )
    assert models.held_when_loading == [0, 0]
    gc.collect()
    assert models.count() == sum(parameter.numel() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("trainer_class", REFERENCE_FREE)
def test_a_reference_model_is_refused(trainer_class, make, models, policy_dir):
    reference = AutoModelForCausalLM.from_pretrained(policy_dir)
    with pytest.raises(ValueError, match="`ref_model` has no effect: .* has no reference model. Leave it out."):
        make(trainer_class, PAIRS, ref_model=reference)
    assert models.num_loaded == 1


@pytest.mark.parametrize("trainer_class", REFERENCE_FREE)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.5),
        ("precompute_ref_log_probs", True),
        ("precompute_ref_batch_size", 4),
        ("sync_ref_model", True),
        ("ref_model_mixup_alpha", 0.5),
        ("ref_model_sync_steps", 2),
    ],
)
def test_arguments_of_a_reference_model_are_refused(name, value, trainer_class, config):
    with pytest.raises(ValueError, match=f"`{name}`={value} has no effect in .*no reference model.* Leave it out."):
        config(trainer_class.config_class, **{name: value})


@pytest.mark.parametrize("fails", [False, True])
def test_trls_own_trainer_loads_as_before_afterwards(fails, make, models):
    load = dpo_trainer.create_model_from_path
    if fails:
        with pytest.raises(ValueError, match="virtual"):  # inside DPOTrainer.__init__, after the model is loaded
            make(PROTrainer, PAIRS, router_aux_loss_coef=0.1, peft_config=None, pad_token="virtual")
    else:
        make(PROTrainer, PAIRS)
    assert dpo_trainer.create_model_from_path is load
    assert make(DPOTrainer, PAIRS).ref_model is not None


def test_trls_own_trainers_are_left_as_they_are(tiny_llama_dir, tmp_path, monkeypatch):
    """Not even while one of ours is made: another thread may be making one of TRL's."""
    made = []

    def make_trls(*args, **kwargs):
        if not made:
            made.append(None)
            config = DPOConfig(str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none")
            made[0] = DPOTrainer(tiny_llama_dir, args=config, train_dataset=PAIRS)
        return add_fused_lm_head(*args, **kwargs)

    add_fused_lm_head = dpo_trainer.add_fused_lm_head
    monkeypatch.setattr(dpo_trainer, "add_fused_lm_head", make_trls)
    config = SLiCConfig(str(tmp_path / "ours"), use_cpu=True, bf16=False, report_to="none")
    ours = SLiCTrainer(tiny_llama_dir, args=config, train_dataset=PAIRS)
    assert ours.ref_model is None and isinstance(made[0].ref_model, PreTrainedModel)
