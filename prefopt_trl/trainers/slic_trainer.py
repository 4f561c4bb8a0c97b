"""Sequence Likelihood Calibration (SLiC): a margin between chosen and rejected, without a reference model."""

import textwrap
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from prefopt_trl import losses
from prefopt_trl.data.formats import columns_of
from prefopt_trl.sampling.selection import OWN_COLUMNS
from prefopt_trl.trainers.completions import CompletionTrainer, ScoredCompletions
from prefopt_trl.trainers.prepare import are_prompts
from prefopt_trl.trainers.slic_config import SLiCConfig


class SLiCTrainer(CompletionTrainer):
    """Minimise RSO eq. 1 (`"slic"`), eq. 11 (`"hinge"`) or DPO appendix C.3 (`"unlikelihood"`) on pairs.

    The loss is on the policy's own log-probabilities, summed over tokens, so no reference model is loaded or held. In
    TRL, `DPOTrainer`'s `"hinge"` is another loss, on ratios to a reference model (RSO eq. 12); the experimental
    `CPOTrainer`'s with `cpo_alpha=0` is eq. 11 with `beta = 1 / delta`, and its regularisation is on the chosen
    completion alone and averaged over tokens.

    On pairs this is SLiC-direct. On prompts alone, given a `ranker`, it is SLiC-sample-rank: completions of the policy
    as it is before training meet in a tournament (`pairing="first-round"` for RSO's variant), are labelled by the
    ranker, saved in `<output_dir>/sampled/train` and reused by a later run with the same settings.

    Args:
        args ([`SLiCConfig`], *optional*):
            Configuration.
        ranker ([`~prefopt_trl.rankers.Ranker`], *optional*):
            Scores and compares completions. Needed where a dataset has no `chosen` and `rejected` columns.
        **kwargs:
            Every other argument of [`~trl.DPOTrainer`], in the same order; `ref_model` is refused.

    Raises:
        ValueError: for a `ref_model`, and as [`RSOTrainer`]; the message names the row or argument and the remedy.

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
    num_compared = 2
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
        pairs = completions.logps[:, :2]
        loss_type, delta = self.args.loss_type[0], self.args.delta
        if loss_type == "unlikelihood":
            return losses.unlikelihood(pairs, alpha=self.args.unlikelihood_weight), {}
        calibration = losses.hinge(pairs, gamma=1 / delta) if loss_type == "hinge" else losses.slic(pairs, delta)
        target_logps = completions.logps[:, 2 if self.args.target_column else 0]
        regularization = -self.args.regularization_weight * target_logps
        return calibration + regularization, {"calibration": calibration, "regularization": regularization}

    def scores(self, completions: ScoredCompletions) -> torch.Tensor:
        return completions.logps

    def _check_datasets(self, splits: dict[str, Any], args: Any) -> None:
        super()._check_datasets(splits, args)
        target = args.target_column
        for name, dataset in splits.items():
            columns = [] if dataset is None or target is None else columns_of(dataset, name)
            if are_prompts(columns, self.learns_from) and (target not in columns or target in OWN_COLUMNS):
                raise ValueError(
                    f"`target_column`={target!r} is no column of the {name} dataset that sampling keeps: "
                    f"it has {', '.join(columns)}. Rename the target's with `dataset.rename_column(old, new)`."
                )

    def _takes_rankings(self, args: Any) -> bool:
        return args.target_column is not None  # the target is a third completion of the prompt

    def as_rankings(self, dataset: Dataset | IterableDataset, name: str, args: Any) -> Dataset | IterableDataset:
        missing = {"prompt", "chosen", "rejected", args.target_column} - set(columns_of(dataset, name))
        if missing:
            raise ValueError(
                f"The {name} dataset has no column {' and no column '.join(map(repr, sorted(missing)))}. With "
                "`target_column` it needs `prompt`, `chosen`, `rejected` and that column. To sample pairs for its "
                "prompts instead, remove `chosen` and `rejected`, or rename the one that is the target."
            )
        return dataset.map(
            lambda example: {
                "completions": [example["chosen"], example["rejected"], example[args.target_column]],
                "rewards": [2.0, 1.0, 0.0],  # only keeps them in this order
            }
        )
