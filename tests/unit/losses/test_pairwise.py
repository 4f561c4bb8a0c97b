import itertools
import math

import pytest
import torch

from prefopt_trl.losses import hinge, hinge_norm, sigmoid_norm, slic, unlikelihood, with_labels

# (the loss on a tensor, the same on two Python floats as the paper prints it, its tensor argument's name)
LOSSES = {
    "sigmoid_norm": (
        lambda x: sigmoid_norm(x, gamma=0.3),
        lambda chosen, rejected: -math.log(1 / (1 + math.exp(-(0.3 * chosen - 0.3 * rejected)))),
        "logratios",
    ),
    "hinge_norm": (lambda x: hinge_norm(x, gamma=0.3), lambda c, r: max(0.0, 1 - (0.3 * c - 0.3 * r)), "logratios"),
    "hinge": (lambda x: hinge(x, gamma=0.3), lambda c, r: max(0.0, 1 - (0.3 * c - 0.3 * r)), "logps"),
    "slic": (lambda x: slic(x, delta=2.5), lambda chosen, rejected: max(0.0, 2.5 - chosen + rejected), "logps"),
    "unlikelihood": (lambda x: unlikelihood(x, alpha=0.4), lambda chosen, rejected: -chosen + 0.4 * rejected, "logps"),
}
all_losses = pytest.mark.parametrize(("loss", "naive", "argument"), LOSSES.values(), ids=LOSSES)


def random_pairs(batch_size, seed=0, dtype=torch.float64):
    return 5 * torch.randn(batch_size, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@all_losses
@pytest.mark.parametrize("batch_size", [1, 64])
def test_matches_the_printed_equation(loss, naive, argument, batch_size):
    pairs = random_pairs(batch_size)
    expected = torch.tensor([naive(*pair) for pair in pairs.tolist()], dtype=torch.float64)

    assert torch.unique(expected).numel() > batch_size // 2  # the draws reach more than a hinge's flat part
    torch.testing.assert_close(loss(pairs), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss(pairs.float()), expected.float(), rtol=1e-5, atol=1e-5)


@all_losses
def test_gradient(loss, naive, argument):
    pairs = random_pairs(16).requires_grad_()  # no draw lies within gradcheck's step of a hinge's kink
    assert torch.autograd.gradcheck(loss, (pairs,))


@all_losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, naive, argument, dtype):
    pairs = random_pairs(16).to(dtype).requires_grad_()
    values = loss(pairs)
    values.sum().backward()

    assert values.dtype == torch.float32
    assert torch.equal(values, loss(pairs.float()))
    assert pairs.grad.dtype == dtype


@all_losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails(loss, naive, argument, dtype):
    pairs = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [1e4, 1e4]], dtype=dtype, requires_grad=True)
    values = loss(pairs)
    values.sum().backward()

    assert values.isfinite().all()
    assert pairs.grad.isfinite().all()


