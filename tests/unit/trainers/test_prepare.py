"""From pairs, completions or prompts to what the trainers learn from, and the bad data they refuse."""

import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, T5Config

from prefopt_trl import FunctionRanker, SamplingOptions, sample_completions
from prefopt_trl.data.tokenization import check_tokens
from prefopt_trl.sampling.shards import shard_seed
from prefopt_trl.trainers import base
from prefopt_trl.trainers.listwise_dpo_trainer import ListwiseDPOTrainer
from prefopt_trl.trainers.pro_trainer import PROTrainer
from prefopt_trl.trainers.rrhf_trainer import RRHFTrainer
from prefopt_trl.trainers.rso_trainer import RSOTrainer
from prefopt_trl.trainers.slic_trainer import SLiCTrainer
from tests.unit.known_rankers import brevity

PAIRS = {"prompt": ["Why?", "The dog"], "chosen": [" So.", " sleeps"], "rejected": [" I will not say.", " is"]}
COMPLETIONS = {"prompt": ["Why?", "The dog"], "completions": [[" So.", " No", " Because"], [" sleeps", " is"]]}
RANKINGS = {**COMPLETIONS, "rewards": [[0.5, 1.0, -2.0], [1.0, 3.0]]}
PROMPTS = {"prompt": ["The capital of", "Tell me how", "The quick brown fox", "What is"]}
SAMPLING = {"num_candidates": 6, "num_samples": 4, "max_new_tokens": 6, "generation_batch_size": 24}
ON_RANKINGS = [PROTrainer, RRHFTrainer, ListwiseDPOTrainer]


