"""Configuration of `SLiCTrainer`."""

from dataclasses import dataclass, field

from prefopt_trl.generation.options import is_number
from prefopt_trl.sampling.options import PAIRING, STRATEGY
from prefopt_trl.trainers.base_config import (
    REFERENCE_ARGUMENTS,
    TRL_LOSS_ARGUMENTS,
    PreferenceConfig,
    refuse,
)

LOSSES = ["slic", "unlikelihood"]


@dataclass
class SLiCConfig(PreferenceConfig):
    """Configuration of [`SLiCTrainer`]: the arguments of [`~trl.DPOConfig`], and those below.

    Arguments that need a reference model, and those of TRL's own losses, are refused. Sampling is SLiC's by default:
    samples of the SFT policy (`strategy="sft"`) in a knock-out tournament (`pairing="tournament"`); RSO section 5
    takes `pairing="first-round"`.

    Raises:
        ValueError: if a number is out of its range, a name unknown, or an argument is set that would have no effect.

    Example:

    ```python
    >>> from prefopt_trl import SLiCConfig
    >>> args = SLiCConfig("outputs/slic", delta=1.0, regularization_weight=0.1, use_cpu=True, bf16=False)
    >>> args.strategy, args.pairing
    ('sft', 'tournament')

    ```
    """

    # Parameters that control the loss
    loss_type: list[str] = field(
        default_factory=lambda: ["slic"],
        metadata={
            "help": "Loss: 'slic' (RSO eq. 1) or 'unlikelihood' (DPO appendix C.3), a baseline that degenerates on "
            "open text. One of them."
        },
    )
    delta: float = field(
        default=20.0,
        metadata={
            "help": "Margin between the log-probabilities of chosen and rejected completion, in nats, above 0; "
            "1 / gamma of RSO eq. 11, the same loss divided by delta. Default 20, for RSO's gamma of 0.05."
        },
    )
    unlikelihood_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the rejected completion in loss_type='unlikelihood', at least 0."},
    )
    regularization_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the log-likelihood of a target completion (lambda of RSO eq. 1), at least 0. RSO's "
            "appendix A.5 saw no significant gain between 0.5 and 500. Default 0."
        },
    )
    target_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the target completion (y_ref of RSO eq. 1), such as the SFT target. The chosen "
            "completion by default."
        },
    )

    # Sampling as in SLiC
    strategy: str = field(default="sft", metadata=STRATEGY)
    pairing: str = field(default="tournament", metadata=PAIRING)

    def __post_init__(self) -> None:
        refuse(self, REFERENCE_ARGUMENTS, "SLiC has no reference model, and its margin is `delta`")
        refuse(self, TRL_LOSS_ARGUMENTS, "it is for TRL's losses on pairs")
        loss_types = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        if "hinge" in loss_types:
            raise ValueError(
                "`loss_type='hinge'` (RSO eq. 11) is 'slic' divided by `delta`, where `gamma` is 1 / `delta`. Use "
                "'slic' with that `delta`, and with `regularization_weight` and `max_grad_norm` times `delta`. TRL's "
                "'hinge' has a reference model and is `RSOConfig(loss_type='hinge-norm')`."
            )
        if len(loss_types) != 1 or loss_types[0] not in LOSSES:
            raise ValueError(
                f"`loss_type` must be one of {', '.join(LOSSES)}; got {self.loss_type!r}. TRL's losses are "
                "`RSOTrainer`'s."
            )
        self.loss_type = loss_types
        is_number(self, "delta", "RSO uses 20, which is 1 / gamma.", above_zero=True)
        is_number(self, "regularization_weight", "It is RSO's lambda.")
        is_number(self, "unlikelihood_weight", "DPO appendix C.3 has 1.")
        unlikelihood = loss_types[0] == "unlikelihood"
        if unlikelihood and self.delta != 20.0:
            raise ValueError("`delta` has no effect with `loss_type='unlikelihood'`. Leave it out.")
        if unlikelihood and self.regularization_weight:
            raise ValueError(
                "`regularization_weight` has no effect with `loss_type='unlikelihood'`, which raises the chosen "
                "completion already. Leave it out, or lower `unlikelihood_weight`."
            )
        if unlikelihood and self.label_columns:
            raise ValueError("`soft_labels` and `margin_weight` need `loss_type='slic'`. Set it, or leave them out.")
        if not unlikelihood and self.unlikelihood_weight != 1.0:
            raise ValueError("`unlikelihood_weight` needs `loss_type='unlikelihood'`. Set both, or leave it out.")
        if self.target_column is not None and not self.regularization_weight:
            raise ValueError(
                f"`target_column`={self.target_column!r} needs a `regularization_weight` above 0. Set both, or "
                "leave it out."
            )
        if self.target_column is not None and self.sampling == "online":
            raise ValueError(
                "`target_column` is tokenized before training, and `sampling='online'` makes the pairs later. Set one "
                "of them."
            )
        super().__post_init__()