def test_sigmoid_norm_in_the_tails():
    margins = torch.tensor([[30.0, 0.0], [1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    values = sigmoid_norm(margins, gamma=1.0)
    values.sum().backward()

    # log(1 + exp(-30)) = exp(-30) to 13 digits: far below float32's spacing around 1, and must not be rounded to 0.
    torch.testing.assert_close(values, torch.tensor([math.exp(-30), 0.0, 2e4]), rtol=1e-5, atol=0)
    expected_slope = torch.tensor([math.exp(-30), 0.0, 1.0])
    torch.testing.assert_close(margins.grad, torch.stack([-expected_slope, expected_slope], dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [0.005, 0.05, 1.0, 7.0])
def test_policy_equal_to_reference(gamma):
    logratios = torch.zeros(3, 2, dtype=torch.float64)
    torch.testing.assert_close(sigmoid_norm(logratios, gamma), torch.full_like(logratios[:, 0], math.log(2)))
    assert torch.equal(hinge_norm(logratios, gamma), torch.ones(3, dtype=torch.float64))


def test_values_by_hand():
    # odds of 3 to 1: sigmoid(ln 3) = 3/4
    values = sigmoid_norm(torch.tensor([[2 * math.log(3), 0.0]]), gamma=0.5)
    torch.testing.assert_close(values, torch.tensor([math.log(4 / 3)]))
    # the margin is 1 / gamma = 4: differences of 1, 4 and 6 leave 3/4, nothing and nothing
    pairs = torch.tensor([[-9.0, -10.0], [-6.0, -10.0], [-4.0, -10.0]])
    assert hinge(pairs, gamma=0.25).tolist() == [0.75, 0.0, 0.0]
    assert hinge_norm(pairs, gamma=0.25).tolist() == [0.75, 0.0, 0.0]
    assert slic(pairs, delta=5.0).tolist() == [4.0, 1.0, 0.0]
    assert slic(pairs, delta=0.0).tolist() == [0.0, 0.0, 0.0]
    assert unlikelihood(pairs).tolist() == [-1.0, -4.0, -6.0]
    assert unlikelihood(pairs, alpha=0.0).tolist() == [9.0, 6.0, 4.0]


def test_sigmoid_norm_gradient_is_dpos():
    # DPO's gradient weight: gamma * sigmoid(gamma * (rejected - chosen))
    pairs = random_pairs(16).requires_grad_()
    sigmoid_norm(pairs, gamma=0.3).sum().backward()
    weights = [0.3 / (1 + math.exp(0.3 * (chosen - rejected))) for chosen, rejected in pairs.tolist()]
    expected = torch.tensor([[-weight, weight] for weight in weights], dtype=torch.float64)
    torch.testing.assert_close(pairs.grad, expected)


@pytest.mark.parametrize("gamma", [0.05, 0.4, 3.0])
def test_hinge_is_slic_with_the_inverse_margin(gamma):
    logps = random_pairs(64)
    torch.testing.assert_close(hinge(logps, gamma), gamma * slic(logps, delta=1 / gamma))


@pytest.mark.parametrize("loss", [hinge_norm, sigmoid_norm])
def test_norm_losses_ignore_what_both_completions_share(loss):
    logratios = random_pairs(16)
    torch.testing.assert_close(loss(logratios + 3, gamma=0.3), loss(logratios, gamma=0.3))


def test_slic_regularization():
    logps = torch.tensor([[-10.0, -11.0], [-10.0, -14.0]], requires_grad=True)
    target_logps = torch.tensor([-8.0, -6.0], requires_grad=True)
    values = slic(logps, delta=2.0, target_logps=target_logps, regularization_weight=0.5)
    values.sum().backward()

    assert values.tolist() == [1.0 + 4.0, 0.0 + 3.0]
    assert logps.grad.tolist() == [[-1.0, 1.0], [0.0, 0.0]]
    assert target_logps.grad.tolist() == [-0.5, -0.5]
    # lambda = 0 is the first line of RSO Table 4
    assert slic(logps, 2.0, target_logps=target_logps, regularization_weight=0.0).tolist() == [1.0, 0.0]


def test_slic_regularization_in_half_precision():
    logps = torch.tensor([[-10.0, -11.0]], dtype=torch.bfloat16)
    values = slic(logps, 2.0, target_logps=logps[:, 0], regularization_weight=0.1)
    torch.testing.assert_close(values, torch.tensor([2.0]))  # 0.1 is no bfloat16 number: float32 throughout


@all_losses
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3), (2, 2, 2)])
def test_wrong_shape_or_dtype(loss, naive, argument, shape):
    with pytest.raises(ValueError, match=rf"`{argument}` must have shape \(batch_size, 2\)"):
        loss(torch.zeros(shape))
    with pytest.raises(TypeError, match=f"`{argument}` must be floating point, but is torch.int64"):
        loss(torch.zeros(4, 2, dtype=torch.int64))


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_hyperparameters_out_of_range_are_refused(value):
    for loss, gamma in itertools.product([sigmoid_norm, hinge_norm, hinge], [0.0, value]):
        with pytest.raises(ValueError, match="`gamma` must be positive and finite"):
            loss(torch.zeros(1, 2), gamma=gamma)
    with pytest.raises(ValueError, match="`delta` must be finite and not negative"):
        slic(torch.zeros(1, 2), delta=value)
    with pytest.raises(ValueError, match="`regularization_weight` must be finite and not negative"):
        slic(torch.zeros(1, 2), delta=1.0, target_logps=torch.zeros(1), regularization_weight=value)
    with pytest.raises(ValueError, match="`alpha` must be finite and not negative"):
        unlikelihood(torch.zeros(1, 2), alpha=value)


def test_slic_target_logps():
    logps = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="`regularization_weight` is 0.5 but `target_logps` is missing"):
        slic(logps, delta=1.0, regularization_weight=0.5)
    # per-token log-probabilities would broadcast (3,) against (3, 3) without a word
    with pytest.raises(ValueError, match=r"`target_logps` must have shape \(3,\)"):
        slic(logps, delta=1.0, target_logps=torch.zeros(3, 3), regularization_weight=0.5)
    with pytest.raises(TypeError, match="`target_logps` must be floating point"):
        slic(logps, delta=1.0, target_logps=torch.zeros(3, dtype=torch.int64), regularization_weight=0.5)


