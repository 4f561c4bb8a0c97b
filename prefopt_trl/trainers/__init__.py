"""The trainers: each is a row of `METHODS`, and two files named after it, `..._config.py` and `..._trainer.py`."""

from typing import NamedTuple

Options = dict[str, tuple[object, str]]  # default and help of some options, by name


class Method(NamedTuple):
    """A row of [`METHODS`]."""

    name: str  # of `RSOConfig` and `RSOTrainer`
    summary: str
    options: Options  # of its loss, that `--help` shows first


METHODS = {
    "rso": Method(
        "RSO",
        "train with RSO (or DPO, or another loss of TRL's) on pairs",
        {
            "gamma": (None, "Temperature of the loss (RSO eq. 10-12), which TRL calls `beta`. By default 0.05."),
            "loss_type": (["sigmoid-norm"], "Loss: sigmoid-norm (RSO eq. 10), hinge-norm (eq. 12) or one of TRL's."),
        },
    ),
    "slic": Method(
        "SLiC",
        "train with SLiC on pairs",
        {
            "delta": (20.0, "Margin between the log-probabilities of chosen and rejected completion, in nats."),
            "regularization_weight": (0.0, "Weight of the log-likelihood of a target completion (RSO eq. 1)."),
        },
    ),
    "pro": Method(
        "PRO",
        "train with PRO on rankings",
        {
            "sft_weight": (0.05, "Weight of the log-likelihood of the best completion (PRO eq. 7)."),
            "bootstrap_parts": (0, "Self-bootstrapping (PRO Algorithm 1): parts of the training data."),
        },
    ),
    "listwise-dpo": Method(
        "ListwiseDPO",
        "train with listwise DPO on rankings",
        {
            "beta": (0.1, "Temperature of the loss: how strongly the policy stays with the reference model."),
            "loss_type": (["plackett-luce"], "Loss: plackett-luce (DPO eq. 20) or lambda (LiPO)."),
        },
    ),
    "rrhf": Method(
        "RRHF",
        "train with RRHF on rankings",
        {"sft_weight": (1.0, "Weight of the log-likelihood of the best completion.")},
    ),
}
