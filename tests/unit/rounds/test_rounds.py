"""Rounds make what sampling, training and judging make one after the other, resume anywhere, and keep their word."""

import gc
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import prefopt_trl.rounds.rounds
from prefopt_trl import (
    FunctionRanker,
    PairwiseRanker,
    RoundsOptions,
    RSOConfig,
    RSOTrainer,
    build_preference_dataset,
    train_in_rounds,
)
from prefopt_trl.rounds.models import load
from prefopt_trl.rounds.report import best_round, measured, report_on_rounds
from prefopt_trl.runtime.settings import read_lines
from prefopt_trl.sampling.logps import pair_logps
from tests.unit.known_rankers import vowels
from tests.unit.trainers.conftest import _fast_collection  # noqa: F401

PROMPTS = [f"Tell me of {what}" for what in ("bread", "France", "the dog", "water", "salt", "a fox")]
HELD_OUT = ["What is flour?", "The capital is", "Mix the"]
SMALL = {"num_candidates": 6, "num_samples": 4, "max_new_tokens": 6, "max_length": 64}
TRAINING = {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4}
TRAINING |= {"learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}


def nothing(prompts, completions, **columns):
    return [0.0] * len(completions)


@pytest.fixture
def rounds(tiny_llama_dir, tmp_path):
    """Train in rounds, in `tmp_path`; `args` are those of the configuration, `options` of the rounds."""

    def train(name="RSO", args=None, model=tiny_llama_dir, ranker=None, judges=None, folder="rounds", **options):
        config = getattr(prefopt_trl, f"{name}Config")
        settings = {**SMALL, **TRAINING, **({"gamma": 0.1} if name == "RSO" else {}), **(args or {})}
        return train_in_rounds(
            options.pop("trainer_class", getattr(prefopt_trl, f"{name}Trainer")),
            model,
            config(str(tmp_path / folder), **settings),
            options.pop("prompts", PROMPTS),
            ranker or FunctionRanker(vowels),
            eval_prompts=HELD_OUT,
            judges=judges,
            **{"num_rounds": 2, **options},
        )

    return train


def weights(folder):
    return torch.cat([one.flatten() for one in AutoModelForCausalLM.from_pretrained(str(folder)).parameters()])


def pairs_of(made, number):
    return load_from_disk(str(made.round_folder(number) / "sampled/pairs"))


def losses(folder):
    history = json.loads(Path(folder, "checkpoint-2", "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history]


def test_a_round_is_sampling_from_the_round_before_and_training_on_the_samples(rounds, policy, tokenizer, tmp_path):
    made = rounds()
    before, record = made.model_of(1), made.record(2)["phases"]
    models = (AutoModelForCausalLM.from_pretrained(before), tokenizer)
    by_hand = {**SMALL, "seed": record["sample"]["seed"]}
    pairs = build_preference_dataset(PROMPTS, *models, FunctionRanker(vowels), tmp_path / "hand", **by_hand)
    assert pairs.to_list() == pairs_of(made, 2).to_list()
    assert pairs["chosen"] != pairs_of(made, 1)["chosen"]
    trainer = RSOTrainer(
        before,
        ref_model=policy,
        args=RSOConfig(str(tmp_path / "trained"), gamma=0.1, **SMALL, **TRAINING),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    torch.testing.assert_close(weights(made.model_of(2)), weights(tmp_path / "trained"), rtol=0, atol=0)
    assert record["train"]["loss"] == losses(made.model_of(2))[-1] != losses(made.model_of(1))[-1]
    samples = read_lines(tmp_path / "rounds/round-2/evaluation/samples.jsonl")
    of_round = [row["rewards"]["FunctionRanker"] for row in samples if row["policy"] == "round 2"]
    assert record["judge"]["judges"]["FunctionRanker"]["reward"]["mean"] == pytest.approx(np.mean(of_round))


class Watched(RSOTrainer):
    """Writes down the log-probabilities under the reference model, from what the first step logs."""

    ref_logps: list[float] = []
    holds_model: list[bool] = []

    def train(self, *args, **kwargs):
        self.holds_model.append(self.ref_model is not None)
        result = super().train(*args, **kwargs)
        first = next(log for log in self.state.log_history if "logps/chosen" in log)
        self.ref_logps.append(first["logps/chosen"] - first["rewards/chosen"] / self.args.gamma)
        return result


@pytest.fixture
def watched(monkeypatch):
    """The class of a trainer that has seen nothing yet; no round is judged."""
    monkeypatch.setattr(prefopt_trl.Rounds, "_judge", lambda self, number: {"first_judge": "judge", "judges": {}})
    Watched.ref_logps, Watched.holds_model = [], []
    return Watched


def chosen_logps(made, number):
    """The mean log-probability of what the second round trains to prefer, under the model of a round."""
    pairs, model = made._data(2), load(made.model_of(number), made.args, None)
    both = list(zip(pairs["chosen"], pairs["rejected"], strict=True))
    return pair_logps(model, made.tokenizer, pairs["prompt"], both, 64)[:, 0].mean()


@pytest.mark.parametrize(
    "options, adapter, reference, holds_model",
    [
        ({}, False, 0, True),
        ({"reference": "previous"}, False, 1, True),
        ({"start": "first", "reference": "previous"}, False, 1, True),
        ({"start": "first"}, False, 0, True),
        ({}, True, 0, False),
        ({"reference": "previous"}, True, 1, False),
        ({"start": "first", "reference": "previous"}, True, 1, True),
    ],
)
def test_the_reference_of_the_second_round(rounds, watched, options, adapter, reference, holds_model):
    peft = LoraConfig(r=4, lora_alpha=64, task_type="CAUSAL_LM") if adapter else None
    one_batch = {"per_device_train_batch_size": 64, "learning_rate": 3e-2}
    made = rounds(trainer_class=watched, args=one_batch, peft_config=peft, **options)
    expected = [chosen_logps(made, number) for number in (0, 1)]
    assert abs(expected[0] - expected[1]) > 0.5
    assert watched.ref_logps[1] == pytest.approx(expected[reference], abs=0.01)
    assert watched.holds_model[1] == holds_model


def test_corrected_rounds_keep_the_log_probabilities_of_the_first_model(rounds, watched):
    args = {"per_device_train_batch_size": 64, "learning_rate": 3e-2, "reference_logps": "sampled"}
    made = rounds(trainer_class=watched, args=args, importance_correction=True, proposal_clip=5.0)
    assert watched.holds_model == [False, False]
    assert watched.ref_logps[1] == pytest.approx(chosen_logps(made, 0), abs=0.01)
    first, second = (load_from_disk(str(made.round_folder(one) / "sampled/candidates")) for one in (1, 2))
    assert "log_ratios" not in first.column_names and np.abs(second["log_ratios"]).max() > 0.1
    assert 1 <= made.record(2)["phases"]["sample"]["statistics"]["effective_size"] <= 6


def test_what_a_round_trains_on_and_which_prompts_it_has(rounds):
    made = rounds(num_rounds=3, prompts_per_round=4, judges=FunctionRanker(nothing), args={"max_steps": 1})
    parts = [made._prompts(number)["prompt"][:] for number in (1, 2, 3, 4)]
    assert all(len(set(part)) == 4 for part in parts)
    assert sorted([*parts[0], *parts[1], *parts[2]]) == sorted(2 * PROMPTS) and parts[3] == parts[0]
    assert made.record(2)["phases"]["sample"]["prompts"] == 4

    own = [pairs_of(made, number).to_list() for number in (1, 2, 3)]
    trained = {
        data: replace(made, options=RoundsOptions(data=data))._data(3).to_list()
        for data in ("replace", "accumulate", "mix")
    }
    assert trained["replace"] == own[2] and trained["accumulate"] == [*own[0], *own[1], *own[2]]
    earlier, last = trained["mix"][: len(own[2])], trained["mix"][len(own[2]) :]
    assert last == own[2] and all(row in own[0] + own[1] for row in earlier)
    assert any(row in own[0] for row in earlier) and any(row in own[1] for row in earlier)


@pytest.mark.parametrize("name", ["SLiC", "PRO", "ListwiseDPO", "RRHF"])
def test_every_trainer_trains_in_rounds(rounds, name):
    made = rounds(name)
    assert [record["round"] for record in made.records] == [0, 1, 2]
    moved = [weights(made.model_of(number)) for number in (0, 1, 2)]
    assert (moved[0] - moved[1]).norm() > 0.01 < (moved[1] - moved[2]).norm()


def test_more_rounds_follow_and_nothing_is_done_again(rounds, tmp_path, monkeypatch):
    rounds(num_rounds=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("round-[01]/**/*") if path.is_file()}
    phases = []
    for phase in ("sample", "train", "judge"):
        run = getattr(prefopt_trl.Rounds, f"_{phase}")
        monkeypatch.setattr(
            prefopt_trl.Rounds,
            f"_{phase}",
            lambda self, number, run=run, phase=phase: phases.append((number, phase)) or run(self, number),
        )
    grown = rounds(num_rounds=2)
    assert phases == [(2, "sample"), (2, "train"), (2, "judge")]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if "cache" not in path.name)
    whole = rounds(num_rounds=2, folder="at once")
    torch.testing.assert_close(weights(grown.model_of(2)), weights(whole.model_of(2)), rtol=0, atol=0)


def test_other_settings_are_refused_by_name(rounds, tmp_path):
    rounds(num_rounds=1)
    for changed, message in [
        ({"args": {"learning_rate": 1e-3}}, "args.learning_rate: 0.01 there, 0.001 now"),
        ({"args": {"num_candidates": 8}}, "args.num_candidates: 6 there, 8 now"),
        ({"start": "first"}, "start: 'previous' there, 'first' now"),
        ({"prompts": PROMPTS[1:]}, "prompts: "),
        ({"num_rounds": 2, "ranker": FunctionRanker(vowels, version="2")}, r"ranker\.\w+: "),
    ]:
        with pytest.raises(ValueError, match=message):
            rounds(**{"num_rounds": 1, **changed})
    rounds(num_rounds=1, folder="other", args={"seed": 1})
    shutil.copytree(tmp_path / "other/round-1", tmp_path / "rounds/round-2")
    with pytest.raises(ValueError, match=r"round-2.record\.json belongs to rounds with other settings"):
        rounds()


@pytest.mark.parametrize("length", [{"max_steps": 2}, {"num_train_epochs": 0.5, "max_steps": -1}])
def test_a_round_that_was_trained_but_not_written_down_is_not_trained_on(rounds, tmp_path, monkeypatch, length):
    args = {**length, "lr_scheduler_type": "constant"}
    whole = rounds(num_rounds=1, args=args)
    monkeypatch.setattr(prefopt_trl.rounds.rounds, "write_training_report", lambda *given: 1 / 0)  # after the model
    with pytest.raises(ZeroDivisionError):
        rounds(num_rounds=1, args=args, folder="killed")
    monkeypatch.undo()
    again = rounds(num_rounds=1, args=args, folder="killed")
    assert again.record(1)["phases"]["train"]["steps"] == whole.record(1)["phases"]["train"]["steps"]
    assert again.record(1)["phases"]["train"]["loss"] == whole.record(1)["phases"]["train"]["loss"]
    torch.testing.assert_close(weights(again.model_of(1)), weights(whole.model_of(1)), rtol=0, atol=0)


def test_until_something_is_made_settings_may_change(rounds, monkeypatch):
    monkeypatch.setattr(prefopt_trl.Rounds, "_judge", lambda self, number: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rounds(args={"max_new_tokens": 5})
    monkeypatch.undo()
    assert rounds(num_rounds=1).records


def test_a_judge_without_any_opinion_is_named(rounds):
    with pytest.raises(ValueError, match="The judge 'FunctionRanker' has no opinion on start"):
        rounds(judges=FunctionRanker(lambda prompts, completions, **columns: [None] * len(completions)))


def test_a_missing_parent_is_named(rounds, tmp_path):
    rounds(num_rounds=1)
    shutil.rmtree(tmp_path / "rounds/round-1/model")
    with pytest.raises(FileNotFoundError, match=r"round-1.model is missing\. Restore the folder"):
        rounds()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"args": {"sampling": "online"}}, "leave `sampling` at 'offline'"),
        ({"args": {"eval_strategy": "steps"}}, "judged when they end: leave `eval_strategy` at"),
        ({"args": {"push_to_hub": True}}, "leave `push_to_hub` out"),
        (
            {"args": {"reference_logps": "sampled"}},
            "`reference_logps`='sampled' needs .* reference='previous' and data",
        ),
        ({"importance_correction": True, "args": {"strategy": "sft"}}, "`importance_correction` is .* set `strategy`"),
        ({"importance_correction": True, "reference": "previous"}, "no effect if `reference`, 'previous', is sampled"),
        ({"proposal_clip": 3.0}, "`proposal_clip` has no effect without `importance_correction`"),
        ({"name": "SLiC", "reference": "previous"}, "SLiCTrainer has no reference model"),
        ({"prompts_per_round": 7}, "`prompts_per_round` is more than the 6 prompts"),
        ({"metric": "accuracy"}, "`metric` must be one of reward, win_rate, lc_win_rate"),
        ({"args": {"save_only_model": True}}, "leave `save_only_model` out"),
        ({"num_rounds": 0}, "`num_rounds` must be a whole number, at least 1"),
        ({"against": "best"}, "'best' is neither a policy nor a column"),
    ],
)
def test_bad_input(rounds, given, message, monkeypatch):
    monkeypatch.setattr("prefopt_trl.trainers.publishing.HfApi", None)
    with pytest.raises(ValueError, match=message):
        rounds(**given)


