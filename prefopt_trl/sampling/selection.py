"""Which candidates are kept, which of them meet, and whom the ranker prefers (RSO sections 3.2 and 5)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np

from prefopt_trl.data.formats import Completion, Prompt, Row, completion_text, num_characters
from prefopt_trl.rankers.base import Columns, Ranker, ask_probabilities, logit, sigmoid
from prefopt_trl.sampling.options import BEST, BY_REWARD, RANKING, SamplingOptions
from prefopt_trl.sampling.pairing import Pairs, pairs_by_reward, play
from prefopt_trl.sampling.rejection import BETAS, accept, acceptance_rate, automatic_beta, effective_sample_size

# Columns of candidates, and of the pairs made of them: any other is the user's, and is kept
OWN_COLUMNS = {
    *("prompt", "completions", "rewards", "finished", "logps", "log_ratios"),
    *("chosen", "rejected", "chosen_reward", "rejected_reward", "label_probability"),
    *("ref_chosen_logps", "ref_rejected_logps", "ref_max_length", "disagreement"),
    *("chosen_source", "rejected_source"),
}


Value = TypeVar("Value")


@dataclass(frozen=True)
class SelectedPrompt:
    """What was selected of one prompt's candidates: numbers only, and candidates by their index."""

    rewards: list[float | None]  # of each candidate, None if the ranker has no opinion on it
    num_distinct: int  # candidates
    accepted: list[int] = field(default_factory=list)  # none if the prompt is skipped
    acceptance_rate: float | None = None  # Theorem 1's, of distinct candidates; None if skipped
    random_probabilities: list[float] = field(default_factory=list)  # of the ranker's labels of random candidates
    # Pairs of those accepted, and the ranker's probability of each label, in [0.5, 1]; of a ranking first-round pairs,
    # which say how sure the ranker is of it
    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    ref_logps: list[tuple[float, float]] | None = None  # of the chosen and the rejected one of each pair, if kept
    scored: dict[str, list[float | None]] = field(default_factory=dict)  # the ranker's `score_columns`, of each one
    effective_size: float | None = None  # samples of the optimal policy that the candidates are worth
    penalties: list[float] = field(default_factory=list)  # subtracted from the rewards to select, pair and label
    is_left_out: bool = False  # by the pairing, which finds no two kept candidates with different rewards
    num_outside: int = 0  # pairs outside the margins
    beta: float | None = None  # of Algorithm 1

    @property
    def penalized(self) -> np.ndarray:
        """The rewards that decide, in float64, with NaN for None."""
        return np.array(self.rewards, dtype=float) - np.array(self.penalties or 0.0)


