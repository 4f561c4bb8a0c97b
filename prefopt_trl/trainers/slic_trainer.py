"""Sequence Likelihood Calibration (SLiC): a margin between chosen and rejected, without a reference model."""

import textwrap
from functools import partial
from typing import Any

import torch
from transformers import DataCollator, PreTrainedTokenizerBase
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prefopt_trl import losses
from prefopt_trl.data.formats import Row, check_completions, columns_of
from prefopt_trl.data.tokenization import chat_options, tokenize_completions
from prefopt_trl.rankers.base import Ranker
from prefopt_trl.sampling.selection import OWN_COLUMNS
from prefopt_trl.trainers.base import collating_options
from prefopt_trl.trainers.completions import CompletionTrainer, ScoredCompletions
from prefopt_trl.trainers.prepare import Data, Datasets, are_prompts, check_text
from prefopt_trl.trainers.slic_config import SLiCConfig


class SLiCTrainer(CompletionTrainer):
    """Minimize RSO eq. 1 (`"slic"`) or DPO appendix C.3 (`"unlikelihood"`) on pairs.

    The loss is on the policy's own log-probabilities, summed over tokens, so no reference model is loaded or held.
    Without regularization, eq. 1 is `delta` times the hinge loss of RSO eq. 11 with `gamma = 1 / delta`: the `"hinge"`
    of TRL's experimental `CPOTrainer` with `beta = gamma` and `cpo_alpha=0`. The `"hinge"` of `DPOTrainer` is another
    loss, on ratios to a reference model (RSO eq. 12).

    On pairs this is SLiC-direct. On prompts with a `ranker` it is SLiC-sample-rank: completions of the initial policy
    are paired in a tournament (`pairing="first-round"` for RSO's variant), labeled by the ranker, saved in
    `<output_dir>/sampled/train` and reused by a later run with the same settings.

    The arguments and the errors are those of [`RSOTrainer`], with a [`SLiCConfig`]; `ref_model` is refused.

    Example:

    ```python
    from datasets import Dataset
    from prefopt_trl import SLiCConfig, SLiCTrainer

    pairs = Dataset.from_dict({"prompt": ["The sky is"], "chosen": [" blue."], "rejected": [" green."]})
    trainer = SLiCTrainer("Qwen/Qwen2.5-0.5B", args=SLiCConfig("outputs/slic", delta=1.0), train_dataset=pairs)
    trainer.train()
    ```
    """

    config_class = SLiCConfig
    has_reference = False
    _tag_names = ["trl", "prefopt-trl", "slic"]
    _name = "SLiC"
    _paper = {
        "title": "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        "id": "2305.10425",
        "citation": textwrap.dedent("""\
            @article{zhao2023slic,
                title   = {{SLiC-HF: Sequence Likelihood Calibration with Human Feedback}},
                author  = {Yao Zhao and Rishabh Joshi and Tianqi Liu and Misha Khalman and Mohammad Saleh and
                           Peter J. Liu},
                year    = 2023,
                journal = {arXiv preprint arXiv:2305.10425},
            }"""),
    }

    def loss_per_prompt(self, completions: ScoredCompletions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pairs = completions.logps
        if self.args.loss_type == ["unlikelihood"]:
            return losses.unlikelihood(pairs, alpha=self.args.unlikelihood_weight), {}
        target_logps = pairs[:, 0] if completions.target_logps is None else completions.target_logps
        slic, weight = partial(losses.slic, delta=self.args.delta), self.args.regularization_weight
        calibration = losses.with_labels(slic, pairs, **completions.labels)
        regularized = partial(slic, target_logps=target_logps, regularization_weight=weight)
        loss = losses.with_labels(regularized, pairs, **completions.labels)
        return loss, {"calibration": calibration, "regularization": loss - calibration}

    def scores(self, completions: ScoredCompletions) -> torch.Tensor:
        return completions.logps

    def _check_data(self, datasets: Datasets, ranker: Ranker | None) -> None:
        super()._check_data(datasets, ranker)
        target = self.args.target_column
        for name, dataset in datasets.items() if target is not None else []:
            check_text(dataset, name)
            columns = columns_of(dataset, name)
            if are_prompts(columns, self.learns_from):
                if target not in columns or target in OWN_COLUMNS:
                    raise ValueError(
                        f"`target_column`={target!r} is no column of the {name} dataset that sampling keeps: it has "
                        f"{', '.join(columns)}. Rename the target's with `dataset.rename_column(old, new)`."
                    )
            elif missing := {"prompt", "chosen", "rejected", target} - set(columns):
                raise ValueError(
                    f"The {name} dataset has no column {' and no column '.join(map(repr, sorted(missing)))}. With "
                    "`target_column` it needs `prompt`, `chosen`, `rejected` and that column. To sample pairs for its "
                    "prompts instead, remove `chosen` and `rejected`, or rename the one that is the target."
                )

    def _prepare_dataset(self, dataset: Data, processing_class: Any, args: DPOConfig, dataset_name: str) -> Data:
        target = self.args.target_column
        if target is not None:
            tokenizer = getattr(processing_class, "tokenizer", processing_class)

            def tokenize(example: Row, row: int) -> dict[str, list[int]]:
                prompt, completions = example["prompt"], [example["chosen"], example["rejected"], example[target]]
                check_completions(prompt, completions, f"row {row} of the {dataset_name} dataset")
                ids = tokenize_completions(tokenizer, prompt, completions[2:], **chat_options(example))
                return {"target_prompt_ids": ids[0], "target_ids": ids[1][0]}

            dataset = dataset.with_format(None).map(tokenize, with_indices=True)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _make_collator(self, tokenizer: PreTrainedTokenizerBase, ranker: Ranker | None) -> DataCollator:
        if self.args.target_column is None:
            return super()._make_collator(tokenizer, ranker)
        self.rows_per_example = 3
        return CollatorWithTargets(tokenizer.pad_token_id, **collating_options(self.args))


class CollatorWithTargets(DataCollatorForPreference):
    """TRL's batch of pairs, and behind it a row for the target of each, for which `is_target` is True."""

    def torch_call(self, examples: list[Row]) -> dict[str, torch.Tensor]:
        targets = [
            {"prompt_ids": example["target_prompt_ids"], "chosen_ids": example["target_ids"], "rejected_ids": []}
            for example in examples
        ]
        batch = super().torch_call(examples + targets)  # rows of chosen, of targets, of rejected, and of nothing
        row = torch.arange(3 * len(examples))
        return {
            **{name: rows.unflatten(0, (4, -1))[[0, 2, 1]].flatten(0, 1) for name, rows in batch.items()},
            "group_ids": row % len(examples),
            "is_target": row >= 2 * len(examples),
        }
