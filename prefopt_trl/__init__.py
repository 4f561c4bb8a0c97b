"""Preference optimisation from sampled preferences, on TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefopt_trl import losses
    from prefopt_trl.data.collators import DataCollatorForRanking
    from prefopt_trl.data.hh_rlhf import load_hh_rlhf
    from prefopt_trl.rankers import FunctionRanker, PairwiseRanker, RewardModelRanker
    from prefopt_trl.sampling.collator import DataCollatorForRejectionSampling
    from prefopt_trl.sampling.generation import sample_completions
    from prefopt_trl.sampling.pairing import all_pairs, first_round_pairs, tournament_pairs
    from prefopt_trl.sampling.pipeline import build_preference_dataset
    from prefopt_trl.sampling.rejection import statistical_rejection_sampling
    from prefopt_trl.trainers.listwise_dpo_config import ListwiseDPOConfig
    from prefopt_trl.trainers.listwise_dpo_trainer import ListwiseDPOTrainer
    from prefopt_trl.trainers.pro_config import PROConfig
    from prefopt_trl.trainers.pro_trainer import PROTrainer
    from prefopt_trl.trainers.rrhf_config import RRHFConfig
    from prefopt_trl.trainers.rrhf_trainer import RRHFTrainer
    from prefopt_trl.trainers.rso_config import RSOConfig
    from prefopt_trl.trainers.rso_trainer import RSOTrainer
    from prefopt_trl.trainers.slic_config import SLiCConfig
    from prefopt_trl.trainers.slic_trainer import SLiCTrainer

__version__ = "0.1.0"

# Resolved on first use, so that `prefopt-trl --help` and pure-numpy users do not wait for torch
_HOME = {
    "DataCollatorForRanking": "data.collators",
    "DataCollatorForRejectionSampling": "sampling.collator",
    "FunctionRanker": "rankers.function",
    "ListwiseDPOConfig": "trainers.listwise_dpo_config",
    "ListwiseDPOTrainer": "trainers.listwise_dpo_trainer",
    "PROConfig": "trainers.pro_config",
    "PROTrainer": "trainers.pro_trainer",
    "PairwiseRanker": "rankers.pairwise",
    "RRHFConfig": "trainers.rrhf_config",
    "RRHFTrainer": "trainers.rrhf_trainer",
    "RSOConfig": "trainers.rso_config",
    "RSOTrainer": "trainers.rso_trainer",
    "RewardModelRanker": "rankers.pointwise",
    "SLiCConfig": "trainers.slic_config",
    "SLiCTrainer": "trainers.slic_trainer",
    "all_pairs": "sampling.pairing",
    "build_preference_dataset": "sampling.pipeline",
    "decode_shared_prefix": "shared_prefix.decoding",
    "first_round_pairs": "sampling.pairing",
    "load_hh_rlhf": "data.hh_rlhf",
    "push_preference_dataset": "sampling.card",
    "sample_completions": "sampling.generation",
    "statistical_rejection_sampling": "sampling.rejection",
    "tournament_pairs": "sampling.pairing",
}

__all__ = [
    "DataCollatorForRanking",
    "DataCollatorForRejectionSampling",
    "FunctionRanker",
    "ListwiseDPOConfig",
    "ListwiseDPOTrainer",
    "PROConfig",
    "PROTrainer",
    "PairwiseRanker",
    "RRHFConfig",
    "RRHFTrainer",
    "RSOConfig",
    "RSOTrainer",
    "RewardModelRanker",
    "SLiCConfig",
    "SLiCTrainer",
    "all_pairs",
    "build_preference_dataset",
    "decode_shared_prefix",
    "first_round_pairs",
    "load_hh_rlhf",
    "losses",
    "push_preference_dataset",
    "sample_completions",
    "statistical_rejection_sampling",
    "tournament_pairs",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("prefopt_trl.losses")
    if name in _HOME:
        return getattr(import_module(f"prefopt_trl.{_HOME[name]}"), name)
    raise AttributeError(f"module 'prefopt_trl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
