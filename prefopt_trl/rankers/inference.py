"""How a ranker runs many texts through its model: what they share once, little padding, nothing left changed."""

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
from prefopt_trl.runtime.fingerprints import model_fingerprint, tokenizer_fingerprint
from prefopt_trl.runtime.processes import process_state
from prefopt_trl.shared_prefix.continuation import (
    RowsAfterPrefix,
    WholeRows,
    last_of_row,
    reason_not_to_share_head,
    reason_not_to_share_prefix,
    split_rows,
)
from prefopt_trl.shared_prefix.support import evaluating

# Texts share a beginning where that leaves at most so much of their tokens: attention in one piece is faster per token
WORTH_SHARING = 0.8

TOKENIZER = "tokenizer_config.json"


def is_reward_model(path: str) -> bool:
    """Whether a folder or Hub id is a sequence classification model, or an adapter for one."""
    if find_adapter_config_file(path) is not None:
        return PeftConfig.from_pretrained(path).task_type == "SEQ_CLS"
    architectures = AutoConfig.from_pretrained(path).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def load_model(path: str, auto_class: Any) -> Any:
    """Load the model, or the adapter on its base model, of a folder or Hub id.

    Raises:
        ValueError: if there is nothing to load, or a reward model where a language model is wanted.
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
    """Most tokens that a model has positions for, or None where it has no limit."""
    for name, module in model.named_modules():
        # RoBERTa and its relatives count positions from the one behind their padding's
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    number = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return number if number and number > 0 else None  # XLNet has -1


class RankingModel:
    """A model with its tokenizer, batch size and length limit.

    Args:
        auto_class (`type` or `None`):
            Class that loads the model. None loads a language model: causal or encoder-decoder, as its config says.
        model (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            Model, or the folder or Hub id of one or of an adapter: then it is loaded, onto the accelerator if there is
            one.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            By default it is loaded from where the model came from.
        batch_size (`int`):
            Number of texts in one forward pass.
        max_length (`int`, *optional*):
            Most tokens of one text. By default the limit of the tokenizer or of the model's positions, whichever is
            lower.
        share_prefix (`bool`):
            Whether texts that begin alike are to share that, where it is exact.

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
        self.batch_size = batch_size
        if max_length is None:
            max_length = min(filter(None, [self.tokenizer.model_max_length, num_positions(self.model)]))
        self.max_length = max_length
        self.share_prefix = share_prefix

    def token_ids(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Tokenise as TRL's trainers do. Nothing is cut off."""
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
        """Evaluate `n` texts in batches.

        Args:
            lengths (`Sequence[int]` of length `n`):
                How long each text is, about and in any unit.
            groups (`Sequence` of length `n`):
                The same value for texts that begin alike, which share a batch.
            evaluate (`Callable`):
                Function from the indices of at most `batch_size` texts, those of a group next to each other, to one
                number for each, on any device.
            description (`str`):
                What the progress bar says. It shows in a terminal, after two seconds.

        Returns:
            `np.ndarray` of shape `(n,)`, float64: the numbers, by index.
        """
        # Texts of like length share a batch, so that little is padding; longest first, so that a batch too large for
        # the memory fails at once
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
        return values

    def rows(
        self, token_ids: list[list[int]], groups: list[Hashable], pad_token_id: int, reads_head: bool = False
    ) -> WholeRows | RowsAfterPrefix:
        """Prepare a batch for the model, with what each group begins with computed once where that is exact and pays.

        Args:
            token_ids (`list[list[int]]` of length `batch_size`):
                Token ids of each text.
            groups (`list` of length `batch_size`):
                Which texts begin alike; those of a group are next to each other.
            pad_token_id (`int`):
                Token id of padding.
            reads_head (`bool`, *optional*, defaults to `False`):
                Whether `head_logits` will be read, rather than `last_logits`.
        """
        model = self.model
        # Behind the first token of each text, which may be all it shares, another has to be read
        if self.share_prefix and all(last_of_row(ids, pad_token_id) > 0 for ids in token_ids):
            prefixes, following = split_rows(token_ids, groups, pad_token_id)
            num_tokens = sum(map(len, prefixes)) + sum(len(row) for part in following for row in part)
            if (
                num_tokens <= WORTH_SHARING * sum(map(len, token_ids))
                and reason_not_to_share_prefix(model, max(map(len, token_ids))) is None
                and not (reads_head and reason_not_to_share_head(model, pad_token_id))
            ):
                return RowsAfterPrefix(model, token_ids, groups, pad_token_id)
        return WholeRows(token_ids, pad_token_id, model.device)

    def settings(self) -> dict[str, Any]:
        """Describe what the results depend on. Where the model was loaded from is not part of it: its weights are."""
        return {
            "model": type(self.model).__name__,
            "weights": model_fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "max_length": self.max_length,
            "batch_size": self.batch_size,  # rounding differs with what shares a batch
            "share_prefix": self.share_prefix,
        }
