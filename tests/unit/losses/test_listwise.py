import itertools
import math

import pytest
import torch

from prefopt_trl.losses import lipo_lambda, plackett_luce, pro, pro_terms, rrhf, sigmoid_norm, slic

sizes = pytest.mark.parametrize("n", range(2, 9))


def naive_plackett_luce(logratios, beta):
    """DPO eq. 20 on a list of floats."""
    likelihood = 1.0
    for k in range(len(logratios)):
        likelihood *= math.exp(beta * logratios[k]) / sum(math.exp(beta * x) for x in logratios[k:])
    return -math.log(likelihood)


def naive_pro(scores, rewards):
    """PRO eq. 9-11 on lists of floats, dividing by temperatures as printed; the rewards must differ."""
    loss = 0.0
    for k in range(len(scores) - 1):
        temperatures = {i: 1 / (rewards[k] - rewards[i]) for i in range(k + 1, len(scores))}
        temperatures[k] = min(temperatures.values())
        numerator = math.exp(scores[k] / temperatures[k])
        loss -= math.log(numerator / sum(math.exp(scores[i] / t) for i, t in temperatures.items()))
    return loss


def naive_rrhf(scores, rewards):
    """RSO section 1 on lists of floats."""
    loss = 0.0
    for score_i, reward_i in zip(scores, rewards, strict=True):
        for score_j, reward_j in zip(scores, rewards, strict=True):
            if reward_i < reward_j:
                loss += max(0.0, score_i - score_j)
    return loss


def naive_lipo_lambda(logratios, rewards, beta):
    """LiPO's lambda loss on lists of floats."""
    scores = [beta * logratio for logratio in logratios]
    ranks = [1 + sum(other > score for other in scores) for score in scores]
    loss = 0.0
    for i, j in itertools.permutations(range(len(scores)), 2):
        if rewards[i] > rewards[j]:
            gain = abs((2 ** rewards[i] - 1) - (2 ** rewards[j] - 1))
            discount = abs(1 / math.log(1 + ranks[i]) - 1 / math.log(1 + ranks[j]))
            loss += gain * discount * math.log(1 + math.exp(scores[j] - scores[i]))
    return loss


# (the loss on scores, rewards and mask; the same on two lists of floats)
LOSSES = {
    "plackett_luce": (
        lambda scores, rewards, mask=None: plackett_luce(scores, 0.3, mask),
        lambda scores, _: naive_plackett_luce(scores, 0.3),
    ),
    "pro": (lambda scores, _, mask=None: pro(scores, mask=mask), lambda scores, _: naive_plackett_luce(scores, 1.0)),
    "pro with rewards": (pro, naive_pro),
    "rrhf": (rrhf, naive_rrhf),
    "lipo_lambda": (
        lambda scores, rewards, mask=None: lipo_lambda(scores, rewards, 0.3, mask),
        lambda scores, rewards: naive_lipo_lambda(scores, rewards, 0.3),
    ),
}
all_losses = pytest.mark.parametrize(("loss", "naive"), LOSSES.values(), ids=LOSSES)


