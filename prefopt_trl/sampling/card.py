"""The dataset card of a sampled dataset, and its way to the Hub."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import DatasetCardData

from prefopt_trl.runtime.cards import name, settings_table, table
from prefopt_trl.runtime.fingerprints import dataset_fingerprint
from prefopt_trl.runtime.hub import push_folder
from prefopt_trl.sampling.statistics import QUANTILES, SamplingStatistics

PUSHED = ["README.md", "manifest.json", "statistics.json", "statistics.png"]
# Not every Arrow file: `Dataset.map` leaves caches beside the data
PUSHED += [f"{folder}/{files}" for folder in ("candidates", "pairs") for files in ("data-*.arrow", "*.json")]

CONFIGS: list[dict[str, Any]] = [
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
    "rso": "distinct ones are kept by statistical rejection sampling (Algorithm 1)",
    "sft": "are kept at random",
    "top-k": "distinct ones with the highest rewards are kept",
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
    # `load_dataset` finds a folder in its cache by these lines, and not by what is in the folder: without the
    # fingerprint, one that was made anew in the same place would be read as it was before
    content = [settings, statistics.as_dict(), dataset_fingerprint(dataset)]
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    configs = [{**config, "description": f"Fingerprint {fingerprint}"} for config in CONFIGS]
    metadata = DatasetCardData(configs=configs, tags=tags, pretty_name=f"Sampled preferences ({made})")
    trainer = "RSOTrainer" if made == "pairs" else "PROTrainer"
    relatives = "or TRL's `DPOTrainer`" if made == "pairs" else "and other trainers on rankings"
    quantiles = [[name, *(f"{value:.4g}" for value in row)] for name, row in statistics.reward_quantiles.items()]
    warning = f"> **Warning:** {statistics.warning}\n\n" if statistics.warning else ""
    columns = [[name(column), COLUMNS.get(column, "given with the prompts")] for column in dataset.column_names]
    return f"""---
{metadata.to_yaml()}
---

# Sampled preferences

{how_sampled(settings, statistics)} Made with
`prefopt_trl.build_preference_dataset`.

## Use

```python
from datasets import load_dataset
from prefopt_trl import {trainer}

{made} = load_dataset("this/repository", "pairs", split="train")  # of this folder: load_from_disk("pairs")
trainer = {trainer}(model, train_dataset={made})  # {relatives}
```

`"candidates"` in place of `"pairs"` loads all candidates with their rewards. `build_preference_dataset` takes them as
its `prompts`, to select among them otherwise.

## Columns

{table(["column", "meaning"], columns)}

## Statistics

{warning}{counts_table(statistics)}

Rewards at their quantiles:

{table(["reward of", *(f"{quantile:.0%}" for quantile in QUANTILES)], quantiles)}

## Settings

Fingerprints are shortened; `manifest.json` has them whole.

{settings_table(settings)}

## Citation

Liu et al., *Statistical Rejection Sampling Improves Preference Optimization*, ICLR 2024,
[arXiv:2309.06657](https://arxiv.org/abs/2309.06657).
"""


def how_sampled(settings: dict[str, Any], statistics: SamplingStatistics) -> str:
    """Say in a paragraph of Markdown how a dataset was sampled."""
    used = statistics.num_prompts - statistics.num_skipped
    return f"""{statistics.num_pairs:,} {statistics.made} from {used:,} of {statistics.num_prompts:,} prompts.
Each prompt has candidates with a reward by a ranker, of which up to {settings["num_samples"]}
{STRATEGIES[settings["strategy"]]}, as in
[Statistical Rejection Sampling Improves Preference Optimization](https://arxiv.org/abs/2309.06657)."""


def counts_table(statistics: SamplingStatistics) -> str:
    """Write the numbers of a sampled dataset as a table in Markdown."""
    counts = {
        "prompts": f"{statistics.num_prompts:,}",
        "prompts skipped, whose candidates do not differ": f"{statistics.num_skipped:,}",
        "prompts with fewer distinct candidates than `num_samples`": f"{statistics.num_short:,}",
        "candidates": f"{statistics.num_candidates:,}",
        "candidates that repeat another of their prompt": f"{statistics.num_duplicates:,}",
        "candidates cut before they ended": _or_unknown(statistics.num_unfinished, ","),
        statistics.made: f"{statistics.num_pairs:,}",
        "acceptance rate of the first round of rejection": _or_unknown(statistics.acceptance_rate, ".3f"),
        "mean probability the ranker gives to its own labels, on random candidates": (
            f"{statistics.label_probability_before:.3f}"
        ),
        f"the same on the {statistics.made}": f"{statistics.label_probability_after:.3f}",
    }
    return table(["", "value"], [list(count) for count in counts.items()])


def read_sampled(folder: str | Path) -> tuple[dict[str, Any], SamplingStatistics] | None:
    """Read how a dataset was sampled.

    Args:
        folder (`str` or `Path`):
            Folder of the dataset.

    Returns:
        The settings of its manifest and its statistics; None if the folder holds no finished dataset.
    """
    manifest = Path(folder, "manifest.json")
    if not manifest.exists():
        return None
    contents = json.loads(manifest.read_text(encoding="utf-8"))
    if not contents["finished"]:
        return None
    numbers = json.loads(Path(folder, "statistics.json").read_text(encoding="utf-8"))
    del numbers["quantiles"]  # the same in all of them
    return contents["settings"], SamplingStatistics(**numbers)


def push_preference_dataset(
    output_dir: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload a finished dataset of [`build_preference_dataset`] to the Hub: pairs, candidates, statistics and card.

    Only what the pipeline has written is uploaded; its card then says how to load it from there. Call it in one
    process.

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
        PushError: if the upload fails, with the command that repeats it. The folder stays whole.

    Example:

    ```python
    push_preference_dataset("outputs/pairs", "my-org/my-pairs", private=True)
    ```
    """
    if read_sampled(output_dir) is None:
        raise ValueError(
            f"{output_dir} holds no finished dataset. Give `build_preference_dataset` the same settings and "
            f"output_dir={str(output_dir)!r} to finish it, then push again."
        )

    def write_card(repo_id: str) -> None:
        card = Path(output_dir, "README.md")
        text = card.read_text(encoding="utf-8")
        # The first place is ours: settings, which come later, may hold the same words
        named = re.sub(r'load_dataset\("[^"]*", "pairs"', f'load_dataset("{repo_id}", "pairs"', text, count=1)
        card.write_text(named, encoding="utf-8")

    return push_folder(
        output_dir,
        repo_id,
        write_card,
        repo_type="dataset",
        allow_patterns=PUSHED,
        delete_patterns=["candidates/*", "pairs/*"],  # files of an earlier dataset that had more of them
        private=private,
        token=token,
        commit_message="Upload sampled preferences",
    )


def _or_unknown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
