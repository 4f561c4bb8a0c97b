import json
from types import SimpleNamespace

import pytest
import torch

from prefopt_trl.trainers.completions import ScoredCompletions
from prefopt_trl.trainers.rrhf_config import RRHFConfig
from prefopt_trl.trainers.rrhf_trainer import RRHFTrainer


def losses_by_hand(model, dataset, sft_weight):
    """Ranking term and supervised loss of each prompt (RSO section 1), on mean and on summed log-probabilities."""
    parts = []
    for row in dataset:
        ranked = model.ranked(row)
        ranking = torch.tensor(0.0, dtype=torch.float64)
        for worse_logps, worse in ranked:
            for better_logps, better in ranked:
                if worse < better:
                    ranking = ranking + torch.relu(worse_logps.mean() - better_logps.mean())
        parts.append((ranking, -sft_weight * ranked[0][0].sum()))
    return parts


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("sft_weight", [0.0, 1.0, 0.3])
def test_a_step_minimises_the_papers_equation(sft_weight, share_prefix, rankings, by_hand, one_step):
    parts = losses_by_hand(by_hand, rankings, sft_weight)
    assert [bool(ranking > 0) for ranking, _ in parts].count(False) >= 1  # of the prompt with equal rewards
    loss = sum(ranking + sft for ranking, sft in parts) / 7
    step = one_step(RRHFTrainer, rankings, share_prefix=share_prefix, sft_weight=sft_weight)
    step.assert_is(loss, by_hand.gradients(loss))
    assert step.num_rows == (7 if share_prefix else 35)
    assert step.log["loss/ranking"] == pytest.approx(sum(ranking for ranking, _ in parts).item() / 7, rel=1e-5)
    assert step.log["loss/sft"] == pytest.approx(sum(sft for _, sft in parts).item() / 7, rel=1e-5)


def test_the_default_weight_is_one(rankings, by_hand, one_step):
    parts = losses_by_hand(by_hand, rankings, sft_weight=1.0)
    assert one_step(RRHFTrainer, rankings).log["loss"] == pytest.approx(sum(map(sum, parts)).item() / 7, rel=1e-5)


def test_only_the_order_of_rewards_counts(rankings, one_step):
    scaled = rankings.map(lambda row: {"rewards": [100 * reward - 7 for reward in row["rewards"]]})
    assert one_step(RRHFTrainer, scaled).log["loss"] == one_step(RRHFTrainer, rankings).log["loss"]


def test_the_authors_numbers(shared_dir):
    cases = json.loads((shared_dir / "golden" / "rrhf.json").read_text())["cases"]
    assert [case["n"] for case in cases] == [2, 4]
    trainer = SimpleNamespace(args=RRHFConfig("unused", use_cpu=True, bf16=False))
    for case in cases:
        # Best first, as they come from the collator; completions of 4 tokens each
        best_first = sorted(range(case["n"]), key=lambda index: -case["rewards"][index])
        means = torch.tensor([[case["mean_logps"][index] for index in best_first]], dtype=torch.float64)
        rewards = torch.tensor([[case["rewards"][index] for index in best_first]], dtype=torch.float64)
        completions = ScoredCompletions(4 * means, torch.full_like(means, 4), torch.ones_like(means).bool(), rewards)
        loss, parts = RRHFTrainer.loss_per_prompt(trainer, completions)
        assert parts["ranking"].item() == pytest.approx(case["loss"], rel=1e-6)
        assert loss.item() == pytest.approx(case["loss"] - 4 * means[0, 0].item(), rel=1e-6)
