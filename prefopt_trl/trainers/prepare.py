"""Prepare the user's datasets for training: sample completions for prompts, and score completions."""

import gc
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Row, columns_of, number_rows
from prefopt_trl.data.rankings import pairs_to_rankings
from prefopt_trl.data.tokenization import chat_options, check_prompts_fit, tokenize_prompts
from prefopt_trl.rankers.base import Ranker, ask_rewards
from prefopt_trl.runtime.processes import gathered, process_state
from prefopt_trl.runtime.settings import Settings, as_json, dataset_fingerprint, read_json, write_json
from prefopt_trl.sampling.pipeline import build_preference_dataset
from prefopt_trl.sampling.selection import OWN_COLUMNS, user_columns
from prefopt_trl.sampling.statistics import SamplingStatistics, read_sampled
from prefopt_trl.trainers.base_config import PreferenceConfig

logger = logging.getLogger(__name__)

Data: TypeAlias = Dataset | IterableDataset
Datasets: TypeAlias = dict[str, Data]  # `"train"`, and `"eval"` or several `"eval_<name>"`


@dataclass(frozen=True)
class TrainingData:
    """Where the training data of a run came from.

    Attributes:
        sampled (`tuple` or `None`):
            Settings and statistics of the dataset, if [`build_preference_dataset`] saved it.
        ranker (`dict` or `None`):
            Settings of the ranker that scored the completions, or scores them during training.
    """

    sampled: tuple[Settings, SamplingStatistics] | None = None
    ranker: Settings | None = None

    @classmethod
    def of(cls, dataset: object, ranker: Ranker | None) -> "TrainingData":
        """Read how the dataset was sampled from beside its files, or take the ranker's settings.

        Call it on all processes.
        """
        for file in dataset.cache_files[:1] if isinstance(dataset, Dataset) else []:
            pairs = Path(file["filename"]).parent
            if pairs.name == "pairs" and (sampled := read_sampled(pairs.parent)):
                return cls(sampled, sampled[0].get("ranker"))
        if ranker is None:
            return cls()
        with gathered(ranker.model):
            return cls(None, ranker.settings())


def splits(train_dataset: Data, eval_dataset: Data | Mapping[str, Data] | None) -> Datasets:
    """Return the datasets by name."""
    if isinstance(eval_dataset, Mapping):
        return {"train": train_dataset} | {f"eval_{name}": dataset for name, dataset in eval_dataset.items()}
    return {"train": train_dataset} if eval_dataset is None else {"train": train_dataset, "eval": eval_dataset}


def with_completions(
    datasets: Datasets,
    learns_from: str,
    load_policy: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    ranker: Ranker | None,
    args: PreferenceConfig,
) -> Datasets:
    """Sample completions for prompts, and score completions that have no rewards.

    `learns_from` is `"pairs"` or `"rankings"`. A `ValueError` says which completions, rewards or ranker are missing.
    """
    columns = {name: columns_of(dataset, name) for name, dataset in datasets.items()}
    to_sample = [name for name in columns if are_prompts(columns[name], learns_from)]
    if to_sample and ranker is None:
        missing = "`chosen` and `rejected` completions" if learns_from == "pairs" else "`completions`"
        raise ValueError(
            f"The {' and '.join(to_sample)} dataset has prompts but no {missing}; it has {columns[to_sample[0]]}. "
            "Pass a `ranker`, so that completions can be sampled and ranked, or rename the columns that have them "
            "with `dataset.rename_column(old, new)`."
        )
    if args.sampling == "online" and ("train" not in to_sample or "completions" in columns["train"]):
        raise ValueError(
            "`sampling='online'` needs a training dataset of prompts, and this one has completions. Remove them with "
            "`dataset.select_columns(\"prompt\")`, or leave `sampling` at 'offline'."
        )
    if args.sampling == "online" and ranker is not None:  # offline, the pipeline checks it
        ranker.check_columns(set(columns["train"]) - OWN_COLUMNS)
    for name in to_sample:
        if not isinstance(datasets[name], Dataset):
            raise ValueError(
                f"The {name} dataset is an `IterableDataset` of prompts, and sampling needs to know how many there "
                "are. Pass a `Dataset`, such as `Dataset.from_list(list(dataset.take(1000)))`, or stream completions."
            )
    made = dict(datasets)
    offline = [name for name in to_sample if name != "train" or args.sampling == "offline"]
    if offline:
        assert ranker is not None  # refused above
        policy = load_policy()
        for name in offline:
            made[name] = sample_preferences(datasets[name], name, policy, tokenizer, ranker, args)
        del policy
        gc.collect()  # before the policy is loaded again to be trained
    for name in columns:
        if learns_from == "rankings" and name not in to_sample:
            made[name] = score_completions(datasets[name], name, columns[name], ranker, str(args.output_dir))
    is_used = args.samples_while_training or any(made[name] is not datasets[name] for name in made)
    if ranker is not None and not is_used and {"rejected", "rewards"} & set(columns["train"]):
        logger.warning(
            "`ranker` is not used: the datasets already have ranked completions. To have them scored, remove the "
            "column `rewards`, or give pairs to a trainer on rankings."
        )
    return made


