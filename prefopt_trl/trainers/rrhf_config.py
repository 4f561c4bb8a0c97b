"""Configuration of `RRHFTrainer`."""

from dataclasses import dataclass, field

from prefopt_trl.generation.options import is_number
from prefopt_trl.trainers.base_config import REFERENCE_ARGUMENTS, RankingConfig, refuse


@dataclass
class RRHFConfig(RankingConfig):
    """Configuration of [`RRHFTrainer`]: the arguments of [`~trl.DPOConfig`], and those below.

    Arguments that need a reference model, and those of TRL's own losses, are refused.

    Raises:
        ValueError: if a number is out of its range, a name unknown, or an argument is set that would have no effect.

    Example:

    ```python
    >>> from prefopt_trl import RRHFConfig
    >>> RRHFConfig("outputs/rrhf", use_cpu=True, bf16=False).sft_weight
    1.0

    ```
    """

    sft_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the log-likelihood of the best completion, summed over its tokens (lambda in RSO "
            "section 1), at least 0. Default 1, our choice: the paper adds the unweighted terms."
        },
    )

    def __post_init__(self) -> None:
        refuse(self, REFERENCE_ARGUMENTS, "RRHF has no reference model")
        is_number(self, "sft_weight", "The default is 1.")
        super().__post_init__()
