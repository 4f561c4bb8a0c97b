"""Load Anthropic's HH-RLHF comparisons as prompts with a chosen and a rejected completion."""

import logging
import re
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from prefopt_trl.data.formats import ASSISTANT_TURN, TURN_NAMES, Message, check_columns
from prefopt_trl.runtime.settings import cache_of_contents

logger = logging.getLogger(__name__)

SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")

HUMAN_TURN = "\n\nHuman:"
HELPFUL = "helpful"  # all subsets whose names begin with it: RSO's task
ROLES = {name: role for role, name in TURN_NAMES.items()}


def load_hh_rlhf(
    path_or_repo: str | Path = "Anthropic/hh-rlhf",
    subset: str | None = None,
    split: str = "train",
    conversational: bool = False,
) -> Dataset:
    r"""Load HH-RLHF, with each pair of transcripts split into their common prompt and two completions.

    The prompt ends with the last `"\n\nAssistant:"` up to which the transcripts agree, usually that of the last turn;
    the rest is the completion. If the conversations diverge earlier, the completions have several turns. Only a role
    name after a blank line begins a turn. Rows whose transcripts do not begin with a human turn, or share no assistant
    turn, are dropped with a warning (PRO Table 1 filters such rows too).

    Args:
        path_or_repo (`str` or `Path`, *optional*, defaults to `"Anthropic/hh-rlhf"`):
            Repository on the Hub; or a local folder with the same layout, such as `harmless-base/test.jsonl.gz`; or
            one `.jsonl` or `.jsonl.gz` file.
        subset (`str`, *optional*):
            `"harmless-base"`, `"helpful-base"`, `"helpful-online"`, `"helpful-rejection-sampled"`, or `"helpful"` for
            the last three. By default all four. Subsets that a local folder lacks are skipped if it has another.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"test"`. Ignored for a single file.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether to return lists of messages rather than strings.

    Returns:
        [`~datasets.Dataset`] with the columns `prompt`, `chosen` and `rejected`.

        Plain: `prompt` ends in `"\n\nAssistant:"`, and `prompt + chosen` is the first transcript, character for
        character, `prompt + rejected` the second; a completion begins with the space after the colon.

        Conversational: each turn is a message, without the space after its colon; two turns of the assistant in a row
        are two messages. `formats.transcript(prompt + chosen)` gives the transcript back.

    Raises:
        FileNotFoundError: if the file, folder, split or repository does not exist, or the Hub cannot be reached.
        ValueError: if `subset` is unknown or given for a single file, if a column or a row's text is missing, or if a
            file is empty, not JSON lines, or has no row that can be split.

    Example:

    ```python
    >>> dataset = load_hh_rlhf("data/hh_rlhf", subset="harmless-base", split="test")
    >>> dataset.num_rows
    2312
    ```
    """
    if subset is not None and subset not in (*SUBSETS, HELPFUL):
        raise ValueError(f"subset must be one of {', '.join(SUBSETS)}, {HELPFUL}, or None for all; got {subset!r}")
    path = Path(path_or_repo)
    if path.is_file():
        if subset is not None:
            raise ValueError(f"subset={subset!r} selects a folder, but {path} is a single file: leave subset out")
        raw = {str(path): _read_file(path)}
    elif path.is_dir():
        raw = {str(file): _read_file(file) for file in _find_files(path, subset, split)}
    else:
        names = [name for name in SUBSETS if name.startswith(subset or "")]
        raw = {
            f"{path_or_repo}/{name} ({split})": read_hub(str(path_or_repo), data_dir=name, split=split)
            for name in names
        }
    return concatenate_datasets([split_transcripts(dataset, where, conversational) for where, dataset in raw.items()])


