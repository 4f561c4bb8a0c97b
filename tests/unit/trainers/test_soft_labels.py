"""Losses on pairs that know how sure the ranker is: `soft_labels` and `margin_weight`."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from prefopt_trl import FunctionRanker, PROConfig, RSOConfig, RSOTrainer, SLiCConfig, SLiCTrainer, losses

PAIRS = Dataset.from_dict(
    {
        "prompt": ["The capital of France is", "Tell me how to bake bread.", "Why?", "The dog"],
        "chosen": [" Paris.", " Mix the flour and the water, then wait.", " Because it is so.", " sleeps"],
        "rejected": [" the quick brown fox.", " No.", " I will not say, whatever you ask.", " jumps over the fox"],
        "reference": [" It is Paris.", " Mix, then wait for it.", " Who knows?", " sleeps on"],
        "label_probability": [0.5, 0.6, 0.9, 1.0],
        "chosen_reward": [2.0, 0.5, 1.0, -1.0],
        "rejected_reward": [1.5, 0.75, -3.0, -2.0],  # the second contradicts its label
    }
)
GAMMA, ALPHA = 0.1, 0.5
options = pytest.mark.parametrize("option", [{"soft_labels": True}, {"margin_weight": ALPHA}], ids=["soft", "margin"])
PROMPTS = Dataset.from_dict({"prompt": ["The capital of", "Tell me how", "The quick brown", "What is"]})
ONLINE = {"sampling": "online", "num_candidates": 6, "num_samples": 4, "max_new_tokens": 5}


def checksum(prompts, completions, **kwargs):
    return [sum(completion.strip().encode()) % 11 / 4 for completion in completions]


def loss_log(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("share_prefix", [True, False])
@options
@pytest.mark.parametrize("method", ["sigmoid-norm", "hinge-norm", "slic", "slic with a target"])
def test_a_step_minimises_the_equation(method, option, share_prefix, by_hand, one_step, tiny_llama_dir):
    reference = type(by_hand)(tiny_llama_dir)
    loss_of = {"sigmoid-norm": lambda x: (1 + (-x).exp()).log(), "hinge-norm": lambda x: torch.relu(1 - x)}
    terms, rewards = [], []
    for row in PAIRS:
        prompt, columns = row["prompt"], ("chosen", "rejected", "reference")
        chosen, rejected, target = (by_hand.logps(prompt, row[column]).sum() for column in columns)
        if not method.startswith("slic"):
            chosen = GAMMA * (chosen - reference.logps(prompt, row["chosen"]).sum().detach())
            rejected = GAMMA * (rejected - reference.logps(prompt, row["rejected"]).sum().detach())
        rewards.append((chosen.item(), rejected.item()))
        p = row["label_probability"] if "soft_labels" in option else 1.0
        x = chosen - rejected
        if "margin_weight" in option:
            x = x - ALPHA * (row["chosen_reward"] - row["rejected_reward"])
        loss = loss_of.get(method, lambda x: torch.relu(5 - x))
        terms.append(p * loss(x) + (1 - p) * loss(-x) - (0.5 * target if "target" in method else 0.0))
    loss = sum(terms) / 4
    if method.startswith("slic"):
        target = {"target_column": "reference", "regularization_weight": 0.5} if "target" in method else {}
        step = one_step(SLiCTrainer, PAIRS, delta=5.0, share_prefix=share_prefix, **target, **option)
        assert step.log["loss/calibration"] + step.log["loss/regularization"] == pytest.approx(loss.item(), rel=1e-5)
    else:
        given = {"ref_model": AutoModelForCausalLM.from_pretrained(tiny_llama_dir), "gamma": GAMMA, **option}
        step = one_step(RSOTrainer, PAIRS, loss_type=method, share_prefix=share_prefix, **given)
    step.assert_is(loss, by_hand.gradients(loss))
    for column, name in enumerate(("chosen", "rejected")):  # the policy's own rewards, without the margin
        mean = sum(pair[column] for pair in rewards) / 4
        assert step.log[f"rewards/{name}"] == pytest.approx(mean, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("precompute", [False, True], ids=["computed", "precomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_with_certain_labels_it_is_trls_own_path(lora, precompute, make):
    """Step for step, with TRL's metrics, in evaluation too."""
    certain = PAIRS.remove_columns("label_probability").add_column("label_probability", [1.0] * 4)
    logs = []
    for soft_labels in (False, True):
        torch.manual_seed(0)  # of the adapter's weights
        peft = {"peft_config": LoraConfig(target_modules=["q_proj"], init_lora_weights=False)} if lora else {}
        given = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "gamma": GAMMA, **peft}
        given |= {"eval_strategy": "steps", "eval_steps": 3, "precompute_ref_log_probs": precompute}
        trainer = make(RSOTrainer, certain, eval_dataset=certain, soft_labels=soft_labels, **given)
        assert trainer.evaluate(certain)["eval_loss"] > 0.1  # other data than `eval_dataset`
        trainer.train()
        logs.append(trainer.state.log_history)
    names = [set(log) & set(other) for log, other in zip(*logs, strict=True)]
    assert {"loss", "rewards/margins", "logits/chosen", "entropy", "mean_token_accuracy", "num_tokens"} < names[0]
    assert {"eval_loss", "eval_rewards/accuracies", "eval_logps/rejected"} < set.union(*names)
    for log, other, shared in zip(*logs, names, strict=True):
        compared = [name for name in shared if not name.endswith(("time", "per_second", "flos"))]
        assert [other[name] for name in compared] == pytest.approx([log[name] for name in compared], 2e-3, abs=1e-4)


