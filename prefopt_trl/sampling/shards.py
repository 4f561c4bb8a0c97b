"""The work cut into shards: consecutive prompts that one process samples, ranks and writes down."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import wrap_completion
from prefopt_trl.data.tokenization import chat_options, merge_equal_in_training
from prefopt_trl.rankers.base import Ranker, check_rewards
from prefopt_trl.sampling.generation import sample_candidates
from prefopt_trl.sampling.logps import sampled_logps
from prefopt_trl.sampling.prompts import tokenize_prompts
from prefopt_trl.sampling.selection import OWN_COLUMNS, RANKING, SelectedPrompt, preference_rows, select_and_pair
from prefopt_trl.sampling.store import SampleStore

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Shards:
    """What each shard is made of and how. A shard depends on its number and on what is here, and on nothing else.

    Attributes:
        store ([`SampleStore`]):
            Where shards are written. One that is there is not made again.
        prompts ([`~datasets.Dataset`]):
            All prompts, or all given candidates.
        sample (`Callable`, *optional*):
            Makes rows of candidates of rows of prompts and a seed; None where candidates are given.
        ranker ([`~prefopt_trl.rankers.Ranker`]):
            Scores and compares.
        selection (`dict`):
            `strategy`, `num_samples`, `beta` and `pairing`.
        seed (`int`):
            Seed of all shards.
        keep_logps (`bool`):
            Whether candidates have `logps`, which pairs keep.
        max_length (`int`, *optional*):
            Tokens of prompt and completion for which these hold.
        score_pairs (`Callable`, *optional*):
            Log-probabilities, of shape `(n, 2)`, of prompts and pairs whose candidates have none; None without policy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            That of the training, whose chat template decides which candidates are distinct.
    """

    store: SampleStore
    prompts: Dataset
    sample: Callable[[Rows, int], Rows] | None
    ranker: Ranker
    selection: dict[str, Any]
    seed: int
    keep_logps: bool
    max_length: int | None = None
    score_pairs: Callable[..., np.ndarray] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def make(self, shard: int) -> None:
        """Sample and rank the prompts of a shard."""
        if self.sample is not None and not self.store.has_shard(shard, "candidates"):
            sampled = self.sample(self._given(shard), shard_seed(self.seed, shard))
            self.store.write_shard(shard, "candidates", sampled)
        rows = self.candidates(shard)  # as they are read after a restart
        first_row = self._rows(shard).start
        try:
            selected = self._select(rows, first_row)
        except Exception as error:
            error.add_note(f"Row 0 of these {len(rows)} is row {first_row} of `prompts`.")
            raise
        if self.keep_logps:
            selected = self._with_logps(rows, selected, first_row)
        self.store.write_shard(shard, "ranked", map(vars, selected))

    def _select(self, rows: Rows, first_row: int) -> list[SelectedPrompt]:
        prompts, completions = [row["prompt"] for row in rows], [row["completions"] for row in rows]
        if "rewards" in self.prompts.column_names and self.sample is None:
            rewards, source = [row["rewards"] for row in rows], "The column `rewards`"
        else:
            rewards, source = self.ranker.score(prompts, completions), type(self.ranker).__name__
        checked = check_rewards(rewards, prompts, completions, source)
        if self.tokenizer is not None:
            completions = merge_equal_in_training(self.tokenizer, rows, completions)
        return select_and_pair(
            prompts, completions, checked, self.ranker, seed=self.seed, first_row=first_row, **self.selection
        )

    def _with_logps(self, rows: Rows, selected: list[SelectedPrompt], first_row: int) -> list[SelectedPrompt]:
        """Give pairs the log-probabilities of their candidates; both are scored where one of them has none."""
        made = []
        for row, (candidates, one) in enumerate(zip(rows, selected, strict=True), start=first_row):
            pairs = list(zip(one.chosen, one.rejected, strict=True))
            logps = [(candidates["logps"][chosen], candidates["logps"][rejected]) for chosen, rejected in pairs]
            unknown = [place for place, both in enumerate(logps) if None in both]
            if unknown and self.score_pairs is None:
                raise ValueError(
                    f"Row {row} of `prompts` has a candidate without a log-probability in `logps`. Give `policy` and "
                    "`tokenizer`, so that it can be scored, or leave `keep_logps` out."
                )
            if unknown and self.score_pairs is not None:
                texts = candidates["completions"]
                to_score = [(texts[pairs[place][0]], texts[pairs[place][1]]) for place in unknown]
                prompts = [candidates["prompt"]] * len(unknown)
                scored = self.score_pairs(prompts, to_score, **chat_options(candidates)).tolist()
                for place, (chosen, rejected) in zip(unknown, scored, strict=True):
                    logps[place] = (chosen, rejected)
            made.append(replace(one, ref_logps=logps))
        return made

    def candidates(self, shard: int) -> Rows:
        """Rows of the candidates of a shard."""
        return self._given(shard) if self.sample is None else self.store.read_shard(shard, "candidates")

    def selected(self) -> Iterator[SelectedPrompt]:
        """What was selected of each prompt."""
        for shard in range(self.store.layout()[1]):
            for row in self.store.read_shard(shard, "ranked"):
                yield SelectedPrompt(**row)

    def candidate_rows(self) -> Iterator[dict[str, Any]]:
        """Rows of all candidates, with their rewards."""
        for row, selected in self._all():
            yield {"rewards": selected.rewards} | row

    def preference_rows(self) -> Iterator[dict[str, Any]]:
        """Rows of all pairs or rankings."""
        for row, selected in self._all():
            yield from preference_rows(row, selected, self.selection["pairing"], self.max_length)

    def candidate_features(self) -> Features:
        """Features of `candidate_rows`."""
        given = self.prompts.features
        rewards = {"rewards": List(Value("float64"))}
        if self.sample is None:
            return Features(given if "rewards" in given else {**given, **rewards})
        message = {"role": Value("string"), "content": Value("string")}
        completion = given["prompt"] if isinstance(given["prompt"], Value) else List(message)
        logps = {"logps": List(Value("float64"))} if self.keep_logps else {}
        sampled = {"completions": List(completion), "finished": List(Value("bool"))}
        return Features({"prompt": given["prompt"], **self._others(given), **sampled, **logps, **rewards})

    def preference_features(self) -> Features:
        """Features of `preference_rows`."""
        candidates, number = self.candidate_features(), Value("float64")
        columns = {"prompt": candidates["prompt"], **self._others(candidates)}
        completion = candidates["completions"].feature
        if self.selection["pairing"] == RANKING:
            return Features({**columns, "completions": List(completion), "rewards": List(number)})
        numbers = ["chosen_reward", "rejected_reward", "label_probability"]
        numbers += ["ref_chosen_logps", "ref_rejected_logps"] if self.keep_logps else []
        columns |= {"chosen": completion, "rejected": completion, **dict.fromkeys(numbers, number)}
        return Features({**columns, **({"ref_max_length": Value("int64")} if self.keep_logps else {})})

    def _all(self) -> Iterator[tuple[dict[str, Any], SelectedPrompt]]:
        for shard in range(self.store.layout()[1]):
            ranked = self.store.read_shard(shard, "ranked")
            for row, selected in zip(self.candidates(shard), ranked, strict=True):
                yield row, SelectedPrompt(**selected)

    def _given(self, shard: int) -> Rows:
        return self.prompts.select(self._rows(shard)).to_list()

    def _rows(self, shard: int) -> range:
        prompts_per_shard, _ = self.store.layout()
        start = shard * prompts_per_shard
        return range(start, min(start + prompts_per_shard, len(self.prompts)))

    @staticmethod
    def _others(columns: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in columns.items() if name not in OWN_COLUMNS}


def shard_seed(seed: int, shard: int) -> int:
    """Seed of the sampling of one shard, as independent of the others' as `numpy.random.SeedSequence` makes it."""
    return int(np.random.SeedSequence([seed, shard]).generate_state(1)[0])


def sample_rows(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_candidates: int,
    rows: Rows,
    seed: int,
    *,
    keep_logps: bool,
    max_length: int | None,
    **sampling: Any,
) -> Rows:
    """Candidates of each prompt: `completions`, `finished` (whether each ended by itself) and perhaps `logps`."""
    chat, in_encoder = list(map(chat_options, rows)), policy.config.is_encoder_decoder
    prompt_ids = tokenize_prompts(tokenizer, [row["prompt"] for row in rows], chat, for_encoder=in_encoder)
    sampled = sample_candidates(
        policy, tokenizer, prompt_ids, num_candidates, seed=seed, keep_logps=keep_logps, **sampling
    )
    made = []
    for row, options, candidates in zip(rows, chat, sampled, strict=True):
        completions = [wrap_completion(row["prompt"], text) for text in candidates.texts]
        columns = {name: value for name, value in row.items() if name == "prompt" or name not in OWN_COLUMNS}
        columns |= {"completions": completions, "finished": candidates.finished}
        if keep_logps:
            columns["logps"] = sampled_logps(tokenizer, row["prompt"], completions, candidates, max_length, **options)
        made.append(columns)
    return made
