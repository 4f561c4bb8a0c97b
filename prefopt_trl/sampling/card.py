"""The dataset card of a sampled dataset, and its way to the Hub."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import DatasetCardData, HfApi

from prefopt_trl.sampling.statistics import QUANTILES, SamplingStatistics

PUSHED = ["README.md", "manifest.json", "statistics.json", "statistics.png"]
# Not every Arrow file: `Dataset.map` leaves caches beside the data
PUSHED += [f"{folder}/{files}" for folder in ("candidates", "pairs") for files in ("data-*.arrow", "*.json")]

CONFIGS = [
    {"config_name": "pairs", "data_files": "pairs/data-*.arrow", "default": True},
    {"config_name": "candidates", "data_files": "candidates/data-*.arrow"},
]

COLUMNS = {
    "prompt": "the prompt, as text or as messages",
    "chosen": "the completion that the ranker prefers",
    "rejected": "the other one",
    "chosen_reward": "the ranker's reward of `chosen`, a logit",
    "rejected_reward": "the ranker's reward of `rejected`",
    "label_probability": "the ranker's probability that `chosen` is the better one, in [0.5, 1]",
    "completions": "the completions kept, best first",
    "rewards": "the ranker's reward of each, a logit",
    "ref_chosen_logps": "log-probability of `chosen` under the policy that was sampled, summed, in nats",
    "ref_rejected_logps": "the same of `rejected`",
}

STRATEGIES = {
    "rso": "kept by statistical rejection sampling (Algorithm 1)",
    "sft": "kept at random",
    "top-k": "with the highest rewards kept",
}


def dataset_card(settings: dict[str, Any], statistics: SamplingStatistics, dataset: Dataset) -> str:
    """Write the README.md of a sampled dataset, with which the Hub and `load_dataset(folder, "pairs")` can read it.

    It depends on its arguments alone. Texts in the settings and names of columns are shown as code, so that none of
    them is read as Markdown.

    Args:
        settings (`dict`):
            All settings of the manifest.
        statistics ([`SamplingStatistics`]):
            Statistics of the dataset.
        dataset ([`~datasets.Dataset`]):
            The pairs, or rankings.

    Returns:
        `str`: the card in Markdown, with its metadata in YAML first.

    Example:

    ```python
    (output_dir / "README.md").write_text(dataset_card(settings, statistics, pairs), encoding="utf-8")
    ```
    """
    made, strategy = statistics.made, settings["strategy"]
    tags = ["trl", "prefopt-trl", "preference", strategy, settings["pairing"]]
    metadata = DatasetCardData(configs=CONFIGS, tags=tags, pretty_name=f"Sampled preferences ({made})")
    trainer = "RSOTrainer" if made == "pairs" else "PROTrainer"
    relatives = "or TRL's `DPOTrainer`" if made == "pairs" else "and other trainers on rankings"
    used = statistics.num_prompts - statistics.num_skipped
    counts = {
        "prompts": f"{statistics.num_prompts:,}",
        "prompts skipped, with too few distinct candidates": f"{statistics.num_skipped:,}",
        "candidates": f"{statistics.num_candidates:,}",
        "candidates that repeat another of their prompt": f"{statistics.num_duplicates:,}",
        "candidates cut before they ended": _or_unknown(statistics.num_unfinished, ","),
        made: f"{statistics.num_pairs:,}",
        "acceptance rate of the first round of rejection": _or_unknown(statistics.acceptance_rate, ".3f"),
        "mean probability the ranker gives to its own labels, on random candidates": (
            f"{statistics.label_probability_before:.3f}"
        ),
        f"the same on the {made}": f"{statistics.label_probability_after:.3f}",
    }
    quantiles = [[name, *(f"{value:.4g}" for value in row)] for name, row in statistics.reward_quantiles.items()]
    warning = f"> **Warning:** {statistics.warning}\n\n" if statistics.warning else ""
    columns = [[_name(name), COLUMNS.get(name, "given with the prompts")] for name in dataset.column_names]
    shown = [[_name(name), _code(json.dumps(value, ensure_ascii=False))] for name, value in _flat(settings)]
    return f"""---
{metadata.to_yaml()}
---

