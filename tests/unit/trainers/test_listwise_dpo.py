import copy
import itertools
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM
from trl import DPOTrainer

from prefopt_trl.trainers.listwise_dpo_trainer import ListwiseDPOTrainer

PAIRS = Dataset.from_dict(
    {
        "prompt": ["The capital of France is", "Tell me how to bake bread.", "Why?", "The dog", "Mix", "A fox"],
        "chosen": [" Paris.", " Mix the flour, then wait.", " Because it is so.", " sleeps", " it", " and a dog"],
        "rejected": [" the quick brown fox.", " No.", " I will not say, whatever.", " jumps over it", " no", " is"],
    }
)
RANKING_METRICS = {"ranking/kendall_tau", "ranking/top1"}
NOT_COMPARED = ("runtime", "per_second")  # wall-clock times


def converse(row):
    def say(role, text):
        return [{"role": role, "content": text}]

    return {name: say("user" if name == "prompt" else "assistant", text) for name, text in row.items()}


def as_rankings(pairs):
    """The same data as rankings of two, with rewards of their own, and the worse completion first in every other."""
    rows = []
    for index, row in enumerate(pairs):
        completions, rewards = [row["rejected"], row["chosen"]], [-2.0 * index, 0.5 + index]
        order = slice(None, None, -1 if index % 2 else 1)
        rows.append({"prompt": row["prompt"], "completions": completions[order], "rewards": rewards[order]})
    return Dataset.from_list(rows)


def plackett_luce(logratios, beta):
    """DPO eq. 20 of one prompt, best first."""
    scores = [beta * logratio for logratio in logratios]
    likelihood = 1.0
    for k in range(len(scores)):
        likelihood = likelihood * torch.exp(scores[k]) / sum(torch.exp(score) for score in scores[k:])
    return -torch.log(likelihood)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_step_minimises_the_papers_equation(share_prefix, rankings, by_hand, tiny_llama_dir, one_step):
    reference = copy.deepcopy(by_hand)
    reference.model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64)
    losses, scores = [], []
    for row in rankings:
        ref_logps = [logps.sum().detach() for logps, _ in reference.ranked(row)]
        logratios = [logps.sum() - ref for (logps, _), ref in zip(by_hand.ranked(row), ref_logps, strict=True)]
        losses.append(plackett_luce(logratios, 0.2))
        scores.append([0.2 * float(logratio) for logratio in logratios])
    loss = sum(losses) / 7
    ref_model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    step = one_step(ListwiseDPOTrainer, rankings, ref_model=ref_model, beta=0.2, share_prefix=share_prefix)
    step.assert_is(loss, by_hand.gradients(loss))
    assert step.num_rows == (7 if share_prefix else 35)
    assert step.log["rewards/chosen"] == pytest.approx(sum(row[0] for row in scores) / 7, rel=1e-4)
    others = [sum(row[1:]) / (len(row) - 1) for row in scores]
    assert step.log["rewards/rejected"] == pytest.approx(sum(others) / 7, rel=1e-4)


def test_lambda_weights_pairs_by_their_rewards(rankings, by_hand, tiny_llama_dir, one_step):
    reference = copy.deepcopy(by_hand)
    reference.model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64)
    losses = []
    for row in rankings:
        ref_logps = [logps.sum().detach() for logps, _ in reference.ranked(row)]
        pairs = zip(by_hand.ranked(row), ref_logps, sorted(row["rewards"], reverse=True), strict=True)
        ranked = [(0.2 * (logps.sum() - ref), reward) for (logps, _), ref, reward in pairs]
        losses.append(0.0)
        for (better, high), (worse, low) in itertools.product(ranked, ranked):
            if high > low:
                discounts = [1 / math.log(2 + sum(other > score for other, _ in ranked)) for score in (better, worse)]
                weight = (2**high - 2**low) * abs(discounts[0] - discounts[1])
                losses[-1] = losses[-1] + weight * torch.log(1 + torch.exp(worse - better))
    loss = sum(losses) / 7
    ref_model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    step = one_step(ListwiseDPOTrainer, rankings, ref_model=ref_model, beta=0.2, loss_type="lambda")
    step.assert_is(loss, by_hand.gradients(loss))