def are_prompts(columns: list[str], learns_from: str) -> bool:
    """Return whether a dataset with these columns needs sampled completions."""
    completions = {"chosen", "rejected"} if learns_from == "pairs" else {"chosen", "rejected", "completions"}
    are_to_sample = "prompt" in columns and not completions & set(columns)
    if are_to_sample and learns_from == "rankings" and "rewards" in columns:
        raise ValueError(
            "A dataset has `rewards` and no `completions` that they belong to. Rename the column that has them with "
            "`dataset.rename_column(old, new)`, or remove `rewards` to sample completions."
        )
    return are_to_sample


def check_text(dataset: Dataset | IterableDataset, name: str) -> None:
    """Refuse images in rankings, naming the column."""
    images = {"image", "images"} & set(columns_of(dataset, name))
    if images:
        raise ValueError(
            f"The {name} dataset has the column {' and '.join(sorted(images))}, and rankings are of text. Remove it, "
            "or train on pairs with `RSOTrainer`."
        )


def sample_preferences(
    dataset: Dataset,
    name: str,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ranker: Ranker,
    args: PreferenceConfig,
) -> Dataset:
    """Sample pairs or rankings for the prompts of a dataset, and save them in `<output_dir>/sampled/<name>`."""
    others = set(dataset.column_names) - {"prompt", "completions", "rewards", "finished"}
    if others and "completions" not in dataset.column_names:
        logger.warning(
            "Completions are sampled for the prompts of the %s dataset. Its other columns are carried along: %s. If "
            "they hold completions, rename them with `dataset.rename_column(old, new)`.",
            name,
            ", ".join(sorted(others)),
        )
    return build_preference_dataset(
        dataset,
        policy,
        tokenizer,
        ranker,
        os.path.join(str(args.output_dir), "sampled", name),
        args,
        seed=args.seed,
        max_length=args.max_length,
        keep_logps=args.keep_logps,
    )


def score_completions(
    dataset: Dataset | IterableDataset, name: str, columns: list[str], ranker: Ranker | None, output_dir: str
) -> Dataset | IterableDataset:
    """Return the dataset with the ranker's rewards if it has completions without rewards; pairs need no ranker.

    Refuse to score without a ranker, and a stream.
    """
    are_pairs = {"chosen", "rejected"} <= set(columns)
    are_candidates = {"prompt", "completions"} <= set(columns)
    if "rewards" in columns or (are_pairs and ranker is None) or not (are_pairs or are_candidates):
        return dataset  # `tokenize_rankings` says what may be missing
    if are_pairs:
        dataset = pairs_to_rankings(dataset, f"the {name} dataset").remove_columns("rewards")
    if ranker is None:
        raise ValueError(
            f"The {name} dataset has `completions` and no `rewards`. Add the column, with one reward per completion, "
            "or pass a `ranker` to score them."
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The {name} dataset is an `IterableDataset` without `rewards`. Pass a `Dataset`, so that the ranker can "
            "score it before training, or add the rewards."
        )
    others = set(columns) - {"prompt", "completions", "chosen", "rejected"}
    if others:
        logger.warning(
            "The ranker scores the completions of the %s dataset, which has no column `rewards`; %s are: %s.",
            name,
            "passed to the ranker" if ranker.reads_columns else "not used",
            ", ".join(sorted(others)),
        )
    return _rankings_with(score_or_read(dataset, name, ranker, output_dir), dataset, name)


def _rankings_with(rewards: list[list[float]], dataset: Dataset, name: str) -> Dataset:
    """Add the rewards, without the completions whose reward is NaN and the rows that have fewer than two others."""
    if not np.isnan(np.concatenate(rewards)).any():
        return dataset.add_column("rewards", rewards)

    def known(row: Row) -> Row:
        kept = [index for index, reward in enumerate(row["rewards"]) if not np.isnan(reward)]
        return {column: [row[column][index] for index in kept] for column in ("completions", "rewards")}

    left = dataset.add_column("rewards", rewards).map(known).filter(lambda row: len(row["rewards"]) > 1)
    logger.warning(
        "The ranker has no opinion on %d completions of the %s dataset, which are left out; %d of %d rankings keep at "
        "least two.",
        sum(np.isnan(row).sum() for row in rewards),
        name,
        len(left),
        len(dataset),
    )
    if len(left) == 0:
        raise ValueError(f"The ranker has an opinion on two completions in no row of the {name} dataset.")
    return left


