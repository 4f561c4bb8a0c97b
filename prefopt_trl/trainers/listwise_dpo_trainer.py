"""Listwise DPO: Direct Preference Optimization under the Plackett-Luce model, for rankings of any length."""

import textwrap

import torch

from prefopt_trl import losses
from prefopt_trl.trainers.completions import CompletionTrainer, ScoredCompletions
from prefopt_trl.trainers.listwise_dpo_config import ListwiseDPOConfig


class ListwiseDPOTrainer(CompletionTrainer):
    """Minimize DPO eq. 20 on rankings: DPO for more than two completions, with a reference model.

    On rankings of two it is [`~trl.DPOTrainer`], step for step. With `peft_config` the reference model is the base
    model, so there is one copy of the weights; otherwise two, as in TRL. Equal rewards keep the order of the data: the
    model has no ties.

    With `loss_type="lambda"` the loss is LiPO's (arXiv 2402.01878), which weights each pair by its rewards. The gain
    of a completion is `2^reward - 1`, so rewards should be of the order of 1: far below 0 they hardly count.

    The data, the arguments and the errors are those of [`PROTrainer`], without bootstrapping; `ref_model` is allowed.

    Example:

    ```python
    from datasets import Dataset
    from prefopt_trl import ListwiseDPOConfig, ListwiseDPOTrainer

    rankings = Dataset.from_dict(
        {"prompt": ["The sky is"], "completions": [[" blue.", " green.", " wet."]], "rewards": [[2.0, -1.0, 0.5]]}
    )
    trainer = ListwiseDPOTrainer(
        "Qwen/Qwen2.5-0.5B", args=ListwiseDPOConfig("outputs/listwise-dpo"), train_dataset=rankings
    )
    trainer.train()
    ```
    """

    config_class = ListwiseDPOConfig
    learns_from = "rankings"
    _tag_names = ["trl", "prefopt-trl", "listwise-dpo"]
    _name = "Listwise DPO"
    _paper = {
        "title": "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "id": "2305.18290",
        "citation": textwrap.dedent("""\
            @inproceedings{rafailov2023direct,
                title     = {{Direct Preference Optimization: Your Language Model is Secretly a Reward Model}},
                author    = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and
                             Stefano Ermon and Chelsea Finn},
                year      = 2023,
                booktitle = {Advances in Neural Information Processing Systems 36},
                url       = {https://arxiv.org/abs/2305.18290},
            }"""),
    }

    def loss_per_prompt(self, completions: ScoredCompletions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.args.loss_type == ["lambda"]:
            return losses.lipo_lambda(completions.logratios, completions.rewards, self.args.beta, completions.mask), {}
        return losses.plackett_luce(completions.logratios, self.args.beta, completions.mask), {}

    def scores(self, completions: ScoredCompletions) -> torch.Tensor:
        return self.args.beta * completions.logratios