def random_rankings(batch_size, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(batch_size, n, generator=generator, dtype=torch.float64)
    rewards = torch.randn(batch_size, n, generator=generator, dtype=torch.float64).sort(descending=True).values
    return scores, rewards


def random_mask(batch_size, n, seed=1):
    """Completions missing anywhere; the last four rows have all of them, two, one and none."""
    mask = torch.rand(batch_size, n, generator=torch.Generator().manual_seed(seed)) < 0.7
    for row, kept in zip(range(-4, 0), (n, 2, 1, 0), strict=True):
        mask[row] = torch.arange(n) < kept
    return mask


@all_losses
@sizes
@pytest.mark.parametrize("batch_size", [1, 32])
def test_matches_the_printed_equation(loss, naive, n, batch_size):
    scores, rewards = random_rankings(batch_size, n, seed=n)
    expected = [naive(*row) for row in zip(scores.tolist(), rewards.tolist(), strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64)

    torch.testing.assert_close(loss(scores, rewards), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss(scores.float(), rewards.float()), expected.float(), rtol=1e-4, atol=1e-5)


@all_losses
@sizes
def test_masking_equals_dropping_the_column(loss, naive, n):
    scores, rewards = random_rankings(24, n)
    mask = random_mask(24, n)
    scores.requires_grad_()
    values = loss(scores, rewards, mask)
    (gradient,) = torch.autograd.grad(values.sum(), scores)

    for row in range(24):
        kept = mask[row]
        if kept.sum() < 2:
            assert values[row] == 0
            assert (gradient[row] == 0).all()
            continue
        shorter = scores[row : row + 1, kept].detach().requires_grad_()
        expected = loss(shorter, rewards[row : row + 1, kept])
        torch.testing.assert_close(values[row : row + 1], expected)
        torch.testing.assert_close(gradient[row, kept], torch.autograd.grad(expected, shorter)[0][0])
        assert (gradient[row, ~kept] == 0).all()


@all_losses
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_what_a_missing_column_holds_does_not_matter(loss, naive, junk):
    clean_scores, clean_rewards = random_rankings(12, 5)
    mask = random_mask(12, 5)
    scores = clean_scores.masked_fill(~mask, junk).requires_grad_()
    rewards = clean_rewards.masked_fill(~mask, junk)
    clean_scores.requires_grad_()
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way back either, for those who hunt one with this
        values, expected = loss(scores, rewards, mask), loss(clean_scores, clean_rewards, mask)
        values.sum().backward()
    expected.sum().backward()

    assert torch.equal(values, expected)
    assert torch.equal(scores.grad, clean_scores.grad)


@all_losses
def test_gradient(loss, naive):
    scores, rewards = random_rankings(8, 4)  # no two scores lie within gradcheck's step of each other, RRHF's kink
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, rewards), (scores,))
    assert torch.autograd.gradcheck(lambda x: loss(x, rewards, random_mask(8, 4)), (scores,))


@all_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, naive, dtype):
    scores, rewards = (x.to(dtype) for x in random_rankings(8, 4))
    scores.requires_grad_()
    values = loss(scores, rewards)
    values.sum().backward()

    assert values.dtype == torch.float32
    assert torch.equal(values, loss(scores.float(), rewards.float()))
    assert scores.grad.dtype == dtype


@all_losses
def test_the_scores_decide_the_dtype(loss, naive):
    scores, rewards = random_rankings(2, 3)
    assert loss(scores, rewards.float()).dtype == torch.float64
    assert loss(scores.float(), rewards).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails(dtype):
    scores = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]], dtype=dtype, requires_grad=True)
    rewards = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]], dtype=dtype)
    # ranked right: nothing is left; ranked wrong: each completion is behind the last one by the difference
    for values, expected in [
        (plackett_luce(scores, beta=1.0), [0.0, 2e4 + 1e4]),
        (pro(scores), [0.0, 2e4 + 1e4]),
        # k = 1: 2 p_1 = -2e4 against p_2 = 0 and 2 p_3 = 2e4; k = 2: p_2 = 0 against p_3 = 1e4
        (pro(scores, rewards), [0.0, 4e4 + 1e4]),
        (rrhf(scores, rewards), [0.0, 1e4 + 2e4 + 1e4]),
    ]:
        (gradient,) = torch.autograd.grad(values.sum(), scores)
        assert values.tolist() == expected
        assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", [lambda x: plackett_luce(x, beta=1.0), pro])
def test_small_losses_keep_their_digits(loss):
    # log(1 + exp(-30)) = exp(-30) to 13 digits: far below float32's spacing around 1, and must not be rounded to 0
    scores = torch.tensor([[35.0, 5.0], [35.0, 0.0]])
    torch.testing.assert_close(loss(scores), torch.tensor([math.exp(-30), math.exp(-35)]), rtol=1e-5, atol=0)


def test_plackett_luce_by_hand():
    # weights 3, 2, 1 in this order: 3/6 * 2/3 * 1/1 = 1/3
    logratios = torch.tensor([[math.log(3), math.log(2), math.log(1)]])
    torch.testing.assert_close(plackett_luce(logratios, beta=1.0), torch.tensor([math.log(3)]))
    # beta = 2 squares them to 9, 4, 1: 9/14 * 4/5
    torch.testing.assert_close(plackett_luce(logratios, beta=2.0), torch.tensor([math.log(70 / 36)]))


@sizes
def test_plackett_luce_policy_equal_to_reference(n):
    # every one of the n! orders is as likely as any other
    values = plackett_luce(torch.zeros(2, n, dtype=torch.float64), beta=0.1)
    torch.testing.assert_close(values, torch.full_like(values, math.log(math.factorial(n))))


def test_plackett_luce_is_a_distribution_over_orders():
    logratios = random_rankings(1, 4)[0][0]
    orders = torch.stack([logratios[list(order)] for order in itertools.permutations(range(4))])
    torch.testing.assert_close(plackett_luce(orders, beta=0.7).neg().exp().sum().item(), 1.0)


