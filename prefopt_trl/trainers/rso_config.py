"""Configuration of `RSOTrainer`."""

import logging
import math
from dataclasses import dataclass, field

from prefopt_trl.generation.options import is_one_of
from prefopt_trl.trainers.base_config import TRL_LOSS_ARGUMENTS, PreferenceConfig, refuse

logger = logging.getLogger(__name__)

# RSO's names of losses, and TRL's names of the same functions
LOSS_NAMES = {"sigmoid-norm": "sigmoid", "hinge-norm": "hinge"}


@dataclass
class RSOConfig(PreferenceConfig):
    """Configuration of [`RSOTrainer`]: every argument of [`~trl.DPOConfig`], and those below.

    Defaults of the loss and of sampling are those of RSO section 5, all others TRL's. `gamma` (TRL's `beta`) is 0.05
    rather than 0.1, and `loss_type` is `"sigmoid-norm"`, which is TRL's `"sigmoid"`.

    Raises:
        ValueError: if `gamma` and `beta` are set to different values, a number is out of its range, or an argument is
            set that would have no effect. TRL refuses an unknown `loss_type` in the first step of training.

    Example:

    ```python
    >>> from prefopt_trl import RSOConfig
    >>> args = RSOConfig("outputs/rso", gamma=0.1, loss_type="hinge-norm", use_cpu=True, bf16=False)
    >>> args.beta, args.loss_type
    (0.1, ['hinge'])

    ```
    """

    # Parameters that control the loss
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid-norm"],
        metadata={
            "help": "Loss. 'sigmoid-norm' (RSO eq. 10; TRL's 'sigmoid', the DPO loss) and 'hinge-norm' (RSO eq. 12; "
            "TRL's 'hinge') are RSO's; every other loss of TRL's DPOTrainer works too. Its 'sigmoid_norm' is "
            "length-normalized and not RSO's sigmoid-norm."
        },
    )
    gamma: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of the loss (RSO eq. 10-12), what TRL calls `beta`: set either. Greater than 0. "
            "Default 0.05."
        },
    )
    beta: float | None = field(  # type: ignore[assignment]  # a float as in TRL, once `__post_init__` has run
        default=None,
        metadata={"help": "TRL's name for `gamma`. Not the beta of RSO's Algorithm 1, which is `rejection_beta`."},
    )

    reference_logps: str = field(
        default="computed",
        metadata={
            "help": "Log-probabilities of the reference model: 'computed' by it, as in TRL, or 'sampled': those that "
            "were written down when the pairs were sampled (columns `ref_chosen_logps` and `ref_rejected_logps`), so "
            "that training holds no reference model.",
            "choices": ["computed", "sampled"],
        },
    )

    def __post_init__(self) -> None:
        is_one_of(self, "reference_logps", ["computed", "sampled"])
        if self.reference_logps == "sampled":
            if self.sampling == "online" or self.truncation_mode != "keep_start":
                raise ValueError(
                    "`reference_logps='sampled'` needs pairs sampled before training, and cut at their end. Leave "
                    "`sampling` at 'offline' and `truncation_mode` at 'keep_start'."
                )
            self.precompute_ref_log_probs = True  # to TRL they are precomputed
        if self.gamma is not None and self.beta is not None and self.gamma != self.beta:
            raise ValueError(
                f"`gamma`={self.gamma} and `beta`={self.beta} are two names of the same temperature of the loss. Set "
                "one of them. (The beta of RSO's Algorithm 1 is `rejection_beta`.)"
            )
        given = self.gamma if self.gamma is not None else self.beta
        self.gamma = self.beta = 0.05 if given is None else given
        if not isinstance(self.gamma, int | float) or not 0 < self.gamma < math.inf:
            raise ValueError(
                f"`gamma` (or `beta`) must be greater than 0 and finite, got {self.gamma!r}. The paper uses 0.05."
            )
        loss_types = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        self.loss_type = [LOSS_NAMES.get(loss_type, loss_type) for loss_type in loss_types]
        if self.label_columns:
            refuse(self, TRL_LOSS_ARGUMENTS, "with `soft_labels` or `margin_weight` the loss is not TRL's")
            if self.loss_type not in (["sigmoid"], ["hinge"]):
                raise ValueError(
                    f"`soft_labels` and `margin_weight` need 'sigmoid-norm' or 'hinge-norm', not {self.loss_type}."
                )
        super().__post_init__()
        if given is None and self.process_index == 0:
            logger.warning(
                "`gamma` is not set and is 0.05, as in the RSO paper. `DPOTrainer` calls it `beta`, with a default of "
                "0.1. Set either name to choose."
            )
        if "sigmoid_norm" in self.loss_type and self.process_index == 0:
            logger.warning(
                "`loss_type='sigmoid_norm'` is TRL's length-normalized loss. RSO's sigmoid-norm (eq. 10) is "
                "'sigmoid-norm', TRL's 'sigmoid'."
            )

    @property
    def keep_logps(self) -> bool:
        return self.reference_logps == "sampled"