@pytest.mark.parametrize(("loss_type", "p"), [("aot_unpaired", 0.8), ("robust", 0.8 / 0.6)])
def test_trls_conservative_and_robust_losses(loss_type, p, one_step, policy):
    """With batches of one pair TRL's "aot_unpaired" is conservative DPO; "robust" is the same for a p above 1."""
    log = one_step(RSOTrainer, PAIRS.select([2]), loss_type=loss_type, label_smoothing=0.2, ref_model=policy).log
    scores = torch.tensor([[log["rewards/chosen"], log["rewards/rejected"]]])
    expected = losses.with_labels(lambda pairs: losses.sigmoid_norm(pairs, gamma=1), scores, torch.tensor([p]))
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-4)


@options
def test_sampled_pairs_and_their_log_probabilities(option, make, tmp_path):
    given = {"num_candidates": 6, "num_samples": 4, "max_new_tokens": 5, "max_steps": 3, "learning_rate": 1e-2}
    given |= {"ranker": FunctionRanker(checksum), "per_device_train_batch_size": 2, **option}
    changes = ({}, {"reference_logps": "sampled"}, {"soft_labels": False, "margin_weight": 0.0})
    computed, sampled, hard = (
        loss_log(make(RSOTrainer, PROMPTS, output_dir=tmp_path / str(len(change)), **{**given, **change}))
        for change in changes
    )
    assert sampled == pytest.approx(computed, rel=1e-4)
    assert hard[-1] != pytest.approx(computed[-1], rel=1e-3)


@pytest.mark.parametrize("trainer_class", [RSOTrainer, SLiCTrainer])
def test_online_batches_have_the_rankers_opinion(trainer_class, make):
    batches = []
    for option in ({"soft_labels": True}, {"margin_weight": ALPHA}):
        trainer = make(trainer_class, PROMPTS, ranker=FunctionRanker(checksum), **ONLINE, **option)
        batches.append(trainer.data_collator([{"prompt": prompt} for prompt in PROMPTS["prompt"]]))
        assert loss_log(trainer)[0] > 0.1
    soft, hard = batches
    texts = [
        trainer.processing_class.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(hard["input_ids"], hard["completion_mask"], strict=True)
    ]
    rewards = torch.tensor(checksum(None, texts)).view(2, -1)
    torch.testing.assert_close(hard["margins"], ALPHA * (rewards[0] - rewards[1]))
    torch.testing.assert_close(soft["label_probabilities"].logit(), rewards[0] - rewards[1])
    assert (hard["margins"] > 0).any()


def test_a_resumed_run_needs_the_same_labels(make):
    other = PAIRS.remove_columns("label_probability").add_column("label_probability", [0.7] * 4)
    for soft_labels in (False, True):
        settings = [make(RSOTrainer, rows, soft_labels=soft_labels)._settings() for rows in (PAIRS, other)]
        assert (settings[0] != settings[1]) == soft_labels and settings[0]["soft_labels"] == soft_labels


@pytest.mark.parametrize(
    ("option", "change", "message"),
    [
        ({"soft_labels": True}, {"label_probability": None}, "train dataset has no column 'label_probability'"),
        ({"margin_weight": 1.0}, {"rejected_reward": None}, "no column 'rejected_reward'.*`margin_weight` reads"),
        ({"soft_labels": True}, {"label_probability": [1.0, 0.5, 97.0, 1.0]}, "`label_probability` of row 2 of .* 97"),
        ({"margin_weight": 1.0}, {"chosen_reward": [1.0, None, 1.0, 1.0]}, "`chosen_reward` of row 1 .* is nan"),
    ],
)
def test_what_the_pairs_lack_is_named(option, change, message, make):
    rows = PAIRS
    for column, values in change.items():
        rows = rows.remove_columns(column)
        rows = rows if values is None else rows.add_column(column, values)
    with pytest.raises(ValueError, match=message):
        make(RSOTrainer, rows, **option)


@pytest.mark.parametrize(
    ("config_class", "given", "message"),
    [
        (RSOConfig, {"soft_labels": True, "margin_weight": 1.0}, "would count the rewards twice. Set one"),
        (RSOConfig, {"margin_weight": -1.0}, "`margin_weight` must be at least 0"),
        (RSOConfig, {"soft_labels": True, "loss_type": "ipo"}, r"need 'sigmoid-norm' or 'hinge-norm', not \['ipo'\]"),
        (RSOConfig, {"soft_labels": True, "label_smoothing": 0.1}, "`label_smoothing`=0.1 has no effect"),
        (SLiCConfig, {"soft_labels": True, "loss_type": "unlikelihood"}, "need `loss_type='slic'`"),
        (
            PROConfig,
            {"margin_weight": 1.0},
            "`margin_weight`=1.0 has no effect in PROConfig",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(config_class, given, message, config):
    with pytest.raises(ValueError, match=message):
        config(config_class, **given)