def test_it_begins_where_all_orders_are_as_likely(rankings, one_step):
    """Policy and reference are one model, so each of the n! orders has the same probability."""
    log = one_step(ListwiseDPOTrainer, rankings).log
    expected = sum(torch.lgamma(torch.tensor(n + 1.0)).item() for n in range(2, 9)) / 7
    assert log["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def mixtral_dir(policy_dir, tmp_path_factory):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "router_aux_loss_coef": 0.5, "sliding_window": None}
    config = MixtralConfig(vocab_size=AutoConfig.from_pretrained(policy_dir).vocab_size, **sizes, **experts)
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    folder = tmp_path_factory.mktemp("mixtral")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(policy_dir).save_pretrained(folder)
    return str(folder)


def run(make, trainer_class, dataset, folder, **given):
    given |= {"max_steps": 6, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    given |= {"eval_dataset": dataset.select(range(3)), "eval_strategy": "steps", "eval_steps": 3}
    # Adam makes a full step of a gradient that is rounding alone, so weights agree under plain gradient descent
    given |= {"optim": "sgd", "learning_rate": 0.2 if "peft_config" in given else 0.03, "max_grad_norm": 1.0}
    trainer = make(trainer_class, dataset, output_dir=folder, lr_scheduler_type="constant", **given)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    return trainer, before


VIRTUAL = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
VARIANTS = {
    "full": {},
    "full, unshared": {"share_prefix": False},
    "LoRA": {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=4)},
    "conversations": {},
    "padding": {"pad_to_multiple_of": 32},
    "accumulation": {"gradient_accumulation_steps": 3},
    "another beta": {"beta": 0.5},
    "truncation": {"max_length": 40},
    "truncation of prompts": {"max_length": 30, "truncation_mode": "keep_end"},
    "synchronised reference": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "experts": {},
    # Virtual tokens before each row; PEFT refuses gradient checkpointing
    "prefix tuning": {"peft_config": PrefixTuningConfig(**VIRTUAL), "gradient_checkpointing": False},
    "prompt tuning": {"peft_config": PromptTuningConfig(**VIRTUAL), "gradient_checkpointing": False},
}
NOT_SHARED = {"experts", "prefix tuning", "prompt tuning"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_completions_are_trls_dpo_step_for_step(variant, make, mixtral_dir, tmp_path, caplog):
    pairs = PAIRS.map(converse) if variant == "conversations" else PAIRS
    settings = {**VARIANTS[variant], **({"model": mixtral_dir} if variant == "experts" else {})}
    given = {name: value for name, value in settings.items() if name != "share_prefix"}
    expected, before = run(make, DPOTrainer, pairs, tmp_path / "dpo", **given)
    found, _ = run(make, ListwiseDPOTrainer, as_rankings(pairs), tmp_path / "ours", **settings)
    assert any("not shared" in record.getMessage() for record in caplog.records) == (variant in NOT_SHARED)

    trls, ours = expected.state.log_history, found.state.log_history
    trained = [log for log in trls if "loss" in log]
    assert len(trained) == 6 and len([log for log in trls if "eval_loss" in log]) == 2 and len(ours) == len(trls)
    losses = [log["loss"] for log in trained]
    assert abs(losses[-1] - losses[0]) > 1e-3
    assert ("aux_loss" in trained[0]) == (variant == "experts")
    if variant not in NOT_SHARED:
        assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    for log, expected_log in zip(ours, trls, strict=True):
        own = {name.removeprefix("eval_") for name in log.keys() - expected_log.keys()}
        assert own == (RANKING_METRICS if len(expected_log) > 8 else set()) and not expected_log.keys() - log.keys()
        for name, value in expected_log.items():
            if not name.endswith(NOT_COMPARED):
                tolerance = 1e-3 if name == "grad_norm" else 2e-5
                assert log[name] == pytest.approx(value, abs=1e-4, rel=tolerance), f"{name} at step {log['step']}"

    weights = expected.model.state_dict()
    moved = max((weights[name] - value).abs().max().item() for name, value in before.items())
    assert moved > 1e-3
    assert found.model.state_dict().keys() == weights.keys()
    for name, value in found.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-3 * moved, msg=name)


def test_a_pretrained_adapter_is_its_own_reference(make, policy_dir, tmp_path):
    """As in TRL: its copy, the adapter "ref", stands in for the reference model."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(policy_dir)
    adapter = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    get_peft_model(base, adapter).save_pretrained(tmp_path / "adapter")
    losses = []
    for trainer_class, dataset in ((DPOTrainer, PAIRS), (ListwiseDPOTrainer, as_rankings(PAIRS))):
        base = AutoModelForCausalLM.from_pretrained(policy_dir)
        model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
        trainer = make(trainer_class, dataset, model=model, max_steps=3, per_device_train_batch_size=2)
        losses.append(losses_of(trainer))
        assert "ref" in trainer.model.peft_config
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[0][0] == pytest.approx(0.693147, abs=1e-5)


def losses_of(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_pairs_are_rankings_of_two(make):
    given = {"max_steps": 2, "per_device_train_batch_size": 2}
    of_pairs, of_rankings = (make(ListwiseDPOTrainer, data, **given) for data in (PAIRS, as_rankings(PAIRS)))
    assert losses_of(of_pairs) == losses_of(of_rankings)


PRECOMPUTED = "`precompute_ref_log_probs`=True has no effect in .*: it works on pairs only, .* Leave it out"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *[({"beta": float(b)}, f"`beta` must be greater than 0 and finite, got {b}") for b in ("0.0", "inf", "nan")],
        ({"precompute_ref_log_probs": True}, PRECOMPUTED),
        ({"loss_type": "hinge"}, r"`loss_type` must be one of plackett-luce, lambda; got \['hinge'\]"),
        ({"label_smoothing": 0.1}, "`label_smoothing`=0.1 has no effect in ListwiseDPOConfig"),
    ],
)
def test_what_has_no_effect_is_refused(given, message, config):
    with pytest.raises(ValueError, match=message):
        config(ListwiseDPOTrainer.config_class, **given)
