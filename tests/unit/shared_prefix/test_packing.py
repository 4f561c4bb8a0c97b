"""Packing is a lossless rearrangement: tokens, positions and labels of every row can be read back."""

import pytest
import torch

from prefopt_trl.shared_prefix.packing import IGNORE_INDEX, pack_rows, pair_groups


def make_batch(prompts, completions, group_ids, pad=0):
    """Right-padded rows with labels on the completion tokens."""
    rows = [prompts[group] + completion for group, completion in zip(group_ids, completions, strict=True)]
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    attention_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for index, (group, row) in enumerate(zip(group_ids, rows, strict=True)):
        start = len(prompts[group])
        labels[index, start : len(row)] = torch.tensor(row[start:])
    return input_ids, attention_mask, labels, torch.tensor(group_ids)


def visible_history(packed, group, position):
    """The (position, token) pairs that a packed place attends to, in order of position."""
    keys = packed.visible[group, 0, position].nonzero().squeeze(1)
    return sorted((int(packed.position_ids[group, key]), int(packed.input_ids[group, key])) for key in keys)


CASES = {
    "a pair": ([[5, 6, 7]], [[1, 2], [3, 4, 8]], [0, 0]),
    "prompts of length one": ([[5], [6]], [[1, 2], [3], [4], [8, 9]], [0, 1, 0, 1]),
    "an empty completion": ([[5, 6], [7, 8, 9]], [[], [3], [4], []], [0, 1, 0, 1]),
    "both completions empty": ([[5, 6]], [[], []], [0, 0]),
    "equal completions": ([[5, 6]], [[1, 2], [1, 2]], [0, 0]),
    "one completion begins another": ([[5, 6]], [[1, 2, 3], [1, 2]], [0, 0]),
    "completions that begin alike": ([[5, 6]], [[1, 2, 3], [1, 2, 4, 8]], [0, 0]),
    "unequal group sizes": ([[5, 6], [7], [9, 9, 9]], [[1], [2, 3], [4], [1, 1], [8, 2, 3], [3]], [0, 1, 2, 2, 2, 0]),
    "a single row": ([[5, 6]], [[1, 2]], [0]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_row_reads_back_with_its_own_history(case):
    prompts, completions, group_ids = case
    input_ids, attention_mask, labels, groups = make_batch(prompts, completions, group_ids)
    packed = pack_rows(input_ids, attention_mask, labels, groups)
    length = packed.input_ids.shape[1]
    for row in range(len(input_ids)):
        tokens = input_ids[row, : attention_mask[row].sum()].tolist()
        for token in range(1, len(tokens)):
            group, place = divmod(int(packed.row_index[row, token - 1]), length)
            assert group == group_ids[row]
            assert visible_history(packed, group, place) == list(enumerate(tokens[:token]))
            asked = labels[row, token] != IGNORE_INDEX
            assert bool(packed.row_labels[row, token - 1]) == bool(asked)
            if asked:
                assert packed.shift_labels[group, place] == tokens[token]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_nothing_is_asked_or_visible_beyond_the_rows(case):
    prompts, completions, group_ids = case
    packed = pack_rows(*make_batch(prompts, completions, group_ids))
    used = set(packed.row_index[packed.row_labels].tolist())
    asked = set((packed.shift_labels.flatten() != IGNORE_INDEX).nonzero().squeeze(1).tolist())
    assert asked == used
    assert not packed.visible.triu(diagonal=1).any()
    assert packed.visible.diagonal(dim1=-2, dim2=-1).all()  # no empty row in the softmax


def test_prompt_is_stored_once_and_its_last_token_once_per_completion():
    prompt, completions = list(range(10, 30)), [[1, 2, 3], [4, 5], [6]]
    packed = pack_rows(*make_batch([prompt], completions, [0, 0, 0]))
    # prompt[:-1], then prompt[-1] + completion[:-1] for each
    assert packed.input_ids.tolist() == [[*prompt[:-1], 29, 1, 2, 29, 4, 29]]
    assert packed.position_ids.tolist() == [[*range(19), 19, 20, 21, 19, 20, 19]]


def test_rows_that_share_nothing_stay_apart():
    input_ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    packed = pack_rows(input_ids, torch.ones_like(input_ids), input_ids, torch.tensor([0, 0]))
    assert packed.input_ids.tolist() == [[1, 2, 4, 5]]
    assert visible_history(packed, 0, 3) == [(0, 4), (1, 5)]


def test_unpack_is_zero_where_no_label_is():
    packed = pack_rows(*make_batch([[5, 6, 7]], [[1, 2], [3, 4, 8]], [0, 0]))
    values = torch.arange(1.0, 8.0).view(1, 7)
    assert packed.unpack(values).tolist() == [[0, 0, 3, 4, 0], [0, 0, 5, 6, 7]]


def test_gradient_of_a_shared_token_is_counted_for_both_rows():
    packed = pack_rows(*make_batch([[5, 6]], [[1, 2, 3], [1, 2, 4]], [0, 0]))
    values = torch.ones(packed.input_ids.shape, requires_grad=True)
    packed.unpack(values).sum().backward()
    # p6 -> 1 and 1 -> 2 stand in both rows; the heads of the segments predict 3 and 4 for one row each
    assert values.grad.tolist() == [[0, 2, 2, 1, 1]]


def test_pair_groups_follow_trl_layout():
    assert pair_groups(6).tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError, match="3 rows are not chosen rows.*Pass `group_ids`"):
        pair_groups(3)


def test_random_batches_against_brute_force():
    generator = torch.Generator().manual_seed(0)

    def draw(low, high, size):
        return torch.randint(low, high, (size,), generator=generator).tolist()

    for _ in range(50):
        num_groups = draw(1, 4, 1)[0]
        prompts = [draw(1, 4, draw(1, 6, 1)[0]) for _ in range(num_groups)]
        group_ids = list(range(num_groups)) + draw(0, num_groups, 3)
        completions = [draw(1, 4, draw(0, 5, 1)[0]) for _ in group_ids]
        if max(len(prompts[group]) + len(text) for group, text in zip(group_ids, completions, strict=True)) < 2:
            continue
        test_every_row_reads_back_with_its_own_history((prompts, completions, group_ids))
