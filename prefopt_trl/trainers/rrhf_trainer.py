"""Rank Responses to align with Human Feedback (RRHF): a zero-margin ranking loss plus supervised fine-tuning."""

import textwrap

import torch

from prefopt_trl import losses
from prefopt_trl.trainers.completions import CompletionTrainer, ScoredCompletions
from prefopt_trl.trainers.rrhf_config import RRHFConfig


class RRHFTrainer(CompletionTrainer):
    """Minimize RRHF's ranking term plus the negative log-likelihood of the best completion (RSO section 1), on
    rankings.

    The ranking term uses log-probabilities averaged over tokens, RRHF's score; the likelihood term is summed over
    tokens. No reference model is loaded or held. Prompts may have different numbers of completions.

    The data, the arguments and the errors are those of [`PROTrainer`], without bootstrapping.

    Example:

    ```python
    from datasets import Dataset
    from prefopt_trl import RRHFConfig, RRHFTrainer

    rankings = Dataset.from_dict(
        {"prompt": ["The sky is"], "completions": [[" blue.", " green.", " wet."]], "rewards": [[2.0, -1.0, 0.5]]}
    )
    trainer = RRHFTrainer("Qwen/Qwen2.5-0.5B", args=RRHFConfig("outputs/rrhf"), train_dataset=rankings)
    trainer.train()
    ```
    """

    config_class = RRHFConfig
    learns_from = "rankings"
    has_reference = False
    _tag_names = ["trl", "prefopt-trl", "rrhf"]
    _name = "RRHF"
    _paper = {
        "title": "RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
        "id": "2304.05302",
        "citation": textwrap.dedent("""\
            @article{yuan2023rrhf,
                title   = {{RRHF: Rank Responses to Align Language Models with Human Feedback without tears}},
                author  = {Zheng Yuan and Hongyi Yuan and Chuanqi Tan and Wei Wang and Songfang Huang and Fei Huang},
                year    = 2023,
                journal = {arXiv preprint arXiv:2304.05302},
            }"""),
    }

    def loss_per_prompt(self, completions: ScoredCompletions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        ranking = losses.rrhf(completions.mean_logps, completions.rewards, completions.mask)
        sft = -self.args.sft_weight * completions.logps[:, 0]
        return ranking + sft, {"ranking": ranking, "sft": sft}

    def scores(self, completions: ScoredCompletions) -> torch.Tensor:
        return completions.mean_logps
