"""Rankers that read two completions side by side, and their rewards against a baseline (RSO eq. 9)."""

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from prefopt_trl.data.formats import Completion, Prompt, completion_text, prompt_text
from prefopt_trl.rankers.base import Columns, Ranker, check_inputs, logit, sigmoid

logger = logging.getLogger(__name__)


class ComparativeRanker(Ranker):
    """A ranker that says which of two completions is preferred, and may depend on which of them it reads first.

    Subclasses implement `both_orders` and `settings`.

    Attributes:
        temperature (`float`):
            Log-odds are divided by it. [`calibrate`] fits it.
        smallest_probability (`float`):
            Probabilities are clamped to this distance from 0 and 1 before their logits are taken, which would be
            infinite. With 1e-6, rewards are within 13.8 nats.
        seed (`int`):
            Seed of the baselines of `score`, which otherwise depend only on the prompt and its completions.
    """

    temperature: float = 1.0
    smallest_probability: float = 1e-6
    seed: int = 0

    @abstractmethod
    def both_orders(
        self,
        prompts: Sequence[Prompt],
        first: Sequence[Completion],
        second: Sequence[Completion],
        rows: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Return the probability that the first completion is preferred, in each order, before the temperature.

        The result has shape `(n, 2)`: column 0 is P(first preferred) if the ranker reads `first` first, and column 1
        the same if it reads `second` first. A ranker without order bias gives equal columns. Errors name the prompts
        by `rows`, by default 0 to n - 1.
        """

    def compare(
        self,
        prompts: Sequence[Prompt],
        first: Sequence[Completion],
        second: Sequence[Completion],
        columns: Columns | None = None,
    ) -> np.ndarray:
        """Return P(first preferred), averaged over both orders, as [`Ranker.compare`] describes.

        With a temperature other than 1 it is the sigmoid of the reward of the first against the second.
        """
        check_inputs(prompts, first=first, second=second)
        both = self.both_orders(prompts, first, second)
        return both.mean(axis=1) if self.temperature == 1 else sigmoid(self.log_odds(both) / self.temperature)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        baselines: Sequence[Completion] | None = None,
        columns: Columns | None = None,
    ) -> list[np.ndarray]:
        """Return the logit of the probability that each completion is preferred to a baseline (RSO eq. 9).

        Arguments and shapes are those of [`Ranker.score`]. The default baseline is one of the prompt's completions,
        drawn at random. Rewards are in nats. Probabilities closer than `smallest_probability` to 0 or 1 are clamped,
        and one warning counts them.

        Raises:
            TypeError: for a single text or conversation in place of a list of them.
            ValueError: for rows that differ in number, and for a prompt without completions to draw a baseline from.
        """
        check_inputs(prompts, completions=completions, baselines=baselines)
        if baselines is None:
            baselines = [self._draw_baseline(row, prompts[row], completions[row]) for row in range(len(prompts))]
        rows = [row for row, candidates in enumerate(completions) for _ in candidates]
        flat = [completion for candidates in completions for completion in candidates]
        of_rows = [prompts[row] for row in rows], flat, [baselines[row] for row in rows]
        both = self.both_orders(*of_rows, rows)
        smallest = self.smallest_probability
        if num_clamped := int((np.abs(both.mean(axis=1) - 0.5) > 0.5 - smallest).sum()):
            most = logit(np.array(1 - smallest))
            logger.warning(
                f"{num_clamped} of {len(both)} probabilities were closer than {smallest:g} to 0 or 1 and were "
                f"clamped: these rewards are {-most / self.temperature:.1f} or {most / self.temperature:.1f}."
            )
        rewards = self.log_odds(both) / self.temperature
        of_prompts = np.split(rewards, np.cumsum([len(candidates) for candidates in completions], dtype=int))[:-1]
        for row in of_prompts:
            if len(row) > 1 and np.isnan(row).sum() == len(row) - 1:  # its baseline alone has a reward
                row[:] = np.nan
        return of_prompts

    def log_odds(self, both: np.ndarray) -> np.ndarray:
        """Return the log-odds of what `both_orders` returns, averaged and clamped, before the temperature."""
        return logit(both.mean(axis=1).clip(self.smallest_probability, 1 - self.smallest_probability))

    def _draw_baseline(self, row: int, prompt: Prompt, candidates: Sequence[Completion]) -> Completion:
        if len(candidates) == 0:
            raise ValueError(f"Prompt row {row} has no completions to draw a baseline from. Drop the row.")
        texts = [prompt_text(prompt), *map(completion_text, candidates)]
        digest = hashlib.sha256(json.dumps(texts).encode()).digest()
        rng = np.random.default_rng([self.seed, int.from_bytes(digest, "big")])
        return candidates[int(rng.integers(len(candidates)))]
