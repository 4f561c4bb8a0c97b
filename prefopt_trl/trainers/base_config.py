"""What the configurations of all trainers share: prompts computed once, and sampling before or during training."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from trl import DPOConfig

from prefopt_trl.generation.options import is_number, is_one_of
from prefopt_trl.sampling.options import NUM_SAMPLES, PAIRING, PAIRINGS, RANKING, STRATEGY, SamplingOptions
from prefopt_trl.trainers.callbacks import TABLE_TRACKERS

# Arguments of `DPOConfig` that belong to TRL's own losses, and those that need a reference model
TRL_LOSS_ARGUMENTS = [
    "loss_weights",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "label_smoothing",
    "use_weighting",
    "discopop_tau",
]
REFERENCE_ARGUMENTS = [
    "beta",
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "sampling_policy",
]


@dataclass
class PreferenceConfig(SamplingOptions, DPOConfig):
    """Every argument of [`~trl.DPOConfig`], those of [`SamplingOptions`] and those below, which all trainers of this
    package have. Sampling is for training data that are prompts without completions.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
    """

    _pairings = PAIRINGS  # those that the trainer takes

    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Log a table of completions with their rewards to 'tensorboard', 'trackio' and 'wandb', as far as "
            "`report_to` names them: the first of the training data when training begins, or those of the latest "
            "batch whenever the loss is logged, where batches are sampled while training."
        },
    )

    sampling: str = field(
        default="offline",
        metadata={
            "help": "When prompts are sampled: 'offline' before training, into a dataset that is saved (the papers' "
            "way), 'online' batch by batch while training.",
            "choices": ["offline", "online"],
        },
    )
    sampling_policy: str = field(
        default="current",
        metadata={
            "help": "What `sampling='online'` samples from: 'current', the policy as it is at that step, or "
            "'reference', the reference model, as `sampling='offline'` does.",
            "choices": ["current", "reference"],
        },
    )

    soft_labels: bool = field(
        default=False,
        metadata={"help": "Train on the ranker's probability of a pair's label (`label_probability`), not the label."},
    )
    margin_weight: float = field(
        default=0.0,
        metadata={"help": "Alpha of ODPO: demand this times `chosen_reward` - `rejected_reward` more of a pair."},
    )

    def __post_init__(self) -> None:
        is_one_of(self, "sampling", ["offline", "online"])
        is_one_of(self, "sampling_policy", ["current", "reference"])
        if self.sampling == "online" and self.sampling_policy == "reference" and self.sync_ref_model:
            raise ValueError(
                "`sync_ref_model` moves the reference model, and `sampling_policy='reference'` samples from it as it "
                "was before training. Set one of them."
            )
        if self.sampling == "online" and self.precompute_ref_log_probs:
            raise ValueError(
                "`precompute_ref_log_probs` needs the pairs before training, and `sampling='online'` samples them "
                "later. Set one of them."
            )
        is_number(self, "margin_weight", "It is ODPO's alpha.")
        if self.soft_labels and self.margin_weight:
            raise ValueError("`soft_labels` and `margin_weight` would count the rewards twice. Set one of them.")
        SamplingOptions.__post_init__(self)
        is_one_of(self, "pairing", self._pairings)
        DPOConfig.__post_init__(self)
        if self.sampling == "online" and self.dataloader_num_workers:
            raise ValueError(
                "`sampling='online'` generates inside the training process, not in its dataloader's workers. Set "
                "`dataloader_num_workers=0`."
            )
        accelerator: Any = self.accelerator_config  # no `dict` any more
        if accelerator.dispatch_batches and (self.sampling == "online" or RANKING in self._pairings):
            raise ValueError(
                "`dispatch_batches=True` deals out the rows of a batch, and tears the completions of a prompt apart. "
                "Leave it out of `accelerator_config`."
            )
        if self.log_completions and not set(TABLE_TRACKERS) & set(self.report_to or []):
            raise ValueError(
                f"`log_completions` has no effect with `report_to`={self.report_to}, which has none of "
                f"{', '.join(TABLE_TRACKERS)}. Name one there, or leave `log_completions` out."
            )

    @property
    def samples_while_training(self) -> bool:
        """Whether completions are sampled, and the ranker is asked, during training."""
        return self.sampling == "online"

    @property
    def keep_logps(self) -> bool:
        """Whether the log-probabilities of what is sampled are written down."""
        return False

    @property
    def label_columns(self) -> list[str]:
        """Columns of pairs that the loss reads."""
        if self.soft_labels:
            return ["label_probability"]
        return ["chosen_reward", "rejected_reward"] if self.margin_weight else []


@dataclass
class RankingConfig(PreferenceConfig):
    """What the configurations of trainers on rankings share: sampled completions are ranked, not paired."""

    _pairings = [RANKING]
    _has_losses = False  # to choose from with `loss_type`

    strategy: str = field(default="sft", metadata=STRATEGY)
    num_samples: int = field(default=4, metadata=NUM_SAMPLES)
    pairing: str = field(default=RANKING, metadata=PAIRING)

    def __post_init__(self) -> None:
        names = TRL_LOSS_ARGUMENTS if self._has_losses else [*TRL_LOSS_ARGUMENTS, "loss_type"]
        refuse(self, [*names, "soft_labels", "margin_weight"], "it is for losses on pairs")
        super().__post_init__()


def refuse(config: DPOConfig, names: Iterable[str], reason: str) -> None:
    """Refuse arguments that would be without effect; the `ValueError` names one that is not at its default."""
    for argument in fields(config):
        if argument.name in names:
            default = argument.default_factory() if callable(argument.default_factory) else argument.default
            if getattr(config, argument.name) != default:
                raise ValueError(
                    f"`{argument.name}`={getattr(config, argument.name)!r} has no effect in "
                    f"{type(config).__name__}: {reason}. Leave it out."
                )
