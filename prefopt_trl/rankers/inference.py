"""Run many texts through a ranker's model: what they share once, with little padding."""

import logging
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from prefopt_trl.data.tokenization import check_vocabulary
from prefopt_trl.runtime.processes import process_state
from prefopt_trl.runtime.settings import Settings, model_fingerprint, tokenizer_fingerprint
from prefopt_trl.shared_prefix.continuation import (
    RowsAfterPrefix,
    last_of_row,
    probe_segments,
    reason_not_to_share_head,
    split_rows,
)
from prefopt_trl.shared_prefix.packing import WholeRows
from prefopt_trl.shared_prefix.support import evaluating, reason_not_to_share_prefix

logger = logging.getLogger(__name__)

# Texts share a beginning if that leaves at most this part of their tokens: attention in one piece is faster per token
WORTH_SHARING = 0.8

TOKENIZER = "tokenizer_config.json"


def is_reward_model(path: str) -> bool:
    """Return whether a folder or Hub id is a sequence classification model, or an adapter for one."""
    if find_adapter_config_file(path) is not None:
        return PeftConfig.from_pretrained(path).task_type == "SEQ_CLS"
    architectures = AutoConfig.from_pretrained(path).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def load_model(path: str, auto_class: Any) -> Any:
    """Load the model, or the adapter on its base model, of a folder or Hub id.

    `auto_class` None loads a language model, causal or encoder-decoder as its config says.

    Raises:
        ValueError: if there is nothing to load, or a reward model in place of a language model.
    """
    try:
        is_adapter = find_adapter_config_file(path) is not None
        if auto_class is None:
            if is_reward_model(path):
                raise ValueError(f"`model`={path!r} is a reward model. Give it to `RewardModelRanker`.")
            base = PeftConfig.from_pretrained(path).base_model_name_or_path if is_adapter else path
            is_encoder_decoder = AutoConfig.from_pretrained(base).is_encoder_decoder
            auto_class = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
        if not is_adapter:
            return auto_class.from_pretrained(path)
        options = {"num_labels": 1} if auto_class is AutoModelForSequenceClassification else {}
        return getattr(peft, auto_class.__name__.replace("Auto", "AutoPeft")).from_pretrained(path, **options)
    except OSError as error:
        raise ValueError(
            f"`model`={path!r} is no local folder with a model in it, and no model of the Hub that can be read now "
            f"({error})."
        ) from error


def num_positions(model: PreTrainedModel | PeftModel) -> int | None:
    """Return the most tokens that a model has positions for, or None if it has no limit."""
    for name, module in model.named_modules():
        # RoBERTa and its relatives count positions from the one behind their padding's
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    number = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return number if number and number > 0 else None  # XLNet has -1


class RankingModel:
    """A model with its tokenizer, batch size and length limit.

    `auto_class` is that of [`load_model`]; the other arguments are those of [`PairwiseRanker`].

    Raises:
        ValueError: if `batch_size` or `max_length` is below 1, no tokenizer can be found, or it is not the model's.
    """

    def __init__(
        self,
        auto_class: Any,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        batch_size: int,
        max_length: int | None,
        share_prefix: bool,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}. Give 1 or more.")
        if not isinstance(share_prefix, bool):
            raise ValueError(f"`share_prefix` is {share_prefix!r}. Give True or False.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` is {max_length}. Give 1 or more, or None for the model's own limit.")
        source: Any = str(model) if isinstance(model, str | Path) else model.config.name_or_path
        if tokenizer is None and not source:
            raise ValueError("`tokenizer` is missing, and the model was not loaded from anywhere. Pass its tokenizer.")
        is_path = isinstance(model, str | Path)
        self.model: Any = load_model(source, auto_class).to(process_state().device) if is_path else model
        if isinstance(self.model, PeftModel) and Path(source).is_dir() and not Path(source, TOKENIZER).is_file():
            source = self.model.config.name_or_path  # an adapter without a tokenizer has its base's
        self.tokenizer = AutoTokenizer.from_pretrained(source) if tokenizer is None else tokenizer
        check_vocabulary(self.tokenizer, self.model)
        limits = [self.tokenizer.model_max_length, num_positions(self.model)]
        self.max_length: int = min(filter(None, limits)) if max_length is None else max_length
        self.batch_size, self.share_prefix = batch_size, share_prefix
        self.num_cut = 0  # texts that `run` has seen whose prompts were shortened; their ranker counts them

    def token_ids(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Tokenize as TRL's trainers do, without truncation."""
        return self.tokenizer(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )["input_ids"]

    def run(
        self,
        lengths: Sequence[int],
        groups: Sequence[Hashable],
        evaluate: Callable[[list[int]], torch.Tensor],
        description: str,
    ) -> np.ndarray:
        """Evaluate texts in batches, and return one number for each in float64.

        `lengths` are about right, in any unit. Texts of the same group begin alike and share a batch. `evaluate` takes
        the indices of at most `batch_size` texts, those of a group next to each other. `description` is what the
        progress bar says; it shows in a terminal, after two seconds.
        """
        # Texts of similar length share a batch, so that little is padding. The longest come first, so that a batch too
        # large for the memory fails at once.
        self.num_cut = 0
        if not self.share_prefix:
            groups = [None] * len(lengths)
        longest: dict[Hashable, tuple[int, int]] = {}  # of each group, which also gets a number
        for length, group in zip(lengths, groups, strict=True):
            before, number = longest.get(group, (0, len(longest)))
            longest[group] = max(length, before), number
        order = sorted(range(len(lengths)), key=lambda index: (longest[groups[index]], lengths[index]), reverse=True)
        values = np.empty(len(lengths))
        progress = tqdm(total=len(lengths), desc=description, disable=None, delay=2)
        with evaluating(self.model), torch.no_grad(), progress:
            for start in range(0, len(lengths), self.batch_size):
                batch = order[start : start + self.batch_size]
                values[batch] = evaluate(batch).cpu().double().numpy()
                progress.update(len(batch))
        if self.num_cut:
            logger.warning(
                f"{self.num_cut} of {len(lengths)} texts exceeded max_length={self.max_length} tokens: their prompts "
                "lost their beginning."
            )
        return values

    def rows(
        self, token_ids: list[list[int]], groups: list[Hashable], pad_token_id: int, reads_head: bool = False
    ) -> WholeRows | RowsAfterPrefix:
        """Prepare a batch for the model, and compute what each group begins with once if that is exact and pays.

        Texts of the same group are next to each other. `reads_head` says that `head_logits` will be read rather than
        `last_logits`.
        """
        model = self.model
        # A token has to be read after the first one of each text, which may be all it shares
        if self.share_prefix and all(last_of_row(ids, pad_token_id) > 0 for ids in token_ids):
            prefixes, following = split_rows(token_ids, groups, pad_token_id)
            num_tokens = sum(map(len, prefixes)) + sum(len(row) for part in following for row in part)
            if (
                num_tokens <= WORTH_SHARING * sum(map(len, token_ids))
                and reason_not_to_share_prefix(model, max(map(len, token_ids)), probe_segments) is None
                and not (reads_head and reason_not_to_share_head(model, pad_token_id))
            ):
                return RowsAfterPrefix(model, token_ids, groups, pad_token_id)
        return WholeRows(token_ids, pad_token_id, model.device)

    def settings(self) -> Settings:
        """Return what the results depend on: the weights, but not where they were loaded from."""
        return {
            "model": type(self.model).__name__,
            "weights": model_fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "max_length": self.max_length,
            "batch_size": self.batch_size,  # rounding differs with what shares a batch
            "share_prefix": self.share_prefix,
        }
