import math

import pytest
import torch
from scipy.stats import kendalltau

from prefopt_trl.trainers.completions import ScoredCompletions, by_prompt, columns_of_rows, ranking_metrics

RAGGED = torch.tensor([0, 0, 1, 1, 1, 2, 2])
PAIRS = torch.tensor([0, 1, 2, 0, 1, 2])  # chosen rows, then rejected rows


def completions(logps, rewards, mask=None, num_tokens=None, ref_logps=None):
    logps = torch.tensor(logps, dtype=torch.float64)
    mask = torch.ones_like(logps).bool() if mask is None else torch.tensor(mask)
    num_tokens = torch.ones_like(logps).long() if num_tokens is None else torch.tensor(num_tokens)
    return ScoredCompletions(logps, num_tokens, mask, torch.tensor(rewards), ref_logps)


def quotients(scores, of):
    metrics = ranking_metrics(torch.tensor(scores, dtype=torch.float64), of)
    return {name: (total / count).item() if count else math.nan for name, (total, count) in metrics.items()}


@pytest.mark.parametrize(
    ("group_ids", "columns"),
    [
        (RAGGED, [0, 1, 0, 1, 2, 0, 1]),
        (PAIRS, [0, 0, 0, 1, 1, 1]),
        (torch.tensor([1, 0, 1, 0, 0]), [0, 0, 1, 1, 2]),
        (torch.tensor([0]), [0]),
    ],
)
def test_a_row_stands_after_those_of_its_prompt(group_ids, columns):
    assert columns_of_rows(group_ids).tolist() == columns


def test_one_row_per_prompt():
    values = torch.arange(1.0, 8.0)
    assert by_prompt(values, RAGGED).tolist() == [[1, 2, 0], [3, 4, 5], [6, 7, 0]]
    assert by_prompt(values > 0, RAGGED).tolist() == [[True, True, False], [True] * 3, [True, True, False]]
    assert by_prompt(torch.arange(1, 7), PAIRS).tolist() == [[1, 4], [2, 5], [3, 6]]
    assert by_prompt(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 1])).dtype == torch.long


def test_the_gradient_reaches_every_row():
    values = torch.arange(1.0, 8.0, requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 100.0], [3.0, 4.0, 5.0], [6.0, 7.0, 100.0]])
    (by_prompt(values, RAGGED) * weights).sum().backward()
    assert values.grad.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_means_are_over_tokens_and_log_ratios_are_not():
    given = {"num_tokens": [[3, 2, 0]], "ref_logps": torch.tensor([[-5.0, -4.0, 0.0]])}
    scored = completions([[-6.0, -3.0, 0.0]], [[2.0, 1.0, 0.0]], mask=[[True, True, False]], **given)
    assert scored.mean_logps.tolist() == [[-2.0, -1.5, 0.0]]
    assert scored.logratios.tolist() == [[-1.0, 1.0, 0.0]]


def test_metrics_of_a_pair():
    right, wrong = (quotients([scores], completions([[-4.0, -6.0]], [[1.0, 0.0]])) for scores in ([2, 0.5], [0.5, 2]))
    rewards = {"rewards/chosen": 2.0, "rewards/rejected": 0.5, "rewards/accuracies": 1.0, "rewards/margins": 1.5}
    orders = {"ranking/kendall_tau": 1.0, "ranking/top1": 1.0}
    assert right == {**rewards, **orders, "logps/chosen": -4.0, "logps/rejected": -6.0}
    assert (wrong["rewards/accuracies"], wrong["ranking/kendall_tau"], wrong["ranking/top1"]) == (0.0, -1.0, 0.0)


def test_metrics_of_ragged_rankings_with_ties():
    nothing = 1e9  # a missing column may hold anything
    scored = completions(
        [[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, nothing, nothing], [-7.0, -8.0, -9.0, nothing]],
        [[3.0, 1.0, 1.0, 0.0], [2.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.0]],
        mask=[[True] * 4, [True, True, False, False], [True, True, True, False]],
    )
    found = quotients([[2.0, 3.0, 1.0, 0.0], [1.0, 4.0, nothing, nothing], [1.0, 2.0, 6.0, nothing]], scored)
    # The first prompt has 5 pairs with different rewards: (0, 1) is the one the scores order otherwise. The second has
    # one, ordered otherwise. The third has none, and counts for neither tau nor top1.
    assert found["rewards/accuracies"] == pytest.approx(4 / 6)
    assert found["ranking/kendall_tau"] == pytest.approx((3 / 5 - 1) / 2)
    assert found["ranking/top1"] == 0.0
    assert found["rewards/chosen"] == pytest.approx((2 + 1 + 1) / 3)
    assert found["rewards/rejected"] == pytest.approx((4 / 3 + 4 + 8 / 2) / 3)
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"])
    assert found["logps/chosen"] == pytest.approx(-13 / 3)
    assert found["logps/rejected"] == pytest.approx((-3 - 6 - 17 / 2) / 3)


@pytest.mark.parametrize(
    ("scores", "top1"),
    [
        ([1.0, 2.0, 0.0], 1.0),  # the second of two best ones
        ([2.0, 0.0, 1.0], 1.0),
        ([0.0, 1.0, 2.0], 0.0),
        ([2.0, 0.0, 2.0], 0.0),  # level with a worse one
    ],
)
def test_any_of_the_best_may_be_on_top(scores, top1):
    assert quotients([scores], completions([[0.0] * 3], [[1.0, 1.0, 0.0]]))["ranking/top1"] == top1


def test_equal_scores_are_ordered_neither_way():
    found = quotients([[1.0, 1.0, 0.0]], completions([[0.0] * 3], [[2.0, 1.0, 0.0]]))
    assert found["rewards/accuracies"] == pytest.approx(2 / 3)
    assert found["ranking/kendall_tau"] == pytest.approx(2 / 3)


def test_a_batch_of_equal_rewards_has_no_order():
    metrics = ranking_metrics(torch.tensor([[1.0, 2.0]]), completions([[0.0, 0.0]], [[1.0, 1.0]]))
    for name in ("rewards/accuracies", "ranking/kendall_tau", "ranking/top1"):
        assert [part.item() for part in metrics[name]] == [0, 0], name


def test_tau_is_scipys_where_nothing_is_tied():
    generator = torch.Generator().manual_seed(0)
    for n in range(2, 9):
        scores = torch.randn(1, n, generator=generator, dtype=torch.float64)
        rewards = torch.randn(1, n, generator=generator).sort(descending=True).values
        found = quotients(scores.tolist(), completions([[0.0] * n], rewards.tolist()))
        assert found["ranking/kendall_tau"] == pytest.approx(kendalltau(scores[0], rewards[0]).statistic)
        assert found["rewards/accuracies"] == pytest.approx((1 + found["ranking/kendall_tau"]) / 2)


def test_batches_add_up():
    """Sums and counts of two batches are those of the batch of both."""
    scores = torch.tensor([[1.0, 2.0, 0.5], [2.0, 1.0, 0.0], [3.0, 4.0, 0.0]])
    logps, rewards = -scores - 1, [[2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
    both = ranking_metrics(scores, completions(logps.tolist(), rewards))
    halves = slice(0, 1), slice(1, 3)
    parts = [ranking_metrics(scores[rows], completions(logps[rows].tolist(), rewards[rows])) for rows in halves]
    for name, pair in both.items():
        for place, value in enumerate(pair):
            assert value.item() == pytest.approx(sum(part[name][place].item() for part in parts)), name
