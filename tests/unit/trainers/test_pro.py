import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from scipy.stats import kendalltau

from prefopt_trl.trainers.completions import ScoredCompletions
from prefopt_trl.trainers.pro_config import PROConfig
from prefopt_trl.trainers.pro_trainer import PROTrainer


def ranking_terms(means, rewards):
    """The terms of PRO eq. 9-11 of one prompt, best first; of eq. 8 for `rewards=None`."""
    terms = []
    for k in range(len(means) - 1):
        worse = range(k + 1, len(means))
        inverse = {i: 1.0 if rewards is None else rewards[k] - rewards[i] for i in worse}  # 1 / T_k^i
        inverse[k] = max(inverse.values())
        denominator = sum(torch.exp(means[i] * factor) for i, factor in inverse.items())
        terms.append(-torch.log(torch.exp(means[k] * inverse[k]) / denominator))
    return terms


def losses_by_hand(model, dataset, reward_temperature="dynamic", sft_weight=0.05, first_term_only=False):
    """Terms and supervised loss of each prompt."""
    parts = []
    for row in dataset:
        ranked = model.ranked(row)
        rewards = [reward for _, reward in ranked] if reward_temperature == "dynamic" else None
        terms = ranking_terms([logps.mean() for logps, _ in ranked], rewards)
        sft = -sft_weight * (len(ranked) - 1) ** 2 * ranked[0][0].sum()
        parts.append((terms[:1] if first_term_only else terms, sft))
    return parts


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reward_temperature": "none"},
        {"sft_weight": 0.0},
        {"first_term_only": True},
        {"first_term_only": True, "reward_temperature": "none", "sft_weight": 0.0},
    ],
    ids=str,
)
def test_a_step_minimises_the_papers_equation(settings, share_prefix, rankings, by_hand, one_step):
    parts = losses_by_hand(by_hand, rankings, **settings)
    loss = sum(sum(terms) + sft for terms, sft in parts) / 7
    step = one_step(PROTrainer, rankings, share_prefix=share_prefix, **settings)
    step.assert_is(loss, by_hand.gradients(loss))
    assert step.num_rows == (7 if share_prefix else 35)
    assert step.log["loss/ranking"] == pytest.approx(sum(sum(terms) for terms, _ in parts).item() / 7, rel=1e-5)
    assert step.log["loss/ranking_first"] == pytest.approx(sum(terms[0] for terms, _ in parts).item() / 7, rel=1e-5)
    assert step.log["loss/sft"] == pytest.approx(sum(sft for _, sft in parts).item() / 7, rel=1e-5)


def test_the_ablations_differ(rankings, by_hand):
    """So that the steps above could not pass with one another's equations."""
    values = [
        sum(sum(terms) + sft for terms, sft in losses_by_hand(by_hand, rankings, **settings)).item()
        for settings in ({}, {"reward_temperature": "none"}, {"sft_weight": 0.0}, {"first_term_only": True})
    ]
    assert all(abs(one - other) > 0.1 for index, one in enumerate(values) for other in values[:index])


def test_every_metric_by_hand(rankings, by_hand, one_step):
    log = one_step(PROTrainer, rankings).log
    scores, logps, tau, top1, alike, pairs, tokens = [], [], [], [], 0, 0, 0
    best_tokens, other_tokens, is_top1 = [], [], []
    with torch.no_grad():
        for row in rankings:
            ranked = by_hand.ranked(row)
            tokens += sum(
                len(by_hand.tokenizer(row["prompt"])["input_ids"]) + len(token_logps) for token_logps, _ in ranked
            )
            logits = by_hand.logits[-len(ranked) :]
            best_tokens.append(logits[0].mean(-1))
            other_tokens += [of_completion.mean(-1) for of_completion in logits[1:]]
            is_top1.append(logits[0].log_softmax(-1).amax(-1) == ranked[0][0])
            means, sums = ([float(f(token_logps)) for token_logps, _ in ranked] for f in (torch.mean, torch.sum))
            rewards = [reward for _, reward in ranked]
            scores.append(means)
            logps.append(sums)
            signs = [
                math.copysign(1, means[i] - means[j])
                for i in range(len(means))
                for j in range(len(means))
                if rewards[i] > rewards[j]
            ]
            alike, pairs = alike + signs.count(1), pairs + len(signs)
            if signs:
                tau.append(sum(signs) / len(signs))
                top1.append(rewards[means.index(max(means))] == rewards[0])
            if len(set(rewards)) == len(rewards):
                assert tau[-1] == pytest.approx(kendalltau(means, rewards).statistic)

    def mean(values):
        return sum(values) / len(values)

    assert len(tau) == 6 and 0 < mean(top1) < 1  # one prompt has equal rewards only
    probabilities = [logits.softmax(-1) for logits in by_hand.logits]
    entropy = torch.cat([-(p * p.log()).sum(-1) for p in probabilities]).mean()
    expected = {
        "rewards/chosen": mean([row[0] for row in scores]),
        "rewards/rejected": mean([mean(row[1:]) for row in scores]),
        "rewards/margins": mean([row[0] - mean(row[1:]) for row in scores]),
        "rewards/accuracies": alike / pairs,
        "ranking/kendall_tau": mean(tau),
        "ranking/top1": mean(top1),
        "logps/chosen": mean([row[0] for row in logps]),
        "logps/rejected": mean([mean(row[1:]) for row in logps]),
        "logits/chosen": torch.cat(best_tokens).mean().item(),
        "logits/rejected": torch.cat(other_tokens).mean().item(),
        "mean_token_accuracy": torch.cat(is_top1).double().mean().item(),
        "entropy": entropy.item(),
        "num_tokens": tokens,
    }
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def loss_of(completions, **given):
    """The trainer's loss on completions that are already scored."""
    args = PROConfig("unused", use_cpu=True, bf16=False, **given)
    return PROTrainer.loss_per_prompt(SimpleNamespace(args=args), completions)


