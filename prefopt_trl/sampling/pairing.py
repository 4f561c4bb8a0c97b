"""Which completions of a prompt meet, and who wins: from the ranker's comparisons to pairs (RSO section 5).

`first_round_pairs`, `tournament_pairs` and `all_pairs` pair the completions of one prompt:

- `num_completions` (`int`): number of completions, at least 2.
- `compare` (`Callable`): called once per round with two int64 arrays of shape `(num_matches,)`, the indices of the
  first and of the second completion of each match. Returns the probability in [0, 1] that the first is preferred, in
  the same shape. At exactly 0.5 the label is drawn at random.
- `rng` (`numpy.random.Generator` or `int`, *optional*): source of randomness, or the seed of a new one.

They return [`Pairs`], and raise `ValueError` if `num_completions` is below 2, or if `compare` returns the wrong number
of values, NaN or a value outside [0, 1].

`play` does the same for many prompts side by side, so that a ranker sees one large batch per round rather than one
small batch per prompt. It checks nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]
Probabilities = NDArray[np.float64]
Compare = Callable[[Indices, Indices], ArrayLike]
Seed = np.random.Generator | int | None


class Pairs(NamedTuple):
    """
    Labeled pairs of one prompt's completions.

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


def first_round_pairs(num_completions: int, compare: Compare, *, rng: Seed = None) -> Pairs:
    """
    Match the completions at random, each at most once (RSO section 5, "first-round-rank").

    The `num_completions // 2` pairs stay random samples of the policy, which is why RSO prefers them to a tournament.
    Of an odd number of completions, one drawn at random is left out.

    >>> rewards = np.array([0.0, 2.0, 1.0, 3.0])
    >>> first_round_pairs(4, lambda first, second: rewards[first] > rewards[second], rng=0)
    Pairs(chosen=array([2, 3]), rejected=array([0, 1]), probability=array([1., 1.]))
    """
    return _play_one("first-round", num_completions, compare, rng)


def tournament_pairs(num_completions: int, compare: Compare, *, rng: Seed = None) -> Pairs:
    """
    Play a single-elimination tournament in random order and keep every match (RSO section 5, "tournament-rank").

    The `num_completions - 1` pairs are in the order of the rounds; the last one is the final. Good completions meet
    more often than others, a bias towards high reward that `first_round_pairs` does not have. If the number of players
    is odd, the last one rests and plays first in the next round.

    >>> rewards = np.array([0.0, 2.0, 1.0, 3.0])
    >>> tournament_pairs(4, lambda first, second: rewards[first] > rewards[second], rng=0).chosen[-1]
    np.int64(3)
    """
    return _play_one("tournament", num_completions, compare, rng)


def all_pairs(num_completions: int, compare: Compare, *, rng: Seed = None) -> Pairs:
    """
    Let every completion meet every other one once: `num_completions * (num_completions - 1) / 2` pairs.

    `rng` decides ties, and which completion of a match is shown first.

    >>> rewards = np.array([0.0, 2.0, 1.0])
    >>> len(all_pairs(3, lambda first, second: rewards[first] > rewards[second], rng=0).chosen)
    3
    """
    return _play_one("all", num_completions, compare, rng)


def pairs_by_reward(pairing: str, rewards: NDArray[np.float64], deviations: float, rng: Seed = None) -> Pairs:
    """Pair the completions of one prompt by `rewards` alone, of shape `(num_completions,)`, in nats.

    - `"best-worst"` pairs the highest reward with the lowest.
    - `"best-quantile"` pairs the highest with the one nearest to the mean minus `deviations` standard deviations of
      `rewards` (arXiv 2502.16825): the worst of many completions is an outlier.
    - `"correct-wrong"` matches rewards of 1 at random with rewards of 0, each at most once.

    Completions of equal reward are not paired. The probability of a label is the sigmoid of the difference of rewards.
    """
    if pairing == "correct-wrong":
        rng = np.random.default_rng(rng)
        chosen, rejected = (rng.permutation(np.flatnonzero(rewards == value)) for value in (1, 0))
    else:
        target = rewards.min() if pairing == "best-worst" else rewards.mean() - deviations * rewards.std()
        worse = np.flatnonzero(rewards < rewards.max())
        chosen = np.array([rewards.argmax()])
        rejected = worse[np.argsort(np.abs(rewards[worse] - target), kind="stable")]
    num_pairs = min(len(chosen), len(rejected))
    chosen, rejected = chosen[:num_pairs], rejected[:num_pairs]
    return Pairs(chosen, rejected, 1 / (1 + np.exp(rewards[rejected] - rewards[chosen])))


