"""Preference optimization from sampled preferences, on TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefopt_trl.runtime.quiet import quiet_libraries
from prefopt_trl.trainers import METHODS as _METHODS

if TYPE_CHECKING:  # `as` makes a name public for type checkers
    from prefopt_trl import losses as losses
    from prefopt_trl.data.collators import DataCollatorForRanking as DataCollatorForRanking
    from prefopt_trl.data.hh_rlhf import load_hh_rlhf as load_hh_rlhf
    from prefopt_trl.evaluation.comparison import PolicyEvaluation as PolicyEvaluation
    from prefopt_trl.evaluation.policy import BestOf as BestOf
    from prefopt_trl.evaluation.policy import evaluate_policy as evaluate_policy
    from prefopt_trl.evaluation.ranker_quality import RankerQuality as RankerQuality
    from prefopt_trl.evaluation.ranker_quality import evaluate_ranker as evaluate_ranker
    from prefopt_trl.evaluation.win_rate import WinRateCallback as WinRateCallback
    from prefopt_trl.generation.generators import ContinuousBatchingGenerator as ContinuousBatchingGenerator
    from prefopt_trl.generation.generators import Generator as Generator
    from prefopt_trl.generation.generators import OpenAIGenerator as OpenAIGenerator
    from prefopt_trl.generation.generators import SharedPrefixGenerator as SharedPrefixGenerator
    from prefopt_trl.generation.options import GenerationOptions as GenerationOptions
    from prefopt_trl.generation.sampler import Candidates as Candidates
    from prefopt_trl.generation.sampler import sample_completions as sample_completions
    from prefopt_trl.rankers.calibration import Calibration as Calibration
    from prefopt_trl.rankers.calibration import calibrate as calibrate
    from prefopt_trl.rankers.ensemble import EnsembleRanker as EnsembleRanker
    from prefopt_trl.rankers.function import FunctionRanker as FunctionRanker
    from prefopt_trl.rankers.judge import JudgeRanker as JudgeRanker
    from prefopt_trl.rankers.pairwise import PairwiseRanker as PairwiseRanker
    from prefopt_trl.rankers.pointwise import RewardModelRanker as RewardModelRanker
    from prefopt_trl.rankers.process import ProcessRewardRanker as ProcessRewardRanker
    from prefopt_trl.rankers.remote import RemoteRewardRanker as RemoteRewardRanker
    from prefopt_trl.rounds.options import RoundsOptions as RoundsOptions
    from prefopt_trl.rounds.rounds import Rounds as Rounds
    from prefopt_trl.rounds.rounds import train_in_rounds as train_in_rounds
    from prefopt_trl.sampling.collator import DataCollatorForRejectionSampling as DataCollatorForRejectionSampling
    from prefopt_trl.sampling.options import SamplingOptions as SamplingOptions
    from prefopt_trl.sampling.pairing import all_pairs as all_pairs
    from prefopt_trl.sampling.pairing import first_round_pairs as first_round_pairs
    from prefopt_trl.sampling.pairing import tournament_pairs as tournament_pairs
    from prefopt_trl.sampling.pipeline import build_preference_dataset as build_preference_dataset
    from prefopt_trl.sampling.publishing import push_preference_dataset as push_preference_dataset
    from prefopt_trl.sampling.rejection import statistical_rejection_sampling as statistical_rejection_sampling
    from prefopt_trl.shared_prefix.decoding import decode_shared_prefix as decode_shared_prefix
    from prefopt_trl.trainers.listwise_dpo_config import ListwiseDPOConfig as ListwiseDPOConfig
    from prefopt_trl.trainers.listwise_dpo_trainer import ListwiseDPOTrainer as ListwiseDPOTrainer
    from prefopt_trl.trainers.pro_config import PROConfig as PROConfig
    from prefopt_trl.trainers.pro_trainer import PROTrainer as PROTrainer
    from prefopt_trl.trainers.rrhf_config import RRHFConfig as RRHFConfig
    from prefopt_trl.trainers.rrhf_trainer import RRHFTrainer as RRHFTrainer
    from prefopt_trl.trainers.rso_config import RSOConfig as RSOConfig
    from prefopt_trl.trainers.rso_trainer import RSOTrainer as RSOTrainer
    from prefopt_trl.trainers.slic_config import SLiCConfig as SLiCConfig
    from prefopt_trl.trainers.slic_trainer import SLiCTrainer as SLiCTrainer

__version__ = "0.1.0"

# Resolved on first use, so that `prefopt-trl --help` and pure-numpy users do not wait for torch
_HOME = {
    "BestOf": "evaluation.policy",
    "Calibration": "rankers.calibration",
    "Candidates": "generation.sampler",
    "ContinuousBatchingGenerator": "generation.generators",
    "DataCollatorForRanking": "data.collators",
    "DataCollatorForRejectionSampling": "sampling.collator",
    "EnsembleRanker": "rankers.ensemble",
    "FunctionRanker": "rankers.function",
    "GenerationOptions": "generation.options",
    "Generator": "generation.generators",
    "JudgeRanker": "rankers.judge",
    "OpenAIGenerator": "generation.generators",
    "PairwiseRanker": "rankers.pairwise",
    "PolicyEvaluation": "evaluation.comparison",
    "ProcessRewardRanker": "rankers.process",
    "RankerQuality": "evaluation.ranker_quality",
    "RemoteRewardRanker": "rankers.remote",
    "RewardModelRanker": "rankers.pointwise",
    "Rounds": "rounds.rounds",
    "RoundsOptions": "rounds.options",
    "SamplingOptions": "sampling.options",
    "SharedPrefixGenerator": "generation.generators",
    "WinRateCallback": "evaluation.win_rate",
    "all_pairs": "sampling.pairing",
    "build_preference_dataset": "sampling.pipeline",
    "calibrate": "rankers.calibration",
    "decode_shared_prefix": "shared_prefix.decoding",
    "evaluate_policy": "evaluation.policy",
    "evaluate_ranker": "evaluation.ranker_quality",
    "first_round_pairs": "sampling.pairing",
    "load_hh_rlhf": "data.hh_rlhf",
    "push_preference_dataset": "sampling.publishing",
    "sample_completions": "generation.sampler",
    "statistical_rejection_sampling": "sampling.rejection",
    "tournament_pairs": "sampling.pairing",
    "train_in_rounds": "rounds.rounds",
    **{
        f"{method.name}{kind}": f"trainers.{command.replace('-', '_')}_{kind.lower()}"
        for command, method in _METHODS.items()
        for kind in ("Config", "Trainer")
    },
}

if not TYPE_CHECKING:  # type checkers cannot evaluate it, and would hide every name
    __all__ = [*_HOME, "losses"]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("prefopt_trl.losses")
    if name in _HOME:
        quiet_libraries()  # before they are imported
        return getattr(import_module(f"prefopt_trl.{_HOME[name]}"), name)
    raise AttributeError(f"module 'prefopt_trl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOME, "losses"])