LABELS = {
    "soft": {"label_probabilities": torch.linspace(0, 1, 16, dtype=torch.float64)},
    "margin": {"margins": torch.linspace(-2, 3, 16, dtype=torch.float64)},
}
LABELS["both"] = LABELS["soft"] | LABELS["margin"]


@all_losses
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_labels_match_the_equation_and_have_its_gradient(loss, naive, argument, labels):
    pairs = random_pairs(16).requires_grad_()
    expected = []
    for row, (chosen, rejected) in enumerate(pairs.tolist()):
        p = labels["label_probabilities"][row].item() if "label_probabilities" in labels else 1.0
        chosen -= labels["margins"][row].item() if "margins" in labels else 0.0
        expected.append(p * naive(chosen, rejected) + (1 - p) * naive(rejected, chosen))
    values = with_labels(loss, pairs, **labels)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda pairs: with_labels(loss, pairs, **labels), (pairs,))


@all_losses
def test_limits_of_labels(loss, naive, argument):
    pairs, ones = random_pairs(16), torch.ones(16, dtype=torch.float64)
    assert torch.equal(with_labels(loss, pairs, ones, 0 * ones), loss(pairs))
    assert torch.equal(with_labels(loss, pairs, 0 * ones), loss(pairs.flip(1)))
    torch.testing.assert_close(with_labels(loss, pairs, ones / 2), with_labels(loss, pairs.flip(1), ones / 2))


@pytest.mark.parametrize(("p", "margin"), [(0.5, 0.0), (0.9, 0.0), (0.75, 2.0)])
def test_a_soft_sigmoid_is_smallest_at_the_log_odds(p, margin):
    pairs = torch.tensor([[math.log(p / (1 - p)) / 0.3 + margin, 0.0]], dtype=torch.float64, requires_grad=True)
    labels = (torch.tensor([value], dtype=torch.float64) for value in (p, margin))
    value = with_labels(lambda pairs: sigmoid_norm(pairs, gamma=0.3), pairs, *labels)
    value.sum().backward()
    assert value.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-12)
    assert pairs.grad.abs().max() < 1e-15


def test_the_margin_of_slic_adds_to_delta():
    logps, margins = random_pairs(16), torch.full((16,), 1.5, dtype=torch.float64)
    values = with_labels(lambda pairs: slic(pairs, delta=2.0), logps, margins=margins)
    torch.testing.assert_close(values, slic(logps, delta=3.5))


@pytest.mark.parametrize("name", ["label_probabilities", "margins"])
def test_labels_of_another_shape_are_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` must have shape \(3,\), but has \(3, 1\)"):
        with_labels(unlikelihood, torch.zeros(3, 2), **{name: torch.ones(3, 1)})
