"""The pointwise ranker: a reward model, which is a sequence classification model."""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Completion, Prompt
from prefopt_trl.rankers.base import Columns, PointwiseRanker
from prefopt_trl.rankers.inference import RankingModel, check_temperature, label_index, log_odds
from prefopt_trl.rankers.publishing import PublishedModel
from prefopt_trl.rankers.templates import RewardTemplate, RewardText, cut_prompt
from prefopt_trl.runtime.settings import Settings
from prefopt_trl.shared_prefix.packing import common_length

SENSITIVE_TO_PADDING = {"nystromformer", "xlnet", "yoso"}  # a row's reward would depend on the length of the others


class RewardModelRanker(PublishedModel, PointwiseRanker):
    """A sequence classification model, whose output is the reward of a completion.

    Without a template, texts are formatted like those of TRL's `RewardTrainer`: a plain prompt, its completion and EOS
    are concatenated, and messages go through the chat template. A text ends in one EOS even if the tokenizer appends
    one itself (`RewardTrainer` then trains on two). `compare` and `score` are those of [`PointwiseRanker`].

    Args:
        model (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            Sequence classification model, or the folder or Hub id of a model or adapter, which is loaded onto the
            accelerator if there is one. The model finds the last token of a row by its config's `pad_token_id`. If
            that is missing, it is set to the tokenizer's padding token or EOS, as `RewardTrainer` does.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            By default it is loaded from the folder or Hub id of the model.
        template (`str`, `Path` or `Callable`, *optional*):
            How a prompt and a completion are written, if not as above: `"oasst"` (OpenAssistant's turns), the path of
            a Jinja chat template, or a function `(prompt, completion) -> str`. The first two split a plain HH-RLHF
            transcript into its turns. A text longer than `max_length` is also written with an empty completion, to
            find the end of its prompt. A function gets completions in the format of their prompt, and the tokenizer's
            special tokens are added to its text.
        label (`str` or `int`, *optional*):
            Name or index of a classifier's label. The reward is its log-odds log(p / (1 - p)), in nats.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of completions in one forward pass.
        max_length (`int`, *optional*):
            Maximum number of tokens of prompt and completion. Longer prompts are truncated at the beginning, after a
            leading special token, and one warning counts them. By default the lower of the limits of the tokenizer and
            of the model's positions.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Compute each prompt once for all its completions if that is exact. Otherwise log the reason once.
        temperature (`float`, *optional*, defaults to `1.0`):
            Rewards are divided by it. [`calibrate`] fits it.
        model_init_kwargs (`dict`, *optional*):
            Arguments of `from_pretrained` for a model given by its path, such as `dtype`, `device_map`,
            `quantization_config`, `trust_remote_code` or `revision`.

    Raises:
        ValueError: if the label or template is unknown, if the label of a classifier is missing, if the tokenizer has
            neither a padding token nor EOS, if a number is out of range, or if no tokenizer can be found.

    Example:

    ```python
    >>> ranker = RewardModelRanker("my-reward-model")
    >>> ranker.score(["What is 2 + 2?"], [["It is 4.", "It is 5."]])
    [array([ 1.7, -0.4])]
    ```
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        template: str | Path | RewardTemplate | None = None,
        label: str | int | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        share_prefix: bool = True,
        temperature: float = 1.0,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.temperature = check_temperature(temperature)
        self.ranking_model = RankingModel(
            AutoModelForSequenceClassification,
            model,
            tokenizer,
            batch_size,
            max_length,
            share_prefix,
            model_init_kwargs,
        )
        self.model, self.tokenizer = self.ranking_model.model, self.ranking_model.tokenizer
        self.texts, self.label = RewardText(self.tokenizer, template), label_index(self.model, label)
        # The model reads the last token that is not this one, so rows must be padded with it
        text_config = self.model.config.get_text_config()
        if text_config.pad_token_id is None:
            text_config.pad_token_id = _padding_token_id(self.tokenizer)
        self.pad_token_id = text_config.pad_token_id

    def rewards(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], columns: Columns | None = None
    ) -> list[np.ndarray]:
        """Return the rewards of each prompt's completions in float64, running the model once on each distinct text.

        Raise `ValueError` for a completion that exceeds `max_length`, or for messages without a chat template.
        """
        written = [
            [self.texts.write(row, prompt, completion) for completion in row_completions]
            for row, (prompt, row_completions) in enumerate(zip(prompts, completions, strict=True))
        ]
        row_of_text = {text: row for row, row_texts in enumerate(written) for text in row_texts}
        texts, rows = list(row_of_text), list(row_of_text.values())

        def evaluate(batch: list[int]) -> torch.Tensor:
            token_ids = [self._tokenize(texts[index], rows[index], prompts[rows[index]]) for index in batch]
            return self._head(token_ids, [rows[index] for index in batch])

        values = self.ranking_model.run([len(text) for text in texts], rows, evaluate, "Scoring completions")
        rewards = dict(zip(texts, values, strict=True))
        return [np.array([rewards[text] for text in row_texts]) for row_texts in written]

    def _head(self, token_ids: list[list[int]], groups: Sequence[Hashable]) -> torch.Tensor:
        """Run the model on a batch and return its rewards, shape `(batch_size,)`."""
        model = self.ranking_model.model
        parts = [0] * len(token_ids)  # rows of one part share a forward pass
        if model.config.is_encoder_decoder:  # T5 and BART refuse rows with different numbers of EOS
            parts = [ids.count(model.config.eos_token_id) for ids in token_ids]
        elif model.config.model_type in SENSITIVE_TO_PADDING:
            parts = list(map(len, token_ids))
        rewards = torch.empty(len(token_ids), device=model.device)
        for part in set(parts):
            rows = [row for row, key in enumerate(parts) if key == part]
            prepared = self.ranking_model.rows(
                [token_ids[row] for row in rows], [groups[row] for row in rows], self.pad_token_id, reads_head=True
            )
            rewards[rows] = log_odds(prepared.head_logits(model), self.label, model.config.problem_type)
        return rewards

    def arguments(self) -> dict[str, str]:
        template = "your_template" if callable(self.texts.template) else repr(self.texts.template)
        given = {"template": template, "label": repr(self.label)}
        return {**{name: value for name, value in given.items() if value != "None"}, **super().arguments()}

    def settings(self) -> Settings:
        """Return fingerprints of the weights and the tokenizer, and the ranker's options."""
        return {
            "class": type(self).__name__,
            **self.ranking_model.settings(),
            **self.texts.settings(),
            "label": self.label,
            "pad_token_id": self.pad_token_id,
            "temperature": self.temperature,
        }

    def _tokenize(self, text: str, row: int, prompt: Prompt) -> list[int]:
        token_ids, max_length = self.texts.token_ids(text, prompt), self.ranking_model.max_length
        if len(token_ids) <= max_length:
            return token_ids
        self.ranking_model.num_cut += 1
        without_completion = self.texts.token_ids(self.texts.write(row, prompt, ""), prompt)
        prompt_length = common_length([token_ids, without_completion])
        return cut_prompt(token_ids, prompt_length, self.tokenizer, max_length, row)


def _padding_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(
        "`tokenizer` has neither a padding token nor EOS, so rows cannot be padded. Set `tokenizer.pad_token` to a "
        "token of its vocabulary that ends no text."
    )