def test_two_completions():
    scores, rewards = random_rankings(64, 2)
    chosen, rejected = scores.unbind(dim=1)
    torch.testing.assert_close(plackett_luce(scores, beta=0.3), sigmoid_norm(scores, gamma=0.3))
    # Bradley-Terry on the mean log-probabilities; with rewards, its logit is scaled by their difference
    torch.testing.assert_close(pro(scores), -torch.nn.functional.logsigmoid(chosen - rejected))
    logits = (rewards[:, 0] - rewards[:, 1]) * (chosen - rejected)
    torch.testing.assert_close(pro(scores, rewards), -torch.nn.functional.logsigmoid(logits))
    torch.testing.assert_close(rrhf(scores, rewards), slic(scores, delta=0.0))


@sizes
def test_pro_all_rewards_equal(n):
    # no completion is better than another: every order is as likely, and nothing is learnt
    scores, _ = random_rankings(4, n)
    scores.requires_grad_()
    values = pro(scores, torch.full_like(scores, 0.25))
    values.sum().backward()

    torch.testing.assert_close(values, torch.full_like(values, math.log(math.factorial(n))))
    assert (scores.grad == 0).all()


def test_pro_some_rewards_equal():
    scores = torch.tensor([[-1.0, -2.0, -3.0]], dtype=torch.float64)
    # k = 1: both differences 2: exponents -2, -4, -6; k = 2: difference 0: exponents 0, 0
    expected = math.log(1 + math.exp(-2) + math.exp(-4)) + math.log(2)
    tied = pro(scores, torch.tensor([[1.0, -1.0, -1.0]], dtype=torch.float64))
    torch.testing.assert_close(tied.item(), expected)
    # and it is the limit of the printed equation as the tie is approached
    torch.testing.assert_close(naive_pro(scores[0].tolist(), [1.0, -1.0, -1.0 - 1e-9]), expected, rtol=1e-7, atol=0)


