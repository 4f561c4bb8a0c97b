"""The interface of rankers, and the checks of what they are given and return."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from typing import Any, TypeAlias

import numpy as np
from torch import nn

from prefopt_trl.data.formats import Completion, Prompt, check_completions, check_format, check_list, wrap_completion
from prefopt_trl.runtime.processes import gathered, process_state
from prefopt_trl.runtime.settings import Settings

Rewards: TypeAlias = Sequence[Sequence[float | None] | np.ndarray]  # of each prompt, in the order of its completions
Columns: TypeAlias = Mapping[str, Sequence[Any]]  # of a dataset, by name, with one value per prompt


class Ranker(ABC):
    """A judge that prefers one completion of a prompt to another.

    Subclass it to use your own judge, or subclass [`PointwiseRanker`] if the judge rewards each completion separately.
    A prompt or completion is text or a list of messages. The results of `compare` and `score` are checked where they
    are used, by [`check_probabilities`] and [`check_rewards`].

    Attributes:
        model ([`~torch.nn.Module`] or `None`):
            The model that the ranker runs, or None if it runs none. Set it in your `__init__`: weights that DeepSpeed
            ZeRO-3 or FSDP2 has sharded are gathered before the ranker is called.
        draws_baselines (`bool`):
            Whether `score` without `baselines` compares the completions of a prompt to one of them, so that a reward
            depends on the others.
        reads_columns (`bool`):
            Whether `compare` and `score` take `columns`, the other columns of the prompts' dataset. They are not
            passed otherwise.
        required_columns (`Collection[str]`):
            Those without which it cannot be asked.
        may_abstain (`bool`):
            Whether NaN in a result means "no opinion": the completion or comparison is left out. Otherwise NaN is an
            error.
        score_columns (`tuple[str, ...]`):
            Names of the numbers that [`score_with_columns`] returns for each completion beside its reward. Sampled
            candidates have them as columns.
    """

    model: nn.Module | None = None
    draws_baselines: bool = True
    reads_columns: bool = False
    required_columns: Collection[str] = ()
    may_abstain: bool = False
    score_columns: tuple[str, ...] = ()

    @abstractmethod
    def compare(
        self,
        prompts: Sequence[Prompt],
        first: Sequence[Completion],
        second: Sequence[Completion],
        columns: Columns | None = None,
    ) -> np.ndarray:
        """Return the probability that the first completion is preferred to the second.

        The arguments have length `n`, one entry per prompt. The result is an `np.ndarray` of shape `(n,)`, float64 in
        [0, 1]. It does not depend on the order: `compare(p, a, b) + compare(p, b, a)` is 1 up to rounding. A ranker
        without `reads_columns` may leave `columns` out of its signature.
        """

    @abstractmethod
    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        baselines: Sequence[Completion] | None = None,
        columns: Columns | None = None,
    ) -> list[np.ndarray]:
        """Return a reward for each completion, comparable to the others of its prompt.

        Args:
            completions (`Sequence` of length `n`):
                For each prompt, any number of completions.
            baselines (`Sequence` of length `n`, *optional*):
                For each prompt, the completion whose reward is 0 (RSO eq. 9). By default the ranker chooses.
            columns (`Mapping[str, Sequence]`, *optional*):
                Other columns of the prompts' dataset, each of length `n`.

        Returns:
            `list[np.ndarray]` of length `n`: for each prompt, the rewards of its completions in nats, float64 and
            finite. They are logits: by Bradley-Terry, P(a preferred to b) = sigmoid(reward of a - reward of b).
        """

    def verdicts(self, probabilities: np.ndarray) -> np.ndarray:
        """Return 1 where the first completion wins by `compare`, 0 where it loses, 0.5 for a tie, and NaN for NaN."""
        return np.where(probabilities == 0.5, 0.5, probabilities > 0.5) + 0 * probabilities

    def check_columns(self, names: Collection[str]) -> None:
        """Raise `ValueError` unless the columns that the ranker requires are among these."""
        if missing := sorted(set(self.required_columns) - set(names)):
            raise ValueError(
                f"The {type(self).__name__} needs the column `{missing[0]}`, and the prompts' dataset has "
                f"{', '.join(names) or 'no other columns'}. Add it to the dataset; an argument of a function can be "
                "bound with `functools.partial`."
            )

    def score_with_columns(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        baselines: Sequence[Completion] | None = None,
        columns: Columns | None = None,
    ) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
        """Return what `score` returns, and for each of `score_columns` a number of each completion."""
        read = {"columns": columns or {}} if self.reads_columns else {}
        return self.score(prompts, completions, baselines, **read), {}

    @abstractmethod
    def settings(self) -> Settings:
        """Return a JSON-serializable description of the ranker, which differs whenever its results may differ.

        A ranker with equal settings may reuse a dataset that this ranker has labeled. The settings are saved and
        published with the dataset, so they must not contain secrets.
        """

    def as_reward_func(self, baseline_column: str | None = None) -> Callable[..., list[float | None]]:
        """Return the ranker as a reward function, for `reward_funcs` of TRL's online trainers.

        TRL repeats a prompt for each of its completions. The ranker gets the prompt once, with all of them. Of TRL's
        arguments it gets the prompts, the completions and the columns of the dataset.

        Args:
            baseline_column (`str`, *optional*):
                Column of the training dataset with the completion whose reward is 0, such as `"chosen"` (RSO eq. 9).
                By default a ranker that needs a baseline chooses one among the completions.

        Returns:
            `Callable`: function `(prompts, completions, **columns) -> list[float]`, with the name of the ranker's
            class. It returns the rewards of [`score`] in the order of `completions`.

        Raises:
            ValueError: if the ranker would choose a baseline in each of several processes, and by the function if the
                dataset has no such column.

        Example:

        ```python
        trainer = GRPOTrainer(
            "Qwen/Qwen3-0.6B", reward_funcs=PairwiseRanker("my-ranker").as_reward_func("chosen"), train_dataset=pairs
        )
        ```
        """
        if baseline_column is None and self.draws_baselines and process_state().num_processes > 1:
            raise ValueError(
                f"A {type(self).__name__} chooses a baseline among the completions of a prompt, and each process "
                "would choose a different one. Name a dataset column that holds the baseline, with "
                "`as_reward_func(baseline_column=...)`."
            )

        def reward_func(prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float | None]:
            if baseline_column is not None and baseline_column not in columns:
                raise ValueError(
                    f"`baseline_column` is {baseline_column!r}, but the dataset has no such column: the reward "
                    f"function was given {', '.join(columns)}. Name one of its columns."
                )
            check_list(prompts, "prompts", "a list of prompts")
            check_list(completions, "completions", "a list with one completion per prompt")
            baselines: list[Completion] | None = None if baseline_column is None else columns[baseline_column]
            read: dict[str, list[Any]] = {}
            if self.reads_columns:  # TRL also passes objects of its own, and the tokens of each completion
                own = {name for name, value in columns.items() if not isinstance(value, list)} | {"completion_ids"}
                read = {name: column for name, column in columns.items() if name not in own}
            rows_of: dict[str, list[int]] = {}  # by prompt: not all of TRL's trainers repeat it in adjacent rows
            for row, given in enumerate(zip(prompts, baselines or prompts, *read.values(), strict=True)):
                rows_of.setdefault(repr(given), []).append(row)
            groups = list(rows_of.values())
            grouped = [prompts[rows[0]] for rows in groups], [[completions[row] for row in rows] for rows in groups]
            group_baselines = None if baselines is None else [baselines[rows[0]] for rows in groups]
            of_groups = {name: [column[rows[0]] for rows in groups] for name, column in read.items()}
            with gathered(self.model):  # on all processes, which call this together
                scored, _ = ask_rewards(self, *grouped, baselines=group_baselines, columns=of_groups, may_abstain=True)
            rewards: list[float | None] = [None] * len(prompts)
            for rows, of_prompt in zip(groups, scored, strict=True):
                for row, reward in zip(rows, of_prompt.tolist(), strict=True):
                    rewards[row] = None if np.isnan(reward) else reward
            return rewards

        reward_func.__name__ = type(self).__name__  # TRL's name of the metric
        return reward_func


class PointwiseRanker(Ranker):
    """A ranker that rewards each completion separately and compares by Bradley-Terry (RSO eq. 6, g = sigmoid).

    Subclasses implement `rewards` and `settings`.

    Attributes:
        temperature (`float`):
            Rewards are divided by it, so that they are logits. [`calibrate`] fits it.
    """

    draws_baselines = False
    temperature: float = 1.0

    @abstractmethod
    def rewards(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], columns: Columns | None = None
    ) -> Rewards:
        """Return one sequence of rewards per prompt, in the order of its completions, before the temperature.

        A ranker without `reads_columns` may leave `columns` out of its signature. None is a reward of a ranker with
        `may_abstain` that has no opinion on a completion.
        """

    def compare(
        self,
        prompts: Sequence[Prompt],
        first: Sequence[Completion],
        second: Sequence[Completion],
        columns: Columns | None = None,
    ) -> np.ndarray:
        check_inputs(prompts, first=first, second=second)
        rewards = self._rewards(prompts, list(zip(first, second, strict=True)), columns)
        return sigmoid(np.array([of_first - of_second for of_first, of_second in rewards]))

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        baselines: Sequence[Completion] | None = None,
        columns: Columns | None = None,
    ) -> list[np.ndarray]:
        check_inputs(prompts, completions=completions, baselines=baselines)
        rewards = self._rewards(prompts, completions, columns)
        if baselines is None:
            return rewards
        baseline_rewards = self._rewards(prompts, [[baseline] for baseline in baselines], columns)
        return [row - baseline for row, baseline in zip(rewards, baseline_rewards, strict=True)]

    def _rewards(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], columns: Columns | None
    ) -> list[np.ndarray]:
        read = {"columns": columns} if self.reads_columns else {}
        rewards = self.rewards(prompts, completions, **read)
        checked = check_rewards(rewards, prompts, completions, type(self).__name__, self.may_abstain)
        return [row / self.temperature for row in checked]


def ask_rewards(
    ranker: Ranker,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    *,
    baselines: Sequence[Completion] | None = None,
    columns: Columns | None = None,
    may_abstain: bool = False,
) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """Return the ranker's rewards of each prompt's completions, in float64, checked, and its `score_columns`.

    With `may_abstain`, NaN is the reward of a completion on which the ranker has no opinion. Raise the errors of
    [`check_rewards`].
    """
    rewards, scored = ranker.score_with_columns(prompts, completions, baselines, columns)
    may_abstain = may_abstain and ranker.may_abstain
    return check_rewards(rewards, prompts, completions, type(ranker).__name__, may_abstain), scored


def ask_probabilities(
    ranker: Ranker,
    prompts: Sequence[Prompt],
    first: Sequence[Completion],
    second: Sequence[Completion],
    columns: Columns | None = None,
) -> np.ndarray:
    """Return the ranker's probabilities that the first completions are preferred, in float64, checked.

    NaN is the probability of a comparison on which the ranker has no opinion. Raise the errors of
    [`check_probabilities`].
    """
    read = {"columns": columns or {}} if ranker.reads_columns else {}
    probabilities = ranker.compare(prompts, first, second, **read)
    return check_probabilities(probabilities, prompts, f"{type(ranker).__name__}.compare", ranker.may_abstain)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Turn log-odds in nats into probabilities, without overflow at either end."""
    with np.errstate(invalid="ignore"):  # NaN, no opinion, stays NaN
        return np.exp(-np.logaddexp(0.0, -logits))


