"""Configuration of `PROTrainer`."""

from dataclasses import dataclass, field
from typing import Any

from prefopt_trl.generation.options import is_number, is_one_of
from prefopt_trl.trainers.base_config import REFERENCE_ARGUMENTS, RankingConfig, refuse

REWARD_TEMPERATURES = ["dynamic", "none"]


@dataclass
class PROConfig(RankingConfig):
    """Configuration of [`PROTrainer`]: the arguments of [`~trl.DPOConfig`], and those below.

    Arguments that need a reference model, and those of TRL's own losses, are refused.

    Raises:
        ValueError: if a number is out of its range, a name unknown, or an argument is set that would have no effect.

    Example:

    ```python
    >>> from prefopt_trl import PROConfig
    >>> args = PROConfig("outputs/pro", sft_weight=0.05, reward_temperature="none", use_cpu=True, bf16=False)
    >>> args.reward_temperature, args.temperature
    ('none', 1.0)

    ```
    """

    # Parameters that control the loss
    reward_temperature: str = field(
        default="dynamic",
        metadata={
            "help": "Temperatures of the ranking term: 'dynamic' takes them from differences of rewards (PRO eq. "
            "9-11), 'none' sets them to 1 (PRO eq. 8).",
            "choices": REWARD_TEMPERATURES,
        },
    )
    sft_weight: float = field(
        default=0.05,
        metadata={
            "help": "Weight of the log-likelihood of the best completion, summed over its tokens, at least 0; it is "
            "multiplied by (n - 1)**2 for n completions (PRO section 4.3, eq. 7)."
        },
    )
    first_term_only: bool = field(
        default=False,
        metadata={
            "help": "Contrast only the best completion with the others, the paper's ablation (PRO section 4.7): the "
            "term k = 1 of eq. 8 or 9."
        },
    )
    bootstrap_parts: int = field(
        default=0,
        metadata={
            "help": "Self-bootstrapping (PRO Algorithm 1): split the training data into this many parts, and before "
            "each add to every prompt a completion sampled from the policy as it then is. Needs a `ranker`, which "
            "scores all completions of the prompt, in place of the data's rewards. 0: none."
        },
    )

    def __post_init__(self) -> None:
        refuse(self, REFERENCE_ARGUMENTS, "PRO has no reference model")
        is_one_of(self, "reward_temperature", REWARD_TEMPERATURES)
        is_number(self, "sft_weight", "The paper uses 0.05.")
        if not isinstance(self.bootstrap_parts, int) or self.bootstrap_parts < 0:
            raise ValueError(
                f"`bootstrap_parts` must be a whole number, at least 0, got {self.bootstrap_parts!r}. 0 turns it off."
            )
        if self.bootstrap_parts:
            refuse(self, ["length_penalty", "unfinished_penalty"], "`bootstrap_parts` ranks by the ranker's reward")
        if self.bootstrap_parts and self.train_sampling_strategy != "random":
            raise ValueError(
                f"`train_sampling_strategy`={self.train_sampling_strategy!r} has no effect with `bootstrap_parts`, "
                "which goes through the data part by part. Leave it out."
            )
        if self.bootstrap_parts and self.sampling == "online":
            raise ValueError(
                "`bootstrap_parts` adds samples to completions, and `sampling='online'` is for prompts without any. "
                "Set one of them."
            )
        super().__post_init__()
        accelerator: Any = self.accelerator_config  # no `dict` any more
        if self.bootstrap_parts and accelerator.even_batches is False:
            raise ValueError(
                "`even_batches=False` gives processes batches of different lengths, and with `bootstrap_parts` they "
                "sample together. Leave it out of `accelerator_config`."
            )

    @property
    def samples_while_training(self) -> bool:
        return super().samples_while_training or self.bootstrap_parts > 0
