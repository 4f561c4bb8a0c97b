"""Configuration of `ListwiseDPOTrainer`."""

from dataclasses import dataclass, field

from prefopt_trl.generation.options import is_number
from prefopt_trl.sampling.options import STRATEGY
from prefopt_trl.trainers.base_config import RankingConfig, refuse

LOSSES = ["plackett-luce", "lambda"]


@dataclass
class ListwiseDPOConfig(RankingConfig):
    """Configuration of [`ListwiseDPOTrainer`]: the arguments of [`~trl.DPOConfig`], and those below.

    `beta` is TRL's, 0.1 by default. The arguments of TRL's other losses are refused.

    Raises:
        ValueError: if a number is out of its range, a name unknown, or an argument is set that would have no effect.

    Example:

    ```python
    >>> from prefopt_trl import ListwiseDPOConfig
    >>> ListwiseDPOConfig("outputs/listwise-dpo", use_cpu=True, bf16=False).beta
    0.1

    ```
    """

    _has_losses = True

    loss_type: list[str] = field(
        default_factory=lambda: ["plackett-luce"],
        metadata={
            "help": "Loss: 'plackett-luce' (DPO eq. 20), for the order of the rewards, or 'lambda' (LiPO, arXiv "
            "2402.01878), for their differences, with gains 2^reward - 1. One of them."
        },
    )

    # Completions as the optimal policy would write them, as in RSO
    strategy: str = field(default="rso", metadata=STRATEGY)

    def __post_init__(self) -> None:
        is_number(self, "beta", "DPO uses 0.1 and 0.5.", above_zero=True)
        precomputing = ["precompute_ref_log_probs", "precompute_ref_batch_size"]
        refuse(self, precomputing, "it works on pairs only, and with `peft_config` there is no second copy to save")
        super().__post_init__()
        if len(self.loss_type) != 1 or self.loss_type[0] not in LOSSES:
            raise ValueError(f"`loss_type` must be one of {', '.join(LOSSES)}; got {self.loss_type!r}.")