def select_and_pair(
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    rewards: Sequence[np.ndarray],
    ranker: Ranker,
    options: SamplingOptions,
    *,
    seed: int,
    first_row: int = 0,
    columns: Columns | None = None,
    log_ratios: Sequence[np.ndarray] | None = None,
    penalties: Sequence[np.ndarray] | None = None,
) -> list[SelectedPrompt]:
    """Keep `num_samples` candidates of each prompt, and let the ranker label pairs of them.

    Every prompt has a random stream of its own, made from `seed` and its row among all prompts (`first_row` is that of
    the first here), so that it does not matter which others it is selected with. A candidate whose reward is NaN
    leaves, and so does a pair on which the ranker has no opinion. A pair of two equal texts is not made: no ranker
    prefers one of them, and every loss of a difference has gradient zero. A prompt is skipped if all its candidates
    are equal, or all those kept that met. `columns` are the other columns of the prompts' dataset, and `penalties`
    what [`penalties_of`] returns for each prompt. Raise `ValueError` if the pairing needs other rewards.

    `log_ratios` are, for each candidate, the log-probability under the proposal that drew it minus that under the
    reference model, in nats. Algorithm 1 then runs on `reward - beta * log_ratio`, so that what it accepts follows
    `pi_ref(y | x) exp(reward(x, y) / beta)`, and not the same times `proposal / pi_ref`. `beta` is finite, above 0.
    """
    if options.pairing == "correct-wrong":
        check_correctness(rewards)
    texts = [first_occurrences(row) for row in completions]
    distinct = [without_nan(np.unique(row), scores) for row, scores in zip(texts, rewards, strict=True)]
    penalties = penalties or [np.zeros(len(row)) for row in rewards]
    selected = [
        SelectedPrompt(as_numbers(row), len(first), penalties=penalty.tolist())
        for row, penalty, first in zip(rewards, penalties, distinct, strict=True)
    ]
    rewards = [one.penalized for one in selected]
    rows = [row for row in range(len(prompts)) if len(distinct[row]) > 1]
    streams = [np.random.default_rng([seed, first_row + row]) for row in rows]
    of_rows = {name: [column[row] for row in rows] for name, column in (columns or {}).items()}
    asked = [prompts[row] for row in rows], [completions[row] for row in rows]
    decisive = [rewards[row] for row in rows], [penalties[row] for row in rows]
    label = partial(label_pairs, ranker, options, *asked, *decisive, of_rows)

    at_random = [
        stream.choice(distinct[row], min(options.num_samples, len(distinct[row])), replace=False)
        for row, stream in zip(rows, streams, strict=True)
    ]
    before = label(at_random, "first-round", streams)
    betas = {row: beta_of(texts[row], rewards[row], options) for row in rows}
    corrected, proposed = list(rewards), list(distinct)
    if log_ratios is not None:
        for row, beta in betas.items():
            corrected[row] = rewards[row] - beta * log_ratios[row]
            proposed[row] = without_nan(np.arange(len(rewards[row])), corrected[row])
    accepted = [
        keep(corrected[row], texts[row], options, stream, betas[row], log_ratios is not None)
        for row, stream in zip(rows, streams, strict=True)
    ]
    is_ranking = options.pairing in (RANKING, BEST)
    after = label(accepted, "first-round" if is_ranking else options.pairing, streams)

    for row, kept, random_pairs, pairs in zip(rows, accepted, before, after, strict=True):
        differ = (texts[row][pairs.chosen] != texts[row][pairs.rejected]) & np.isfinite(pairs.probability)
        made = differ & options.allows(rewards[row][pairs.chosen] - rewards[row][pairs.rejected])
        outside = int(differ.sum() - made.sum())
        beta = betas[row]
        selected[row] = replace(selected[row], is_left_out=not len(pairs.chosen), num_outside=outside, beta=beta)
        if not (made.any() or (is_ranking and len(np.unique(texts[row][kept])) > 1) or options.pairing == BEST):
            continue
        selected[row] = replace(
            selected[row],
            accepted=kept.tolist(),
            acceptance_rate=acceptance_rate(corrected[row][proposed[row]], beta),
            effective_size=effective_sample_size(corrected[row][proposed[row]], beta) if 0 < beta < np.inf else None,
            random_probabilities=random_pairs.probability[np.isfinite(random_pairs.probability)].tolist(),
            chosen=pairs.chosen[made].tolist(),
            rejected=pairs.rejected[made].tolist(),
            probabilities=pairs.probability[made].tolist(),
        )
    return selected


def penalties_of(texts: Sequence[Completion], finished: Sequence[bool] | None, how: SamplingOptions) -> np.ndarray:
    """Return what is subtracted from the reward of each of a prompt's candidates, in nats."""
    length = np.array(list(map(num_characters, texts)), dtype=np.float64)
    is_cut = ~np.array(finished or [True] * len(texts), dtype=bool)
    return how.length_penalty * length + how.unfinished_penalty * is_cut


def check_correctness(rewards: Sequence[np.ndarray]) -> None:
    """Raise `ValueError`, naming the row, unless each reward is 1, 0 or NaN."""
    for row, values in enumerate(rewards):
        if others := {*np.nan_to_num(values).tolist()} - {0, 1}:
            raise ValueError(
                f"pairing='correct-wrong' needs rewards of exactly 1 and 0, and row {row} has {min(others):g}. Give a "
                "ranker that returns them, and candidates without older `rewards`, or choose 'best-worst'."
            )


