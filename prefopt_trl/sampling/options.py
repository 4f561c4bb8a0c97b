"""The options of sampling and selection: each with its help, default and check, once. Imports the standard library
alone."""

import math
from dataclasses import dataclass, field
from typing import Any

from prefopt_trl.generation.options import GenerationOptions, is_number, is_one_of, is_whole

STRATEGIES = ["rso", "sft", "top-k"]
AUTO = "auto"  # value of `rejection_beta`
BY_REWARD = ["best-worst", "best-quantile", "correct-wrong"]  # pairings that rewards alone make and label
PAIRINGS = ["first-round", "tournament", "all", *BY_REWARD]
# In place of a pairing: the kept candidates are ranked by reward, or the best of them is the target of SFT
RANKING, BEST = "ranking", "best"

# Help of the options that some configurations give another default or another name
NUM_SAMPLES = {"help": "Completions kept per prompt."}
STRATEGY = {
    "help": "How `num_samples` completions are kept out of `num_candidates`: 'rso' by statistical rejection "
    "sampling, 'sft' at random (sft-sample-rank), 'top-k' the ones with the highest reward.",
    "choices": STRATEGIES,
}
PAIRING = {
    "help": "Which kept completions are compared: 'first-round' (num_samples / 2 random pairs), 'tournament' "
    "(num_samples - 1 pairs of a knock-out tournament) or 'all'; by reward alone 'best-worst', 'best-quantile' (the "
    "rejected one is nearest to mean minus `rejected_deviations` standard deviations) or 'correct-wrong' (rewards 1 "
    "and 0, at random). 'ranking' ranks them by reward instead, for the trainers that learn from rankings, and 'best' "
    "takes the best, for SFT. To pair all candidates, set strategy='sft' and num_samples=num_candidates.",
    "choices": [*PAIRINGS, RANKING, BEST],
}


@dataclass(kw_only=True)
class SamplingOptions(GenerationOptions):
    """How completions are generated, and which of them become preferences (RSO section 5).

    Raises:
        ValueError: naming an option that is out of its range, or whose name is unknown.

    Example:

    ```python
    >>> from prefopt_trl import SamplingOptions
    >>> SamplingOptions(num_candidates=16, max_new_tokens=128).num_samples
    8

    ```
    """

    strategy: str = field(default="rso", metadata=STRATEGY)
    num_candidates: int = field(default=64, metadata={"help": "Completions sampled per prompt."})
    num_samples: int = field(default=8, metadata=NUM_SAMPLES)
    pairing: str = field(default="first-round", metadata=PAIRING)
    rejection_beta: float | str = field(
        default=0.5,
        metadata={
            "help": "The paper's beta in Algorithm 1, in units of the ranker's reward: small trusts the ranker (0 "
            "keeps the top `num_samples`), large stays with the policy that is sampled. 'auto' chooses it for each "
            "prompt, from calibrated rewards."
        },
    )
    rejected_deviations: float = field(
        default=2.0, metadata={"help": "Standard deviations from mean to rejected reward, for 'best-quantile'."}
    )
    min_margin: float | None = field(
        default=None, metadata={"help": "Leave out pairs whose rewards differ by less, in the ranker's unit."}
    )
    max_margin: float | None = field(default=None, metadata={"help": "Leave out pairs whose rewards differ by more."})
    length_penalty: float = field(
        default=0.0, metadata={"help": "Nats per character to subtract from rewards, except saved candidates'."}
    )
    unfinished_penalty: float = field(
        default=0.0, metadata={"help": "Nats to subtract likewise if a completion was cut at `max_new_tokens`."}
    )

    def __post_init__(self) -> None:
        is_number(self, "temperature", "Algorithm 1 assumes 1.", above_zero=True)
        super().__post_init__()
        is_one_of(self, "strategy", STRATEGIES)
        is_one_of(self, "pairing", [*PAIRINGS, RANKING, BEST])
        is_whole(self, "num_candidates", 1)
        is_whole(self, "num_samples", 2)  # to make a pair
        if self.num_samples > self.num_candidates:
            raise ValueError(
                f"`num_samples`={self.num_samples} completions cannot be kept out of "
                f"`num_candidates`={self.num_candidates}. Lower the first or raise the second."
            )
        beta = self.rejection_beta
        if beta != AUTO and not (isinstance(beta, int | float) and beta >= 0):  # NaN is not
            raise ValueError(f"`rejection_beta` must be 'auto', or at least 0, got {beta!r}. The paper uses 0.5.")
        for name, pairings in (
            ("rejected_deviations", ["best-quantile"]),
            ("min_margin", PAIRINGS),
            ("max_margin", PAIRINGS),
        ):
            value, default = getattr(self, name), getattr(SamplingOptions, name)
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a finite number, got {value!r}.")
            if value != default and self.pairing not in pairings:
                raise ValueError(f"`{name}` has no effect with pairing={self.pairing!r}. Leave it out.")
        if self.min_margin is not None and self.max_margin is not None and self.min_margin > self.max_margin:
            raise ValueError(f"`min_margin`={self.min_margin} is above `max_margin`={self.max_margin}. Swap them.")
        for name, unit in (("length_penalty", "nats per character"), ("unfinished_penalty", "nats")):
            is_number(self, name, f"It is in {unit}.")
            if getattr(self, name) and self.pairing == "correct-wrong":
                raise ValueError(f"`{name}` changes rewards, and pairing='correct-wrong' needs 1 and 0. Leave it out.")

    @property
    def effective_beta(self) -> float:
        """Beta of Algorithm 1 that the strategy stands for: its own, or one of its limits (RSO section 3.2).

        It is NaN if it depends on the prompt.
        """
        own = math.nan if isinstance(self.rejection_beta, str) else self.rejection_beta
        return {"rso": own, "sft": math.inf, "top-k": 0.0}[self.strategy]

    @property
    def can_correct(self) -> bool:
        """Whether Algorithm 1 has a beta that weighs rewards against log-ratios of a proposal."""
        return self.effective_beta not in (0.0, math.inf)

    def allows(self, margin: Any) -> Any:
        """Return whether a difference of rewards is within the margins; of an array, for each of them."""
        lowest = -math.inf if self.min_margin is None else self.min_margin
        return (margin >= lowest) & (margin <= (math.inf if self.max_margin is None else self.max_margin))
