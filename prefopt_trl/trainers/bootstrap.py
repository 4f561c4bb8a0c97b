"""Self-bootstrapping (PRO Algorithm 1): the policy's own samples join the rankings that it learns from."""

import logging
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from prefopt_trl.data.formats import Completion, Row
from prefopt_trl.data.tokenization import chat_options, tokenize_completions
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.rankers.base import Ranker, ask_rewards
from prefopt_trl.runtime.processes import gathered
from prefopt_trl.runtime.settings import as_json, differences, read_json, write_json
from prefopt_trl.sampling.collator import sample_for
from prefopt_trl.sampling.selection import user_columns
from prefopt_trl.trainers.callbacks import epoch_of

logger = logging.getLogger(__name__)

SHARD_ROWS = 32  # sampled together with one seed, so that samples do not depend on the number of processes


class Bootstrap(TrainerCallback):
    """The parts of a dataset of rankings, with the policy's samples for their prompts in the current epoch.

    A part is sampled just before training reaches its first row, and saved in `folder` as `epoch-0-part-0.json`, with
    the number of steps trained so far. A resumed run reads the parts sampled before its checkpoint and samples the
    later ones again, as the uninterrupted run would have. A new run first renames a `folder` that an earlier run left.

    `num_parts` is K of Algorithm 1, at most the number of rows. `seed` determines the split, the order of rows and the
    samples.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_parts: int,
        tokenizer: PreTrainedTokenizerBase,
        ranker: Ranker,
        folder: str | Path,
        seed: int,
        options: GenerationOptions,
    ) -> None:
        if num_parts > len(dataset):
            raise ValueError(
                f"`bootstrap_parts`={num_parts} is more than the training dataset's {len(dataset)} rows. Lower it."
            )
        self.dataset, self.tokenizer, self.ranker = dataset, tokenizer, ranker
        self.folder, self.seed, self.options = Path(folder), seed, options
        with gathered(ranker.model):  # a resumed run must have the same settings
            settings = {"bootstrap_parts": num_parts, "seed": seed, **vars(options), "ranker": ranker.settings()}
        self.settings = as_json(settings)
        order = np.random.default_rng(seed).permutation(len(dataset))
        self.parts = np.array_split(order, num_parts)
        self.starts = np.cumsum([0, *map(len, self.parts)])  # places at which the parts begin in an epoch
        self.epoch = 0
        self.resumed_at = 0  # steps that the checkpoint had been trained for
        self.rankings: dict[int, Row] = {}  # of the rows sampled in this epoch
        self.num_sampled = 0  # parts

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.resumed_at = state.global_step
        if state.global_step == 0 and state.is_world_process_zero and self.folder.exists():
            # A later resume of this run would otherwise read samples of the earlier run
            names = (self.folder.with_name(f"{self.folder.name}-{number}") for number in count(1))
            aside = self.folder.rename(next(name for name in names if not name.exists()))
            logger.warning("This run does not resume; the samples of an earlier run were moved to %s.", aside)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.epoch = epoch_of(state)
        self.rankings, self.num_sampled = {}, 0
        self.place = {row: place for place, row in enumerate(PartSampler(self))}

    def extend(self, rows: list[int], model: PreTrainedModel, accelerator: Accelerator, global_step: int) -> list[Row]:
        """Return the rankings of these rows of the dataset, with the policy's samples among them, for the collator.

        Every process calls this at the same time, each with different rows.
        """
        places = accelerator.gather(torch.tensor([self.place[row] for row in rows], device=accelerator.device))
        latest = int(np.searchsorted(self.starts, int(places.max()), side="right")) - 1
        for part in range(self.num_sampled, latest + 1):
            begun_before = self.starts[part] < int(places.min())
            self._sample(part, model, accelerator, global_step, begun_before)
            self.num_sampled = part + 1
        return [self.rankings[row] for row in rows]

    def _sample(
        self, part: int, model: PreTrainedModel, accelerator: Accelerator, global_step: int, begun_before: bool
    ) -> None:
        file = self.folder / f"epoch-{self.epoch}-part-{part}.json"
        saved = [self._read(file, part) if accelerator.is_main_process else None]
        broadcast_object_list(saved)
        if saved[0] is None and begun_before:
            raise ValueError(
                f"The checkpoint stands after the beginning of part {part}, whose samples are not in {file}. Resume "
                "with the `output_dir` of the run that was interrupted, or from a checkpoint before that part."
            )
        if saved[0] is None:
            shards = np.split(self.parts[part], range(SHARD_ROWS, len(self.parts[part]), SHARD_ROWS))
            # Each process samples equally many shards, some of them twice, as sharded weights may require
            rank, world = accelerator.process_index, accelerator.num_processes
            own = np.resize(np.arange(len(shards)), -(-len(shards) // world) * world)[rank::world].tolist()
            with gathered(model, self.ranker.model):
                extended = [self._sample_rows(shards[n], model, [self.seed, self.epoch, part, n]) for n in own]
            sampled = gather_object([ranking for shard in extended for ranking in shard])
            by_row = {ranking["row"]: ranking for ranking in sampled}
            saved[0] = [by_row[row] for row in self.parts[part].tolist()]
            if accelerator.is_main_process:
                write_json(file, {"global_step": global_step, "settings": self.settings, "rankings": saved[0]})
        for ranking in saved[0] or []:
            prompt, completions = ranking["prompt"], ranking["completions"]
            options = chat_options(self.dataset[ranking["row"]])
            prompt_ids, completion_ids = tokenize_completions(self.tokenizer, prompt, completions, **options)
            self.rankings[ranking["row"]] = {
                "prompt_ids": prompt_ids,
                "completion_ids": completion_ids,
                "rewards": ranking["rewards"],
            }

    def _sample_rows(self, rows: np.ndarray, model: PreTrainedModel, stream: list[int]) -> list[Row]:
        chosen = [self.dataset[row] for row in rows.tolist()]
        seed = int(np.random.SeedSequence(stream).generate_state(1)[0])
        sampled, _ = sample_for(chosen, model, self.tokenizer, 1, self.options, seed=seed)
        prompts = [row["prompt"] for row in chosen]
        extended = [[*row["completions"], *samples] for row, samples in zip(chosen, sampled, strict=True)]
        rewards, _ = ask_rewards(self.ranker, prompts, extended, columns=user_columns(chosen), may_abstain=True)
        return [
            {"row": row, "prompt": prompt, **re_rank(completions, row_rewards)}
            for row, prompt, completions, row_rewards in zip(rows.tolist(), prompts, extended, rewards, strict=True)
        ]

    def _read(self, file: Path, part: int) -> list[Row] | None:
        """Return the rankings of a part that was sampled before the checkpoint this run resumes from, or None."""
        content = read_json(file)
        if content is None or content["global_step"] >= self.resumed_at:
            return None
        saved = {name: content["settings"].get(name) for name in self.settings}
        other = {name.split(".")[0] for name in differences(saved, self.settings)}
        if "ranker" in other:
            # A warning only: the settings of a function, such as a cache it holds, may change without its rewards
            logger.warning("%s was scored by a ranker with other settings. Its rewards are kept.", file)
            other.discard("ranker")
        if other:
            others = " and another ".join(f"`{name}`" for name in sorted(other))
            raise ValueError(
                f"{file} was sampled with another {others}. Resume with the settings of the run that was interrupted."
            )
        prompts = {ranking["row"]: ranking["prompt"] for ranking in content["rankings"]}
        if prompts != {int(row): self.dataset[int(row)]["prompt"] for row in self.parts[part]}:
            raise ValueError(
                f"{file} was sampled for other prompts. Resume with the dataset of the run that was interrupted."
            )
        return content["rankings"]


def re_rank(completions: list[Completion], rewards: np.ndarray) -> Row:
    """Rank completions of which the last is the policy's sample, best first (PRO, footnote 6).

    The sample is never ranked first: if its reward is the highest, it is ranked second. Rewards are reassigned to the
    ranks in descending order. A completion whose reward is NaN is left out.

    >>> re_rank(["good", "bad", "sampled"], np.array([1.0, 0.0, 2.0]))
    {'completions': ['good', 'sampled', 'bad'], 'rewards': [2.0, 1.0, 0.0]}
    """
    order = np.argsort(-rewards, kind="stable").tolist()[: np.isfinite(rewards).sum()]  # NaN is last
    if order[0] == len(completions) - 1:
        order[:2] = order[1], order[0]
    return {"completions": [completions[index] for index in order], "rewards": sorted(rewards[order], reverse=True)}


class PartSampler(Sampler[int]):
    """Rows of a dataset, part after part, in a random order within each that changes with the epoch."""

    def __init__(self, bootstrap: Bootstrap) -> None:
        self.bootstrap = bootstrap

    def __len__(self) -> int:
        return len(self.bootstrap.dataset)

    def __iter__(self) -> Iterator[int]:
        stream = np.random.default_rng([self.bootstrap.seed, self.bootstrap.epoch])
        for rows in self.bootstrap.parts:
            yield from stream.permutation(rows).tolist()
