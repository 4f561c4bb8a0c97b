"""The options of training in rounds: each with its help, default and check, once. Imports the standard library
alone."""

from dataclasses import dataclass, field, fields

from prefopt_trl.generation.options import Options, is_one_of, is_whole


@dataclass(kw_only=True)
class RoundsOptions(Options):
    """How rounds follow each other. The help of each field says what it means.

    Raises:
        ValueError: naming an option that is out of its range, or that has no effect beside another.
    """

    num_rounds: int = field(default=3, metadata={"help": "Rounds to train. A finished run may be given more of them."})
    start: str = field(
        default="previous",
        metadata={
            "help": "Model that a round trains: 'previous', that of the round before, or 'first', the model you gave.",
            "choices": ["previous", "first"],
        },
    )
    reference: str = field(
        default="first",
        metadata={
            "help": "Reference model of a round: 'first', the model you gave, which keeps all rounds near it, or "
            "'previous', that of the round before, so that the policy may move further with each round.",
            "choices": ["first", "previous"],
        },
    )
    data: str = field(
        default="replace",
        metadata={
            "help": "What a round trains on: 'replace', its own samples; 'accumulate', those of all rounds so far; "
            "'mix', its own and as many drawn from those of earlier rounds.",
            "choices": ["replace", "accumulate", "mix"],
        },
    )
    prompts_per_round: int | None = field(
        default=None,
        metadata={
            "help": "Prompts of each round: the next so many in a random order, from the beginning again after the "
            "last. By default every round has all prompts."
        },
    )
    importance_correction: bool = field(
        default=False,
        metadata={
            "help": "Correct later rounds for sampling another policy than the reference model: Algorithm 1 runs on "
            "reward - rejection_beta * log-ratio, so that the pairs follow RSO's target in every round. For "
            "strategy='rso' and reference='first'."
        },
    )
    proposal_clip: float | None = field(
        default=None,
        metadata={
            "help": "Limit of the distance of a log-ratio from the median of its prompt, in nats, for "
            "`importance_correction`."
        },
    )
    against: str = field(
        default="start",
        metadata={"help": "Opponent of the samples that are judged: 'start', the model you gave, or a column."},
    )
    metric: str = field(
        default="reward",
        metadata={
            "help": "What decides which round is the best, by the first judge.",
            "choices": ["reward", "win_rate", "lc_win_rate"],
        },
    )
    patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many rounds that are no better than the best. By default never."},
    )

    def __post_init__(self) -> None:
        is_whole(self, "num_rounds", 1)
        for option in fields(RoundsOptions):
            if "choices" in option.metadata:
                is_one_of(self, option.name, option.metadata["choices"])
        if self.importance_correction and self.reference == "previous":
            raise ValueError("`importance_correction` has no effect if `reference`, 'previous', is sampled.")
        if self.proposal_clip is not None and not self.importance_correction:
            raise ValueError("`proposal_clip` has no effect without `importance_correction`. Leave it out.")
        for name in ("prompts_per_round", "patience"):
            if getattr(self, name) is not None:
                is_whole(self, name, 1)