def preference_rows(
    candidates: Row, selected: SelectedPrompt, pairing: str, max_length: int | None = None
) -> Iterator[Row]:
    """Yield the rows of the final dataset that a row of candidates makes: its pairs, or its ranking, or none."""
    columns = carried(candidates)
    sources = {"source": columns.pop("source")} if isinstance(columns.get("source"), list) else {}
    completions, rewards = candidates["completions"], as_numbers(selected.penalized)
    if pairing in (RANKING, BEST):
        if selected.accepted:
            ranking = rank(completions, selected.penalized, np.array(selected.accepted), **sources)
            best = {name.removesuffix("s"): values[0] for name, values in ranking.items()}
            yield {**columns, **(best if pairing == BEST else ranking)}
        return
    labeled = zip(selected.chosen, selected.rejected, selected.probabilities, strict=True)
    for pair, (chosen, rejected, probability) in enumerate(labeled):
        row = {
            **columns,
            "chosen": completions[chosen],
            "rejected": completions[rejected],
            "chosen_reward": rewards[chosen],
            "rejected_reward": rewards[rejected],
            "label_probability": probability,
        }
        for name, values in sources.items():
            row |= {f"chosen_{name}": values[chosen], f"rejected_{name}": values[rejected]}
        if selected.ref_logps is not None:
            row["ref_chosen_logps"], row["ref_rejected_logps"] = selected.ref_logps[pair]
            row["ref_max_length"] = max_length
        yield row


def user_columns(rows: Sequence[Row]) -> Columns:
    """Return the columns that a ranker may read: those of the user, by name, with one value per row."""
    return {name: [row[name] for row in rows] for name in rows[0] if name not in OWN_COLUMNS} if rows else {}


def as_numbers(rewards: np.ndarray) -> list[float | None]:
    """Return rewards as JSON numbers, with None for NaN."""
    return [None if np.isnan(reward) else reward for reward in rewards.tolist()]


