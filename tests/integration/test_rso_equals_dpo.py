"""`RSOTrainer` is a drop-in for TRL's `DPOTrainer`: the same losses and metrics, step by step, on HH-RLHF pairs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MixtralConfig, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from prefopt_trl.data.hh_rlhf import load_hh_rlhf
from prefopt_trl.trainers.rso_config import RSOConfig
from prefopt_trl.trainers.rso_trainer import RSOTrainer
from tests.unit.trainers.conftest import _fast_collection  # noqa: F401

TRAINER_ARGUMENTS = ("model", "ref_model", "train_dataset", "eval_dataset", "peft_config")
NOT_COMPARED = ("runtime", "per_second")  # wall-clock times

# TRL's metrics, all of which must come out of the shared rows too
METRICS = {f"{name}/{side}" for name in ("logits", "logps", "rewards") for side in ("chosen", "rejected")}
METRICS |= {"entropy", "num_tokens", "mean_token_accuracy", "rewards/accuracies", "rewards/margins"}


@pytest.fixture(scope="module")
def pairs(shared_dir: Path) -> Dataset:
    """Real pairs with prompts of less than 120 bytes, in memory, so that no trainer finds another's cached files."""
    dataset = load_hh_rlhf(shared_dir / "data" / "hh_rlhf" / "harmless-base" / "test.jsonl.gz")
    return Dataset.from_list([row for row in dataset.select(range(400)) if len(row["prompt"]) < 120][:60])


def save(model: PreTrainedModel, folder: Path, tokenizer_dir: str) -> str:
    """Save a model with weights so large that a wrong mask or position moves log-probabilities by whole nats."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def policy_dir(tiny_llama_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    return save(model, tmp_path_factory.mktemp("policy"), tiny_llama_dir)


FINE_TUNING = {"full": {}, "LoRA": {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=4)}}


@dataclass
class Run:
    """What a training printed, and how many rows and tokens, padding among them, its models were given."""

    logs: list[dict[str, float]]
    num_rows: int
    num_tokens: int
    trainer: DPOTrainer


@contextmanager
def embedded_shapes() -> Iterator[list[torch.Size]]:
    """Shapes `(num_rows, row_length)` that reach the token embeddings of the policy and the reference."""
    shapes: list[torch.Size] = []

    def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings >= 300:  # the vocabulary's
            shapes.append(inputs[0].shape)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(record)
    try:
        yield shapes
    finally:
        hook.remove()


def train(
    trainer_class: type[DPOTrainer], config_class: type[DPOConfig], resume_from: str | None = None, **given: Any
) -> Run:
    arguments = {name: given.pop(name) for name in TRAINER_ARGUMENTS if name in given}
    # Each trainer has models of its own, where they are not given by name
    arguments = {name: value() if isinstance(value, FunctionType) else value for name, value in arguments.items()}
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 160, "bf16": False, "use_cpu": True}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    settings |= {"learning_rate": 1e-2 if "peft_config" in arguments else 1e-3}
    with embedded_shapes() as shapes:
        trainer = trainer_class(args=config_class(**settings | given), **arguments)
        trainer.train(resume_from_checkpoint=resume_from)
    batches = [shape for shape in shapes if shape.numel() > 50]  # the probe's are smaller
    num_rows, num_tokens = sum(shape[0] for shape in batches), sum(map(torch.Size.numel, batches))
    return Run(trainer.state.log_history, num_rows, num_tokens, trainer)


def train_dpo(tmp_path: Path, **given: Any) -> Run:
    return train(DPOTrainer, DPOConfig, output_dir=str(tmp_path / "dpo"), beta=0.1, **given)


def train_rso(tmp_path: Path, **given: Any) -> Run:
    return train(RSOTrainer, RSOConfig, output_dir=str(tmp_path / "rso"), gamma=0.1, **given)


def assert_same(run: Run, expected: Run) -> None:
    """Require the same keys and values in every log.

    Values of hundreds of nats agree to float32's rounding of their sums. Adam makes a full step of a gradient that is
    rounding alone, which the gradient's norm shows first.
    """
    assert len(run.logs) == len(expected.logs) > 0
    for log, expected_log in zip(run.logs, expected.logs, strict=True):
        assert log.keys() == expected_log.keys()
        for name, value in expected_log.items():
            if not name.endswith(NOT_COMPARED):
                tolerance = 1e-3 if name == "grad_norm" else 2e-5
                assert log[name] == pytest.approx(value, abs=1e-4, rel=tolerance), f"{name} at step {log['step']}"


def both(tmp_path: Path, **given: Any) -> tuple[Run, Run]:
    """Our run and TRL's with the same arguments, which must be the same."""
    run, expected = train_rso(tmp_path, **given), train_dpo(tmp_path, **given)
    assert_same(run, expected)
    return run, expected


