"""Preference Ranking Optimization (PRO): every completion against all worse ones, plus supervised fine-tuning."""

import logging
import os
import textwrap

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefopt_trl import losses
from prefopt_trl.data.formats import Row, number_rows
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.rankers.base import Ranker
from prefopt_trl.trainers.bootstrap import Bootstrap, PartSampler
from prefopt_trl.trainers.completions import CompletionTrainer, ScoredCompletions
from prefopt_trl.trainers.prepare import Datasets
from prefopt_trl.trainers.pro_config import PROConfig

logger = logging.getLogger(__name__)


class PROTrainer(CompletionTrainer):
    """Minimize PRO eq. 7 on rankings: its ranking term (eq. 9-11, or eq. 8 with `reward_temperature="none"`) plus the
    supervised term of the best completion.

    The ranking term is on log-probabilities averaged over tokens, the supervised one is summed over them and weighted
    `sft_weight * (n - 1)**2`. Rankings may be of any length, and of several in one batch. No reference model is loaded
    or held. On rankings of two with `reward_temperature="none"` the ranking term is Bradley-Terry on the mean
    log-probabilities, which TRL's experimental `CPOTrainer` has as `"simpo"` (`beta=1`, `simpo_gamma=0`,
    `cpo_alpha=0`); for more TRL has no such loss.

    The data have `prompt`, `completions` and `rewards` (in any order), or `prompt`, `chosen` and `rejected`, whose
    rewards are 1 and 0. A `ranker` scores completions without `rewards`, and completions sampled for prompts. With
    `bootstrap_parts` the policy's samples are added to the rankings during training (PRO Algorithm 1).

    Args:
        args ([`PROConfig`], *optional*):
            Configuration.
        ranker ([`~prefopt_trl.rankers.Ranker`], *optional*):
            Scores completions without `rewards`, sampled completions, and those of self-bootstrapping.
        **kwargs:
            Every other argument of [`~trl.DPOTrainer`], in the same order; `ref_model` is refused.

    Raises:
        ValueError: for a `ref_model`, missing columns, a row that is no ranking (fewer than two completions, a reward
            missing or not finite), completions without rewards and without a ranker, an empty dataset, or a tokenizer
            without an EOS token; the message names the row or argument and the remedy.

    Example:

    ```python
    from datasets import Dataset
    from prefopt_trl import PROConfig, PROTrainer

    rankings = Dataset.from_dict(
        {"prompt": ["The sky is"], "completions": [[" blue.", " green.", " wet."]], "rewards": [[2.0, -1.0, 0.5]]}
    )
    trainer = PROTrainer("Qwen/Qwen2.5-0.5B", args=PROConfig("outputs/pro"), train_dataset=rankings)
    trainer.train()
    ```
    """

    config_class = PROConfig
    learns_from = "rankings"
    has_reference = False
    _tag_names = ["trl", "prefopt-trl", "pro"]
    _name = "PRO"
    _paper = {
        "title": "Preference Ranking Optimization for Human Alignment",
        "id": "2306.17492",
        "citation": textwrap.dedent("""\
            @article{song2023preference,
                title   = {{Preference Ranking Optimization for Human Alignment}},
                author  = {Feifan Song and Bowen Yu and Minghao Li and Haiyang Yu and Fei Huang and Yongbin Li and
                           Houfeng Wang},
                year    = 2023,
                journal = {arXiv preprint arXiv:2306.17492},
            }"""),
    }

    bootstrap: Bootstrap | None = None

    def _check_data(self, datasets: Datasets, ranker: Ranker | None) -> None:
        super()._check_data(datasets, ranker)
        if not self.args.bootstrap_parts:
            return
        if ranker is None:
            raise ValueError("`ranker` is missing, and `bootstrap_parts` needs one to score the samples. Pass it.")
        dataset = datasets["train"]
        if not isinstance(dataset, Dataset):
            raise ValueError(
                "`bootstrap_parts` splits the training dataset, and an `IterableDataset` cannot be split. Pass a "
                "`Dataset`, or leave it at 0."
            )
        if "rewards" in dataset.column_names:
            logger.warning(
                "The ranker scores all completions of a prompt for `bootstrap_parts`, and the column `rewards` is not "
                "used, so the best completion may change."
            )

    def _set_up(self, tokenizer: PreTrainedTokenizerBase, ranker: Ranker | None) -> None:
        if not self.args.bootstrap_parts or ranker is None:
            return
        self.bootstrap = Bootstrap(
            self.train_dataset,
            self.args.bootstrap_parts,
            tokenizer,
            ranker,
            folder=os.path.join(self.args.output_dir, "bootstrap"),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            options=GenerationOptions.of(self.args),
        )
        self.train_dataset = number_rows(self.train_dataset)
        self.train_sampler = PartSampler(self.bootstrap)
        self.add_callback(self.bootstrap)

    def _sample(self, examples: list[Row]) -> dict[str, torch.Tensor]:
        if self.bootstrap is None:
            return super()._sample(examples)
        rows, policy = [example["row"] for example in examples], self.accelerator.unwrap_model(self.model)
        return self.data_collator(self.bootstrap.extend(rows, policy, self.accelerator, self.state.global_step))

    def loss_per_prompt(self, completions: ScoredCompletions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rewards = completions.rewards if self.args.reward_temperature == "dynamic" else None
        terms = losses.pro_terms(completions.mean_logps, rewards, completions.mask)
        ranking = terms[:, 0] if self.args.first_term_only else terms.sum(dim=1)
        length = completions.mask.sum(dim=1)
        sft = -self.args.sft_weight * (length - 1) ** 2 * completions.logps[:, 0]
        return ranking + sft, {"ranking": ranking, "ranking_first": terms[:, 0], "sft": sft}

    def scores(self, completions: ScoredCompletions) -> torch.Tensor:
        return completions.mean_logps
