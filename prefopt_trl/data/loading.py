"""Load datasets by name: an id on the Hub, a folder, or a file."""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict, ReadInstruction, load_dataset, load_from_disk

from prefopt_trl.data.formats import check_columns, is_lost, normalize_pairs
from prefopt_trl.data.hh_rlhf import HELPFUL, HUMAN_TURN, SUBSETS, load_hh_rlhf, read_hub, split_transcripts
from prefopt_trl.runtime.settings import cache_of_contents

ROWS_SEED = 0  # for `num_rows`: every command takes the same rows, and a smaller number takes a subset
FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # the builder that `load_dataset` uses for each
SAMPLED = ("pairs", "candidates")  # the datasets that `build_preference_dataset` saves


def load_rows(name: str, config: str | None = None, split: str = "train", num_rows: int | None = None) -> Dataset:
    r"""Load the rows of a dataset.

    HH-RLHF transcripts (no `prompt` column, and mostly `chosen` and `rejected` that begin with `"\n\nHuman:"`) are
    split into prompt and completions like [`load_hh_rlhf`]. Pairs with text prompts and whole conversations as
    completions, such as UltraFeedback's, get the prompt as messages. Other columns are unchanged.

    Args:
        name (`str`):
            Id on the Hub; a folder from `save_to_disk` or [`build_preference_dataset`], or of data files; or one
            file, `.jsonl`, `.json` (each also with `.gz`) or `.parquet`.
        config (`str`, *optional*):
            Configuration of the dataset, such as `"candidates"` of a sampled one, or a subset of HH-RLHF.
        split (`str`, *optional*, defaults to `"train"`):
            Split, or part of one: `"train[:90%]"` has the rows of the first 90% of the distinct prompts, so that
            `"train[90%:]"` shares no prompt with it. A file, or a folder where `save_to_disk` wrote one dataset, has
            no splits and is read as the split named here. A sampled dataset has only the split `"train"`.
        num_rows (`int`, *optional*):
            Take so many rows only, drawn at random with [`ROWS_SEED`] from all of the split.
    """
    if num_rows is not None and num_rows < 1:
        raise ValueError(f"`num_rows` must be at least 1, got {num_rows}. Leave it out for all rows.")
    splits = {part.partition("[")[0] for part in split.split("+")}
    whole = splits.pop() if len(splits) == 1 else split  # parts of several splits are cut by row
    dataset = load_hh_rlhf(name, config, whole) if config in (*SUBSETS, HELPFUL) else _load(name, config, whole)
    dataset = normalize_rows(dataset, name)
    if whole != split:
        dataset = _part(dataset, whole, split)
    if num_rows is None or num_rows >= len(dataset):
        return dataset
    return dataset.shuffle(seed=ROWS_SEED).select(range(num_rows))


def normalize_rows(dataset: Dataset, where: str) -> Dataset:
    """Split HH-RLHF transcripts, and give prompts the format of their completions, as [`load_rows`] describes.

    Raise an error that begins with `where` unless this is one non-empty split.
    """
    check_columns(dataset, [], where)
    if _are_transcripts(dataset):
        dataset = split_transcripts(dataset, where, conversational=False)
    return normalize_pairs(dataset, where)


def check_name(name: str) -> None:
    """Raise `FileNotFoundError` for a name that can only be a path but does not exist."""
    path = Path(name)
    if is_lost(name) or (not path.exists() and path.suffix in (*FILES, ".gz")):
        raise FileNotFoundError(
            f"There is no file {name}, and no folder. Check the path, which is relative to the current folder."
        )


def _load(name: str, config: str | None, split: str) -> Dataset:
    check_name(name)
    path = Path(name)
    if path.is_file():
        suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        if suffix not in FILES:
            raise ValueError(f"{name} is no file of {', '.join(FILES)} (or .jsonl.gz, .json.gz). Convert it to one.")
        return load_dataset(FILES[suffix], data_files=name, split="train", cache_dir=cache_of_contents(path))
    if (path / "manifest.json").is_file() and (path / "pairs" / "state.json").is_file():
        # Not through the folder's dataset card, so that the cache files name the source of the rows
        if config not in (None, *SAMPLED):
            raise ValueError(f"{name} has no configuration {config!r}; it has {' and '.join(SAMPLED)}.")
        if split != "train":
            raise ValueError(f"{name} has no split {split!r}; a sampled dataset is all 'train', or 'train[90%:]'.")
        return load_from_disk(str(path / (config or "pairs")))
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load_from_disk(name)
        if isinstance(saved, DatasetDict) and split not in saved:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(saved)}. Choose one of them.")
        return saved[split] if isinstance(saved, DatasetDict) else saved
    return read_hub(name, name=config, split=split, cache_dir=cache_of_contents(path) if path.is_dir() else None)


def _part(dataset: Dataset, whole: str, split: str) -> Dataset:
    """Select part of a split, counted in distinct prompts, or in rows without a column `prompt`."""
    prompts = map(json.dumps, dataset["prompt"]) if "prompt" in dataset.column_names else range(len(dataset))
    numbers: dict[str | int, int] = {}
    number_of_row = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    parts = ReadInstruction.from_spec(split).to_absolute({whole: len(numbers)})
    wanted = {number for part in parts for number in range(part.from_, part.to)}
    if not wanted:
        raise ValueError(f"The part {split!r} of {len(numbers)} prompts has none. Take a larger part.")
    return dataset.select([row for row, number in enumerate(number_of_row) if number in wanted])


def _are_transcripts(dataset: Dataset) -> bool:
    if "prompt" in dataset.column_names or not {"chosen", "rejected"} <= set(dataset.column_names):
        return False
    pairs = zip(dataset["chosen"], dataset["rejected"], strict=True)
    begin_so = sum(all(isinstance(side, str) and side.startswith(HUMAN_TURN) for side in pair) for pair in pairs)
    return 2 * begin_so > len(dataset)