def assert_shared(run: Run, expected: Run) -> None:
    """Require that policy and reference were given one row per pair, always."""
    assert run.num_rows == expected.num_rows // 2 > 0
    assert run.num_tokens < 0.9 * expected.num_tokens


def losses(run: Run) -> list[float]:
    return [log["loss"] for log in run.logs if "loss" in log]


@pytest.mark.parametrize(("loss", "fine_tuning"), [("sigmoid", "full"), ("hinge", "LoRA")])
def test_twenty_steps_are_those_of_trl(loss, fine_tuning, pairs, policy_dir, tmp_path):
    given = {"model": policy_dir, "train_dataset": pairs.select(range(48)), **FINE_TUNING[fine_tuning]}
    given |= {"eval_dataset": pairs.select(range(48, 54)), "eval_strategy": "steps", "eval_steps": 10, "max_steps": 20}
    expected = train_dpo(tmp_path, loss_type=loss, **given)
    assert len(losses(expected)) == 20 and max(losses(expected)) - min(losses(expected)) > 0.1
    eval_logs = [log for log in expected.logs if "eval_loss" in log]
    assert len(eval_logs) == 2 and {f"eval_{name}" for name in METRICS} <= eval_logs[0].keys()
    assert expected.logs[0].keys() >= METRICS
    for share_prefix in (True, False):
        run = train_rso(tmp_path, loss_type=f"{loss}-norm", share_prefix=share_prefix, **given)
        assert losses(run) == pytest.approx(losses(expected), abs=1e-4, rel=0)
        assert_same(run, expected)
        if share_prefix:
            assert_shared(run, expected)
        else:
            assert (run.num_rows, run.num_tokens) == (expected.num_rows, expected.num_tokens)


ALPHA = {"f_alpha_divergence_coef": 0.3, "learning_rate": 1e-4}
LOSS_TYPES = [
    "sigmoid_norm",
    "ipo",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
]
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in [*LOSS_TYPES, "sft"]},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "several losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"ld_alpha": 0.5},
    # Exponentials of the log-ratios, which are kept small
    "forward_kl": {"f_divergence_type": "forward_kl", "learning_rate": 1e-4},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", **ALPHA},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "use_weighting": {"use_weighting": True},
    "precompute_ref_log_probs": {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 3},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "gradient accumulation": {"gradient_accumulation_steps": 2},
    "no gradient checkpointing": {"gradient_checkpointing": False},
    "reentrant gradient checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "truncation of completions": {"max_length": 90},
    "truncation of prompts": {"max_length": 60, "truncation_mode": "keep_end"},
    "eager attention": {"model_init_kwargs": {"attn_implementation": "eager"}},
}
NOT_WITH_LORA = {"sync_ref_model"}  # TRL refuses it


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_other_option_is_trls(variant, pairs, policy_dir, tmp_path):
    run, expected = both(tmp_path, model=policy_dir, train_dataset=pairs.select(range(8)), **VARIANTS[variant])
    if variant == "truncation of prompts":  # pairs cut at different places have nothing in common
        assert run.num_rows == expected.num_rows // 2
    else:
        assert_shared(run, expected)


@pytest.mark.slow
@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("fine_tuning", FINE_TUNING)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_other_option_is_trls_however_it_is_run(variant, fine_tuning, share_prefix, pairs, policy_dir, tmp_path):
    given = {"model": policy_dir, "train_dataset": pairs, "max_steps": 10, **VARIANTS[variant]}
    given |= FINE_TUNING[fine_tuning]
    if fine_tuning == "LoRA" and variant in NOT_WITH_LORA:
        with pytest.raises(NotImplementedError, match="sync_ref_model"):
            train_rso(tmp_path, **given)
        return
    assert_same(train_rso(tmp_path, share_prefix=share_prefix, **given), train_dpo(tmp_path, **given))


def test_precomputing_shares_the_prompts_too(pairs, policy_dir, tmp_path):
    splits = {"first": pairs.select(range(12, 16)), "second": pairs.select(range(16, 20))}
    given = {"eval_dataset": splits, "eval_strategy": "steps", "eval_steps": 2, "precompute_ref_log_probs": True}
    run, expected = both(tmp_path, model=policy_dir, train_dataset=pairs.select(range(8)), **given)
    assert {"eval_first_loss", "eval_second_loss"} <= {name for log in run.logs for name in log}
    assert_shared(run, expected)
    rows, wanted = ([one.trainer.train_dataset, one.trainer.eval_dataset["first"]] for one in (run, expected))
    for dataset, expected_dataset in zip(rows, wanted, strict=True):
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            assert list(dataset[name]) == pytest.approx(list(expected_dataset[name]), abs=1e-4, rel=1e-6)


