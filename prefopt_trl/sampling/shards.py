"""The work in shards: consecutive prompts that one process samples, ranks and writes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Prompt, Row, wrap_completion
from prefopt_trl.data.tokenization import ChatOptions, chat_options, merge_equal_in_training, tokenize_prompts
from prefopt_trl.generation.generators import Generator, Request
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.generation.sampler import Candidates, Sampled
from prefopt_trl.rankers.base import Ranker, ask_rewards
from prefopt_trl.runtime.settings import (
    Settings,
    dataset_fingerprint,
    model_fingerprint,
    template_date,
    tokenizer_fingerprint,
)
from prefopt_trl.sampling.logps import drawn_logps, pair_logps, sampled_logps
from prefopt_trl.sampling.options import BEST, RANKING, SamplingOptions
from prefopt_trl.sampling.selection import (
    SelectedPrompt,
    add_given,
    as_numbers,
    carried,
    penalties_of,
    preference_rows,
    select_and_pair,
    user_columns,
)
from prefopt_trl.sampling.store import SampleStore

# Options that given candidates depend on, too
SELECTING = {*vars(SamplingOptions())} - {*vars(GenerationOptions()), "num_candidates"}


@dataclass(frozen=True)
class Shards:
    """All inputs of the shards. A shard depends only on these and on its number."""

    store: SampleStore  # where shards are written, and found again after a restart
    prompts: Dataset  # with a column `completions`, candidates are given and nothing is sampled
    generator: Generator | None  # of candidates that are not given
    policy: PreTrainedModel | None  # for log-probabilities
    tokenizer: PreTrainedTokenizerBase | None  # of the policy; its chat template decides which candidates are distinct
    ranker: Ranker
    options: SamplingOptions
    seed: int  # of all shards
    keep_logps: bool  # whether candidates have `logps`, which pairs keep
    max_length: int | None  # of prompt and completion in tokens, for these log-probabilities
    proposal_clip: float | None = None  # of the log-ratios of a generator other than the policy
    given: Sequence[str] = ()  # columns of `prompts` with a completion each, candidates beside the sampled ones

    @property
    def are_given(self) -> bool:
        """Whether candidates are given."""
        return "completions" in self.prompts.column_names

    @property
    def has_rewards(self) -> bool:
        """Whether candidates are given with rewards, so that they are not scored again."""
        return self.are_given and "rewards" in self.prompts.column_names

    @property
    def has_proposal(self) -> bool:
        """Whether candidates come from another policy than the one whose optimal policy they shall follow."""
        return self.generator is not None and self.policy is not self.generator.model

    def settings(self) -> Settings:
        """Return all settings that the dataset depends on, for its manifest."""
        settings = {
            **{name: getattr(self.options, name) for name in SELECTING},
            "seed": self.seed,
            "keep_logps": self.keep_logps,
            "prompts": dataset_fingerprint(self.prompts),
            "ranker": self.ranker.settings(),
        }
        if self.tokenizer is not None:
            settings["tokenizer"] = tokenizer_fingerprint(self.tokenizer)
        if self.keep_logps:
            settings["max_length"] = self.max_length
        if self.has_proposal or "log_ratios" in self.prompts.column_names:
            settings["proposal_clip"] = self.proposal_clip
        if self.given:
            settings["given"] = list(self.given)
        if not self.are_given:
            assert self.generator is not None
            settings |= {**vars(self.options), **self.generator.settings(self.options)}
            if self.tokenizer is not None and not isinstance(self.prompts.features["prompt"], Value):
                settings |= template_date(self.tokenizer)
            if self.has_proposal:
                assert self.policy is not None
                settings["reference"] = model_fingerprint(self.policy)
        return settings

    def make(self, shard: int) -> None:
        """Sample and rank the prompts of a shard."""
        if not self.are_given and not self.store.has_shard(shard, "candidates"):
            self.store.write_shard(shard, "candidates", self._sample(shard))
        rows = self.candidates(shard)  # read back, as after a restart
        first_row = self._rows(shard).start
        try:
            selected = self._select(rows, first_row)
        except Exception as error:
            error.add_note(f"Row 0 of these {len(rows)} is row {first_row} of `prompts`.")
            raise
        if self.keep_logps:
            selected = self._with_logps(rows, selected, first_row)
        self.store.write_shard(shard, "ranked", map(vars, selected))

    def _sample(self, shard: int) -> list[Row]:
        """Sample rows with `completions`, `finished` (see [`Candidates`]) and, with `keep_logps`, `logps`."""
        assert self.generator is not None
        rows, number, seed = self._given(shard), self.options.num_candidates, shard_seed(self.seed, shard)
        prompts, chat = [row["prompt"] for row in rows], list(map(chat_options, rows))
        keeps_tokens = self.keep_logps or self.has_proposal
        sampled = self.generator.generate(Request(prompts, chat, number, self.options, seed, keeps_tokens))
        for place, row_number in enumerate(self._rows(shard)):
            one = sampled[place] if place < len(sampled) else Candidates([], [])
            if (found := min(len(one.texts), len(one.finished))) != number:
                raise ValueError(
                    f"`generator` returned {found} of {number} completions of row {row_number} of `prompts`."
                )
        log_ratios: list[list[float]] = []
        if self.has_proposal:
            sampled, log_ratios = self._compare_to_policy(prompts, chat, sampled)
        made = []
        for place, (row, how, candidates) in enumerate(zip(rows, chat, sampled, strict=True)):
            prompt = row["prompt"]
            completions = [wrap_completion(prompt, text) for text in candidates.texts]
            made.append({**carried(row), "completions": completions, "finished": candidates.finished})
            if self.keep_logps:
                assert self.tokenizer is not None
                made[-1]["logps"] = sampled_logps(
                    self.tokenizer, prompt, completions, candidates, self.max_length, **how
                )
            if log_ratios:
                made[-1]["log_ratios"] = log_ratios[place]
            if self.given:
                made[-1] = add_given({name: row[name] for name in self.given} | made[-1], self.given)
        return made

    def _compare_to_policy(
        self, prompts: list[Prompt], chat: list[ChatOptions], sampled: list[Candidates]
    ) -> tuple[list[Candidates], list[list[float]]]:
        """Return candidates with their log-probabilities under the policy in place of those under the proposal, and
        the latter minus the former."""
        assert self.generator is not None and self.generator.model is not None
        assert self.policy is not None and self.tokenizer is not None
        prompt_ids = tokenize_prompts(self.tokenizer, prompts, chat)
        drawn = [[one.ids for one in candidates.sampled] for candidates in sampled]
        ref_logps = drawn_logps(self.policy, prompt_ids, drawn)
        logps = [[one.logp for one in candidates.sampled if one.logp is not None] for candidates in sampled]
        if not all(logps):  # prompts are not shared
            logps = drawn_logps(self.generator.model, prompt_ids, drawn)
        under_policy = [
            replace(candidates, sampled=list(map(Sampled, ids, of)))
            for candidates, ids, of in zip(sampled, drawn, ref_logps, strict=True)
        ]
        return under_policy, [(np.array(of) - ref).tolist() for of, ref in zip(logps, ref_logps, strict=True)]

    def _select(self, rows: list[Row], first_row: int) -> list[SelectedPrompt]:
        prompts, completions = [row["prompt"] for row in rows], [row["completions"] for row in rows]
        columns = user_columns(rows)
        scored: dict[str, list[np.ndarray]] = {}
        if self.has_rewards:
            rewards = [np.array(row["rewards"], dtype=np.float64) for row in rows]
        else:
            rewards, scored = ask_rewards(self.ranker, prompts, completions, columns=columns, may_abstain=True)
        finished = [row.get("finished") for row in rows]
        penalties = [penalties_of(*row, self.options) for row in zip(completions, finished, strict=True)]
        if self.tokenizer is not None:
            completions = merge_equal_in_training(self.tokenizer, rows, completions)
        log_ratios = None
        if "log_ratios" in rows[0] and self.options.can_correct:
            log_ratios = [clipped(np.array(row["log_ratios"]), self.proposal_clip) for row in rows]
        selected = select_and_pair(
            prompts,
            completions,
            rewards,
            self.ranker,
            self.options,
            seed=self.seed,
            first_row=first_row,
            columns=columns,
            log_ratios=log_ratios,
            penalties=penalties,
        )
        return [
            replace(one, scored={name: as_numbers(values[row]) for name, values in scored.items()})
            for row, one in enumerate(selected)
        ]

    def _with_logps(self, rows: list[Row], selected: list[SelectedPrompt], first_row: int) -> list[SelectedPrompt]:
        """Add the log-probabilities of each pair; if one candidate has none, compute both from the text."""
        made = []
        for row, (candidates, one) in enumerate(zip(rows, selected, strict=True), start=first_row):
            pairs = np.array([one.chosen, one.rejected], dtype=int).T
            logps = np.array(candidates["logps"], dtype=float)[pairs]  # None is NaN
            unknown = np.isnan(logps).any(axis=1)
            if unknown.any():
                if self.policy is None or self.tokenizer is None:
                    raise ValueError(
                        f"Row {row} of `prompts` has a candidate without a log-probability in `logps`. Give `policy` "
                        "and `tokenizer` to compute it, or leave `keep_logps` out."
                    )
                texts = candidates["completions"]
                to_score = [(texts[chosen], texts[rejected]) for chosen, rejected in pairs[unknown]]
                prompts, chat = [candidates["prompt"]] * len(to_score), chat_options(candidates)
                logps[unknown] = pair_logps(self.policy, self.tokenizer, prompts, to_score, self.max_length, **chat)
            made.append(replace(one, ref_logps=logps.tolist()))
        return made

    def candidates(self, shard: int) -> list[Row]:
        """Return the rows of the candidates of a shard."""
        return self._given(shard) if self.are_given else self.store.read_shard(shard, "candidates")

    def selected(self, shards: Iterable[int] | None = None) -> Iterator[tuple[Row, SelectedPrompt]]:
        """Yield the row of candidates of each prompt of all or some shards, and what was selected of it."""
        for shard in range(self.store.layout()[1]) if shards is None else shards:
            ranked = (SelectedPrompt(**row) for row in self.store.read_shard(shard, "ranked"))
            yield from zip(self.candidates(shard), ranked, strict=True)

    def candidate_rows(self) -> Iterator[Row]:
        """Yield the rows of all candidates, with their rewards."""
        for row, selected in self.selected():
            yield {"rewards": selected.rewards, **selected.scored} | row

    def preference_rows(self, shards: Iterable[int] | None = None) -> Iterator[Row]:
        """Yield the rows of the pairs or rankings of all or some shards."""
        for row, selected in self.selected(shards):
            yield from preference_rows(row, selected, self.options.pairing, self.max_length)

    def candidate_features(self) -> Features:
        """Return the features of `candidate_rows`."""
        given = self.prompts.features
        rewards = {"rewards": List(Value("float64"))}
        if not self.has_rewards:
            rewards |= dict.fromkeys(self.ranker.score_columns, List(Value("float64")))
        if self.are_given:
            return Features({**rewards, **given})
        message = {"role": Value("string"), "content": Value("string")}
        completion = given["prompt"] if isinstance(given["prompt"], Value) else List(message)
        logps = {"logps": List(Value("float64"))} if self.keep_logps else {}
        sampled = {"completions": List(completion), "finished": List(Value("bool"))}
        sampled |= {"log_ratios": List(Value("float64"))} if self.has_proposal else {}
        others = {name: feature for name, feature in carried(given).items() if name not in self.given}
        sources = {"source": List(Value("string"))} if self.given else {}
        return Features({**others, **sampled, **logps, **rewards, **sources})

    def preference_features(self) -> Features:
        """Return the features of `preference_rows`."""
        candidates, number = self.candidate_features(), Value("float64")
        columns, completion = carried(candidates), candidates["completions"].feature
        if self.options.pairing == RANKING:
            return Features({**columns, "completions": List(completion), "rewards": List(number)})
        source = columns.pop("source") if isinstance(columns.get("source"), List) else None
        if self.options.pairing == BEST:
            columns |= {"source": source.feature} if source else {}
            return Features({**columns, "completion": completion, "reward": number})
        columns |= dict.fromkeys(["chosen_source", "rejected_source"], source.feature) if source else {}
        numbers = ["chosen_reward", "rejected_reward", "label_probability"]
        numbers += ["ref_chosen_logps", "ref_rejected_logps"] if self.keep_logps else []
        columns |= {"chosen": completion, "rejected": completion, **dict.fromkeys(numbers, number)}
        return Features({**columns, **({"ref_max_length": Value("int64")} if self.keep_logps else {})})

    def _given(self, shard: int) -> list[Row]:
        return self.prompts.select(self._rows(shard)).to_list()

    def _rows(self, shard: int) -> range:
        prompts_per_shard, _ = self.store.layout()
        start = shard * prompts_per_shard
        return range(start, min(start + prompts_per_shard, len(self.prompts)))


def clipped(log_ratios: np.ndarray, limit: float | None) -> np.ndarray:
    """Return log-ratios of a prompt's candidates within so many nats of their median; a constant has no effect."""
    if limit is None:
        return log_ratios
    return np.clip(log_ratios - np.median(log_ratios), -limit, limit)


def shard_seed(seed: int, shard: int) -> int:
    """Return the seed of one shard, independent of the seeds of the others."""
    return int(np.random.SeedSequence([seed, shard]).generate_state(1)[0])
