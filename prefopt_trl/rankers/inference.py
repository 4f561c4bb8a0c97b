"""Run many texts through a ranker's model, with common prefixes computed once and little padding."""

import logging
import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

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
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from prefopt_trl.data.tokenization import check_vocabulary
from prefopt_trl.rankers.gpt_neox_reward import GPTNeoXRewardModel
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

# Share prefixes only if at most this part of the tokens is left, because attention in one piece is faster per token
WORTH_SHARING = 0.8

TOKENIZER = "tokenizer_config.json"

# Of `model_init_kwargs`, what finds the files of a repository
FINDS_FILES = ("cache_dir", "local_files_only", "revision", "token")

AutoClass: TypeAlias = type[
    AutoModelForCausalLM | AutoModelForSeq2SeqLM | AutoModelForSequenceClassification | AutoModelForTokenClassification
]


def is_reward_model(path: str, **model_init_kwargs: Any) -> bool:
    """Return whether a folder or Hub id is a sequence classification model, or an adapter for one."""
    if (adapter := _adapter_config(path, model_init_kwargs)) is not None:
        return adapter.task_type == "SEQ_CLS"
    config = AutoConfig.from_pretrained(path, **_options_of_files(model_init_kwargs))
    names = ("ForSequenceClassification", GPTNeoXRewardModel.__name__)
    return any(name.endswith(names) for name in config.architectures or [])


def load_model(path: str, auto_class: AutoClass | None, init: dict[str, Any]) -> PreTrainedModel:
    """Load the model, or the adapter on its base model, of a folder or Hub id.

    If `auto_class` is None, load a language model, causal or encoder-decoder according to its config. `init` are
    arguments of `from_pretrained`. The model goes to the accelerator unless they place it. Raise `ValueError` if there
    is no model, or a reward model in place of a language model.
    """
    device = process_state().device  # set before a quantized model is loaded onto it
    base, options = path, _options_of_files(init)
    try:
        adapter = _adapter_config(path, init)
        if auto_class is None:
            if is_reward_model(path, **init):
                raise ValueError(f"`model`={path!r} is a reward model. Give it to `RewardModelRanker`.")
            if adapter is not None:
                base, options = str(adapter.base_model_name_or_path), {**options, "revision": adapter.revision}
            is_encoder_decoder = AutoConfig.from_pretrained(base, **options).is_encoder_decoder
            auto_class = AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM
        if adapter is None:
            model = auto_class.from_pretrained(path, **init)
        else:
            labels = {"num_labels": 1} if auto_class is AutoModelForSequenceClassification else {}
            auto_class = getattr(peft, auto_class.__name__.replace("Auto", "AutoPeft"))
            model = auto_class.from_pretrained(path, **labels | init)
    except OSError as error:
        raise ValueError(
            f"`model`={path!r} is neither a local folder that contains a model nor a readable model on the Hub "
            f"({error})."
        ) from error
    is_placed = init.get("device_map") is not None or getattr(model, "is_quantized", False)
    return model if is_placed else model.to(device)


