"""Batches of rankings, in the layout that TRL's trainers use for pairs."""

from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.data.data_collator import DataCollatorMixin

from prefopt_trl.data.formats import Row
from prefopt_trl.data.rankings import check_ranking


@dataclass
class DataCollatorForRanking(DataCollatorMixin):
    """Collate rankings like TRL's `DataCollatorForPreference` collates pairs, padded on the right.

    Each example has `"prompt_ids"` (`list[int]`), `"completion_ids"` (`list[list[int]]`, any number of completions)
    and `"rewards"` (`list[float]`, one per completion, in any order). A batch has one row per completion, grouped by
    prompt, best completion first; equal rewards keep the order of the example:

    - `"input_ids"`, `"attention_mask"`, `"completion_mask"` (`torch.LongTensor` of shape `(num_rows, row_length)`): as
      in TRL's collator. `attention_mask` is 1 for tokens, `completion_mask` is 1 for completion tokens; 0 elsewhere.
    - `"group_ids"` (`torch.LongTensor` of shape `(num_rows,)`): index of each row's prompt in the batch.
    - `"rewards"` (`torch.FloatTensor` of shape `(num_rows,)`).

    Args:
        pad_token_id (`int`):
            Token to pad with.
        max_length (`int`, *optional*):
            Maximum length of a row in tokens; longer rows are truncated.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            `"keep_start"` truncates the end of a row, `"keep_end"` its beginning.
        pad_to_multiple_of (`int`, *optional*):
            Pad rows to a multiple of this length.
        return_tensors (`str`, *optional*, defaults to `"pt"`):
            Only `"pt"` is supported.

    Raises:
        TypeError: for text instead of token ids.
        ValueError: for another `truncation_mode`, or an example that is not a ranking (see [`check_ranking`]).

    Example:

    ```python
    >>> from prefopt_trl import DataCollatorForRanking

    >>> collator = DataCollatorForRanking(pad_token_id=0)
    >>> examples = [
    ...     {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5]], "rewards": [0.1, 0.7]},
    ...     {"prompt_ids": [6], "completion_ids": [[7], [8], [9]], "rewards": [3.0, 2.0, 1.0]},
    ... ]
    >>> batch = collator(examples)
    >>> batch["input_ids"]
    tensor([[1, 2, 4, 5],
            [1, 2, 3, 0],
            [6, 7, 0, 0],
            [6, 8, 0, 0],
            [6, 9, 0, 0]])
    >>> batch["group_ids"], batch["rewards"]
    (tensor([0, 0, 1, 1, 1]), tensor([0.7000, 0.1000, 3.0000, 2.0000, 1.0000]))

    ```
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"`truncation_mode` must be 'keep_start' or 'keep_end', got {self.truncation_mode!r}.")

    def torch_call(self, examples: list[Row]) -> dict[str, torch.Tensor]:
        kept = slice(self.max_length)
        if self.max_length is not None and self.truncation_mode == "keep_end":
            kept = slice(-self.max_length, None)
        rows, completions, group_ids, rewards = [], [], [], []
        for group, example in enumerate(examples):
            prompt_ids, completion_ids = example["prompt_ids"], example["completion_ids"]
            check_ranking(completion_ids, example["rewards"], f"Example {group} of the batch")
            if any(isinstance(ids, str) for ids in [prompt_ids, *completion_ids]):
                raise TypeError(f"Example {group} of the batch has text. Give lists of token ids.")
            best_first = sorted(range(len(completion_ids)), key=lambda index: -example["rewards"][index])
            for index in best_first:
                rows.append(torch.tensor((prompt_ids + completion_ids[index])[kept]))
                completions.append(torch.tensor(([0] * len(prompt_ids) + [1] * len(completion_ids[index]))[kept]))
                group_ids.append(group)
                rewards.append(example["rewards"][index])
        return {
            "input_ids": self._pad(rows, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in rows], 0),
            "completion_mask": self._pad(completions, 0),
            "group_ids": torch.tensor(group_ids),
            "rewards": torch.tensor(rewards, dtype=torch.float32),
        }

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        padded = pad_sequence(rows, batch_first=True, padding_value=value)
        if self.pad_to_multiple_of:
            missing = -padded.shape[1] % self.pad_to_multiple_of
            padded = torch.nn.functional.pad(padded, (0, missing), value=value)
        return padded