def _find_files(folder: Path, subset: str | None, split: str) -> list[Path]:
    wanted = [folder / name / f"{split}.jsonl.gz" for name in SUBSETS if name.startswith(subset or "")]
    files = [file for file in wanted if file.is_file()]
    if not files:
        present = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.jsonl.gz"))
        raise FileNotFoundError(
            f"{folder} has none of {', '.join(str(file.relative_to(folder)) for file in wanted)}; "
            f"it has {', '.join(present) or 'no .jsonl.gz file at all'}. "
            "Lay the folder out like the Hub's Anthropic/hh-rlhf, choose another split, or pass one file."
        )
    return files


def _read_file(file: Path) -> Dataset:
    try:
        return load_dataset("json", data_files=str(file), split="train", cache_dir=cache_of_contents(file))
    except (DatasetGenerationError, StopIteration) as error:  # `datasets` raises StopIteration on an empty file
        raise ValueError(f"{file} must hold one JSON object per line: {error.__cause__ or 'it is empty'}") from error


def read_hub(path: str, **options: str | None) -> Dataset:
    """Call `load_dataset`; if it cannot read the dataset, raise `FileNotFoundError` with the remedy."""
    try:
        return load_dataset(path, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"{path!r} is neither a local file or folder nor a dataset of the Hub that can be read now ({error}). "
            "Check the name, or download the dataset and give its folder."
        ) from error


def split_transcripts(dataset: Dataset, where: str, conversational: bool) -> Dataset:
    check_columns(dataset, ["chosen", "rejected"], where)
    kept: list[int] = []
    malformed: list[int] = []
    for index, row in enumerate(dataset):
        for column in ("chosen", "rejected"):
            if not isinstance(row[column], str):
                raise ValueError(f"{where}, row {index}: {column} must be a transcript, got {row[column]!r}")
        (malformed if _prompt_end(row) is None else kept).append(index)
    if malformed:
        message = (
            f"{where}: {len(malformed)} of {len(dataset)} rows have no prompt, as their transcripts do not begin with "
            f"{HUMAN_TURN!r} or do not agree up to any {ASSISTANT_TURN!r}: rows {', '.join(map(str, malformed[:10]))}"
            f"{', ...' if len(malformed) > 10 else ''}"
        )
        if not kept:
            raise ValueError(message)
        logger.warning("%s. They are left out.", message)
    split = dataset.select(kept).map(
        _split_row,
        fn_kwargs={"conversational": conversational},
        remove_columns=dataset.column_names,
        # `datasets` hashes this function by its name only, so the cache would be stale after an upgrade
        load_from_cache_file=False,
        desc="Splitting HH-RLHF transcripts",
    )
    return split.select_columns(["prompt", "chosen", "rejected"])


def _prompt_end(row: dict[str, str]) -> int | None:
    """Return the end of the last `ASSISTANT_TURN` up to which both transcripts agree, or None."""
    chosen, rejected = row["chosen"], row["rejected"]
    start = chosen.rfind(ASSISTANT_TURN)
    while start >= 0 and chosen.startswith(HUMAN_TURN):
        end = start + len(ASSISTANT_TURN)
        if rejected.startswith(chosen[:end]):
            return end
        start = chosen.rfind(ASSISTANT_TURN, 0, start)
    return None


def _split_row(row: dict[str, str], conversational: bool) -> dict[str, str] | dict[str, list[Message]]:
    chosen, rejected = row["chosen"], row["rejected"]
    end = _prompt_end(row)
    if not conversational:
        return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}
    prompt = _messages(chosen[:end])[:-1]  # the last one is the empty turn that the completions fill
    return {
        "prompt": prompt,
        "chosen": _messages(chosen)[len(prompt) :],
        "rejected": _messages(rejected)[len(prompt) :],
    }


def _messages(text: str) -> list[Message]:
    """Parse a transcript into messages: the inverse of `formats.transcript`."""
    _, *turns = re.split(r"\n\n(Human|Assistant):", text)
    return [
        {"role": ROLES[name], "content": content.removeprefix(" ")}
        for name, content in zip(turns[::2], turns[1::2], strict=True)
    ]