def play(
    pairing: str,
    nums_completions: Sequence[int],
    compare: Callable[[Indices, Indices, Indices], Probabilities],
    rngs: Sequence[np.random.Generator],
) -> list[Pairs]:
    """Pair the completions of many prompts side by side, with one call of `compare` for each round of all of them.

    `pairing` is `"first-round"`, `"tournament"` or `"all"`. Each prompt has its number of completions and its source
    of randomness. `compare` gets one more array first: the position of each match's prompt.
    """
    rounds: list[list[Pairs]] = [[] for _ in rngs]
    # Neighbors meet, and the last of an odd number rests
    playing = {
        prompt: rng.permutation(num) for prompt, (num, rng) in enumerate(zip(nums_completions, rngs, strict=True))
    }
    if pairing == "all":
        playing = {prompt: _each_with_each(players) for prompt, players in playing.items()}
    while playing:
        sizes = [len(players) // 2 for players in playing.values()]
        prompt = np.repeat(list(playing), sizes)
        first = np.concatenate([players[:-1:2] for players in playing.values()])
        second = np.concatenate([players[1::2] for players in playing.values()])
        probability = compare(prompt, first, second)

        winners: dict[int, Indices] = {}
        for index, matches in zip(playing, np.split(np.arange(len(first)), np.cumsum(sizes)[:-1]), strict=True):
            pairs = _label(first[matches], second[matches], probability[matches], rngs[index])
            rounds[index].append(pairs)
            winners[index] = np.concatenate([playing[index][2 * len(matches) :], pairs.chosen])  # who rested is first
        playing = {index: left for index, left in winners.items() if pairing == "tournament" and len(left) > 1}
    return [Pairs(*map(np.concatenate, zip(*played, strict=True))) for played in rounds]


def _play_one(pairing: str, num_completions: int, compare: Compare, rng: Seed) -> Pairs:
    if num_completions < 2:
        raise ValueError(f"`num_completions` must be at least 2, to make a pair, got {num_completions}.")

    def checked(_: Indices, first: Indices, second: Indices) -> Probabilities:
        probability = np.asarray(compare(first, second), dtype=np.float64)
        if probability.shape != first.shape:
            raise ValueError(
                f"`compare` returned an array of shape {probability.shape} for {len(first)} matches. Return one "
                "probability per match."
            )
        valid = (probability >= 0) & (probability <= 1)  # False for NaN
        if not valid.all():
            match = int(np.argmin(valid))
            raise ValueError(
                f"`compare` returned {probability[match]} for completion {first[match]} against completion "
                f"{second[match]}. Return the probability, in [0, 1], that the first is preferred."
            )
        return probability

    return play(pairing, [num_completions], checked, [np.random.default_rng(rng)])[0]


def _each_with_each(players: Indices) -> Indices:
    return players[np.stack(np.triu_indices(len(players), k=1), axis=1)].reshape(-1)


def _label(first: Indices, second: Indices, probability: Probabilities, rng: np.random.Generator) -> Pairs:
    undecided = (probability == 0.5) | np.isnan(probability)  # NaN is no opinion
    first_wins = np.where(undecided, rng.random(len(first)) < 0.5, probability > 0.5)
    return Pairs(
        chosen=np.where(first_wins, first, second),
        rejected=np.where(first_wins, second, first),
        probability=np.maximum(probability, 1 - probability),
    )
