"""Lay out rows of tokens as tensors: padded, or packed into one row per prompt that stores their common prefix once.

A batch of right-padded rows, several of which begin with the same prompt, becomes one packed row per group::

    rows                              packed row
    p1 p2 p3 a1 a2                    p1 p2 | p3 a1 | p3 b1 b2
    p1 p2 p3 b1 b2 b3                 shared  segment  segment

The shared part ends one token early. The last shared token is repeated at the start of every segment, because it
predicts a different next token in each segment, so every packed position has exactly one label. A segment attends to
the shared part and to itself, with the position ids of the unpacked row. The last token of a row predicts nothing and
is dropped. The shared part is the longest common prefix of the group's rows, so completions that begin alike share
more than the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

IGNORE_INDEX = -100


@dataclass(frozen=True)
class PackedBatch:
    """A batch of `num_groups` packed rows of `packed_length` tokens, made from `num_rows` rows of `row_length` tokens.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(num_groups, packed_length)`):
            Tokens; 0 at empty positions.
        position_ids (`torch.LongTensor` of shape `(num_groups, packed_length)`):
            Position of each token in its unpacked row.
        visible (`torch.BoolTensor` of shape `(num_groups, 1, packed_length, packed_length)`):
            True where the query (third axis) may attend to the key (last axis). Empty positions attend to themselves.
        shift_labels (`torch.LongTensor` of shape `(num_groups, packed_length)`):
            Token that each position predicts, already shifted; `-100` is ignored.
        row_index (`torch.LongTensor` of shape `(num_rows, row_length - 1)`):
            For token `t + 1` of a row, the flat index of the packed position that predicts it.
        row_labels (`torch.BoolTensor` of shape `(num_rows, row_length - 1)`):
            True where token `t + 1` of the row has a label.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    visible: torch.Tensor
    shift_labels: torch.Tensor
    row_index: torch.Tensor
    row_labels: torch.Tensor

    def unpack(self, per_token: torch.Tensor) -> torch.Tensor:
        """Map values per packed position `(num_groups, packed_length)` to tokens of rows `(num_rows, row_length - 1)`.

        The result is zero where the row's label is `-100`.
        """
        return per_token.flatten()[self.row_index].masked_fill(~self.row_labels, 0)


def pair_groups(num_rows: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Return the group ids `(num_rows,)` of TRL's preference batch, the chosen rows and then the rejected rows.

    Raise `ValueError` if the number of rows is odd.
    """
    if num_rows % 2:
        raise ValueError(
            f"{num_rows} rows are not chosen rows and then rejected rows. Pass `group_ids`, each row's prompt index."
        )
    return torch.arange(num_rows, device=device) % (num_rows // 2)


def is_right_padded(attention_mask: torch.Tensor) -> bool:
    """Return whether no row of the mask has padding before a token."""
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def pack_rows(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, group_ids: torch.Tensor
) -> PackedBatch:
    """Pack rows of the same group into one row that stores their common prefix once.

    Args:
        input_ids (`torch.LongTensor` of shape `(num_rows, row_length)`):
            Right-padded rows; `row_length` is at least 2.
        attention_mask (`torch.Tensor` of shape `(num_rows, row_length)`):
            1 for tokens, 0 for padding.
        labels (`torch.LongTensor` of shape `(num_rows, row_length)`):
            Labels aligned with `input_ids` (not shifted); `-100` is ignored.
        group_ids (`torch.LongTensor` of shape `(num_rows,)`):
            Index of each row's prompt, `0 ... num_groups - 1`, in any order; groups may differ in size.

    Returns:
        [`PackedBatch`].

    Example:

    ```python
    >>> import torch
    >>> rows = torch.tensor([[5, 6, 7, 1, 2, 0], [5, 6, 7, 3, 4, 8]])
    >>> mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    >>> labels = torch.tensor([[-100, -100, -100, 1, 2, -100], [-100, -100, -100, 3, 4, 8]])
    >>> packed = pack_rows(rows, mask, labels, torch.tensor([0, 0]))
    >>> packed.input_ids
    tensor([[5, 6, 7, 1, 7, 3, 4]])
    >>> packed.position_ids
    tensor([[0, 1, 2, 3, 2, 3, 4]])
    >>> packed.shift_labels
    tensor([[-100, -100,    1,    2,    3,    4,    8]])

    ```
    """
    device = input_ids.device
    num_rows, row_length = input_ids.shape
    valid = attention_mask.bool()
    lengths = valid.sum(dim=1)
    membership = torch.nn.functional.one_hot(group_ids).bool()  # (num_rows, num_groups)
    num_groups = membership.shape[1]

    # Longest common prefix of each group: compare rows with the first row of their group
    first_row = membership.int().argmax(dim=0)[group_ids]
    agrees = valid & valid[first_row] & (input_ids == input_ids[first_row])
    common = agrees.int().cumprod(dim=1).sum(dim=1)  # (num_rows,)
    common = torch.where(membership, common[:, None], row_length).amin(dim=0)  # (num_groups,)
    shared = (common - 1).clamp(min=0)  # (num_groups,) the last common token starts every segment

    # Lay the segments of a group side by side behind its shared part
    segment = (lengths - 1 - shared[group_ids]).clamp(min=0)  # (num_rows,)
    by_group = membership * segment[:, None]
    offset = (by_group.cumsum(dim=0) - by_group).gather(1, group_ids[:, None]).squeeze(1)  # of earlier rows
    packed_length = max(int((shared + by_group.sum(dim=0)).max()), 1)

    token = torch.arange(row_length - 1, device=device).expand(num_rows, -1)
    in_shared = token < shared[group_ids][:, None]
    column = torch.where(in_shared, token, token + offset[:, None])
    exists = token < (lengths - 1)[:, None]
    row_index = torch.where(exists, group_ids[:, None] * packed_length + column, 0)

    def scatter(values: torch.Tensor, empty: int) -> torch.Tensor:
        # Every row writes the shared positions, with equal values (labels: `-100` or the token, so take the larger)
        packed = torch.full((num_groups * packed_length,), empty, dtype=torch.long, device=device)
        packed.scatter_reduce_(0, row_index[exists], values[exists].long(), reduce="amax")
        return packed.view(num_groups, packed_length)

    row = torch.arange(1, num_rows + 1, device=device)[:, None].expand_as(token)
    owner = scatter(torch.where(in_shared, 0, row), empty=-1)  # 0: shared; 1 ... num_rows: segment; -1: empty
    query, key = owner[:, :, None], owner[:, None, :]
    causal = torch.ones(packed_length, packed_length, dtype=torch.bool, device=device).tril()
    itself = torch.eye(packed_length, dtype=torch.bool, device=device)
    visible = (((key == 0) | (key == query)) & (query >= 0) & causal) | itself

    return PackedBatch(
        input_ids=scatter(input_ids[:, :-1], empty=0),
        position_ids=scatter(token, empty=0),
        visible=visible[:, None],
        shift_labels=scatter(labels[:, 1:], empty=IGNORE_INDEX),
        row_index=row_index,
        row_labels=exists & (labels[:, 1:] != IGNORE_INDEX),
    )


class WholeRows:
    """Rows of token ids without sharing, padded on the right; `inputs` are the model's keyword arguments."""

    def __init__(self, rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> None:
        self.lengths = torch.tensor([len(row) for row in rows], device=device)
        input_ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_token_id
        ).to(device)
        mask = (torch.arange(input_ids.shape[1], device=device) < self.lengths[:, None]).long()
        self.inputs = {"input_ids": input_ids, "attention_mask": mask}

    def last_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the LM logits after the last token of each row, shape `(num_rows, vocab_size)`."""
        # The LM head runs only at positions where some row ends
        positions, position_of_row = torch.unique(self.lengths - 1, return_inverse=True)
        logits = model(**self.inputs, logits_to_keep=positions, use_cache=False).logits
        if logits.shape[1] != len(positions):  # the model ignores `logits_to_keep`
            logits = logits[:, positions]
        return logits[torch.arange(len(logits), device=logits.device), position_of_row.to(logits.device)]

    def head_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the logits of a classification head, shape `(num_rows, num_labels)`."""
        return model(**self.inputs).logits


def left_pad(ids: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Pad rows of ids on the left; return `input_ids`, `attention_mask` and `position_ids` (0 at padding)."""
    length = max(map(len, ids))
    input_ids = torch.tensor([[pad_token_id] * (length - len(row)) + list(row) for row in ids], device=device)
    attention_mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids], device=device)
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return the length of the common prefix of all rows."""
    columns = enumerate(zip(*rows, strict=False))
    return next((place for place, tokens in columns if len(set(tokens)) > 1), min(map(len, rows)))