def test_pro_depends_on_reward_differences_only_and_takes_integers():
    scores, rewards = random_rankings(16, 4)
    torch.testing.assert_close(pro(scores, rewards + 7), pro(scores, rewards))
    scores, _ = random_rankings(1, 3)
    expected = pro(scores, torch.tensor([[5.0, 3.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(pro(scores, torch.tensor([[5, 3, 2]])), expected)


def test_rrhf_by_hand():
    # better first: 0.2 (best), then the tied -0.5 and 0.4, then 0.3 (worst)
    mean_logps = torch.tensor([[0.3, -0.5, 0.2, 0.4]], dtype=torch.float64)
    rewards = torch.tensor([[-1.0, 0.0, 3.0, 0.0]], dtype=torch.float64)
    # worst over: best 0.1, tied 0.8 and 0; tied over best: 0 and 0.2; the tied pair is not compared
    torch.testing.assert_close(rrhf(mean_logps, rewards).item(), 0.1 + 0.8 + 0.2)


@sizes
def test_rrhf_takes_columns_in_any_order(n):
    scores, rewards = random_rankings(16, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(rrhf(scores[:, order], rewards[:, order]), rrhf(scores, rewards))


def test_rrhf_sees_only_the_order_of_the_rewards():
    scores, rewards = random_rankings(16, 4)
    assert torch.equal(rrhf(scores, rewards), rrhf(scores, rewards.exp()))
    assert (rrhf(rewards, rewards) == 0).all()  # where the scores agree with it
    # rewards that float32 cannot tell apart still have an order
    close = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert rrhf(torch.tensor([[2.0, 1.0]]), close).tolist() == [1.0]


@all_losses
def test_a_wrong_shape_dtype_or_mask_is_refused(loss, naive):
    for shape in [(4,), (4, 1), (4, 0), (2, 2, 2)]:
        with pytest.raises(
            ValueError, match=r"`(logratios|mean_logps)` must have shape \(batch_size, n\) with n >= 2"
        ):
            loss(torch.zeros(shape), torch.zeros(shape))
    scores, rewards = random_rankings(2, 3)
    with pytest.raises(TypeError, match="`(logratios|mean_logps)` must be floating point"):
        loss(scores.long(), rewards)
    with pytest.raises(TypeError, match=r"`mask` must be bool.*torch.int64.*mask.bool\(\)"):
        loss(scores, rewards, torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`mask` must have shape \(2, 3\).*\(2, 1\)"):
        loss(scores, rewards, torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize("loss", [pro, rrhf])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_rewards_must_be_finite_and_one_per_completion(loss, junk):
    with pytest.raises(ValueError, match=r"`rewards` must have shape \(2, 3\).*\(2,\)"):
        loss(torch.zeros(2, 3), torch.zeros(2))
    rewards = torch.tensor([[2.0, 1.0, 0.0], [2.0, junk, 0.0]])
    with pytest.raises(ValueError, match=r"`rewards\[1\]` must be finite"):
        loss(torch.zeros(2, 3), rewards)
    # also where the completion has nothing to be compared with
    alone = torch.tensor([[True, True, True], [False, True, False]])
    with pytest.raises(ValueError, match=r"`rewards\[1\]` must be finite"):
        loss(torch.zeros(2, 3), rewards, alone)


def test_lipo_lambda_of_two_is_the_weighted_loss_of_dpo():
    scores, rewards = random_rankings(16, 2)
    weight = (2 ** rewards[:, 0] - 2 ** rewards[:, 1]) * (1 / math.log(2) - 1 / math.log(3))
    torch.testing.assert_close(lipo_lambda(scores, rewards, 0.3), weight * sigmoid_norm(scores, 0.3))


def test_lipo_lambda_compares_no_equal_rewards_and_ranks_equal_scores_by_column():
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    loss = lipo_lambda(scores, torch.full((3, 5), 0.7), 0.3)
    loss.sum().backward()
    assert (loss == 0).all() and (scores.grad == 0).all()
    # Policy and reference agree: ranks 1, 2, 3; gains 1, 0, 0
    expected = math.log(2) * (2 / math.log(2) - 1 / math.log(3) - 1 / math.log(4))
    found = lipo_lambda(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[1.0, 0.0, 0.0]]), 0.3)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_lipo_lambda_refuses_rewards_whose_gains_overflow():
    with pytest.raises(ValueError, match=r"`rewards\[1\]` must be finite, as well as 2 to its power: scale"):
        lipo_lambda(torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [200.0, 0.0]]), 0.3)


def test_pro_rewards_must_be_sorted():
    rewards = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [0.0, 1.0, 2.0]])
    with pytest.raises(ValueError, match=r"`rewards\[1\]` must be .*sorted from highest to lowest.*\[2.0, 0.0, 1.0\]"):
        pro(torch.zeros(3, 3), rewards)
    # the order of a completion that does not exist is nobody's business
    mask = torch.tensor([[True, True, True], [True, False, True], [True, False, False]])
    assert pro(torch.zeros(3, 3), rewards, mask).isfinite().all()


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="`beta` must be positive and finite"):
        plackett_luce(torch.zeros(1, 3), beta=beta)


# The terms of PRO


def test_the_terms_by_hand():
    """Mean log-probabilities ln 4, ln 2 and 0; with rewards 2, 1 and 0.5 the temperatures of PRO eq. 10-11."""
    scores = torch.tensor([[math.log(4), math.log(2), 0.0]], dtype=torch.float64)
    first, second = pro_terms(scores)[0].tolist()
    assert first == pytest.approx(-math.log(4 / (4 + 2 + 1)))
    assert second == pytest.approx(-math.log(2 / (2 + 1)))
    # 1 / T_1^1 = max(2 - 1, 2 - 0.5) = 1.5, so 4 ** 1.5 against 2 ** 1 and 1 ** 1.5
    first, second = pro_terms(scores, torch.tensor([[2.0, 1.0, 0.5]]))[0].tolist()
    assert first == pytest.approx(-math.log(8 / (8 + 2 + 1)))
    assert second == pytest.approx(-math.log(2**0.5 / (2**0.5 + 1)))


def test_terms_sum_up_to_pro_and_each_is_the_first_of_the_ranking_without_the_better_ones():
    scores, rewards = random_rankings(8, 5)
    terms = pro_terms(scores, rewards)
    torch.testing.assert_close(terms.sum(dim=1), pro(scores, rewards))
    for k in range(4):
        torch.testing.assert_close(terms[:, k], pro_terms(scores[:, k:], rewards[:, k:])[:, 0])


def test_terms_of_missing_completions_are_zero():
    scores, rewards = random_rankings(3, 4)
    mask = torch.tensor([[True, True, False, False], [True, False, False, False], [True, True, True, True]])
    terms = pro_terms(scores, rewards, mask)
    assert (terms > 0).tolist() == [[True, False, False], [False, False, False], [True, True, True]]
