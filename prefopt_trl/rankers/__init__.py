"""Rankers: what says which of two completions is preferred, and by how much."""

from prefopt_trl.rankers.base import PointwiseRanker, Ranker, check_probabilities, check_rewards
from prefopt_trl.rankers.ensemble import EnsembleRanker
from prefopt_trl.rankers.function import FunctionRanker
from prefopt_trl.rankers.judge import JudgeRanker
from prefopt_trl.rankers.pairwise import PairwiseRanker, pairwise_ranker_dataset
from prefopt_trl.rankers.pointwise import RewardModelRanker
from prefopt_trl.rankers.process import ProcessRewardRanker
from prefopt_trl.rankers.remote import RemoteRewardRanker

__all__ = [
    "EnsembleRanker",
    "FunctionRanker",
    "JudgeRanker",
    "PairwiseRanker",
    "PointwiseRanker",
    "ProcessRewardRanker",
    "Ranker",
    "RemoteRewardRanker",
    "RewardModelRanker",
    "check_probabilities",
    "check_rewards",
    "pairwise_ranker_dataset",
]