def logit(probabilities: np.ndarray) -> np.ndarray:
    """Turn probabilities into log-odds in nats: log(p / (1 - p))."""
    return np.log(probabilities) - np.log1p(-probabilities)


def check_ranker(ranker: object, name: str = "ranker") -> None:
    """Raise `TypeError` unless `ranker` is a [`Ranker`], naming the argument and the classes to wrap it in."""
    if not isinstance(ranker, Ranker):
        raise TypeError(
            f"`{name}` is a {type(ranker).__name__}, not a ranker. Wrap a function in `FunctionRanker`, a reward "
            "model in `RewardModelRanker`, a causal language model in `PairwiseRanker`, a chat model or its server in "
            "`JudgeRanker`."
        )


def check_inputs(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]] | None = None,
    **columns: Sequence[Completion] | None,
) -> None:
    """Require a list of prompts, with a list of `completions` and one completion of each other column per prompt.

    Raise `TypeError` for a single text or conversation in place of a list, and `ValueError` for another number of
    entries or for a row that is neither text nor messages.
    """
    check_list(prompts, "prompts", "a list of prompts")
    for row, prompt in enumerate(prompts):
        check_format(prompt, f"Prompt row {row}")
    given: dict[str, Sequence[Sequence[Completion]]] = {}
    if completions is not None:
        check_list(completions, "completions", "a list with one list of completions per prompt")
        for row, several in enumerate(completions):
            check_list(several, f"completions[{row}]", "a list of completions for each prompt, as in [['a', 'b']]")
        given["completions"] = completions
    for name, column in columns.items():
        if column is not None:
            check_list(column, name, "a list with one completion per prompt")
            given[name] = [[completion] for completion in column]
    for name, rows in given.items():
        if len(rows) != len(prompts):
            raise ValueError(f"`{name}` has {len(rows)} entries for {len(prompts)} prompts. Give one per prompt.")
        for row, (prompt, several) in enumerate(zip(prompts, rows, strict=True)):
            wrapped = [wrap_completion(prompt, completion) for completion in several]
            check_completions(prompt, wrapped, f"prompt row {row} in `{name}`")


