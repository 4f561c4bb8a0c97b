"""The process reward ranker: a token classification model that rewards each step of a completion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Completion, Prompt, completion_text
from prefopt_trl.data.tokenization import prompt_token_ids
from prefopt_trl.rankers.base import Columns, PointwiseRanker
from prefopt_trl.rankers.inference import RankingModel, check_temperature, label_index, log_odds
from prefopt_trl.rankers.publishing import PublishedModel
from prefopt_trl.rankers.templates import cut_prompt
from prefopt_trl.runtime.settings import Settings, template_date
from prefopt_trl.shared_prefix.packing import WholeRows

REDUCTIONS: dict[str, Any] = {"min": torch.min, "mean": torch.mean, "last": lambda of_steps: of_steps[-1]}


class ProcessRewardRanker(PublishedModel, PointwiseRanker):
    """A process reward model, which rewards each step of a completion at the step's last token.

    Texts are tokenized as TRL's `PRMTrainer` did: BOS, the prompt, and each step followed by the separator. Steps are
    the parts of a completion that are not blank, or else all of it. Messages go through the chat template.

    Args:
        model, tokenizer, batch_size, max_length, temperature, model_init_kwargs:
            As in [`RewardModelRanker`], for a token classification model.
        separator (`str`, *optional*, defaults to a line break):
            Text between steps. Use the one the model was trained with.
        label (`str` or `int`, *optional*):
            As in [`RewardModelRanker`]. Models of TRL's trainer have 1 for a correct step.
        reduce (`str`, *optional*, defaults to `"min"`):
            Reward of a completion: the lowest of its steps (`"min"`), that of the `"last"`, or their `"mean"`.

    Raises:
        ValueError: as [`RewardModelRanker`], and if `separator` is empty or `reduce` is unknown.

    Example:

    ```python
    ranker = ProcessRewardRanker("my-process-reward-model", label=1)
    rewards = ranker.score(["What is 2 + 2 + 2?"], [["2 + 2 is 4.\\n4 + 2 is 6.", "2 + 2 is 5."]])
    ```
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        separator: str = "\n",
        label: str | int | None = None,
        reduce: str = "min",
        batch_size: int = 32,
        max_length: int | None = None,
        temperature: float = 1.0,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not separator or reduce not in REDUCTIONS:
            said = f"`separator` is {separator!r} and `reduce` is {reduce!r}"
            raise ValueError(f"{said}. Give a text, and one of {', '.join(REDUCTIONS)}.")
        self.temperature = check_temperature(temperature)
        self.ranking_model = RankingModel(
            AutoModelForTokenClassification, model, tokenizer, batch_size, max_length, False, model_init_kwargs
        )
        self.model, self.tokenizer = self.ranking_model.model, self.ranking_model.tokenizer
        self.separator, self.reduce, self.label = separator, reduce, label_index(self.model, label)

    def rewards(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], columns: Columns | None = None
    ) -> list[np.ndarray]:
        """Return the rewards of each prompt's completions. Raise `ValueError` for one that exceeds `max_length`."""
        rows = [(row, completion) for row, several in enumerate(completions) for completion in several]
        model, reduce = self.ranking_model.model, REDUCTIONS[self.reduce]

        def evaluate(batch: list[int]) -> torch.Tensor:
            tokens = [self._tokenize(rows[index][0], prompts[rows[index][0]], rows[index][1]) for index in batch]
            padded = WholeRows([ids for ids, _ in tokens], model.config.pad_token_id or 0, model.device)
            rewards = log_odds(model(**padded.inputs).logits, self.label, model.config.problem_type)
            return torch.stack([reduce(own[ends]) for own, (_, ends) in zip(rewards, tokens, strict=True)])

        lengths = [len(str(prompts[row])) + len(str(completion)) for row, completion in rows]
        rewards = self.ranking_model.run(lengths, [None] * len(rows), evaluate, "Scoring steps")
        return np.split(rewards, np.cumsum([len(several) for several in completions], dtype=int))[:-1]

    def settings(self) -> Settings:
        """Return fingerprints of the weights and the tokenizer, and the ranker's options."""
        model = {**self.ranking_model.settings(), **template_date(self.tokenizer)}
        own = {"separator": self.separator, "label": self.label, "reduce": self.reduce}
        return {"class": type(self).__name__, **model, **own, "temperature": self.temperature}

    def arguments(self) -> dict[str, str]:
        given = {"separator": self.separator, "label": self.label, "reduce": self.reduce}
        return {**{name: repr(value) for name, value in given.items() if value is not None}, **super().arguments()}

    def _tokenize(self, row: int, prompt: Prompt, completion: Completion) -> tuple[list[int], list[int]]:
        """Return token ids, and the index of the last token of each step."""
        encode, tokenizer = self.ranking_model.token_ids, self.tokenizer
        if isinstance(prompt, str):
            bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            prompt_ids = bos + encode([prompt], add_special_tokens=False)[0]
        else:
            prompt_ids = prompt_token_ids(tokenizer, prompt)
        text = completion if isinstance(completion, str) else completion_text(completion).removeprefix(" ")
        steps = [step for step in text.split(self.separator) if step.strip()] or [text]
        *of_steps, of_separator = encode([*steps, self.separator], add_special_tokens=False)
        ends = np.cumsum([len(ids) + len(of_separator) for ids in of_steps])
        token_ids = [*prompt_ids, *(token for ids in of_steps for token in ids + of_separator)]
        if len(token_ids) > (max_length := self.ranking_model.max_length):
            self.ranking_model.num_cut += 1
            token_ids = cut_prompt(token_ids, len(prompt_ids), tokenizer, max_length, row)
        return token_ids, (ends - ends[-1] + len(token_ids) - 1).tolist()
