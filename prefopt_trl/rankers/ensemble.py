"""Several rankers as one, with their disagreement."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
from torch import nn

from prefopt_trl.data.formats import Completion, Prompt
from prefopt_trl.rankers.base import Columns, Ranker, ask_rewards, check_inputs, check_ranker, logit, sigmoid
from prefopt_trl.runtime.processes import process_state
from prefopt_trl.runtime.settings import Settings

COMBINATIONS = ("mean", "min", "mean-std", "vote")


class EnsembleRanker(Ranker):
    """Several rankers, whose rewards are combined into one.

    On an accelerator the members take turns: a model is moved there for its turn and back to the CPU afterwards,
    unless it is quantized or has a device map. If a member draws baselines, as a `PairwiseRanker` does, the rewards of
    each member are first centered on their mean over the completions of a prompt. A member that has no opinion on
    any completion of a prompt is left out of it, and a completion on which one of the others has none gets no reward.

    Sampled candidates get a column `disagreement`: the standard deviation of a completion's reward over the members,
    in nats.

    Args:
        rankers (`Sequence[Ranker | Callable]`):
            The members, at least two. A function without arguments is called to make its member, so that only one
            model at a time is loaded. Calibrate members whose rewards have different scales first, with [`calibrate`].
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
        ValueError: for fewer than two members, or a value of another argument that does not fit.

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
            with _on_accelerator(made):  # and then on the CPU, before the next is loaded
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
        rewards = self.score(prompts, list(zip(first, second, strict=True)), columns=columns)
        of_first, of_second = np.array(rewards).reshape(-1, 2).T
        return sigmoid(of_first if self.combine == "vote" else of_first - of_second)

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
        asked = []
        for member in self.rankers:
            with _on_accelerator(member):
                asked.append(
                    ask_rewards(member, prompts, completions, baselines=baselines, columns=columns, may_abstain=True)
                )
        combined, disagreement = [], []
        for of_members in zip(*(rewards for rewards, _ in asked), strict=True):
            rewards = np.stack(of_members)  # shape (num_members, num_completions)
            has_opinion = ~np.isnan(rewards).all(axis=1)
            weights = self.weights[has_opinion]
            if not weights.any():
                combined.append(np.full(rewards.shape[1], np.nan))
                disagreement.append(combined[-1])
                continue
            rewards = rewards[has_opinion]
            if self.draws_baselines and baselines is None:
                rewards = rewards - np.nanmean(rewards, axis=1, keepdims=True)
            mean = partial(np.average, axis=0, weights=weights)
            result = mean(rewards)
            deviation = np.sqrt(mean((rewards - result) ** 2))
            if self.combine == "min":
                result = rewards.min(axis=0)
            elif self.combine == "mean-std":
                result = result - self.k * deviation
            elif self.combine == "vote":
                others = np.zeros((len(rewards), 1)) if baselines is not None else rewards
                shares = mean(0.5 * (1 + np.sign(rewards[:, :, None] - others[:, None, :])))  # a tie counts half
                if baselines is None:
                    known = ~np.isnan(result)
                    shares = shares[:, known]
                    shares = (shares.sum(axis=1) - 0.5) / (known.sum() - 1)  # without the tie with itself
                result = logit((len(rewards) * shares.reshape(-1) + 0.5) / (len(rewards) + 1))
            combined.append(result / self.temperature)
            disagreement.append(deviation)
        return combined, {"disagreement": disagreement}

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


@contextmanager
def _on_accelerator(member: Ranker) -> Iterator[None]:
    """Hold the member's model on this process's accelerator, and on the CPU afterwards, if it may be moved."""
    model, device = member.model, process_state().device
    is_fixed = getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None)
    is_sharded = model is not None and any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    if model is None or is_fixed or is_sharded or device.type == "cpu" or isinstance(member, EnsembleRanker):
        yield  # the members of an ensemble move one by one
        return
    model.to(device)
    try:
        yield
    finally:
        model.to("cpu")