def _options_of_files(init: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with which the config and the tokenizer of a model are loaded."""
    return {name: init[name] for name in (*FINDS_FILES, "trust_remote_code") if name in init}


def _adapter_config(path: str, init: dict[str, Any]) -> PeftConfig | None:
    options = {name: init[name] for name in FINDS_FILES if name in init}
    return None if find_adapter_config_file(path, **options) is None else PeftConfig.from_pretrained(path, **options)


def num_positions(model: PreTrainedModel | PeftModel) -> int | None:
    """Return the number of tokens that a model has positions for, or None if it has no limit."""
    for name, module in model.named_modules():
        # RoBERTa and its relatives count positions from `padding_idx + 1`
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    number = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return number if number and number > 0 else None  # XLNet has -1


def label_index(model: PreTrainedModel, label: str | int | None) -> int | None:
    """Return the index of a classifier's label, or None for a model with one output; refuse any other label."""
    names = [str(name) for _, name in sorted((model.config.id2label or {}).items())]
    if len(names) == 1 and label is None:
        return None
    index = names.index(label) if label in names else label
    if len(names) == 1 or not isinstance(index, int) or not 0 <= index < len(names):
        raise ValueError(
            f"`label` is {label!r}, and `model` has the labels {', '.join(names)}. Of a classifier, give the name or "
            "index of the one whose log-odds are the reward. A reward model has one output and takes no `label`."
        )
    return index


def log_odds(logits: torch.Tensor, label: int | None, problem_type: str | None = None) -> torch.Tensor:
    """Return log(p / (1 - p)) of a label for logits of shape `(..., num_labels)`: shape `(...)`, float32.

    A single output (`label` is None), a regression, and a label that does not exclude the others are not changed.
    """
    logits = logits.float()
    if label is None or problem_type in ("regression", "multi_label_classification"):
        return logits[..., label or 0]
    is_label = torch.arange(logits.shape[-1], device=logits.device) == label
    return logits[..., label] - logits.masked_fill(is_label, -torch.inf).logsumexp(dim=-1)


def check_temperature(temperature: float) -> float:
    """Return the temperature of a ranker. Raise `ValueError` unless it is positive and finite."""
    if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` is {temperature!r}. Give a positive, finite number.")
    return temperature


class RankingModel:
    """A model with its tokenizer, batch size and length limit.

    `auto_class` is that of [`load_model`]; the other arguments are those of [`PairwiseRanker`].

    Raises:
        ValueError: if an argument is out of range, or the tokenizer is missing or does not fit the model.
    """

    def __init__(
        self,
        auto_class: AutoClass | None,
        model: str | Path | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        batch_size: int,
        max_length: int | None,
        share_prefix: bool = False,
        model_init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}. Give 1 or more.")
        if not isinstance(share_prefix, bool):
            raise ValueError(f"`share_prefix` is {share_prefix!r}. Give True or False.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` is {max_length}. Give 1 or more, or None for the model's own limit.")
        init = model_init_kwargs or {}
        if init and not isinstance(model, str | Path):
            raise ValueError("`model_init_kwargs` has no effect on a loaded model. Give the model's path.")
        source = str(model) if isinstance(model, str | Path) else model.config.name_or_path or ""
        if tokenizer is None and not source:
            raise ValueError("`tokenizer` is missing, and the model has no `name_or_path`. Pass its tokenizer.")
        self.model: PreTrainedModel = load_model(source, auto_class, init) if isinstance(model, str | Path) else model
        self.trust_remote_code = bool(init.get("trust_remote_code"))
        options = _options_of_files(init)
        if isinstance(self.model, PeftModel) and Path(source).is_dir() and not Path(source, TOKENIZER).is_file():
            # Without its own tokenizer, an adapter uses that of its base
            source = self.model.config.name_or_path
            options["revision"] = self.model.active_peft_config.revision
        self.tokenizer = AutoTokenizer.from_pretrained(source, **options) if tokenizer is None else tokenizer
        check_vocabulary(self.tokenizer, self.model)
        limits = [self.tokenizer.model_max_length, num_positions(self.model)]
        self.max_length: int = min(filter(None, limits)) if max_length is None else max_length
        self.batch_size, self.share_prefix = batch_size, share_prefix
        self.num_cut = 0  # prompts shortened during `run`, counted by the ranker

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

        `lengths` are approximate, in any unit. Texts of a group have a common prefix and are adjacent in the order of
        evaluation. `evaluate` takes the indices of at most `batch_size` texts. `description` labels the progress bar,
        which a terminal shows after two seconds.
        """
        # Batch texts of similar length to save padding, longest first, so that a lack of memory shows at once
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
                "were cut on the left."
            )
        return values

    def rows(
        self, token_ids: list[list[int]], groups: list[Hashable], pad_token_id: int, reads_head: bool = False
    ) -> WholeRows | RowsAfterPrefix:
        """Prepare a batch for the model. The prefix of each group is computed once if that is exact and worthwhile.

        Texts of a group are adjacent. Set `reads_head` to read `head_logits` rather than `last_logits`.
        """
        model = self.model
        # The token that is read must follow the prefix, which has at least one token
        if self.share_prefix and all(last_of_row(ids, pad_token_id) > 0 for ids in token_ids):
            prefixes, following = split_rows(token_ids, groups, pad_token_id)
            num_tokens = sum(map(len, prefixes)) + sum(len(row) for part in following for row in part)
            if (
                num_tokens <= WORTH_SHARING * sum(map(len, token_ids))
                and reason_not_to_share_prefix(model, max(map(len, token_ids)), probe_segments) is None
                and not (reads_head and reason_not_to_share_head(model, pad_token_id))
            ):
                return RowsAfterPrefix(model, prefixes, following, pad_token_id)
        return WholeRows(token_ids, pad_token_id, model.device)

    def settings(self) -> Settings:
        """Return everything the results depend on: the weights, but not the path they were loaded from."""
        return {
            "model": type(self.model).__name__,
            "weights": model_fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "max_length": self.max_length,
            "batch_size": self.batch_size,  # rounding depends on the other rows of a batch
            "share_prefix": self.share_prefix,
        }