def check_rewards(
    rewards: Rewards, prompts: Sized, completions: Sequence[Sized], source: str, may_abstain: bool = False
) -> list[np.ndarray]:
    """Return a ranker's rewards in float64, one for each completion of each prompt.

    With `may_abstain`, None and NaN mean no opinion, and are returned as NaN. Raise `ValueError`, with the `source` of
    the rewards and the row, unless every other reward is finite.

    >>> check_rewards([[1, 2], [3]], ["a", "b"], [["c", "d"], ["e"]], "MyRanker")
    [array([1., 2.]), array([3.])]
    """
    if len(rewards) != len(prompts):
        raise ValueError(
            f"{source} returned rewards for {len(rewards)} prompts, {len(prompts)} were expected. Return one array "
            "per prompt, in the same order."
        )
    checked = []
    for row, (row_rewards, row_completions) in enumerate(zip(rewards, completions, strict=True)):
        values = _numbers(row_rewards, f"{source}, prompt row {row}")
        if len(values) != len(row_completions):
            raise ValueError(
                f"{source} returned {len(values)} rewards for prompt row {row}, {len(row_completions)} were expected. "
                "Return one per completion, in the same order."
            )
        valid = np.isfinite(values) | (np.isnan(values) & may_abstain)
        if not valid.all():
            index = valid.argmin()
            raise ValueError(
                f"{source} returned {values[index]} for completion {index} of prompt row {row}, a finite reward was "
                "expected. Return a number for every completion, or drop the row."
            )
        checked.append(values)
    return checked


def check_probabilities(
    probabilities: Sequence[float] | np.ndarray, prompts: Sized, source: str, may_abstain: bool = False
) -> np.ndarray:
    """Return a ranker's probabilities in float64, one for each prompt.

    With `may_abstain`, NaN means no opinion. Raise `ValueError`, with the `source` of the probabilities and the row,
    unless each other one is in [0, 1].
    """
    values = _numbers(probabilities, source)
    if len(values) != len(prompts):
        raise ValueError(
            f"{source} returned {len(values)} probabilities, {len(prompts)} were expected. Return one per prompt, in "
            "the same order."
        )
    in_range = ((values >= 0) & (values <= 1)) | (np.isnan(values) & may_abstain)
    if not in_range.all():
        row = in_range.argmin()
        raise ValueError(
            f"{source} returned {values[row]} for prompt row {row}, a probability in [0, 1] was expected. Return the "
            "probability that the first completion is preferred, or drop the row."
        )
    return values


def _numbers(values: Sequence[float | None] | np.ndarray, source: str) -> np.ndarray:
    try:
        return np.array([np.nan if value is None else float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: a sequence of numbers was expected, {values!r} was returned.") from error
