"""Completions of people or of other models as candidates, and where each comes from."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_from_disk

from prefopt_trl import FunctionRanker, PROConfig, PROTrainer, RSOConfig, RSOTrainer, build_preference_dataset
from prefopt_trl.sampling.selection import add_given
from tests.unit.known_rankers import brevity

DATA: dict[str, Any] = {
    "prompt": ["The sky is", "The sea is", "The sun is"],
    "chosen": [" blue.", " salty.", " hot."],
    "rejected": [" a very long story.", " no.", None],
    "chatgpt": [" a color.", " wide and deep.", " very far."],
    "topic": ["air", "water", "fire"],
}
MESSAGES = [{"role": "assistant", "content": "Blue."}]
OPTIONS: dict[str, Any] = {"num_candidates": 4, "num_samples": 4, "strategy": "sft"}
TRAINING: dict[str, Any] = {"use_cpu": True, "bf16": False, "max_steps": 1, "report_to": "none", "save_strategy": "no"}
BREVITY = FunctionRanker(brevity)
SOURCES = {DATA[name][row]: name for name in ("chosen", "rejected", "chatgpt") for row in range(3)}


def build(folder: Path, given=("chosen", "rejected", "chatgpt"), policy=None, tokenizer=None, data=DATA, **options):
    how = {**OPTIONS, **options}
    return build_preference_dataset(Dataset.from_dict(data), policy, tokenizer, BREVITY, folder, given=given, **how)


def test_given_ones_come_last_and_none_leaves() -> None:
    row = {"prompt": "p", "completions": ["s"], "finished": [False], "logps": [-1.0], "a": "x", "b": None, "c": "z"}
    assert add_given(row, ["c", "b", "a"]) == {
        **{"prompt": "p", "completions": ["s", "z", "x"], "source": ["sampled", "c", "a"]},
        **{"finished": [False, True, True], "logps": [-1.0, None, None]},
    }
    assert add_given({"prompt": "p", "a": "x"}, ["a"]) == {"prompt": "p", "completions": ["x"], "source": ["a"]}


def test_answers_of_several_models_are_a_ranking_that_pro_trains_on(tmp_path: Path, tiny_llama_dir: str) -> None:
    made = build(tmp_path / "out", pairing="ranking")
    assert made[0] == {
        **{"prompt": "The sky is", "topic": "air", "completions": [" blue.", " a color.", " a very long story."]},
        **{"source": ["chosen", "chatgpt", "rejected"], "rewards": [-6.0, -9.0, -19.0]},
    }
    assert made[2]["source"] == ["chosen", "chatgpt"]
    assert build(tmp_path / "best", pairing="best")[1] == {
        **{"prompt": "The sea is", "topic": "water", "completion": " no.", "reward": -4.0, "source": "rejected"}
    }
    args = PROConfig(str(tmp_path / "pro"), **TRAINING)
    assert PROTrainer(tiny_llama_dir, args=args, train_dataset=made).train().global_step == 1


@pytest.mark.parametrize("keep_logps", [False, True])
def test_they_stand_beside_sampled_ones(keep_logps: bool, sampler, tmp_path: Path, tiny_llama_dir: str) -> None:
    how = {"max_new_tokens": 4, "num_samples": 4, "strategy": "top-k", "pairing": "all", "keep_logps": keep_logps}
    made = build(tmp_path / "out", ["rejected", "chatgpt"], *sampler, **how)
    candidates = load_from_disk(tmp_path / "out" / "candidates")
    assert list(candidates["source"]) == [["sampled"] * 4 + ["rejected", "chatgpt"]] * 2 + [
        ["sampled"] * 4 + ["chatgpt"]
    ]
    assert [row[4] for row in candidates["completions"]] == [" a very long story.", " no.", " very far."]
    assert "chatgpt" not in candidates.column_names
    for pair in made:
        for side in ("chosen", "rejected"):
            assert pair[f"{side}_source"] == SOURCES.get(pair[side], "sampled")
    assert {"sampled", "chatgpt"} <= {*made["chosen_source"], *made["rejected_source"]}
    if keep_logps:
        assert [row[4] for row in candidates["logps"]] == [None] * 3
        args = RSOConfig(str(tmp_path / "rso"), reference_logps="sampled", **TRAINING)
        assert RSOTrainer(tiny_llama_dir, args=args, train_dataset=made).train().global_step == 1
    # The saved candidates are those of another run, with their sources
    again = build_preference_dataset(
        candidates, None, None, BREVITY, tmp_path / "again", **{**OPTIONS, "pairing": "all"}
    )
    assert set(again["rejected_source"]) <= {"sampled", "rejected", "chatgpt"}
    with pytest.raises(ValueError, match="given: .'rejected', 'chatgpt'. there, .'chatgpt'. now"):
        build(tmp_path / "out", ["chatgpt"], *sampler, **how)


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, ["gpt"], "`prompts` lacks the column gpt; it has prompt, chosen"),
        (
            {"chosen": [MESSAGES] * 3},
            ["chosen"],
            "Completion 0 of the given columns, row 0 of `prompts`, is a list of m",
        ),
        (
            {"source": ["web"] * 3},
            ["chosen"],
            "column `source` of `prompts` does not name the sources of `completions`",
        ),
        ({"source": [["web"]] * 3}, [], "column `source` of `prompts` does not name the sources of `completions`"),
        (
            {"completions": [["a"]] * 3, "rewards": [[1.0]] * 3},
            ["chosen"],
            "Remove the column `rewards`, to score all",
        ),
        (
            {"completions": [["a"]] * 3, "source": [["x", "y"]] * 3},
            [],
            "1 completions and 2 `source`. Give one for each",
        ),
        (
            {"completions": [["a"]] * 3, "log_ratios": [[0.0]] * 3},
            ["chosen"],
            "completions have no log-ratio to a `pro",
        ),
        ({}, [], "`policy` and `tokenizer` are needed to sample candidates"),
    ],
)
def test_what_cannot_be_candidates_is_named(changes: dict, given: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "out", given, data={**DATA, **changes})
    assert not list(tmp_path.iterdir())
