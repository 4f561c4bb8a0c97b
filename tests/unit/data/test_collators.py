import pytest
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prefopt_trl.data.collators import DataCollatorForRanking

EXAMPLES = [
    {"prompt_ids": [1, 2], "completion_ids": [[3], [4, 5], [6]], "rewards": [0.5, 2.0, 1.0]},
    {"prompt_ids": [7], "completion_ids": [[8], [9]], "rewards": [1.0, 1.0]},
]


def rows(batch):
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_one_row_per_completion_best_first():
    batch = DataCollatorForRanking(pad_token_id=0)(EXAMPLES)
    assert rows(batch) == {
        "input_ids": [[1, 2, 4, 5], [1, 2, 6, 0], [1, 2, 3, 0], [7, 8, 0, 0], [7, 9, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]],
        "completion_mask": [[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]],
        "group_ids": [0, 0, 0, 1, 1],
        "rewards": [2.0, 1.0, 0.5, 1.0, 1.0],
    }
    assert batch["rewards"].dtype == torch.float32
    assert all(batch[name].dtype == torch.long for name in batch if name != "rewards")


def test_equal_rewards_keep_the_order_of_the_data():
    example = {"prompt_ids": [1], "completion_ids": [[2], [3], [4], [5]], "rewards": [1.0, 3.0, 1.0, 3.0]}
    assert DataCollatorForRanking(pad_token_id=0)([example])["input_ids"][:, 1].tolist() == [3, 5, 2, 4]


def test_rows_are_padded_to_a_multiple():
    batch = DataCollatorForRanking(pad_token_id=99, pad_to_multiple_of=3)(EXAMPLES)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["completion_mask"].shape == (5, 6)
    assert batch["input_ids"][3].tolist() == [7, 8, 99, 99, 99, 99] and batch["attention_mask"][3].sum() == 2


@pytest.mark.parametrize("settings", [{}, {"max_length": 4}, {"max_length": 4, "truncation_mode": "keep_end"}])
def test_rankings_of_two_are_the_rows_of_trls_pairs(settings):
    pairs = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
    ]
    rankings = [
        {
            "prompt_ids": pair["prompt_ids"],
            "completion_ids": [pair["rejected_ids"], pair["chosen_ids"]],
            "rewards": [0.0, 1.0],
        }
        for pair in pairs
    ]
    ours = DataCollatorForRanking(pad_token_id=0, **settings)(rankings)
    trls = DataCollatorForPreference(pad_token_id=0, **settings)(pairs)
    chosen_then_rejected = [0, 2, 1, 3]
    for name, tensor in trls.items():
        assert torch.equal(ours[name][chosen_then_rejected], tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1.0, 2.0, 3.0]}, "Example 1 of the batch has 2 completions and 3 rewards"),
        ({"completion_ids": [[8]], "rewards": [1.0]}, "Example 1 of the batch has 1 completion, .* at least 2"),
    ],
)
def test_an_example_that_is_no_ranking_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DataCollatorForRanking(pad_token_id=0)([EXAMPLES[0], {**EXAMPLES[1], **change}])


@pytest.mark.parametrize("change", [{"prompt_ids": "ab"}, {"completion_ids": ["ab", "c"]}])
def test_text_is_no_token_ids(change):
    with pytest.raises(TypeError, match="Example 1 of the batch has text. Give lists of token ids."):
        DataCollatorForRanking(pad_token_id=0)([EXAMPLES[0], {**EXAMPLES[1], "rewards": [1.0, 2.0], **change}])


def test_another_way_of_cutting_is_refused():
    with pytest.raises(ValueError, match="`truncation_mode` must be 'keep_start' or 'keep_end', got 'middle'"):
        DataCollatorForRanking(pad_token_id=0, truncation_mode="middle")
