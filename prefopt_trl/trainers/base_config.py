"""What the configurations of all trainers share: prompts computed once, and sampling before or during training."""

from dataclasses import dataclass, field
from typing import Any

from trl import DPOConfig

from prefopt_trl.sampling.selection import PAIRINGS, RANKING, STRATEGIES
from prefopt_trl.trainers.arguments import TRL_LOSS_ARGUMENTS, is_number, is_one_of, refuse
from prefopt_trl.trainers.callbacks import TABLE_TRACKERS


@dataclass
class PreferenceConfig(DPOConfig):
    """Every argument of [`~trl.DPOConfig`], and those below, which all trainers of this package have.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
    """

    share_prefix: bool = field(
        default=True,
        metadata={
            "help": "Compute each prompt once for all its completions, in training and in sampling. Exact; where a "
            "model cannot share (sliding window, ALiBi, recurrence) one logged line says so and each completion is a "
            "row of its own."
        },
    )

    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Log a table of completions with their rewards to 'tensorboard', 'trackio' and 'wandb', as far as "
            "`report_to` names them: the first of the training data when training begins, or those of the latest "
            "batch whenever the loss is logged, where batches are sampled while training."
        },
    )

    # Parameters that control sampling, used when the training data are prompts without completions
    sampling: str = field(
        default="offline",
        metadata={
            "help": "When prompts are sampled: 'offline' before training, into a dataset that is saved (the papers' "
            "way), 'online' batch by batch while training, from the reference model.",
            "choices": ["offline", "online"],
        },
    )
    strategy: str = field(
        default="rso",
        metadata={
            "help": "How `num_samples` completions are kept out of `num_candidates`: 'rso' by statistical rejection "
            "sampling, 'sft' at random (sft-sample-rank), 'top-k' the ones with the highest reward.",
            "choices": list(STRATEGIES),
        },
    )
    num_candidates: int = field(
        default=64, metadata={"help": "Completions sampled per prompt from the policy as it is before training."}
    )
    num_samples: int = field(default=8, metadata={"help": "Completions kept per prompt."})
    pairing: str = field(
        default="first-round",
        metadata={
            "help": "Which kept completions are compared: 'first-round' (num_samples / 2 random pairs), 'tournament' "
            "(num_samples - 1 pairs of a knock-out tournament) or 'all'; 'ranking' ranks them by reward instead, for "
            "the trainers that learn from rankings.",
            "choices": [*PAIRINGS, RANKING],
        },
    )
    rejection_beta: float = field(
        default=0.5,
        metadata={
            "help": "The paper's beta in Algorithm 1, in units of the ranker's reward: small trusts the ranker (0 "
            "keeps the top `num_samples`), large stays with the reference policy."
        },
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Longest completion to sample, in tokens."})
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature. Algorithm 1 assumes samples of the policy itself: 1."}
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling threshold; 1 keeps the whole distribution."})
    top_k: int = field(
        default=0, metadata={"help": "Sample among the k most likely tokens only; 0 means all of them."}
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions generated at a time, over all prompts. By default as many as "
            "`generation_memory_budget` holds."
        },
    )
    generation_memory_budget: float = field(
        default=4.0,
        metadata={
            "help": "GiB for what sampling needs beside the model: keys, values and scores of completions as long as "
            "they may be. Raise it on a large GPU; lower it where memory runs out."
        },
    )

    def __post_init__(self) -> None:
        is_one_of(self, "sampling", ["offline", "online"])
        if not isinstance(self.share_prefix, bool):
            raise ValueError(f"`share_prefix` must be True or False, got {self.share_prefix!r}.")
        if self.sampling == "online" and self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model` moves the reference model, and `sampling='online'` samples from it as it was before "
                "training. Set one of them."
            )
        if self.sampling == "online" and self.precompute_ref_log_probs:
            raise ValueError(
                "`precompute_ref_log_probs` needs the pairs before training, and `sampling='online'` samples them "
                "later. Set one of them."
            )
        for name in ("num_candidates", "num_samples", "max_new_tokens", "top_k"):
            if type(value := getattr(self, name)) is not int:
                raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
        if not isinstance(self.rejection_beta, int | float) or not self.rejection_beta >= 0:
            raise ValueError(f"`rejection_beta` must be at least 0, got {self.rejection_beta!r}. The paper uses 0.5.")
        is_one_of(self, "strategy", STRATEGIES)
        is_one_of(self, "pairing", self._pairings())
        temperature = self.generation_options()["temperature"]
        if not isinstance(temperature, int | float) or not temperature > 0:
            raise ValueError(f"`temperature` must be greater than 0, got {temperature!r}. Algorithm 1 assumes 1.")
        if self.max_new_tokens < 1 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"`max_new_tokens`={self.max_new_tokens} must be at least 1, `top_k`={self.top_k} at least 0 and "
                f"`top_p`={self.top_p} in (0, 1]."
            )
        if self.generation_batch_size is not None and self.generation_batch_size < 1:
            raise ValueError(f"`generation_batch_size`={self.generation_batch_size} must be at least 1, or None.")
        is_number(self, "generation_memory_budget", "It is in GiB.", above_zero=True)
        if self.num_samples < 2:
            raise ValueError(f"`num_samples` must be at least 2 to make a pair, got {self.num_samples}.")
        if self.num_samples > self.num_candidates:
            raise ValueError(
                f"`num_samples`={self.num_samples} completions cannot be kept out of "
                f"`num_candidates`={self.num_candidates}. Lower the first or raise the second."
            )
        super().__post_init__()
        if self.log_completions and not set(TABLE_TRACKERS) & set(self.report_to or []):
            raise ValueError(
                f"`log_completions` has no effect with `report_to`={self.report_to}, which has none of "
                f"{', '.join(TABLE_TRACKERS)}. Name one there, or leave `log_completions` out."
            )

    def _pairings(self) -> list[str]:
        return list(PAIRINGS)

    def generation_options(self) -> dict[str, Any]:
        """The arguments of [`sample_completions`] that say how to sample."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "batch_size": self.generation_batch_size,
            "memory_budget": self.generation_memory_budget,
            "share_prefix": "auto" if self.share_prefix else False,
        }

    def selection_options(self) -> dict[str, Any]:
        """The arguments of [`build_preference_dataset`] that say what is kept of the candidates, and who meets."""
        return {
            "strategy": self.strategy,
            "num_candidates": self.num_candidates,
            "num_samples": self.num_samples,
            "beta": self.rejection_beta,
            "pairing": self.pairing,
            "seed": self.seed,
        }


@dataclass
class RankingConfig(PreferenceConfig):
    """What the configurations of trainers on rankings share: sampled completions are ranked, not paired."""

    strategy: str = field(default="sft", metadata=PreferenceConfig.__dataclass_fields__["strategy"].metadata)
    num_samples: int = field(default=4, metadata=PreferenceConfig.__dataclass_fields__["num_samples"].metadata)
    pairing: str = field(default=RANKING, metadata=PreferenceConfig.__dataclass_fields__["pairing"].metadata)

    def __post_init__(self) -> None:
        refuse(self, [*TRL_LOSS_ARGUMENTS, "loss_type"], "it is for TRL's losses on pairs")
        super().__post_init__()

    def _pairings(self) -> list[str]:
        return [RANKING]