def test_a_model_object_is_refused(rounds, policy):
    with pytest.raises(TypeError, match="`model` is a LlamaForCausalLM. Give the folder or Hub id"):
        rounds(model=policy)


def record(number, **found):
    estimates = {name: {"mean": mean, "standard_error": 0.1, "num_prompts": 9} for name, mean in found.items()}
    judges = {"a": {"reward": {"mean": 9.0 - number, "standard_error": 0.1}}, "judge": estimates} if estimates else {}
    return {"round": number, "phases": {"judge": {"first_judge": "judge", "judges": judges}}}


def test_the_best_round():
    records = [record(0, reward=1.0), record(1, reward=None, win_rate=0.4), record(2, reward=1.5, win_rate=0.4)]
    assert best_round(records, "reward") == 2
    assert best_round(records, "win_rate") == 0  # against itself the start wins half
    assert best_round([record(0), record(1, reward=-0.1)], "reward") == 0
    assert best_round([record(0), record(1, reward=0.1)], "reward") == 1
    assert measured(record(0), "lc_win_rate").mean == 0.5


def test_the_table_of_rounds():
    phases = {"judge": {**record(1, reward=1.234)["phases"]["judge"], "seconds": 180}, "sample": {"seconds": 60}}
    phases |= {"train": {"seconds": 120, "steps": 1, "loss": 0.5}}
    phases["sample"]["statistics"] = {"made": "pairs", "num_pairs": 12, "acceptance_rate": 0.25}
    printed = report_on_rounds(
        [record(0, reward=1.0) | {"phases": {"judge": phases["judge"]}}, {"round": 1, "phases": phases}], "reward", "m"
    )
    _, header, _, _, last = (re.split(r" *\| *", line) for line in printed.splitlines()[1:6])
    cells = dict(zip(header, last, strict=True))
    assert cells["pairs"] == "12" and cells["acceptance"] == "0.25" and cells["loss"] == "0.5"
    assert cells["reward"] == "1.23 ± 0.10" and cells["minutes to sample + train + judge"] == "1.0 + 2.0 + 3.0"


def test_rounds_that_do_not_help_end_them(rounds, capsys):
    made = rounds(num_rounds=5, patience=2, judges=FunctionRanker(nothing))
    assert [one["round"] for one in made.records] == [0, 1, 2]
    assert made.best_model == made.model and "no round is better" in capsys.readouterr().out


def test_a_ranker_that_only_compares_judges_against_the_start(rounds, sampler):
    made = rounds(num_rounds=1, judges={"judge": PairwiseRanker(*sampler)})
    assert made.record(0)["phases"]["judge"]["judges"] == {}
    assert 0 <= measured(made.record(1), "win_rate").mean <= 1
    assert "| 0     |" in str(made)


def test_rounds_leave_nothing_behind(rounds):
    def held():
        gc.collect()
        tensors = (one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.is_floating_point())
        return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())

    rounds(num_rounds=1)
    after_one = held()
    rounds(num_rounds=3)
    assert held() <= after_one + 1000  # the model has more than 100,000 bytes