class Length:
    """A reward function that writes down what it is asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, **kwargs):
        self.calls.append(list(zip(prompts, completions, strict=True)))
        return [float(len(completion)) for completion in completions]


def dataset(columns):
    return Dataset.from_dict(columns)


def stream(columns):
    return IterableDataset.from_generator(lambda: iter(dataset(columns).to_list()))


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("prefopt_trl")]


# Pairs


@pytest.mark.parametrize("trainer_class", ON_RANKINGS)
def test_pairs_become_rankings_of_two(trainer_class, make, caplog):
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        trainer = make(trainer_class, dataset(PAIRS))
    rows = trainer.train_dataset.to_list()
    assert [(row["completions"], row["rewards"]) for row in rows] == [
        ([" So.", " I will not say."], [1.0, 0.0]),
        ([" sleeps", " is"], [1.0, 0.0]),
    ]
    assert said(caplog) == []


def test_the_prompt_of_a_pair_may_be_implicit(make):
    whole = {
        name: [prompt + text for prompt, text in zip(PAIRS["prompt"], PAIRS[name], strict=True)] for name in PAIRS
    }
    rows = make(PROTrainer, dataset({name: whole[name] for name in ("chosen", "rejected")})).train_dataset
    # What both begin with is the prompt, so it takes the space along
    assert list(rows["prompt"]) == ["Why?", "The dog"]
    assert list(rows["completions"]) == [[" So.", " I will not say."], [" sleeps", " is"]]


def test_a_ranker_scores_pairs_again(make):
    length = Length()
    trainer = make(PROTrainer, dataset(PAIRS), ranker=FunctionRanker(length))
    assert list(trainer.train_dataset["rewards"]) == [[4.0, 16.0], [7.0, 3.0]]
    assert len(length.calls) == 1
    first_batch = trainer.data_collator([trainer.train_dataset[0]])
    tokenizer = trainer.processing_class
    assert first_batch["rewards"].tolist() == [16.0, 4.0]  # the ranker's order, not the data's
    assert tokenizer.decode(first_batch["input_ids"][0], skip_special_tokens=True) == "Why? I will not say."


def test_rewards_of_the_data_come_before_the_ranker(make, caplog):
    length = Length()
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        trainer = make(PROTrainer, dataset(RANKINGS), ranker=FunctionRanker(length))
    assert length.calls == [] and list(trainer.train_dataset["rewards"]) == RANKINGS["rewards"]
    assert said(caplog) == [
        "`ranker` is not used: the datasets already have ranked completions. To have them scored, remove the column "
        "`rewards`, or give pairs to a trainer on rankings."
    ]


# Completions without rewards


def test_completions_are_scored_once_per_split(make, caplog):
    length = Length()
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        trainer = make(
            PROTrainer,
            dataset(COMPLETIONS),
            eval_dataset={"one": dataset(COMPLETIONS).select([1]), "given": dataset(RANKINGS)},
            ranker=FunctionRanker(length),
        )
    train, one = (
        [
            (prompt, completion)
            for prompt, row in zip(COMPLETIONS["prompt"], COMPLETIONS["completions"], strict=True)
            for completion in row
            if prompt in prompts
        ]
        for prompts in (("Why?", "The dog"), ("The dog",))
    )
    assert length.calls == [train, one] and said(caplog) == []
    assert list(trainer.train_dataset["rewards"]) == [[4.0, 3.0, 8.0], [7.0, 3.0]]
    assert list(trainer.eval_dataset["one"]["rewards"]) == [[7.0, 3.0]]
    assert list(trainer.eval_dataset["given"]["rewards"]) == RANKINGS["rewards"]
    trainer.train()
    trainer.evaluate()
    assert len(length.calls) == 2


@pytest.mark.parametrize("trainer_class", ON_RANKINGS)
def test_data_given_to_evaluate(trainer_class, make):
    trainer = make(trainer_class, dataset(RANKINGS))
    ranked = {
        "prompt": PAIRS["prompt"],
        "completions": [list(pair) for pair in zip(PAIRS["chosen"], PAIRS["rejected"], strict=True)],
        "rewards": [[1.0, 0.0]] * 2,
    }
    found, expected = (trainer.evaluate(dataset(columns))["eval_loss"] for columns in (PAIRS, ranked))
    assert found == expected != trainer.evaluate(dataset(RANKINGS))["eval_loss"]
    with pytest.raises(ValueError, match="The eval dataset has no column 'rewards'; it has"):
        trainer.evaluate(dataset(COMPLETIONS))


@pytest.mark.parametrize("trainer_class", ON_RANKINGS)
def test_completions_need_rewards_or_a_ranker(trainer_class, make):
    remedy = "has `completions` and no `rewards`. Add the column, .* or pass a `ranker` to score them."
    with pytest.raises(ValueError, match=f"The train dataset {remedy}"):
        make(trainer_class, dataset(COMPLETIONS))
    with pytest.raises(ValueError, match=f"The eval dataset {remedy}"):
        make(trainer_class, dataset(RANKINGS), eval_dataset=dataset(COMPLETIONS))


def test_a_ranker_that_fails_is_named_with_the_row(make):
    ranker = FunctionRanker(lambda prompts, completions, **kwargs: [1.0, 2.0, float("nan"), 1.0, 2.0])
    with pytest.raises(ValueError, match="FunctionRanker returned nan for completion 2 of prompt row 0"):
        make(PROTrainer, dataset(COMPLETIONS), ranker=ranker)


# Prompts alone


def candidates_by_hand(policy_dir, seed=42):
    return sample_completions(
        AutoModelForCausalLM.from_pretrained(policy_dir),
        AutoTokenizer.from_pretrained(policy_dir),
        PROMPTS["prompt"],
        6,
        max_new_tokens=6,
        seed=shard_seed(seed, 0),
        generation_batch_size=24,
    )


@pytest.mark.parametrize("trainer_class", ON_RANKINGS)
def test_prompts_are_sampled_into_rankings(trainer_class, make, policy_dir, tmp_path):
    trainer = make(trainer_class, dataset(PROMPTS), ranker=FunctionRanker(brevity), **SAMPLING)
    sampled = dict(zip(PROMPTS["prompt"], candidates_by_hand(policy_dir), strict=True))
    rows = trainer.train_dataset.to_list()
    assert [row["prompt"] for row in rows] == PROMPTS["prompt"]
    for row in rows:
        assert len(set(row["completions"])) == 4 and set(row["completions"]) <= set(sampled[row["prompt"]])
        assert row["rewards"] == sorted(brevity(None, row["completions"]), reverse=True)
        assert row["rewards"] == brevity(None, row["completions"])
    manifest = json.loads((tmp_path / "sampled" / "train" / "manifest.json").read_text())
    assert manifest["finished"]
    strategy = "rso" if trainer_class is ListwiseDPOTrainer else "sft"
    assert (trainer.args.strategy, trainer.args.pairing) == (strategy, "ranking")
    trainer.train()
    assert trainer.state.log_history[0]["num_tokens"] > 0


def test_prompts_are_sampled_into_a_tournament(make, policy_dir):
    trainer = make(SLiCTrainer, dataset(PROMPTS), ranker=FunctionRanker(brevity), **SAMPLING)
    sampled = dict(zip(PROMPTS["prompt"], candidates_by_hand(policy_dir), strict=True))
    rows = [
        # TRL ends a text with EOS when it tokenises pairs
        {**row, **{name: row[name].removesuffix("</s>") for name in ("chosen", "rejected")}}
        for row in trainer.train_dataset
    ]
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS["prompt"] for _ in range(3)]
    for start in range(0, 12, 3):
        of_prompt = rows[start : start + 3]
        assert {row[name] for row in of_prompt for name in ("chosen", "rejected")} <= set(
            sampled[rows[start]["prompt"]]
        )
        # A knock-out of four: each loses once but the winner, who is in the final
        losers, winner = {row["rejected"] for row in of_prompt}, of_prompt[-1]["chosen"]
        assert len(losers) == 3 and winner not in losers
        assert len(winner) <= min(map(len, losers))
    trainer.train()
    assert "loss/calibration" in trainer.state.log_history[0]


def test_the_sampling_temperature_of_pro_arrives(make, monkeypatch):
    received = {}

    def record(prompts, policy, tokenizer, ranker, output_dir, options, **settings):
        received.update(settings, **vars(SamplingOptions.of(options)))
        return dataset(RANKINGS)

    monkeypatch.setattr("prefopt_trl.trainers.prepare.build_preference_dataset", record)
    make(PROTrainer, dataset(PROMPTS), ranker=FunctionRanker(brevity), temperature=0.7, top_p=0.9, seed=3)
    assert (received["temperature"], received["top_p"], received["seed"]) == (0.7, 0.9, 3)
    assert (received["strategy"], received["pairing"]) == ("sft", "ranking")


def test_evaluation_prompts_are_sampled_and_training_data_are_not(make, tmp_path):
    trainer = make(
        RRHFTrainer,
        dataset(RANKINGS),
        eval_dataset=DatasetDict({"new": dataset(PROMPTS)}),
        ranker=FunctionRanker(brevity),
        **SAMPLING,
    )
    assert [path.name for path in (tmp_path / "sampled").iterdir()] == ["eval_new"]
    assert list(trainer.train_dataset["rewards"]) == RANKINGS["rewards"]
    assert [len(row) for row in trainer.eval_dataset["new"]["completions"]] == [4] * 4


def test_rewards_of_pairs_are_not_replaced_in_silence(make):
    pairs = dataset({**PAIRS, "rewards": [[0.1, 0.9], [0.2, 0.8]]})
    with pytest.raises(ValueError, match="has pairs and a column `rewards`. Remove it"):
        make(PROTrainer, pairs)


@pytest.mark.parametrize("trainer_class", [SLiCTrainer, *ON_RANKINGS])
def test_prompts_need_a_ranker(trainer_class, make):
    with pytest.raises(ValueError, match="The train dataset has prompts but no .* Pass a `ranker`"):
        make(trainer_class, dataset(PROMPTS))


@pytest.mark.parametrize("trainer_class", [RSOTrainer, PROTrainer])
def test_an_encoder_decoder_is_refused_before_anything_is_sampled(
    trainer_class, make, policy_dir, tmp_path, monkeypatch
):
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = tokenizer.pad_token_id
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    length = Length()
    path = str(tmp_path / "t5")
    for model in (path, AutoModelForSeq2SeqLM.from_pretrained(path)):
        for data in (PROMPTS, PAIRS):
            with pytest.raises(ValueError, match=r"`model` is an encoder-decoder \(t5\).*Sample from"):
                make(
                    trainer_class,
                    dataset(data),
                    model=model,
                    ranker=FunctionRanker(length),
                    output_dir=tmp_path / "out",
                    **SAMPLING,
                )
    assert length.calls == [] and not (tmp_path / "out" / "sampled").exists()


def test_a_stream_of_prompts_is_refused(make):
    with pytest.raises(ValueError, match="is an `IterableDataset` of prompts.*Pass a `Dataset`"):
        make(PROTrainer, stream(PROMPTS), ranker=FunctionRanker(brevity))


# Bad rankings


def with_row(**changed):
    """A good row, and one with these columns."""
    return dataset({name: [RANKINGS[name][0], changed.get(name, RANKINGS[name][1])] for name in RANKINGS})


@pytest.mark.parametrize("trainer_class", ON_RANKINGS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"completions": [" sleeps"], "rewards": [1.0]},
            "has 1 completion, and a ranking has at least 2. Leave the row out.",
        ),
        ({"completions": [], "rewards": []}, "has 0 completions, and a ranking has at least 2. Leave the row out."),
        ({"rewards": [1.0]}, "has 2 completions and 1 rewards. Give one reward per completion."),
        ({"rewards": [1.0, 2.0, 3.0]}, "has 2 completions and 3 rewards. Give one reward per completion."),
        ({"rewards": [1.0, float("nan")]}, "has the reward nan for completion 1, a finite number was expected."),
        ({"rewards": [float("inf"), 1.0]}, "has the reward inf for completion 0, a finite number was expected."),
        ({"rewards": [1.0, float("-inf")]}, "has the reward -inf for completion 1"),
        ({"rewards": [1.0, None]}, "has the reward None for completion 1"),
        ({"rewards": None}, "has 2 completions and None as `rewards`. Give one reward per completion."),
    ],
)
def test_a_row_that_is_no_ranking_is_named(changed, message, trainer_class, make):
    with pytest.raises(ValueError) as error:
        make(trainer_class, with_row(**changed))
    assert f"Row 1 of the train dataset {message}" in str(error.value)


def test_rewards_written_as_text_are_refused(make):
    rewards = [[str(reward) for reward in row] for row in RANKINGS["rewards"]]
    with pytest.raises(ValueError, match="Row 0 of the train dataset has the reward '0.5' for completion 0, .* Give"):
        make(PROTrainer, dataset({**RANKINGS, "rewards": rewards}))


def test_a_bad_row_of_evaluation_data_is_named(make):
    with pytest.raises(ValueError, match="Row 1 of the mine dataset has 2 completions and 1 rewards"):
        make(PROTrainer, dataset(RANKINGS), eval_dataset={"mine": with_row(rewards=[1.0])})
    trainer = make(PROTrainer, dataset(RANKINGS))
    with pytest.raises(ValueError, match="Row 1 of the eval dataset has 2 completions and 1 rewards"):
        trainer.evaluate(with_row(rewards=[1.0]))


def test_one_text_is_no_list_of_completions(make):
    rows = {"prompt": ["Why?"], "completions": [" So."], "rewards": [[1.0, 2.0]]}
    with pytest.raises(ValueError, match="Row 0 of the train dataset has str as `completions`. Give a list"):
        make(PROTrainer, dataset(rows))


def test_whole_numbers_are_rewards(make):
    rewards = make(PROTrainer, dataset({**RANKINGS, "rewards": [[3, 1, 2], [0, 1]]})).train_dataset["rewards"]
    assert list(rewards) == [[3.0, 1.0, 2.0], [0.0, 1.0]]


def test_the_order_of_the_data_is_free(make):
    ranked = [
        sorted(zip(rewards, texts, strict=True), reverse=True)
        for rewards, texts in zip(RANKINGS["rewards"], RANKINGS["completions"], strict=True)
    ]
    in_order = {
        "prompt": RANKINGS["prompt"],
        "completions": [[text for _, text in row] for row in ranked],
        "rewards": [[reward for reward, _ in row] for row in ranked],
    }
    assert in_order["rewards"] != RANKINGS["rewards"]
    losses = []
    for columns in (RANKINGS, in_order):
        trainer = make(PROTrainer, dataset(columns))
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("trainer_class", ON_RANKINGS)
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"completions": [["a", "b"]], "rewards": [[1.0, 0.0]]}, "has no column 'prompt'; it has"),
        ({"prompt": ["a"], "chosen": ["b"]}, "has no column 'completions' and no column 'rewards'; it has"),
    ],
)
def test_missing_columns_are_named(columns, message, trainer_class, make):
    with pytest.raises(ValueError) as error:
        make(trainer_class, dataset(columns))
    assert f"The train dataset {message}" in str(error.value) and "rename_column(old, new)" in str(error.value)


def test_slic_makes_pairs_of_rankings_with_a_ranker_alone(make):
    with pytest.raises(ValueError, match="The train dataset has prompts but no `chosen` and `rejected` completions"):
        make(SLiCTrainer, dataset(COMPLETIONS))
    given = {"num_candidates": 2, "num_samples": 2}
    trainer = make(SLiCTrainer, dataset(COMPLETIONS), ranker=FunctionRanker(brevity), **given)
    assert len(trainer.train_dataset) == 2
    for row, completions in zip(trainer.train_dataset, COMPLETIONS["completions"], strict=True):
        chosen, rejected = (row[name].removesuffix("</s>") for name in ("chosen", "rejected"))
        assert {chosen, rejected} <= set(completions) and len(chosen) < len(rejected)


@pytest.mark.parametrize("trainer_class", [PROTrainer, SLiCTrainer])
def test_images_are_refused_where_rankings_are_collated(trainer_class, make):
    columns = {**PAIRS, "images": [["x"], ["y"]], "target": [" So", " dog"]}
    given = {"regularization_weight": 0.1, "target_column": "target"} if trainer_class is SLiCTrainer else {}
    with pytest.raises(ValueError, match="has the column images, and rankings are of text. Remove it"):
        make(trainer_class, dataset(columns), **given)


# Length


def test_a_completion_longer_than_a_row_is_cut_and_counted(make, caplog):
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        trainer = make(PROTrainer, dataset(RANKINGS), max_length=13)
    row = trainer.train_dataset[0]
    whole = [len(row["prompt_ids"]) + len(ids) for ids in row["completion_ids"]]
    assert [length > 13 for length in whole] == [False, False, True]
    assert said(caplog) == [
        "1 of 2 rows of the train dataset have a completion that `max_length`=13 cuts. Raise `max_length` to keep it "
        "whole."
    ]
    batch = trainer.data_collator([row])
    assert batch["input_ids"].shape == (3, 13)
    kept = batch["completion_mask"].sum(dim=1).tolist()
    assert kept == [whole[1] - len(row["prompt_ids"]), whole[0] - len(row["prompt_ids"]), 13 - len(row["prompt_ids"])]
    trainer.train()
    assert trainer.state.log_history[0]["num_tokens"] < sum(
        len(row["prompt_ids"]) + len(ids) for row in trainer.train_dataset for ids in row["completion_ids"]
    )


def test_a_prompt_that_fills_a_row_is_left_out_and_counted(make, caplog):
    tokenizer = make(PROTrainer, dataset(RANKINGS)).processing_class
    long, short = (len(tokenizer(prompt)["input_ids"]) for prompt in RANKINGS["prompt"])
    assert short < long
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        trainer = make(PROTrainer, dataset(RANKINGS), max_length=long)
    assert list(trainer.train_dataset["prompt"]) == ["The dog"]
    full = (
        f"rows of the train dataset have a prompt that fills `max_length`={long} and leaves no room for a completion"
    )
    assert f"1 of 2 {full}; they are left out, as TRL does. Raise `max_length` to keep them." in said(caplog)
    with pytest.raises(ValueError, match=f"2 of 2 .* fills `max_length`={short} .* Raise `max_length` or shorten"):
        make(PROTrainer, dataset(RANKINGS), max_length=short)
    kept = make(PROTrainer, dataset(RANKINGS), max_length=short, truncation_mode="keep_end")
    assert len(kept.train_dataset) == 2


# Streams


def test_a_stream_trains_like_the_dataset(make):
    losses = []
    for rows in (dataset(RANKINGS), stream(RANKINGS)):
        trainer = make(PROTrainer, rows, per_device_train_batch_size=2, train_sampling_strategy="sequential")
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_stream_of_pairs_needs_no_ranker(make):
    losses = []
    for rows in (dataset(PAIRS), stream(PAIRS)):
        trainer = make(RRHFTrainer, rows, per_device_train_batch_size=2, train_sampling_strategy="sequential")
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_a_stream_without_rewards_is_refused(make):
    with pytest.raises(ValueError, match="is an `IterableDataset` without `rewards`. Pass a `Dataset`"):
        make(PROTrainer, stream(COMPLETIONS), ranker=FunctionRanker(brevity))
    with pytest.raises(ValueError, match="has `completions` and no `rewards`. Add the column"):
        make(PROTrainer, stream(COMPLETIONS))


def test_a_bad_row_of_a_stream_is_named_when_it_comes(make):
    trainer = make(PROTrainer, stream({name: list(with_row(rewards=[1.0])[name]) for name in RANKINGS}))
    with pytest.raises(ValueError, match="Row 1 of the train dataset has 2 completions and 1 rewards"):
        trainer.train()


def test_a_prompt_that_fills_a_row_of_a_stream_is_left_out(make):
    trainer = make(PROTrainer, stream(RANKINGS), max_length=13, per_device_train_batch_size=2)
    lengths = [len(row["prompt_ids"]) for row in trainer.train_dataset]
    assert len(lengths) == 2
    shorter = make(PROTrainer, stream(RANKINGS), max_length=max(lengths))
    assert [row["prompt"] for row in shorter.train_dataset] == ["The dog"]


# Rankings are not RSO's


def test_rso_learns_from_pairs(make):
    with pytest.raises(ValueError, match="The train dataset has no column 'chosen' and no column 'rejected'"):
        make(RSOTrainer, dataset({name: RANKINGS[name] for name in ("completions", "rewards")}))


# What a user is told


def test_rows_of_equal_rewards_are_counted(make, caplog):
    rewards = [[1.0, 1.0, 1.0], [2.0, 1.0]]
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        make(PROTrainer, dataset({**COMPLETIONS, "rewards": rewards}))
    (message,) = said(caplog)
    assert message.startswith("1 of 2 rows of the train dataset have equal rewards only")


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        (
            [{"from": "human", "value": "Why?"}],
            [{"role": "assistant", "content": "So."}],
            "The prompt of row 0 of the train dataset has a message with the keys from, value; .* `role`",
        ),
        (
            [{"role": "user", "content": "Why?"}],
            [],
            "Completion 1 of row 0 of the train dataset is an empty list; .* Leave the row out",
        ),
        ("Why?", None, "Completion 1 of row 0 of the train dataset is NoneType"),
    ],
)
def test_messages_of_another_kind_are_refused(prompt, completion, message, make):
    other = " yes" if isinstance(prompt, str) else [{"role": "assistant", "content": "Yes."}]
    rows = {"prompt": [prompt], "completions": [[other, completion]], "rewards": [[1.0, 0.0]]}
    with pytest.raises(ValueError, match=message):
        make(PROTrainer, dataset(rows))


def test_a_row_of_two_formats_is_named(make):
    rows = {"prompt": ["Why?"], "completions": [[[{"role": "assistant", "content": "So."}]] * 2], "rewards": [[1, 0]]}
    message = "Completion 0 of row 0 of the train dataset is a list of messages, and its prompt text"
    with pytest.raises(ValueError, match=message):
        make(PROTrainer, dataset(rows))


@pytest.mark.parametrize("trainer_class", [RSOTrainer, PROTrainer])
def test_pairs_of_ultrafeedback_are_trained_on_as_conversations(trainer_class, make):
    asked = [{"role": "user", "content": "Why?"}]
    yes, no = ([{"role": "assistant", "content": text}] for text in ("So.", "No."))
    on_the_hub = {"prompt": ["Why?"], "chosen": [asked + yes], "rejected": [asked + no]}
    made, expected = (
        make(trainer_class, dataset(pairs).with_format("torch")).train_dataset[0]
        for pairs in (on_the_hub, {"prompt": [asked], "chosen": [yes], "rejected": [no]})
    )
    assert made == expected and len(made["prompt_ids"]) > 3
    with pytest.raises(ValueError, match="`chosen` of row 1 of the train dataset is None. Leave the row out."):
        make(trainer_class, dataset({"prompt": ["a", "b"], "chosen": ["c", None], "rejected": ["d", "e"]}))


def test_columns_beside_sampled_prompts_are_said(make, caplog):
    rows = dataset({"prompt": PROMPTS["prompt"], "responses": [["a", "b"]] * 4})
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        make(PROTrainer, rows, ranker=FunctionRanker(brevity), **SAMPLING)
    assert any("other columns are carried along: responses. If they hold completions" in text for text in said(caplog))


def test_columns_beside_scored_completions_are_said(make, caplog):
    rows = dataset({**COMPLETIONS, "reward": [[1.0, 2.0, 3.0], [1.0, 2.0]]})
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        make(PROTrainer, rows, ranker=FunctionRanker(brevity))
    assert any("has no column `rewards`; passed to the ranker are: reward." in text for text in said(caplog))


def test_the_columns_there_are_stand_in_the_message(make):
    with pytest.raises(ValueError, match=r"no `completions`; it has \['prompt', 'responses'\]. Pass a `ranker`"):
        make(PROTrainer, dataset({"prompt": ["Why?"], "responses": [["a", "b"]]}))


def test_rewards_without_completions_are_refused(make):
    with pytest.raises(ValueError, match="has `rewards` and no `completions` that they belong to. Rename the column"):
        rows = dataset({"prompt": ["Why?"], "responses": [["a", "b"]], "rewards": [[1.0, 0.0]]})
        make(PROTrainer, rows, ranker=FunctionRanker(brevity))


def test_a_reward_beyond_single_precision_is_refused(make):
    with pytest.raises(ValueError, match="has the reward 1e[+]39 for completion 0, a finite number was expected"):
        make(PROTrainer, dataset({**COMPLETIONS, "rewards": [[1e39, 0.0, 1.0], [1.0, 2.0]]}))


@pytest.mark.parametrize("trainer_class", ON_RANKINGS)
def test_dispatched_batches_are_refused(trainer_class, make):
    with pytest.raises(ValueError, match="`dispatch_batches=True` deals out the rows of a batch"):
        make(trainer_class, dataset(RANKINGS), accelerator_config={"dispatch_batches": True})


def test_rows_with_nothing_to_compare_do_not_count_in_metrics(make):
    rows = {
        "prompt": ["Why?", "The dog", "Who?"],
        "completions": [[" So.", " No"]] * 3,
        "rewards": [[1.0, 1.0], [1.0, 0.0], [2.0, 2.0]],
    }
    settings = {"per_device_train_batch_size": 1, "max_steps": 3, "logging_steps": 3, "learning_rate": 0.0}
    one_by_one = make(PROTrainer, dataset(rows), **settings)
    one_by_one.train()
    alone = make(PROTrainer, dataset(rows).select([1]), **{**settings, "max_steps": 1, "logging_steps": 1})
    alone.train()
    for name in ("rewards/accuracies", "ranking/kendall_tau", "ranking/top1"):
        assert one_by_one.state.log_history[0][name] == alone.state.log_history[0][name]


@pytest.mark.parametrize(("processes", "given"), [("NO", {}), ("MULTI_GPU", {"device_map": None})])
def test_each_of_several_processes_has_a_policy_of_its_own_to_sample_from(processes, given, config, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        base, "create_model_from_path", lambda path, **kwargs: seen.update(kwargs) or torch.nn.Linear(1, 1)
    )
    args = config(RSOTrainer.config_class)
    state = SimpleNamespace(distributed_type=DistributedType[processes])
    stand_in = SimpleNamespace(
        trust_remote_code=False, model_init_kwargs=None, device=args.device, distributed_state=state
    )
    base.load_policy("path/to/a-model", stand_in, None)
    # Without `device_map`, TRL spreads the model over all devices that a process sees
    assert seen == {"trust_remote_code": False, **given}


@pytest.mark.parametrize("trainer_class", [RSOTrainer, PROTrainer])
def test_pairs_without_a_prompt_are_refused_and_equal_tokens_counted(
    trainer_class, make, policy_dir, tmp_path, caplog
):
    question = {"question": ["What?"], "chosen": ["Yes."], "rejected": ["No."]}  # a misspelled `prompt`
    with pytest.raises(ValueError, match="Row 0 of the train dataset has no prompt; its columns are .*question"):
        make(trainer_class, dataset(question))
    merged = Dataset.from_dict({"prompt": ["a"], "prompt_ids": [[]]})  # where "ab" is one token
    with pytest.raises(ValueError, match="The prompt of row 0 of the train dataset, 'a', is left without a token"):
        check_tokens(merged, ["prompt", "chosen", "rejected"], "train")
    with pytest.raises(ValueError):
        make(trainer_class, dataset({"question": ["What?"]}), ranker=FunctionRanker(lambda prompts, completions: []))
    assert "`ranker` is not used" not in caplog.text
    thinking = AutoTokenizer.from_pretrained(policy_dir)
    thinking.chat_template = thinking.chat_template.replace("['content']", "['content'].split('</think>')[-1]")
    says = [[{"role": "assistant", "content": f"{thought}</think>Yes"}] for thought in ("good", "bad")]
    pairs = {"prompt": [[{"role": "user", "content": "Why?"}]], "chosen": says[:1], "rejected": says[1:]}
    thinking.save_pretrained(shutil.copytree(policy_dir, tmp_path / "thinking"))
    make(trainer_class, dataset(pairs), model=str(tmp_path / "thinking"))
    assert "1 of the first 1 rows of the train dataset have completions of different text and equal" in caplog.text
