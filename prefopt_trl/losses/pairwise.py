"""
The papers' losses on pairs, one function per equation.

`SLiCTrainer` trains with [`slic`] and [`unlikelihood`]. `RSOTrainer` trains with TRL's own `"sigmoid"` and `"hinge"`,
which a test holds equal to [`sigmoid_norm`] and [`hinge_norm`]. [`hinge`] is [`slic`] up to a factor.

Arguments:

- `logps` (`torch.Tensor` of shape `(batch_size, 2)`): log-probabilities under the policy, in nats, summed over tokens.
  Column 0 is the chosen completion, column 1 the rejected one. Floating point; computed in float32 at least.
- `logratios` (`torch.Tensor` of shape `(batch_size, 2)`): `logps` minus the same under the reference model.
- The weights and margins are finite Python floats.

Returns: `torch.Tensor` of shape `(batch_size,)`, one loss per pair, at least 0 unless the function says otherwise.

Raises: `ValueError` if a tensor has another shape or a number is out of its range, `TypeError` if a tensor is not
floating point.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefopt_trl.losses.checks import as_float, check_not_negative, check_positive

PairLoss = Callable[[Tensor], Tensor]


def sigmoid_norm(logratios: Tensor, gamma: float) -> Tensor:
    """
    Return the logistic loss on log-ratios to a reference model, RSO's *sigmoid-norm* and DPO's loss.

    `-log sigmoid(gamma * logratio_chosen - gamma * logratio_rejected)` (RSO eq. 10), with `gamma > 0`; RSO uses 0.05.
    It is `ln 2` where policy and reference agree. It equals [`plackett_luce`] on two completions, and TRL's
    `loss_type="sigmoid"` with `beta=gamma`. TRL's `"sigmoid_norm"` is another loss, which averages over tokens.

    >>> sigmoid_norm(torch.tensor([[0.0, 0.0], [3.0, -1.0]]), gamma=0.5)
    tensor([0.6931, 0.1269])
    """
    check_positive("gamma", gamma)
    chosen, rejected = _chosen_rejected("logratios", logratios)
    return -logsigmoid(gamma * (chosen - rejected))


def hinge_norm(logratios: Tensor, gamma: float) -> Tensor:
    """
    Return the hinge loss on log-ratios to a reference model, RSO's *hinge-norm*.

    `max(0, 1 - (gamma * logratio_chosen - gamma * logratio_rejected))` (RSO eq. 12), with `gamma > 0`; RSO uses 0.05.
    The loss vanishes once the log-ratios differ by `1 / gamma` nats, and is 1 where policy and reference agree. It is
    TRL's `loss_type="hinge"` with `beta=gamma`. [`hinge`] is the same without the reference model.

    >>> hinge_norm(torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, -1.0]]), gamma=0.5)
    tensor([1.0000, 0.5000, 0.0000])
    """
    check_positive("gamma", gamma)
    chosen, rejected = _chosen_rejected("logratios", logratios)
    return torch.relu(1 - gamma * (chosen - rejected))


def hinge(logps: Tensor, gamma: float) -> Tensor:
    """
    Return the hinge loss on log-probabilities, RSO's *hinge*, which needs no reference model.

    `max(0, 1 - (gamma * logp_chosen - gamma * logp_rejected))` (RSO eq. 11), with `gamma > 0`. It equals `gamma` times
    [`slic`] with `delta = 1 / gamma`. `DPOTrainer`'s `loss_type="hinge"` is [`hinge_norm`]; the `"hinge"` of TRL's
    experimental `CPOTrainer`, with `beta=gamma` and `cpo_alpha=0`, is this loss.

    >>> hinge(torch.tensor([[-10.0, -11.0], [-10.0, -14.0]]), gamma=0.5)
    tensor([0.5000, 0.0000])
    """
    check_positive("gamma", gamma)
    chosen, rejected = _chosen_rejected("logps", logps)
    return torch.relu(1 - gamma * (chosen - rejected))


def slic(
    logps: Tensor, delta: float, target_logps: Tensor | None = None, regularization_weight: float = 0.0
) -> Tensor:
    """
    Return the calibration loss with a margin, plus the negative log-likelihood of a target; needs no reference model.

    `max(0, delta - logp_chosen + logp_rejected) - regularization_weight * target_logp` (RSO eq. 1). `delta >= 0` is in
    nats. `target_logps` of shape `(batch_size,)` are the summed log-probabilities of the target completions (the
    paper's `y_ref`), required when `regularization_weight >= 0` (the paper's lambda) is above 0.

    The first term is [`hinge`] with `gamma = 1 / delta`, divided by that `gamma`, so TRL's experimental `CPOTrainer`
    has it up to the factor. Its `cpo_alpha` weights another term: the chosen completion, averaged over tokens.

    >>> logps = torch.tensor([[-10.0, -11.0], [-10.0, -14.0]])
    >>> slic(logps, delta=2.0, target_logps=logps[:, 0], regularization_weight=0.5)
    tensor([6., 5.])
    """
    check_not_negative("delta", delta)
    check_not_negative("regularization_weight", regularization_weight)
    chosen, rejected = _chosen_rejected("logps", logps)
    calibration = torch.relu(delta - chosen + rejected)
    if target_logps is None:
        if regularization_weight > 0:
            raise ValueError(
                f"`regularization_weight` is {regularization_weight} but `target_logps` is missing: pass the summed "
                "log-probabilities of the target completions, or set the weight to 0."
            )
        return calibration
    if target_logps.shape != chosen.shape:
        raise ValueError(
            f"`target_logps` must have shape {tuple(chosen.shape)}, one value per pair, but has "
            f"{tuple(target_logps.shape)}: sum the log-probabilities over tokens."
        )
    return calibration - regularization_weight * as_float("target_logps", target_logps)


def unlikelihood(logps: Tensor, alpha: float = 1.0) -> Tensor:
    """
    Return a loss that raises the likelihood of the chosen completion and lowers that of the rejected one.

    `-logp_chosen + alpha * logp_rejected` (DPO appendix C.3, the *unlikelihood* baseline, where `alpha` is 1), with
    `alpha >= 0`. It needs no reference model. It may have any sign and nothing bounds it from below, because the
    rejected completion can always become less likely; the paper found it to degenerate on open text. With `alpha=0` it
    is TRL's `loss_type="sft"`, except that TRL averages over tokens.

    >>> unlikelihood(torch.tensor([[-10.0, -14.0]]), alpha=0.5)
    tensor([3.])
    """
    check_not_negative("alpha", alpha)
    chosen, rejected = _chosen_rejected("logps", logps)
    return -chosen + alpha * rejected


def with_labels(
    loss: PairLoss, pairs: Tensor, label_probabilities: Tensor | None = None, margins: Tensor | None = None
) -> Tensor:
    """
    Return a loss on pairs, such as [`sigmoid_norm`], with soft labels or margins, both of shape `(batch_size,)`.

    `p * loss(chosen - margin, rejected) + (1 - p) * loss(rejected, chosen - margin)`, where `p` in [0, 1] is the
    probability of the label, 1 by default: conservative DPO (https://ericmitchell.ai/cdpo.pdf) with a `p` per pair.
    Margins, in the unit of `pairs`, are ODPO's offsets (arXiv 2402.10571). The logistic loss becomes a cross-entropy,
    smallest where `gamma` times the difference is `logit(p)`; the hinge losses weight pairs by `p`, too.

    >>> pairs, p = torch.tensor([[0.0, 0.0], [3.0, -1.0]]), torch.tensor([0.9, 0.9])
    >>> with_labels(lambda pairs: sigmoid_norm(pairs, gamma=0.5), pairs, label_probabilities=p)
    tensor([0.6931, 0.3269])
    """
    chosen, rejected = _chosen_rejected("pairs", pairs)
    for name, values in (("label_probabilities", label_probabilities), ("margins", margins)):
        if values is not None and values.shape != chosen.shape:
            raise ValueError(f"`{name}` must have shape {tuple(chosen.shape)}, but has {tuple(values.shape)}.")
    pairs = torch.stack([chosen if margins is None else chosen - margins, rejected], dim=1)
    if label_probabilities is None:
        return loss(pairs)
    return label_probabilities * loss(pairs) + (1 - label_probabilities) * loss(pairs.flip(1))


def _chosen_rejected(name: str, values: Tensor) -> tuple[Tensor, Tensor]:
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(
            f"`{name}` must have shape (batch_size, 2), chosen then rejected, but has {tuple(values.shape)}: stack "
            "the two as columns, each summed over tokens."
        )
    chosen, rejected = as_float(name, values).unbind(dim=1)
    return chosen, rejected