def without_nan(indices: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Return the indices of the candidates that have a reward."""
    return indices[~np.isnan(rewards[indices])]


def carried(columns: Mapping[str, Value]) -> dict[str, Value]:
    """Return the columns that candidates and pairs take over from their prompt: `prompt` and those of the user."""
    return {name: value for name, value in columns.items() if name == "prompt" or name not in OWN_COLUMNS}


def add_given(row: Row, given: Sequence[str]) -> Row:
    """Append the completions in the given columns to a row's candidates, with the name of the column as `source`."""
    texts = {name: row[name] for name in given if row[name] is not None}
    more: Row = {"completions": [*texts.values()], "source": [*texts]}
    more |= {"finished": [True] * len(texts), "logps": [None] * len(texts)}
    now = {"source": ["sampled"] * len(row.get("completions", [])), "completions": [], **row}
    kept = {name: value for name, value in now.items() if name not in given}
    return kept | {name: [*kept[name], *values] for name, values in more.items() if name in kept}


def beta_of(texts: np.ndarray, rewards: np.ndarray, options: SamplingOptions) -> float:
    """Return the beta of Algorithm 1 for a prompt's candidates; `texts` and NaN as for [`keep`]."""
    if not np.isnan(options.effective_beta):
        return options.effective_beta
    distinct = without_nan(np.unique(texts), rewards)
    return automatic_beta(rewards[distinct], options.num_samples) if len(distinct) > 1 else float(BETAS[-1])


def keep(
    rewards: np.ndarray,
    texts: np.ndarray,
    options: SamplingOptions,
    stream: np.random.Generator,
    beta: float | None = None,
    is_corrected: bool = False,
) -> np.ndarray:
    """Return the indices of a prompt's candidates that are kept: `num_samples`, or all that there are.

    `"rso"` and `"top-k"` keep distinct texts, as Algorithm 1 does. `"sft"` draws among all candidates, so that a text
    sampled twice is twice as likely: these are samples of the policy (RSO section 5, "sft-sample-rank"). `texts` are
    what [`first_occurrences`] returns. A candidate whose reward is NaN leaves.

    Rewards that are corrected for the proposal weigh each sample, so that a text sampled twice is proposed twice: the
    first accepted sample of each text is kept. `beta` is then that of the rewards before the correction.
    """
    beta = beta_of(texts, rewards, options) if beta is None else beta
    if is_corrected:
        every = without_nan(np.arange(len(texts)), rewards)
        order = every[accept(rewards[every], len(every), beta, stream)]
        firsts = np.sort(np.unique(texts[order], return_index=True)[1])
        return order[firsts[: options.num_samples]]
    pool = without_nan(np.arange(len(texts)) if options.strategy == "sft" else np.unique(texts), rewards)
    return pool[accept(rewards[pool], min(options.num_samples, len(pool)), beta, stream)]


def rank(completions: Sequence[Completion], rewards: np.ndarray, kept: np.ndarray, **others: Sequence[str]) -> Row:
    """Return columns `completions` and `rewards` of a prompt's kept candidates, best first, and others alike."""
    best_first = kept[np.argsort(-rewards[kept], kind="stable")]
    columns = {"completions": completions, **others, "rewards": rewards.tolist()}
    return {name: [values[index] for index in best_first] for name, values in columns.items()}


def label_pairs(
    ranker: Ranker,
    options: SamplingOptions,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[Completion]],
    rewards: Sequence[np.ndarray],
    penalties: Sequence[np.ndarray],
    columns: Columns,
    members: Sequence[np.ndarray],
    pairing: str,
    streams: Sequence[np.random.Generator],
) -> list[Pairs]:
    """Pair each prompt's `members` (indices into its completions), and return pairs of such indices.

    If `options.pairing` is by reward or `"best"`, so are all labels. Otherwise they are the ranker's, with its
    log-odds shifted by the difference of the penalties, which are subtracted from `rewards` already.
    """

    def compare(*match: np.ndarray) -> np.ndarray:
        matches = [(at, members[at][one], members[at][other]) for at, one, other in zip(*match, strict=True)]

        def difference(values: Sequence[np.ndarray]) -> np.ndarray:
            return np.array([values[at][one] - values[at][other] for at, one, other in matches])

        if options.pairing in (*BY_REWARD, BEST):
            return sigmoid(difference(rewards))
        firsts, seconds = ([completions[at][met[side]] for at, *met in matches] for side in (0, 1))
        of_matches = {name: [column[at] for at, _, _ in matches] for name, column in columns.items()}
        probability = ask_probabilities(ranker, [prompts[at] for at, _, _ in matches], firsts, seconds, of_matches)
        shift = difference(penalties)
        with np.errstate(divide="ignore"):  # a certain ranker stays certain
            return np.where(shift == 0, probability, sigmoid(logit(probability) - shift))

    if pairing in BY_REWARD:
        deviations = options.rejected_deviations
        paired = [
            pairs_by_reward(pairing, row[member], deviations, rng)
            for row, member, rng in zip(rewards, members, streams, strict=True)
        ]
    else:
        paired = play(pairing, [len(member) for member in members], compare, streams)
    return [
        pairs._replace(chosen=member[pairs.chosen], rejected=member[pairs.rejected])
        for member, pairs in zip(members, paired, strict=True)
    ]


def first_occurrences(completions: Sequence[Completion]) -> np.ndarray:
    """Return for each completion the index of the first one with its text. Rankers do not see outer space."""
    first: dict[str, int] = {}
    texts = (completion_text(completion).strip() for completion in completions)
    return np.array([first.setdefault(text, index) for index, text in enumerate(texts)], dtype=np.int64)