def test_the_authors_numbers(shared_dir):
    cases = json.loads((shared_dir / "golden" / "pro.json").read_text())["cases"]
    assert [(case["B"], case["n"]) for case in cases] == [(1, 2), (2, 3), (2, 5)]
    for case in cases:
        logps, rewards = (torch.tensor(case[name], dtype=torch.float64) for name in ("sum_logps", "rewards"))
        completions = ScoredCompletions(
            logps, torch.tensor(case["token_counts"]), torch.ones_like(logps, dtype=torch.bool), rewards
        )
        losses, parts = loss_of(completions, sft_weight=case["sft_weight"])
        # The authors add 1e-10 inside the logarithm
        assert losses.mean().item() == pytest.approx(case["total"], rel=1e-6)
        assert parts["ranking"].mean().item() == pytest.approx(sum(case["rank_losses"]), rel=1e-6)
        assert parts["ranking_first"].mean().item() == pytest.approx(case["rank_losses"][0], rel=1e-6)
        assert parts["sft"].mean().item() == pytest.approx(case["sft_loss"], rel=1e-6)


def test_two_completions_are_bradley_terry_on_mean_log_probabilities(by_hand, one_step):
    """PRO section 3.1: with two completions the ranking term is -log sigmoid(p_1 - p_2)."""
    pairs = Dataset.from_dict(
        {
            "prompt": ["The capital of France is", "Why?", "Mix"],
            "chosen": [" Paris.", " Because.", " the flour"],
            "rejected": [" blue", " I will not say, whatever", " no"],
        }
    )
    losses = []
    for row in pairs:
        chosen, rejected = (by_hand.logps(row["prompt"], row[name]).mean() for name in ("chosen", "rejected"))
        losses.append(-torch.log(1 / (1 + torch.exp(rejected - chosen))))
    loss = sum(losses) / 3
    step = one_step(PROTrainer, pairs, reward_temperature="none", sft_weight=0.0)
    step.assert_is(loss, by_hand.gradients(loss))
    # A pair has the rewards 1 and 0, whose dynamic temperatures are 1
    dynamic = one_step(PROTrainer, pairs, sft_weight=0.0)
    assert dynamic.log["loss"] == pytest.approx(step.log["loss"], abs=1e-6)


def test_the_order_of_the_data_is_free(rankings, one_step):
    def turned(row):
        return {"completions": row["completions"][::-1], "rewards": row["rewards"][::-1]}

    untied = Dataset.from_list([row for row in rankings if len(set(row["rewards"])) == len(row["rewards"])])
    given, other = (one_step(PROTrainer, dataset) for dataset in (untied, untied.map(turned)))
    assert len(untied) == 3 and other.log["loss"] == given.log["loss"]


def test_accumulated_batches_are_averaged(rankings, by_hand, one_step):
    two = rankings.select([1, 5])
    losses = [sum(terms) + sft for terms, sft in losses_by_hand(by_hand, two)]
    loss = sum(losses) / 2
    step = one_step(PROTrainer, two, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    step.assert_is(loss, by_hand.gradients(loss))
    assert abs(losses[0] - losses[1]) > 1


def test_evaluation_logs_the_same_metrics(rankings, make):
    trainer = make(
        PROTrainer,
        rankings,
        eval_dataset=rankings,
        per_device_eval_batch_size=7,
        eval_strategy="steps",
        eval_steps=1,
        learning_rate=0.0,
    )
    trainer.train()
    trained, evaluated = trainer.state.log_history[:2]
    names = {name for name in trained if "/" in name} | {"loss", "entropy", "mean_token_accuracy", "num_tokens"}
    assert {"loss/ranking", "loss/ranking_first", "loss/sft", "ranking/kendall_tau", "ranking/top1"} < names
    assert {name: evaluated[f"eval_{name}"] for name in names} == pytest.approx(
        {name: trained[name] for name in names}
    )


def test_compute_metrics_gets_the_logits(rankings, make, by_hand):
    received = []

    def compute_metrics(prediction):
        received.append(prediction)
        return {"answer": 42.0}

    row = rankings.select([4])
    trainer = make(PROTrainer, row, eval_dataset=row, compute_metrics=compute_metrics, per_device_eval_batch_size=1)
    assert trainer.evaluate()["eval_answer"] == 42.0
    ids, logits = received[0].label_ids, received[0].predictions
    with torch.no_grad():
        expected = by_hand.model(torch.from_numpy(ids)).logits
    assert logits.shape == (6, ids.shape[1], 300)
    torch.testing.assert_close(torch.from_numpy(logits)[:, :4].double(), expected[:, :4], rtol=1e-3, atol=1e-4)


def test_compute_metrics_gets_every_completion_of_the_last_batch(rankings, make):
    received = []

    def compute_metrics(prediction):
        received.append(prediction)
        return {}

    data = rankings.select([1, 2, 1])  # of 3, 4 and 3 completions
    trainer = make(PROTrainer, data, eval_dataset=data, compute_metrics=compute_metrics, per_device_eval_batch_size=2)
    trainer.evaluate()
    assert len(received[0].predictions) == len(received[0].label_ids) == 10
