"""From the dataset a user has to what a trainer learns from: prompts are sampled, completions scored."""

import logging

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.rankings import pairs_to_rankings
from prefopt_trl.rankers.base import Ranker, check_rewards
from prefopt_trl.sampling.generation import check_unused_columns, tokenize_prompts
from prefopt_trl.sampling.pipeline import build_preference_dataset
from prefopt_trl.trainers.base_config import PreferenceConfig

logger = logging.getLogger(__name__)


def sample_preferences(
    dataset: Dataset | IterableDataset,
    name: str,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ranker: Ranker | None,
    args: PreferenceConfig,
    output_dir: str,
) -> Dataset:
    """Sample pairs or rankings for the prompts of a dataset, as the configuration says, and save them."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The {name} dataset is an `IterableDataset` of prompts, and sampling needs to know how many there are. "
            "Pass a `Dataset`, such as `Dataset.from_list(list(dataset.take(1000)))`, or stream completions."
        )
    given = "completions" in dataset.column_names
    others = set(dataset.column_names) - {"prompt", "completions", "rewards", "finished"}
    if others and not given:
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
        output_dir=output_dir,
        max_length=args.max_length,
        batch_size=args.generation_batch_size,
        **args.selection_options(),
        **args.generation_options(),
    )


def score_completions(
    dataset: Dataset | IterableDataset, name: str, columns: list[str], ranker: Ranker | None
) -> tuple[Dataset | IterableDataset, bool]:
    """Give pairs and completions without rewards those of the ranker; pairs may do without one.

    Returns:
        The dataset, of rankings where it had completions, and whether the ranker was used.

    Raises:
        ValueError: where a ranker is missing, or the rows cannot be counted.
    """
    are_pairs = {"chosen", "rejected"} <= set(columns)
    are_candidates = {"prompt", "completions"} <= set(columns)
    if "rewards" in columns or (are_pairs and ranker is None) or not (are_pairs or are_candidates):
        return dataset, False  # `tokenize_rankings` says what may be missing
    if are_pairs:
        dataset = pairs_to_rankings(dataset).remove_columns("rewards")
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
            "The ranker scores the completions of the %s dataset, which has no column `rewards`; not used are: %s.",
            name,
            ", ".join(sorted(others)),
        )
    prompts, completions = list(dataset["prompt"]), list(dataset["completions"])
    rewards = check_rewards(ranker.score(prompts, completions), prompts, completions, type(ranker).__name__)
    return dataset.add_column("rewards", [row.tolist() for row in rewards]), True


def check_prompts(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: PreferenceConfig
) -> Dataset:
    """Refuse, before training, prompts that could not be sampled while it goes on.

    Raises:
        ValueError: for a stream, columns that sampling does not use, or a prompt that fills `max_length` (naming its
            row).
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "The train dataset is an `IterableDataset` of prompts. Pass a `Dataset`, such as "
            "`Dataset.from_list(list(dataset.take(1000)))`."
        )
    check_unused_columns(dataset, "The train dataset")
    if args.max_length is not None:
        for row, ids in enumerate(tokenize_prompts(tokenizer, list(dataset["prompt"]))):
            if len(ids) >= args.max_length:
                raise ValueError(
                    f"The prompt of row {row} has {len(ids)} tokens and fills `max_length`={args.max_length}. Raise "
                    "`max_length` or leave such rows out."
                )
    return dataset
