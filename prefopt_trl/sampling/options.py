"""The options of sampling and selection: each with its help, default and check, once. Imports the standard library
alone."""

import math
from dataclasses import dataclass, field

from prefopt_trl.generation.options import GenerationOptions, is_number, is_one_of, is_whole

STRATEGIES = ["rso", "sft", "top-k"]
PAIRINGS = ["first-round", "tournament", "all"]
RANKING = "ranking"  # in place of a pairing: the kept candidates are ranked by reward

# Help of the options that some configurations give another default or another name
NUM_SAMPLES = {"help": "Completions kept per prompt."}
STRATEGY = {
    "help": "How `num_samples` completions are kept out of `num_candidates`: 'rso' by statistical rejection "
    "sampling, 'sft' at random (sft-sample-rank), 'top-k' the ones with the highest reward.",
    "choices": STRATEGIES,
}
PAIRING = {
    "help": "Which kept completions are compared: 'first-round' (num_samples / 2 random pairs), 'tournament' "
    "(num_samples - 1 pairs of a knock-out tournament) or 'all'; 'ranking' ranks them by reward instead, for "
    "the trainers that learn from rankings.",
    "choices": [*PAIRINGS, RANKING],
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
    rejection_beta: float = field(
        default=0.5,
        metadata={
            "help": "The paper's beta in Algorithm 1, in units of the ranker's reward: small trusts the ranker (0 "
            "keeps the top `num_samples`), large stays with the policy that is sampled."
        },
    )

    def __post_init__(self) -> None:
        is_number(self, "temperature", "Algorithm 1 assumes 1.", above_zero=True)
        super().__post_init__()
        is_one_of(self, "strategy", STRATEGIES)
        is_one_of(self, "pairing", [*PAIRINGS, RANKING])
        is_whole(self, "num_candidates", 1)
        is_whole(self, "num_samples", 2)  # to make a pair
        if self.num_samples > self.num_candidates:
            raise ValueError(
                f"`num_samples`={self.num_samples} completions cannot be kept out of "
                f"`num_candidates`={self.num_candidates}. Lower the first or raise the second."
            )
        if not isinstance(self.rejection_beta, int | float) or not self.rejection_beta >= 0:  # NaN is not
            raise ValueError(f"`rejection_beta` must be at least 0, got {self.rejection_beta!r}. The paper uses 0.5.")

    @property
    def effective_beta(self) -> float:
        """Beta of Algorithm 1 that the strategy stands for: its own, or one of its limits (RSO section 3.2)."""
        return {"rso": self.rejection_beta, "sft": math.inf, "top-k": 0.0}[self.strategy]
