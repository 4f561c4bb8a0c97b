"""Several rankers as one, with their disagreement."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from prefopt_trl.data.formats import Completion, Prompt
from prefopt_trl.rankers.base import Columns, Ranker, ask_rewards, check_inputs, check_ranker, logit, sigmoid
from prefopt_trl.runtime.processes import process_state
from prefopt_trl.runtime.settings import Settings

COMBINATIONS = ("mean", "min", "mean-std", "vote")


class EnsembleRanker(Ranker):
    """Several rankers, whose rewards are combined into one.

    The members take turns: on an accelerator, the model of a member is moved there for its turn and back to the CPU
    afterwards, unless it is quantized or has a device map. If a member draws baselines, as a `PairwiseRanker` does,
    the rewards of each member are first centered on their mean over the completions of a prompt. A member that has no
    opinion on a completion is left out of its reward.

    Sampled candidates get a column `disagreement`: the standard deviation of a completion's reward over the members,
    in nats.

    Args:
        rankers (`Sequence[Ranker | Callable]`):
            The members, at least two. A function without arguments is called to make its member, so that only one
            model at a time is loaded onto the accelerator. Members whose rewards have different scales should be
            calibrated first, with [`calibrate`].
        combine (`str`, *optional*, defaults to `"mean"`):
            `"mean"` of the rewards; their `"min"`; `"mean-std"`, the mean minus `k` standard deviations; or `"vote"`.
            A vote is the share of members that prefer one completion to another, and the reward of a completion is the
            logit of its mean share against the others (or the baseline), shrunk by half a vote so that it is finite.
            P(first preferred) is the sigmoid of this logit.
        weights (`Sequence[float]`, *optional*):
            Weight of each member in the mean, the standard deviation and the vote. By default all are equal.
        k (`float`, *optional*, defaults to `1.0`):
            Number of standard deviations that `"mean-std"` subtracts.

    Raises:
        TypeError: if a member is not a ranker.
        ValueError: for fewer than two members, an unknown `combine`, or weights that are negative, all zero or not one
            per member.

    Example:

    ```python
    ranker = EnsembleRanker([RewardModelRanker("first"), PairwiseRanker("second")], combine="mean-std")
    ```
    """

    reads_columns = True
    score_columns = ("disagreement",)
    temperature: float = 1.0

    def __init__(
        self,
        rankers: Sequence[Ranker | Callable[[], Ranker]],
        combine: str = "mean",
        weights: Sequence[float] | None = None,
        k: float = 1.0,
    ) -> None:
        if len(rankers) < 2:
            raise ValueError(f"`rankers` has {len(rankers)} members. Give at least two.")
        if combine not in COMBINATIONS:
            raise ValueError(f"`combine` is {combine!r}. Give one of {', '.join(map(repr, COMBINATIONS))}.")
        given = np.ones(len(rankers)) if weights is None else np.array(weights, dtype=np.float64)
        if given.shape != (len(rankers),) or not (given >= 0).all() or not 0 < given.sum() < np.inf:
            raise ValueError(
                f"`weights` is {weights!r}. Give a number of at least 0 for each of {len(rankers)} members."
            )
        if not 0 <= k < np.inf:
            raise ValueError(f"`k` is {k!r}. Give a number of at least 0.")
        self.combine, self.weights, self.k = combine, given / given.sum(), k
        self.rankers: list[Ranker] = []
        for member in rankers:
            made = member() if callable(member) else member
            check_ranker(made)
            with _on_accelerator(made.model):  # and then on the CPU, before the next is loaded
                self.rankers.append(made)
        models = [member.model for member in self.rankers if member.model is not None]
        self.model = nn.ModuleList(models) if models else None
        self.draws_baselines = combine == "vote" or any(member.draws_baselines for member in self.rankers)
        self.may_abstain = any(member.may_abstain for member in self.rankers)
        self.required_columns = {name for member in self.rankers for name in member.required_columns}

    def compare(
        self,
        prompts: Sequence[Prompt],
        first: Sequence[Completion],
        second: Sequence[Completion],
        columns: Columns | None = None,
    ) -> np.ndarray:
        """Return P(first preferred), by Bradley-Terry from the combined rewards or from the reward of the vote."""
        check_inputs(prompts, first=first, second=second)
        both = self._members(prompts, list(zip(first, second, strict=True)), None, columns)
        if self.combine == "vote":
            log_odds = [self._reward(rewards[:, :1] - rewards[:, 1:], against_baseline=True)[0] for rewards in both]
        else:
            log_odds = [-np.diff(self._combine(rewards))[0] for rewards in both]
        return sigmoid(np.array(log_odds) / self.temperature)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        baselines: Sequence[Completion] | None = None,
        columns: Columns | None = None,
    ) -> list[np.ndarray]:
        return self.score_with_columns(prompts, completions, baselines=baselines, columns=columns)[0]

    def score_with_columns(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        baselines: Sequence[Completion] | None = None,
        columns: Columns | None = None,
    ) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
        check_inputs(prompts, completions=completions, baselines=baselines)
        members = self._members(prompts, completions, baselines, columns)
        rewards = [self._reward(row, baselines is not None) / self.temperature for row in members]
        return rewards, {"disagreement": [self._deviation(row) for row in members]}

    def settings(self) -> Settings:
        """Return the settings of the members, and how they are combined."""
        return {
            "class": type(self).__name__,
            "combine": self.combine,
            "weights": self.weights.tolist(),
            "k": self.k,
            "temperature": self.temperature,
            "rankers": [member.settings() for member in self.rankers],
        }

    def _members(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        baselines: Sequence[Completion] | None,
        columns: Columns | None,
    ) -> list[np.ma.MaskedArray]:
        """Return the members' rewards of each prompt's completions, shape `(num_members, num_completions)`.

        A reward is masked if the member has no opinion.
        """
        of_members = []
        for member in self.rankers:
            with _on_accelerator(member.model):
                of_members.append(
                    ask_rewards(member, prompts, completions, baselines=baselines, columns=columns, may_abstain=True)[
                        0
                    ]
                )
        rewards = [np.ma.masked_invalid(rows) for rows in zip(*of_members, strict=True)]
        if self.draws_baselines and baselines is None:
            rewards = [row - row.mean(axis=1, keepdims=True) for row in rewards]
        return rewards

    def _mean(self, values: np.ma.MaskedArray) -> np.ma.MaskedArray:
        return np.ma.average(values, axis=0, weights=self.weights)  # type: ignore[return-value]  # masked

    def _deviation(self, rewards: np.ma.MaskedArray) -> np.ndarray:
        return np.sqrt(self._mean((rewards - self._mean(rewards)) ** 2)).filled(np.nan)

    def _combine(self, rewards: np.ma.MaskedArray) -> np.ndarray:
        if self.combine == "min":
            return rewards.min(axis=0).filled(np.nan)
        mean = self._mean(rewards).filled(np.nan)
        return mean - self.k * self._deviation(rewards) if self.combine == "mean-std" else mean

    def _reward(self, rewards: np.ma.MaskedArray, against_baseline: bool) -> np.ndarray:
        if self.combine != "vote":
            return self._combine(rewards)
        num_members = len(self.rankers)
        share = self._vote(rewards) if against_baseline else self._won(rewards)
        return logit((num_members * share + 0.5) / (num_members + 1))

    def _vote(self, differences: np.ma.MaskedArray) -> np.ndarray:
        """Return the share of the members that prefer what the differences are positive for; a tie counts half."""
        return np.ma.filled(self._mean(0.5 * (1 + np.sign(differences))), np.nan)

    def _won(self, rewards: np.ma.MaskedArray) -> np.ndarray:
        """Return the mean share of votes that each completion wins against the others."""
        others = ~np.eye(rewards.shape[1], dtype=bool)
        shares = [self._vote(rewards[:, [one]] - rewards[:, others[one]]) for one in range(rewards.shape[1])]
        return np.array([np.ma.masked_invalid(row).mean() for row in shares])


@contextmanager
def _on_accelerator(model: Any) -> Iterator[None]:
    """Hold the model on this process's accelerator, and on the CPU afterwards, if it may be moved."""
    device = process_state().device
    fixed = getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None)
    if model is None or fixed or device.type == "cpu":
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")
