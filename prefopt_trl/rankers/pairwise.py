"""The pairwise ranker: a language model that reads two completions and answers "A" or "B" (RSO section 2)."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Completion, Prompt, check_columns, normalize_pairs
from prefopt_trl.data.tokenization import decoder_start_token_id
from prefopt_trl.rankers.comparative import ComparativeRanker
from prefopt_trl.rankers.inference import RankingModel, check_temperature
from prefopt_trl.rankers.publishing import PublishedModel
from prefopt_trl.rankers.templates import (
    ANSWER_CUE,
    ANSWERS,
    TEMPLATES,
    Template,
    Texts,
    Tokens,
    resolve_template,
    rlhflow,
    split_answers,
)
from prefopt_trl.runtime.settings import Settings, function_fingerprint, template_date
from prefopt_trl.shared_prefix.packing import WholeRows


class PairwiseRanker(PublishedModel, ComparativeRanker):
    """A language model that compares two completions of a prompt (RSO section 2).

    The probability that the first is preferred is the softmax over the logits of the answers "A" and "B", averaged
    over both orders of the two completions. Train one with TRL's `SFTTrainer` on [`pairwise_ranker_dataset`].

    The common prefix of the comparisons of a prompt is computed once: the prompt, and in `score` also the baseline if
    it comes first. An encoder-decoder, such as the paper's T5, reads the comparison without the template's answer cue
    and answers in its decoder. It shares no prefix, as each token of an encoder attends to all others.

    Args:
        model (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            Causal language model or encoder-decoder, or the folder or Hub id of a model or adapter, which is loaded
            onto the accelerator if there is one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            By default it is loaded from the folder or Hub id of the model.
        template (`str` or `Callable`, *optional*, defaults to `"dialogue"`):
            Format of a comparison: `"dialogue"` or `"summary"` (the paper's formats), `"rlhflow"` (that of RLHFlow's
            pair-preference models, in the tokenizer's chat template), or a function `(prompt_text, first_text,
            second_text) -> str`. Use the one the model was trained with.
        batch_size (`int`, *optional*, defaults to `32`):
            Number of comparisons in one forward pass.
        max_length (`int`, *optional*):
            Maximum number of tokens of one comparison. Longer prompts are truncated at the beginning, and one warning
            counts them. By default the lower of the limits of the tokenizer and of the model's positions.
        share_prefix (`bool`, *optional*, defaults to `True`):
            Compute common prefixes once if that is exact. Otherwise log the reason once.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the baselines of `score`, which otherwise depend only on the prompt and its completions.
        temperature, model_init_kwargs:
            As in [`RewardModelRanker`]. Log-odds are divided by the temperature.

    Raises:
        ValueError: if the template's name is unknown, a number is out of range, no model or tokenizer can be found,
            or the model is a reward model.

    Example:

    ```python
    >>> ranker = PairwiseRanker("my-ranker")
    >>> ranker.compare(["What is 2 + 2?"], ["It is 4."], ["It is 5."])
    array([0.97])
    >>> ranker.score(["What is 2 + 2?"], [["It is 4.", "It is 5.", "4"]], baselines=["It is 5."])
    [array([3.48, 0.  , 2.75])]
    ```
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        template: str | Template = "dialogue",
        batch_size: int = 32,
        max_length: int | None = None,
        share_prefix: bool = True,
        seed: int = 0,
        temperature: float = 1.0,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.template, self.temperature = resolve_template(template), check_temperature(temperature)
        self.ranking_model = RankingModel(
            None, model, tokenizer, batch_size, max_length, share_prefix, model_init_kwargs
        )
        self.model = self.ranking_model.model
        if self.template is rlhflow and self.ranking_model.tokenizer.chat_template is None:
            raise ValueError("`template='rlhflow'` needs a chat template, and the tokenizer has none. Set its own.")
        self.answers_in_decoder = self.ranking_model.model.config.is_encoder_decoder
        if self.answers_in_decoder:
            self.ranking_model.share_prefix = False
            with_a, with_b = self.ranking_model.token_ids(list(ANSWERS))
            self.decoder_answers = split_answers(with_a, with_b, "The decoder")
        self.seed = seed

    def both_orders(
        self,
        prompts: Sequence[Prompt],
        first: Sequence[Completion],
        second: Sequence[Completion],
        rows: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Return P(first preferred) in both orders, as [`ComparativeRanker.both_orders`] describes.

        Equal texts give 0.5 without running the model.

        Raises:
            ValueError: if the completions of a row exceed `max_length`, or the tokenizer merges the answer with the
                end of the template.
        """
        comparisons = [Texts.of(*texts) for texts in zip(prompts, first, second, strict=True)]
        inputs: dict[Texts, int] = {}  # the first row of each distinct comparison
        for comparison, row in zip(comparisons, rows or range(len(prompts)), strict=True):
            if comparison.first != comparison.second:
                inputs.setdefault(comparison, row)
                inputs.setdefault(comparison.swapped(), row)
        answers_a = dict(zip(inputs, self._probabilities_of_a(inputs), strict=True))
        both = [[answers_a.get(one, 0.5), 1 - answers_a.get(one.swapped(), 0.5)] for one in comparisons]
        return np.array(both).reshape(-1, 2)

    def settings(self) -> Settings:
        """Return fingerprints of the weights, the tokenizer and the template, and the ranker's options."""
        return {
            "class": type(self).__name__,
            **self.ranking_model.settings(),
            "template": function_fingerprint(self.template),
            **(template_date(self.ranking_model.tokenizer) if self.template is rlhflow else {}),
            "seed": self.seed,
            "temperature": self.temperature,
        }

    def arguments(self) -> dict[str, str]:
        names = [repr(name) for name, template in TEMPLATES.items() if template is self.template]
        return {"template": names[0] if names else "your_template", **super().arguments()}

    def _probabilities_of_a(self, inputs: dict[Texts, int]) -> np.ndarray:
        """Return P("A") of each input, shape `(len(inputs),)`."""
        comparisons, rows = list(inputs), list(inputs.values())

        def evaluate(batch: list[int]) -> torch.Tensor:
            tokens = self._tokenize([comparisons[index] for index in batch], [rows[index] for index in batch])
            for place, index in enumerate(batch):
                if len(tokens[place].context) > self.ranking_model.max_length:
                    tokens[place] = self._cut_prompt(comparisons[index], rows[index])
            logits = self._answer_logits([context for context, _ in tokens], [groups[index] for index in batch])
            answers = torch.tensor([answers for _, answers in tokens], device=logits.device)
            return logits.gather(1, answers).float().softmax(dim=1)[:, 0]

        lengths = [sum(map(len, comparison)) for comparison in comparisons]
        # Comparisons that begin with the same baseline share it as well as the prompt
        firsts = Counter((comparison.prompt, comparison.first) for comparison in comparisons)
        groups = [
            comparison[:2] if firsts[comparison.prompt, comparison.first] > 1 else comparison[:1]
            for comparison in comparisons
        ]
        return self.ranking_model.run(lengths, groups, evaluate, "Comparing completions")

    def _answer_logits(self, contexts: list[list[int]], groups: list[Hashable]) -> torch.Tensor:
        """Return the logits of the token that answers, shape `(batch_size, vocabulary_size)`."""
        model = self.ranking_model.model
        if not self.answers_in_decoder:
            # The padding token is arbitrary, as no token attends to the padding after it
            return self.ranking_model.rows(contexts, groups, pad_token_id=0).last_logits(model)
        rows = WholeRows(contexts, 0, model.device)
        start = [decoder_start_token_id(model), *self.decoder_answers.context]
        decoder_input_ids = torch.tensor([start], device=model.device).expand(len(contexts), -1)
        return model(**rows.inputs, decoder_input_ids=decoder_input_ids, use_cache=False).logits[:, -1]

    def _tokenize(self, comparisons: list[Texts], rows: list[int]) -> list[Tokens]:
        """Format comparisons with the template and tokenize them, with each answer as part of the text."""
        texts = [self.template(*comparison) for comparison in comparisons]
        if self.answers_in_decoder:
            asked = [text.removesuffix(ANSWER_CUE) for text in texts]
            return [Tokens(ids, self.decoder_answers.answers) for ids in self.ranking_model.token_ids(asked)]
        in_chat = self.template is rlhflow
        if in_chat:  # without BOS, as in the models' own example
            texts = [self._as_chat(text) for text in texts]
        token_ids = self.ranking_model.token_ids(
            [text + answer for text in texts for answer in ANSWERS], add_special_tokens=not in_chat
        )
        return [
            split_answers(with_a, with_b, f"Prompt row {row}")
            for row, with_a, with_b in zip(rows, token_ids[::2], token_ids[1::2], strict=True)
        ]

    def _as_chat(self, text: str) -> str:
        tokenizer = self.ranking_model.tokenizer
        chat = str(tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False))
        return chat.replace(tokenizer.bos_token, "") if tokenizer.bos_token else chat

    def _cut_prompt(self, comparison: Texts, row: int) -> Tokens:
        """Truncate the beginning of the prompt so that the comparison fits into `max_length`."""
        self.ranking_model.num_cut += 1
        prompt, max_length = comparison.prompt, self.ranking_model.max_length

        def keep(num_characters: int) -> Tokens:
            shortened = comparison._replace(prompt=prompt[len(prompt) - num_characters :])
            return self._tokenize([shortened], [row])[0]

        num_characters = bisect_right(range(len(prompt)), max_length, key=lambda size: len(keep(size).context)) - 1
        if num_characters < 0:
            raise ValueError(
                f"Prompt row {row}: even without the prompt, its two completions exceed `max_length` ({max_length} "
                f"tokens). Raise `max_length`, or drop the row or its long completions."
            )
        return keep(num_characters)


def pairwise_ranker_dataset(pairs: Dataset, template: str | Template = "dialogue", seed: int = 0) -> Dataset:
    """Turn preference pairs into the training set of a pairwise ranker, for TRL's `SFTTrainer`.

    Args:
        pairs ([`~datasets.Dataset`]):
            Columns `prompt`, `chosen` and `rejected`, plain or conversational.
        template (`str` or `Callable`, *optional*, defaults to `"dialogue"`):
            As in [`PairwiseRanker`], except `"rlhflow"`.
        seed (`int`, *optional*, defaults to `0`):
            Decides which row has its chosen completion first.

    Returns:
        [`~datasets.Dataset`]: one row per pair, columns `prompt` (the comparison, with the chosen completion first or
        second with equal probability) and `completion` (`"A"` if it is first, or `"B"`). The answer is at the end, so
        give `SFTConfig` a `max_length` that holds the longest row, or `truncation_mode="keep_end"`.

    Raises:
        TypeError: if `pairs` is not a [`~datasets.Dataset`].
        ValueError: if the template is unknown or `"rlhflow"`, if `pairs` is empty or lacks a column, or a cell is None
            (naming its row).

    Example:

    ```python
    trainer = SFTTrainer("Qwen/Qwen3-0.6B", train_dataset=pairwise_ranker_dataset(pairs))
    trainer.train()
    ranker = PairwiseRanker(trainer.model, trainer.processing_class)
    ```
    """
    check_columns(pairs, ["prompt", "chosen", "rejected"], "pairs")
    pairs = normalize_pairs(pairs, "`pairs`")
    write = resolve_template(template)
    if write is rlhflow:
        raise ValueError("`template='rlhflow'` is for models that exist. Train yours with 'dialogue' or 'summary'.")
    chosen_first = np.random.default_rng(seed).random(len(pairs)) < 0.5
    rows = []
    for pair, is_first in zip(pairs, chosen_first, strict=True):
        texts = Texts.of(pair["prompt"], pair["chosen"], pair["rejected"])
        texts = texts if is_first else texts.swapped()
        rows.append({"prompt": write(*texts), "completion": ANSWERS[0] if is_first else ANSWERS[1]})
    return Dataset.from_list(rows)