def check_prompts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """Refuse, before training, prompts that fill `max_length`, naming the row; number the rows."""
    prompt_ids = tokenize_prompts(tokenizer, list(dataset["prompt"]), list(map(chat_options, dataset)))
    check_prompts_fit(prompt_ids, max_length)
    return number_rows(dataset)  # gives repeated prompts different samples


def check_pairs(dataset: Data, name: str, columns: list[str], label_columns: list[str]) -> None:
    """Require columns of pairs, and in those of the labels finite numbers and probabilities, naming the first row."""
    if missing := [column for column in ("chosen", "rejected", *label_columns) if column not in columns]:
        raise ValueError(
            f"The {name} dataset has no column {' and no column '.join(map(repr, missing))}; it has {columns}. Pairs "
            "have `prompt`, `chosen`, `rejected` and what `soft_labels` or `margin_weight` reads: rename yours with "
            "`dataset.rename_column(old, new)`. Prompts need a `ranker`, and are passed to the trainer's constructor. "
            "Rankings, with `completions`, are for PRO, RRHF and listwise DPO."
        )
    for column in label_columns if isinstance(dataset, Dataset) else []:
        values = np.array(list(dataset[column]), dtype=float)  # None is NaN
        wrong = ~np.isfinite(values) | (column == "label_probability") & (np.abs(values - 0.5) > 0.5)
        if wrong.any():
            raise ValueError(
                f"`{column}` of row {wrong.argmax()} of the {name} dataset is {values[wrong.argmax()]}. Give a finite "
                "number, and as `label_probability` one in [0, 1], or leave the row out."
            )


def with_sampled_logps(dataset: Dataset, name: str, max_length: int | None) -> Dataset:
    """Require the log-probabilities of the reference model that were saved when the pairs were sampled.

    The `ValueError` names the missing columns, or the first row that training truncates to another length.
    """
    missing = [column for column in ("ref_chosen_logps", "ref_rejected_logps") if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`reference_logps='sampled'` reads {' and '.join(f'`{column}`' for column in missing)}, which the {name} "
            "dataset lacks. Give prompts and a `ranker`, make the pairs with "
            "`build_preference_dataset(..., keep_logps=True)`, or set `reference_logps='computed'`."
        )
    scored_at = dataset["ref_max_length"] if "ref_max_length" in dataset.column_names else [None] * len(dataset)
    columns = (dataset[column] for column in ("prompt_ids", "chosen_ids", "rejected_ids"))
    for row, (before, prompt_ids, *ids) in enumerate(zip(scored_at, *columns, strict=True)):
        longest = len(prompt_ids) + max(map(len, ids))
        if min(longest, before or longest) != min(longest, max_length or longest):
            raise ValueError(
                f"Row {row} of the {name} dataset has {longest} tokens, and its log-probabilities are of completions "
                f"cut at `ref_max_length`={before}, where training cuts at `max_length`={max_length}. Make the pairs "
                "with the same `max_length`, or set `reference_logps='computed'`."
            )
    return dataset


def score_or_read(dataset: Dataset, name: str, ranker: Ranker, output_dir: str | Path) -> list[list[float]]:
    """Return the rewards of completions, read from the file of an earlier run with the same rows and ranker, if any.

    Only the main process reads and writes the file, `<output_dir>/scored/<split name>.json`. Call it on all processes:
    each returns the rewards of all rows, and raises the errors of [`check_rewards`] for its share.
    """
    process, file = process_state(), Path(output_dir) / "scored" / f"{name}.json"
    rows = (dataset if ranker.reads_columns else dataset.select_columns(["prompt", "completions"])).with_format(None)
    with gathered(ranker.model):  # by all processes
        settings = as_json({"rows": dataset_fingerprint(rows), "ranker": ranker.settings()})
        content = read_json(file) if process.is_main_process else None
        saved = content["rewards"] if content and content["settings"] == settings else None
        [saved] = broadcast_object_list([saved])
        if saved is None:
            start, end = (len(rows) * (process.process_index + n) // process.num_processes for n in (0, 1))
            rewards = gather_object(_score(rows.select(range(start, end)), start, name, ranker))
    if process.is_main_process and saved is None:
        write_json(file, {"settings": settings, "rewards": rewards})
    elif process.is_main_process:
        logger.info("Reusing the rewards of the %s dataset in %s, made by the same ranker.", name, file)
    return rewards if saved is None else saved


def _score(share: Dataset, first_row: int, name: str, ranker: Ranker) -> list[list[float]]:
    if len(share) == 0:  # more processes than rows
        return []
    prompts, completions = list(share["prompt"]), list(share["completions"])
    try:
        columns = user_columns(share.to_list())
        rewards, _ = ask_rewards(ranker, prompts, completions, columns=columns, may_abstain=True)
    except Exception as error:
        error.add_note(f"Row 0 of these {len(share)} is row {first_row} of the {name} dataset.")
        raise
    return [row.tolist() for row in rewards]
