"""Which completions of a prompt meet, and who wins: from the ranker's comparisons to pairs (RSO section 5).

Each pairing is written once, as a generator that yields a round of matches and is sent the ranker's probabilities.
`play` drives any number of them side by side, so that a ranker sees one large batch per round rather than one small
batch per prompt; the functions named `..._pairs` play a single one.
"""

from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]
Probabilities = NDArray[np.float64]


class Pairs(NamedTuple):
    """
    Labelled pairs of one prompt's completions.

    Attributes:
        chosen (int64 array of shape `(num_pairs,)`):
            Index of the preferred completion.
        rejected (int64 array of shape `(num_pairs,)`):
            Index of the other one.
        probability (float64 array of shape `(num_pairs,)`):
            The ranker's probability of its own label, in [0.5, 1].
    """

    chosen: Indices
    rejected: Indices
    probability: Probabilities


# Yields rounds of matches (first, second), is sent P(first preferred) for each match, returns the labelled pairs.
Pairing = Generator[tuple[Indices, Indices], Probabilities, Pairs]


def first_round_pairs(
    num_completions: int,
    compare: Callable[[Indices, Indices], ArrayLike],
    *,
    rng: np.random.Generator | int | None = None,
) -> Pairs:
    """
    Matches the completions at random, each at most once (RSO section 5, "first-round-rank").

    The pairs stay random samples of the policy, which is why RSO prefers them to a tournament. Of an odd number of
    completions, one drawn at random is left out.

    Args:
        num_completions (`int`):
            Number of completions, at least 2.
        compare (`Callable`):
            Called once, with two int64 arrays of shape `(num_pairs,)`, the indices of the first and of the second
            completion of each match. Returns the probability in [0, 1] that the first is preferred, in the same shape.
            At exactly 0.5 the label is drawn at random.
        rng (`numpy.random.Generator` or `int`, *optional*):
            Source of randomness, or the seed of a new one.

    Returns:
        [`Pairs`]: `num_completions // 2` of them.

    Raises:
        ValueError: if `num_completions` is below 2, or if `compare` returns the wrong number of values, NaN or a value
            outside [0, 1].

    Example:

    ```python
    >>> rewards = np.array([0.0, 2.0, 1.0, 3.0])
    >>> first_round_pairs(4, lambda first, second: rewards[first] > rewards[second], rng=0)
    Pairs(chosen=array([2, 3]), rejected=array([0, 1]), probability=array([1., 1.]))
    ```
    """
    return _play_one(first_round(num_completions, np.random.default_rng(rng)), compare)


def tournament_pairs(
    num_completions: int,
    compare: Callable[[Indices, Indices], ArrayLike],
    *,
    rng: np.random.Generator | int | None = None,
) -> Pairs:
    """
    Plays a single-elimination tournament in random order and keeps every match (RSO section 5, "tournament-rank").

    Good completions meet more often than others, a bias towards high reward that `first_round_pairs` does not have.
    Where the number of players is odd, the last one rests and plays first in the next round.

    Args:
        num_completions (`int`):
            Number of completions, at least 2.
        compare (`Callable`):
            As for `first_round_pairs`, but called once per round.
        rng (`numpy.random.Generator` or `int`, *optional*):
            Source of randomness, or the seed of a new one.

    Returns:
        [`Pairs`]: `num_completions - 1` of them, round by round; the last one is the final.

    Raises:
        ValueError: as `first_round_pairs`.

    Example:

    ```python
    >>> rewards = np.array([0.0, 2.0, 1.0, 3.0])
    >>> tournament_pairs(4, lambda first, second: rewards[first] > rewards[second], rng=0).chosen[-1]
    np.int64(3)
    ```
    """
    return _play_one(tournament(num_completions, np.random.default_rng(rng)), compare)


def all_pairs(
    num_completions: int,
    compare: Callable[[Indices, Indices], ArrayLike],
    *,
    rng: np.random.Generator | int | None = None,
) -> Pairs:
    """
    Lets every completion meet every other one once.

    Args:
        num_completions (`int`):
            Number of completions, at least 2.
        compare (`Callable`):
            As for `first_round_pairs`: called once, with every match.
        rng (`numpy.random.Generator` or `int`, *optional*):
            Source of randomness, or the seed of a new one: decides who is shown first, and ties.

    Returns:
        [`Pairs`]: `num_completions * (num_completions - 1) / 2` of them.

    Raises:
        ValueError: as `first_round_pairs`.

    Example:

    ```python
    >>> rewards = np.array([0.0, 2.0, 1.0])
    >>> len(all_pairs(3, lambda first, second: rewards[first] > rewards[second], rng=0).chosen)
    3
    ```
    """
    return _play_one(round_robin(num_completions, np.random.default_rng(rng)), compare)


