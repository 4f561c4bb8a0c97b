"""Statistical Rejection Sampling Optimization (RSO): pairs from an estimate of the optimal policy, then its loss."""

import textwrap

import torch

from prefopt_trl import losses
from prefopt_trl.trainers.completions import CompletionTrainer, ScoredCompletions
from prefopt_trl.trainers.rso_config import RSOConfig


class RSOTrainer(CompletionTrainer):
    """Minimize RSO eq. 10 (`"sigmoid-norm"`) or eq. 12 (`"hinge-norm"`) on pairs, given or sampled from prompts.

    A drop-in for [`~trl.DPOTrainer`]: on pairs it gives the same losses and metrics, faster, because a prompt is
    computed once for both completions. The two losses *are* TRL's `"sigmoid"` and `"hinge"`, run by TRL's code with
    `beta = gamma`. One default differs: `gamma` is 0.05, as in the paper, and `DPOConfig`'s `beta` is 0.1. With
    `soft_labels` or `margin_weight`, which TRL does not have, the loss is [`losses.with_labels`] of the same two.

    On prompts with a `ranker` it first builds the pairs of RSO section 5 with the initial policy: 64 candidates per
    prompt, 8 kept by statistical rejection sampling, 4 random pairs of them labeled by the ranker. They are saved in
    `<output_dir>/sampled/train` and reused by a later run with the same settings. A run with other settings is
    refused, and the error names those that differ.

    Args:
        ranker ([`~prefopt_trl.rankers.Ranker`], *optional*):
            Scores and compares completions. Needed where a dataset has no `chosen` and `rejected` columns.
        args ([`RSOConfig`], *optional*):
            Configuration.
        **kwargs:
            Every other argument of [`~trl.DPOTrainer`], in the same order.

    Raises:
        ValueError: for missing columns, an empty dataset, prompts without a ranker, prompts that fill `max_length`, or
            a tokenizer without an EOS token; the message names the row or argument and the remedy.

    Example:

    ```python
    from datasets import Dataset
    from prefopt_trl import FunctionRanker, RSOConfig, RSOTrainer

    def shortness(prompts, completions, **kwargs):
        return [-0.1 * len(completion) for completion in completions]

    trainer = RSOTrainer(
        model="Qwen/Qwen2.5-0.5B",
        args=RSOConfig("outputs/rso", num_candidates=16, max_new_tokens=64),
        train_dataset=Dataset.from_dict({"prompt": ["What is the sky?", "What is the sea?"]}),
        ranker=FunctionRanker(shortness),
    )
    trainer.train()
    ```
    """

    config_class = RSOConfig
    _tag_names = ["trl", "prefopt-trl", "rso", "dpo"]
    _name = "RSO"
    _paper = {
        "title": "Statistical Rejection Sampling Improves Preference Optimization",
        "id": "2309.06657",
        "citation": textwrap.dedent("""\
            @inproceedings{liu2024statistical,
                title     = {{Statistical Rejection Sampling Improves Preference Optimization}},
                author    = {Tianqi Liu and Yao Zhao and Rishabh Joshi and Misha Khalman and Mohammad Saleh and
                             Peter J. Liu and Jialu Liu},
                year      = 2024,
                booktitle = {The Twelfth International Conference on Learning Representations},
                url       = {https://arxiv.org/abs/2309.06657},
            }"""),
    }

    @property
    def has_own_loss(self) -> bool:  # type: ignore[override]
        return bool(self.args.label_columns)

    def loss_per_prompt(self, completions: ScoredCompletions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = losses.sigmoid_norm if self.args.loss_type == ["sigmoid"] else losses.hinge_norm
        scores = self.scores(completions)
        return losses.with_labels(lambda pairs: loss(pairs, gamma=1.0), scores, **completions.labels), {}

    def scores(self, completions: ScoredCompletions) -> torch.Tensor:
        return self.args.gamma * completions.logratios