# Sampled preferences

{statistics.num_pairs:,} {made} from {used:,} of {statistics.num_prompts:,} prompts. Each prompt has candidates with a
reward by a ranker, of which {settings["num_samples"]} distinct ones are {STRATEGIES[strategy]}, as in
[Statistical Rejection Sampling Improves Preference Optimization](https://arxiv.org/abs/2309.06657). Made with
`prefopt_trl.build_preference_dataset`.

## Use

```python
from datasets import load_dataset
from prefopt_trl import {trainer}

{made} = load_dataset("this/repository", "pairs", split="train")  # or this folder
trainer = {trainer}(model, train_dataset={made})  # {relatives}
```

`"candidates"` in place of `"pairs"` loads all candidates with their rewards. `build_preference_dataset` takes them as
its `prompts`, to select among them otherwise.

## Columns

{_table(["column", "meaning"], columns)}

## Statistics

{warning}{_table(["", "value"], [list(count) for count in counts.items()])}

Rewards at their quantiles:

{_table(["reward of", *(f"{quantile:.0%}" for quantile in QUANTILES)], quantiles)}

## Settings

Fingerprints are shortened; `manifest.json` has them whole.

{_table(["setting", "value"], shown)}

## Citation

Liu et al., *Statistical Rejection Sampling Improves Preference Optimization*, ICLR 2024,
[arXiv:2309.06657](https://arxiv.org/abs/2309.06657).
"""


def push_preference_dataset(
    output_dir: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a finished dataset of [`build_preference_dataset`] to the Hub: pairs, candidates, statistics and card.

    Only what the pipeline has written is uploaded, in one commit. Call it in one process.

    Args:
        output_dir (`str` or `Path`):
            Folder of the dataset.
        repo_id (`str`):
            Dataset repository, such as `"my-org/my-pairs"`. It is made where there is none.
        private (`bool`, *optional*):
            Whether a repository made here is private. By default as the organisation has it.
        token (`str`, *optional*):
            Access token. By default the one you are logged in with.

    Returns:
        `str`: address of the repository.

    Raises:
        ValueError: if `output_dir` holds no finished dataset.
        RuntimeError: if the upload fails. The folder is left as it is.

    Example:

    ```python
    push_preference_dataset("outputs/pairs", "my-org/my-pairs", private=True)
    ```
    """
    manifest = Path(output_dir, "manifest.json")
    if not manifest.exists() or not json.loads(manifest.read_text(encoding="utf-8"))["finished"]:
        raise ValueError(
            f"{output_dir} holds no finished dataset. Give `build_preference_dataset` the same settings and "
            f"output_dir={str(output_dir)!r} to finish it, then push again."
        )
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            repo_type="dataset",
            folder_path=output_dir,
            allow_patterns=PUSHED,
            delete_patterns=["candidates/*", "pairs/*"],  # files of an earlier dataset that had more of them
            commit_message="Upload sampled preferences",
        )
    except Exception as error:  # whatever the Hub, the network or the login raise
        raise RuntimeError(
            f"The dataset was not pushed to {repo_id}: {error}\nNothing is lost: it is whole in {output_dir}. Push it "
            f"again with `push_preference_dataset({str(output_dir)!r}, {repo_id!r})`."
        ) from error
    return str(repo)


def _or_unknown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _flat(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names, in the order of these."""
    if isinstance(settings, dict) and settings:
        for key in sorted(settings, key=str):
            yield from _flat(settings[key], f"{name}.{key}" if name else str(key))
    else:
        yield name, settings


def _name(name: str) -> str:
    return _code(json.dumps(name, ensure_ascii=False)[1:-1])  # without the quotes


def _code(text: str) -> str:
    """Text on one line as Markdown code in a table: nothing in it ends the code or the cell, or is read as HTML."""
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", text)
    if "`" in text:
        longest = max(map(len, re.findall("`+", text)))
        text = f"{'`' * longest} {text} {'`' * longest}"  # these spaces are not shown
    return f"`{text}`".replace("|", r"\|")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