def first_round(num_completions: int, rng: np.random.Generator) -> Pairing:
    """The generator behind `first_round_pairs`, for `play`."""
    return (yield from _round(_shuffled(num_completions, rng), rng))


def tournament(num_completions: int, rng: np.random.Generator) -> Pairing:
    """The generator behind `tournament_pairs`, for `play`."""
    players = _shuffled(num_completions, rng)
    rounds: list[Pairs] = []
    while len(players) > 1:
        rounds.append((yield from _round(players, rng)))
        resting = players[len(players) // 2 * 2 :]
        players = np.concatenate([resting, rounds[-1].chosen])
    return Pairs(*(np.concatenate(arrays) for arrays in zip(*rounds, strict=True)))


def round_robin(num_completions: int, rng: np.random.Generator) -> Pairing:
    """The generator behind `all_pairs`, for `play`."""
    players = _shuffled(num_completions, rng)
    matches = np.stack(np.triu_indices(num_completions, k=1), axis=1)
    return (yield from _round(players[matches].reshape(-1), rng))


def play(pairings: Sequence[Pairing], compare: Callable[[Indices, Indices, Indices], ArrayLike]) -> list[Pairs]:
    """
    Plays the pairings of many prompts side by side, with one call of the ranker for each round of all of them.

    Args:
        pairings (sequence of generators):
            One per prompt, each made by `first_round`, `tournament` or `round_robin`.
        compare (`Callable`):
            Called with three int64 arrays of shape `(num_matches,)`: the position in `pairings` of the match's prompt,
            and the indices of its first and second completion among that prompt's. Returns the probability in [0, 1]
            that the first is preferred, in the same shape.

    Returns:
        `list` of [`Pairs`], one for each of `pairings`.

    Raises:
        ValueError: if `compare` returns the wrong number of values, NaN or a value outside [0, 1].

    Example:

    ```python
    >>> rng = np.random.default_rng(0)
    >>> rewards = np.array([[0.0, 1.0], [3.0, 2.0]])
    >>> pairings = [first_round(2, rng) for _ in rewards]
    >>> play(pairings, lambda prompt, first, second: rewards[prompt, first] > rewards[prompt, second])[1].chosen
    array([0])
    ```
    """
    results: dict[int, Pairs] = {}
    matches = {prompt: next(pairing) for prompt, pairing in enumerate(pairings)}
    while matches:
        sizes = [len(first) for first, _ in matches.values()]
        prompt = np.repeat(list(matches), sizes)
        first = np.concatenate([first for first, _ in matches.values()])
        second = np.concatenate([second for _, second in matches.values()])
        probability = np.asarray(compare(prompt, first, second), dtype=np.float64)
        _check_probability(probability, prompt, first, second)

        ongoing = list(matches)
        matches = {}
        for index, sent in zip(ongoing, np.split(probability, np.cumsum(sizes)[:-1]), strict=True):
            try:
                matches[index] = pairings[index].send(sent)
            except StopIteration as finished:
                results[index] = finished.value
    return [results[prompt] for prompt in range(len(pairings))]


def _play_one(pairing: Pairing, compare: Callable[[Indices, Indices], ArrayLike]) -> Pairs:
    return play([pairing], lambda _, first, second: compare(first, second))[0]


def _shuffled(num_completions: int, rng: np.random.Generator) -> Indices:
    if num_completions < 2:
        raise ValueError(f"num_completions must be at least 2 to make a pair, got {num_completions}")
    return rng.permutation(num_completions)


def _round(players: Indices, rng: np.random.Generator) -> Pairing:
    """Neighbours meet: (0, 1), (2, 3), ...; the last of an odd number meets nobody."""
    end = len(players) // 2 * 2
    first, second = players[0:end:2], players[1:end:2]
    probability = yield first, second
    first_wins = np.where(probability == 0.5, rng.random(len(first)) < 0.5, probability > 0.5)
    return Pairs(
        chosen=np.where(first_wins, first, second),
        rejected=np.where(first_wins, second, first),
        probability=np.maximum(probability, 1 - probability),
    )


def _check_probability(probability: Probabilities, prompt: Indices, first: Indices, second: Indices) -> None:
    if probability.shape != first.shape:
        raise ValueError(
            f"compare returned an array of shape {probability.shape} for {len(first)} matches: "
            "it must return one probability per match"
        )
    valid = (probability >= 0) & (probability <= 1)  # False for NaN
    if not valid.all():
        match = int(np.argmin(valid))
        raise ValueError(
            f"compare returned {probability[match]} for completion {first[match]} against completion {second[match]} "
            f"of prompt {prompt[match]}: it must return the probability, in [0, 1], that the first is preferred"
        )