def test_bfloat16_is_as_close_as_its_rounding(pairs, policy_dir, tmp_path):
    given = {"bf16": True, "model": policy_dir, "train_dataset": pairs.select(range(12))}
    run, expected = train_rso(tmp_path, **given), train_dpo(tmp_path, **given)
    # bfloat16 keeps 8 bits. Sums in another order round otherwise: a completion of 100 tokens is off by some tenths of
    # a nat, which gamma = 0.1 makes some hundredths of a loss. The mean log-probability stays within 0.1%.
    assert losses(run) == pytest.approx(losses(expected), abs=5e-2)
    for name in ("logps/chosen", "logps/rejected"):
        found, wanted = ([log[name] for log in logs[:-1]] for logs in (run.logs, expected.logs))
        assert found == pytest.approx(wanted, rel=1e-3)
    assert run.logs[0].keys() == expected.logs[0].keys()
    # Both the policy and the reference share, though autocast returns the logits of the latter in float32
    assert_shared(run, expected)


def test_an_explicit_reference_model(pairs, policy_dir, tiny_llama_dir, tmp_path):
    load = AutoModelForCausalLM.from_pretrained
    models = {"model": lambda: load(policy_dir), "ref_model": lambda: load(tiny_llama_dir)}
    run, expected = both(tmp_path, train_dataset=pairs.select(range(8)), **models)
    assert abs(expected.logs[0]["rewards/margins"]) > 0.1  # the reference is another model from the start
    assert_shared(run, expected)


def test_a_pretrained_adapter_is_its_own_reference(pairs, policy_dir, tmp_path):
    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(policy_dir)

    torch.manual_seed(0)
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    get_peft_model(load(), adapter).save_pretrained(tmp_path / "adapter")
    adapted = {"model": lambda: PeftModel.from_pretrained(load(), str(tmp_path / "adapter"), is_trainable=True)}
    run, expected = both(tmp_path, train_dataset=pairs.select(range(8)), **adapted)
    assert expected.logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert_shared(run, expected)
    with run.trainer.model.disable_adapter():  # the base is untouched
        weights = dict(run.trainer.model.get_base_model().named_parameters())
        assert torch.equal(weights["model.embed_tokens.weight"], load().model.embed_tokens.weight)


@pytest.mark.parametrize("fine_tuning", FINE_TUNING)
def test_resuming_gives_the_uninterrupted_losses(fine_tuning, pairs, policy_dir, tmp_path):
    given = {"model": policy_dir, "train_dataset": pairs.select(range(8)), **FINE_TUNING[fine_tuning]}
    given |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = train_rso(tmp_path, **given)
    assert_same(whole, train_dpo(tmp_path, **given))
    resumed = train_rso(tmp_path / "resumed", resume_from=str(tmp_path / "rso" / "checkpoint-2"), **given)
    assert losses(resumed)[-2:] == pytest.approx(losses(whole)[-2:], abs=1e-6)
    assert resumed.num_tokens < whole.num_tokens


@pytest.fixture(scope="module")
def mixtral_dir(tiny_llama_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    copied = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    copied += ["num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id"]
    llama = AutoConfig.from_pretrained(tiny_llama_dir).to_dict()
    config = MixtralConfig(
        num_local_experts=4, router_aux_loss_coef=0.1, sliding_window=None, **{name: llama[name] for name in copied}
    )
    return save(AutoModelForCausalLM.from_config(config), tmp_path_factory.mktemp("mixtral"), tiny_llama_dir)


@pytest.mark.parametrize("output_router_logits", [True, False])
def test_the_auxiliary_loss_of_experts_is_trls(output_router_logits, mixtral_dir, pairs, tmp_path, caplog):
    def load() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(mixtral_dir)
        model.config.output_router_logits = output_router_logits
        return model

    _, expected = both(tmp_path, model=load, ref_model=load, train_dataset=pairs.select(range(12)))
    assert expected.logs[0]["aux_loss"] > 0
    reasons = [record.getMessage() for record in caplog.records if "not shared" in record.getMessage()]
    # Once per model that asks for the router's logits: the policy, and the reference if its config says so
    assert len(reasons) == 1 + output_router_logits and all("output_router_logits" in reason for reason in reasons)


def test_experts_without_auxiliary_loss_share(mixtral_dir, pairs, tmp_path):
    given = {"model": mixtral_dir, "train_dataset": pairs.select(range(8)), "router_aux_loss_coef": 0.0}
    run, expected = both(tmp_path, **given)
    assert_shared(run, expected)


def test_prefix_tuning_falls_back(pairs, policy_dir, tmp_path, caplog):
    virtual = PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    given = {"peft_config": virtual, "gradient_checkpointing": False}  # PEFT refuses it
    both(tmp_path, model=policy_dir, train_dataset=pairs.select(range(8)), **given)
    assert [record.getMessage() for record in caplog.records if "past_key_values" in record.getMessage()]
