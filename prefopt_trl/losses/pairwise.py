"""Losses on pairs: column 0 is the chosen completion, column 1 the rejected one."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid_norm(logratios: Tensor, gamma: float) -> Tensor:
    r"""
    Logistic loss on log-ratios to a reference model, RSO's *sigmoid-norm* and DPO's loss.

    `-log sigmoid(gamma * logratio_chosen - gamma * logratio_rejected)` (RSO eq. 10). It is `ln 2` where policy and
    reference agree. It equals [`plackett_luce`] on two completions, and TRL's `loss_type="sigmoid"` with `beta=gamma`.
    TRL's `"sigmoid_norm"` is something else: there the log-ratios are averaged over tokens.

    Args:
        logratios (`torch.Tensor`):
            Log-probabilities under the policy minus those under the reference model, in nats, summed over tokens.
            Shape `(batch_size, 2)`, floating point; computed in float32 at least.
        gamma (`float`):
            Loss temperature, above 0. RSO uses 0.05.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, at least 0.

    Raises:
        ValueError: If `logratios` does not have two columns, or `gamma` is not positive and finite.
        TypeError: If `logratios` is not floating point.

    Example:

    ```python
    >>> import torch
    >>> from prefopt_trl.losses import sigmoid_norm

    >>> sigmoid_norm(torch.tensor([[0.0, 0.0], [3.0, -1.0]]), gamma=0.5)
    tensor([0.6931, 0.1269])

    ```
    """
    _check_positive("gamma", gamma)
    chosen, rejected = _chosen_rejected("logratios", logratios)
    return -logsigmoid(gamma * (chosen - rejected))


def hinge_norm(logratios: Tensor, gamma: float) -> Tensor:
    r"""
    Hinge loss on log-ratios to a reference model, RSO's *hinge-norm*.

    `max(0, 1 - (gamma * logratio_chosen - gamma * logratio_rejected))` (RSO eq. 12): the support vector machine to the
    logistic regression of [`sigmoid_norm`]. It is 1 where policy and reference agree, and TRL's `loss_type="hinge"`
    with `beta=gamma`. [`hinge`] is the same without the reference model.

    Args:
        logratios (`torch.Tensor`):
            Log-probabilities under the policy minus those under the reference model, in nats, summed over tokens.
            Shape `(batch_size, 2)`, floating point; computed in float32 at least.
        gamma (`float`):
            Inverse margin, above 0: the loss vanishes once the log-ratios differ by `1 / gamma`. RSO uses 0.05.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, at least 0.

    Raises:
        ValueError: If `logratios` does not have two columns, or `gamma` is not positive and finite.
        TypeError: If `logratios` is not floating point.

    Example:

    ```python
    >>> import torch
    >>> from prefopt_trl.losses import hinge_norm

    >>> hinge_norm(torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, -1.0]]), gamma=0.5)
    tensor([1.0000, 0.5000, 0.0000])

    ```
    """
    _check_positive("gamma", gamma)
    chosen, rejected = _chosen_rejected("logratios", logratios)
    return torch.relu(1 - gamma * (chosen - rejected))


def hinge(logps: Tensor, gamma: float) -> Tensor:
    r"""
    Hinge loss on the policy's own log-probabilities, RSO's *hinge*; needs no reference model.

    `max(0, 1 - (gamma * logp_chosen - gamma * logp_rejected))` (RSO eq. 11). It equals `gamma` times [`slic`] with
    `delta = 1 / gamma`. `DPOTrainer`'s `loss_type="hinge"` is [`hinge_norm`]; the `"hinge"` of TRL's experimental
    `CPOTrainer`, with `beta=gamma` and `cpo_alpha=0`, is this.

    Args:
        logps (`torch.Tensor`):
            Log-probabilities under the policy, in nats, summed over tokens. Shape `(batch_size, 2)`, floating point;
            computed in float32 at least.
        gamma (`float`):
            Inverse margin, above 0: the loss vanishes once the log-probabilities differ by `1 / gamma`.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, at least 0.

    Raises:
        ValueError: If `logps` does not have two columns, or `gamma` is not positive and finite.
        TypeError: If `logps` is not floating point.

    Example:

    ```python
    >>> import torch
    >>> from prefopt_trl.losses import hinge

    >>> hinge(torch.tensor([[-10.0, -11.0], [-10.0, -14.0]]), gamma=0.5)
    tensor([0.5000, 0.0000])

    ```
    """
    _check_positive("gamma", gamma)
    chosen, rejected = _chosen_rejected("logps", logps)
    return torch.relu(1 - gamma * (chosen - rejected))


def slic(
    logps: Tensor, delta: float, target_logps: Tensor | None = None, regularization_weight: float = 0.0
) -> Tensor:
    r"""
    Calibration loss with a margin, plus the likelihood of a target completion; needs no reference model.

    `max(0, delta - logp_chosen + logp_rejected) - regularization_weight * target_logp` (RSO eq. 1). Its first term is
    [`hinge`] with `gamma = 1 / delta`, divided by that `gamma`; so TRL's experimental `CPOTrainer` has that term up to
    the factor. Its `cpo_alpha` weights another one: the likelihood of the chosen completion, averaged over tokens.

    Args:
        logps (`torch.Tensor`):
            Log-probabilities under the policy, in nats, summed over tokens. Shape `(batch_size, 2)`, floating point;
            computed in float32 at least.
        delta (`float`):
            Margin in nats, at least 0.
        target_logps (`torch.Tensor`, *optional*):
            Log-probabilities under the policy of the target completions (the paper's `y_ref`), in nats, summed over
            tokens. Shape `(batch_size,)`, floating point. Required when `regularization_weight` is above 0.
        regularization_weight (`float`, *optional*, defaults to `0.0`):
            The paper's lambda, at least 0.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, at least 0.

    Raises:
        ValueError: If `logps` does not have two columns, `target_logps` does not have one value per pair or is missing
            though weighted, or `delta` or `regularization_weight` is negative or not finite.
        TypeError: If `logps` or `target_logps` is not floating point.

    Example:

    ```python
    >>> import torch
    >>> from prefopt_trl.losses import slic

    >>> logps = torch.tensor([[-10.0, -11.0], [-10.0, -14.0]])
    >>> slic(logps, delta=2.0)
    tensor([1., 0.])
    >>> slic(logps, delta=2.0, target_logps=logps[:, 0], regularization_weight=0.5)
    tensor([6., 5.])

    ```
    """
    _check_not_negative("delta", delta)
    _check_not_negative("regularization_weight", regularization_weight)
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
    return calibration - regularization_weight * _as_float("target_logps", target_logps)


def unlikelihood(logps: Tensor, alpha: float = 1.0) -> Tensor:
    r"""
    Raises the likelihood of the chosen completion and lowers that of the rejected one; needs no reference model.

    `-logp_chosen + alpha * logp_rejected` (DPO appendix C.3, the *unlikelihood* baseline). Nothing bounds it from
    below: the rejected completion can always become less likely, which is why the paper found it to degenerate on open
    text. With `alpha=0` it is supervised fine-tuning on the chosen completion, TRL's `loss_type="sft"` up to its
    averaging over tokens.

    Args:
        logps (`torch.Tensor`):
            Log-probabilities under the policy, in nats, summed over tokens. Shape `(batch_size, 2)`, floating point;
            computed in float32 at least.
        alpha (`float`, *optional*, defaults to `1.0`):
            Weight of the rejected completion, at least 0. The appendix gives both terms the same weight.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, of any sign.

    Raises:
        ValueError: If `logps` does not have two columns, or `alpha` is negative or not finite.
        TypeError: If `logps` is not floating point.

    Example:

    ```python
    >>> import torch
    >>> from prefopt_trl.losses import unlikelihood

    >>> unlikelihood(torch.tensor([[-10.0, -14.0]]), alpha=0.5)
    tensor([3.])

    ```
    """
    _check_not_negative("alpha", alpha)
    chosen, rejected = _chosen_rejected("logps", logps)
    return -chosen + alpha * rejected


def _chosen_rejected(name: str, values: Tensor) -> tuple[Tensor, Tensor]:
    if values.ndim != 2 or values.shape[1] != 2:
        raise ValueError(
            f"`{name}` must have shape (batch_size, 2), chosen then rejected, but has {tuple(values.shape)}: stack "
            "the two as columns, each summed over tokens."
        )
    chosen, rejected = _as_float(name, values).unbind(dim=1)
    return chosen, rejected


def _as_float(name: str, values: Tensor) -> Tensor:
    # Half precision holds three digits: too few for the difference of two summed log-probabilities.
    if not values.is_floating_point():
        raise TypeError(f"`{name}` must be floating point, but is {values.dtype}: pass log-probabilities, not tokens.")
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"`{name}` must be positive and finite, but is {value}: pass a number above 0.")


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"`{name}` must be finite and not negative, but is {value}: pass 0 or a number above it.")
