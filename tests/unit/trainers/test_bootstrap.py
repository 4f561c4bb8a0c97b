import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, TrainerCallback

from prefopt_trl import FunctionRanker, GenerationOptions, PROConfig, PROTrainer
from prefopt_trl.generation.sampler import sample_candidates
from prefopt_trl.sampling import collator
from prefopt_trl.trainers.bootstrap import Bootstrap, PartSampler, re_rank
from prefopt_trl.trainers.resuming import SETTINGS_FILE

WORDS = ["blue", "green and yellow and red", "wet", "seven", "a very long completion", "bb", "ccc", "dddd", "e"]


def rankings(num_rows: int) -> Dataset:
    """Rankings of two to four completions, whose own rewards are not those of `checksum`."""
    completions = [[" " + WORDS[(3 * row + place) % 9] for place in range(2 + row % 3)] for row in range(num_rows)]
    rewards = [[100.0 + place for place in range(len(row))] for row in completions]
    prompts = [f"Row {row}:" for row in range(num_rows)]
    return Dataset.from_dict({"prompt": prompts, "completions": completions, "rewards": rewards})


def checksum(prompts, completions, **kwargs):
    """An arbitrary reward, the best one in seven, often with ties."""
    return [sum(completion.encode()) % 7 / 8 for completion in completions]


def config(output_dir: Path | str, **given) -> PROConfig:
    algorithm = {"bootstrap_parts": 3, "num_train_epochs": 2, "per_device_train_batch_size": 2, "max_new_tokens": 6}
    outputs = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    machine = {"bf16": False, "use_cpu": True}
    return PROConfig(str(output_dir), **{**algorithm, "learning_rate": 1e-2, **outputs, **machine, **given})


def make_trainer(model_dir, output_dir, dataset, ranker=checksum, trainer_class=PROTrainer, **given) -> PROTrainer:
    """Make a trainer whose further arguments are its own or its config's."""
    own = {name: given.pop(name) for name in ("eval_dataset", "callbacks") if name in given}
    own["ranker"] = ranker and FunctionRanker(ranker)
    return trainer_class(model_dir, args=config(output_dir, **given), train_dataset=dataset, **own)


def samples(folder: Path) -> dict[str, Any]:
    """What the files hold, but for the ranker's settings, which tell one function of the same rewards from another."""
    contents = {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    for content in contents.values():
        content["settings"].pop("ranker")
    return contents


# Re-ranking


@pytest.mark.parametrize(
    ("rewards", "order", "dealt"),
    [
        ([3.0, 1.0, 5.0], "acb", [5.0, 3.0, 1.0]),  # the sample is best: second place, and the best one's reward grows
        ([1.0, 3.0, 5.0], "bca", [5.0, 3.0, 1.0]),
        ([3.0, 1.0, 2.0], "acb", [3.0, 2.0, 1.0]),  # in the middle
        ([1.0, 3.0, 0.5], "bac", [3.0, 1.0, 0.5]),  # last
        ([1.0, 3.0, 3.0], "bca", [3.0, 3.0, 1.0]),  # ties with the best: behind it
        ([3.0, 3.0, 3.0], "abc", [3.0, 3.0, 3.0]),
        ([2.0, 2.0, 4.0], "acb", [4.0, 2.0, 2.0]),
        ([-1.0, -2.0, -2.0, -3.0, -2.0], "abced", [-1.0, -2.0, -2.0, -2.0, -3.0]),  # ties below the best
    ],
)
def test_the_sample_never_takes_the_first_place(rewards, order, dealt):
    completions = list("abcde"[: len(rewards)])
    assert re_rank(completions, np.array(rewards)) == {"completions": list(order), "rewards": dealt}


# Parts


def make_bootstrap(num_rows: int, num_parts: int, seed: int = 0) -> Bootstrap:
    how = ("unused", seed, GenerationOptions())
    return Bootstrap(rankings(num_rows), num_parts, None, FunctionRanker(checksum), *how)


@pytest.mark.parametrize(
    ("num_rows", "num_parts", "sizes"), [(11, 3, [4, 4, 3]), (10, 4, [3, 3, 2, 2]), (5, 5, [1] * 5), (7, 1, [7])]
)
def test_parts_share_the_rows_out(num_rows, num_parts, sizes):
    parts = make_bootstrap(num_rows, num_parts).parts
    assert [len(rows) for rows in parts] == sizes
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_rows))
    again = make_bootstrap(num_rows, num_parts).parts
    assert [rows.tolist() for rows in parts] == [rows.tolist() for rows in again]


def test_another_seed_splits_otherwise():
    assert make_bootstrap(50, 2, seed=0).parts[0].tolist() != make_bootstrap(50, 2, seed=1).parts[0].tolist()


def test_rows_come_part_after_part_in_an_order_of_the_epoch():
    split = make_bootstrap(40, 3)
    sampler, orders = PartSampler(split), []
    for split.epoch in range(3):
        orders.append(list(sampler))
        assert list(sampler) == orders[-1] and len(sampler) == 40
        start = 0
        for rows in split.parts:
            assert sorted(orders[-1][start : start + len(rows)]) == sorted(rows.tolist())
            start += len(rows)
        assert start == len(orders[-1]) == 40
    for start, end in ((0, 14), (14, 27), (27, 40)):  # 13! orders of a part
        assert len({tuple(order[start:end]) for order in orders}) == 3
    other = make_bootstrap(40, 3)
    other.epoch = 1
    assert list(PartSampler(other)) == orders[1]
    other.seed = 1
    assert list(PartSampler(other)) != orders[1]


# Algorithm 1


class RecordingTrainer(PROTrainer):
    """Writes down, in order, what happens and to which rows."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.events: list[tuple[str, Any]] = []

    def get_train_dataloader(self):
        def fetch(examples):
            self.events.append(("fetch", [example["row"] for example in examples]))
            return examples

        loader = super().get_train_dataloader()
        assert loader.collate_fn is list
        loader.base_dataloader.collate_fn = fetch
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        def recorded():
            for examples in epoch_iterator:
                self.events.append(("batch", [example["row"] for example in examples]))
                yield examples

        return super().get_batch_samples(recorded(), num_batches, device)

    def loss_per_prompt(self, completions):
        if self.model.training:
            self.events.append(("loss", samples(self.bootstrap.folder)))
        return super().loss_per_prompt(completions)


@pytest.fixture(scope="module")
def run(tiny_llama_dir, tmp_path_factory) -> SimpleNamespace:
    """Two epochs of three parts of two steps each, written down, with evaluation in the middle of a part."""
    folder, dataset, weights = tmp_path_factory.mktemp("run"), rankings(12), {}

    def record_samples(model, tokenizer, prompt_ids, num_completions, options, seed):
        sample = SimpleNamespace(prompt_ids=prompt_ids, num_completions=num_completions, options=options, seed=seed)
        sample.weights = {name: value.clone() for name, value in model.state_dict().items()}
        sampled = sample_candidates(model, tokenizer, prompt_ids, num_completions, options, seed=seed)
        sample.texts = [candidates.texts for candidates in sampled]
        trainer.events.append(("sample", sample))
        return sampled

    def record_scores(prompts, completions, **kwargs):
        trainer.events.append(("score", list(zip(prompts, completions, strict=True))))
        return checksum(prompts, completions)

    class Steps(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            weights[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

        def on_optimizer_step(self, args, state, control, **kwargs):
            trainer.events.append(("step", state.global_step))

    every_three_steps = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    given = {"eval_dataset": dataset, "callbacks": [Steps()], "max_new_tokens": 16, **every_three_steps}
    trainer = make_trainer(tiny_llama_dir, folder, dataset, record_scores, RecordingTrainer, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collator, "sample_candidates", record_samples)
        trainer.train()
    return SimpleNamespace(trainer=trainer, events=trainer.events, weights=weights, dataset=dataset, folder=folder)


def of_kind(run: SimpleNamespace, kind: str) -> list[Any]:
    return [value for event, value in run.events if event == kind]


def sampled_texts(run: SimpleNamespace, part: int) -> dict[int, str]:
    """Of the part, counted over epochs: what was sampled for each row."""
    texts = of_kind(run, "sample")[part].texts
    return {int(row): text for row, (text,) in zip(run.trainer.bootstrap.parts[part % 3], texts, strict=True)}


def test_a_part_is_sampled_whole_just_before_its_first_step(run):
    part = ["batch", "sample", "score", "loss", "step", "batch", "loss", "step"]
    assert [event for event, _ in run.events if event != "fetch"] == part * 6
    batches = of_kind(run, "batch")
    for epoch in range(2):
        trained = [row for batch in batches[6 * epoch : 6 * epoch + 6] for row in batch]
        for part, rows in enumerate(run.trainer.bootstrap.parts):
            assert sorted(trained[4 * part : 4 * part + 4]) == sorted(rows.tolist())
    # The dataloader is ahead: it has the next part's first batch before the last step on this part, and no sample yet
    fetched, last_step = map(run.events.index, [("fetch", batches[2]), ("step", 1)])
    _, sampled, *_ = [place for place, (event, _) in enumerate(run.events) if event == "sample"]
    assert fetched < last_step < sampled


def test_samples_come_from_the_policy_of_that_moment(run, policy, tokenizer):
    sampling = of_kind(run, "sample")
    assert len({sample.seed for sample in sampling}) == 6
    differ = 0
    for part, sample in enumerate(sampling):
        prompts = run.dataset[run.trainer.bootstrap.parts[part % 3].tolist()]["prompt"]
        prompt_ids, how = sample.prompt_ids, {"options": sample.options, "seed": sample.seed}
        assert prompt_ids == [tokenizer(prompt)["input_ids"] for prompt in prompts] and sample.num_completions == 1
        assert sample.options == GenerationOptions(max_new_tokens=16)
        before_step = run.weights[2 * part]
        assert all(torch.equal(value, sample.weights[name]) for name, value in before_step.items())
        policy.load_state_dict(before_step)
        again = sample_candidates(policy, tokenizer, prompt_ids, 1, **how)
        assert [candidates.texts for candidates in again] == sample.texts
        if part:
            policy.load_state_dict(run.weights[2 * part - 1])
            earlier = sample_candidates(policy, tokenizer, prompt_ids, 1, **how)
            differ += [candidates.texts for candidates in earlier] != sample.texts
    assert differ >= 3  # of 5: with the weights of one step before they would have been others


def test_every_completion_is_scored_again_beside_the_sample(run):
    for part, scored in enumerate(of_kind(run, "score")):
        rows = [(run.dataset[row], text) for row, text in sampled_texts(run, part).items()]
        assert scored == [(row["prompt"], one) for row, text in rows for one in [*row["completions"], text]]


def by_hand(example: dict[str, Any], sample: str) -> tuple[list[str], list[float]]:
    """The extended ranking, after the paper's footnote 6."""
    completions = [*example["completions"], sample]
    rewards = checksum(prompts=None, completions=completions)
    order = sorted(range(len(completions)), key=lambda place: (-rewards[place], place))
    if order[0] == len(completions) - 1:
        order = [order[1], order[0], *order[2:]]
    return [completions[place] for place in order], sorted(rewards, reverse=True)


def test_samples_are_saved_before_they_are_trained_on(run):
    saved_at = of_kind(run, "loss")
    places = set()
    for step in range(12):
        part, saved = step // 2, saved_at[step]
        assert list(saved) == [f"epoch-{done // 3}-part-{done % 3}.json" for done in range(part + 1)]
        content = list(saved.values())[-1]
        assert content["global_step"] == 2 * part
        expected = []
        for row, text in sampled_texts(run, part).items():
            completions, rewards = by_hand(run.dataset[row], text)
            prompt = run.dataset[row]["prompt"]
            expected.append({"row": row, "prompt": prompt, "completions": completions, "rewards": rewards})
            first_reward, own_reward = checksum(None, [completions[0], text])
            places.add((completions.index(text), np.sign(own_reward - first_reward)))
        assert content["rankings"] == expected
    # There were samples better than the best completion and as good, both behind it, and worse ones further down
    assert {(1, 1.0), (1, 0.0), (2, -1.0)} <= places


def ranking_loss(model, tokenizer, prompt: str, completions: list[str], rewards: list[float]) -> float:
    """PRO eq. 7 and 9-11 in float64, from logits of one row per completion."""
    num_prompt_tokens, sums, means = len(tokenizer(prompt)["input_ids"]), [], []
    for completion in completions:
        ids = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"]
        assert ids[:num_prompt_tokens] == tokenizer(prompt)["input_ids"]
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        of_tokens = [logps[place - 1, ids[place]].item() for place in range(num_prompt_tokens, len(ids))]
        sums.append(sum(of_tokens))
        means.append(sum(of_tokens) / len(of_tokens))
    n, loss = len(completions), 0.0
    for k in range(n - 1):
        inverse_temperatures = {i: rewards[k] - rewards[i] for i in range(k + 1, n)}
        own = max(inverse_temperatures.values())
        others = sum(math.exp(means[i] * inverse) for i, inverse in inverse_temperatures.items())
        loss -= math.log(math.exp(means[k] * own) / (math.exp(means[k] * own) + others))
    return loss - 0.05 * (n - 1) ** 2 * sums[0]


@torch.no_grad()
def test_every_step_minimises_pro_on_the_extended_rankings(run, tiny_llama_dir, tokenizer):
    policy = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float64)
    logged = [log["loss"] for log in run.trainer.state.log_history if "loss" in log]
    for step, rows in enumerate(of_kind(run, "batch")):
        policy.load_state_dict(run.weights[step])
        texts = sampled_texts(run, step // 2)
        rankings = [(run.dataset[row]["prompt"], *by_hand(run.dataset[row], texts[row])) for row in rows]
        losses = [ranking_loss(policy, tokenizer, *ranking) for ranking in rankings]
        assert logged[step] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_evaluation_is_on_the_plain_rankings(run, tmp_path):
    given = {"eval_dataset": run.dataset, "ranker": None, "bootstrap_parts": 0}
    values = make_trainer(str(run.folder / "checkpoint-3"), tmp_path, run.dataset, **given).evaluate()
    expected = {name: values[name] for name in values if "/" in name or name in ("eval_loss", "eval_entropy")}
    assert {"eval_loss/sft", "eval_rewards/accuracies", "eval_ranking/kendall_tau"} < expected.keys()
    (logged,) = [log for log in run.trainer.state.log_history if "eval_loss" in log and log["step"] == 3]
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_conversations_are_sampled_as_conversations(tiny_llama_dir, tmp_path):
    def say(role, text):
        return [{"role": role, "content": text}]

    def message_checksum(prompts, completions, **kwargs):
        return checksum(prompts, [completion[0]["content"] for completion in completions])

    texts = rankings(4)
    prompts = [say("user", text) for text in texts["prompt"]]
    completions = [[say("assistant", text) for text in row] for row in texts["completions"]]
    dataset = Dataset.from_dict({"prompt": prompts, "completions": completions, "rewards": texts["rewards"][:]})
    make_trainer(tiny_llama_dir, tmp_path, dataset, message_checksum, bootstrap_parts=1, max_steps=1).train()
    (content,) = samples(tmp_path / "bootstrap").values()
    for ranking in content["rankings"]:
        (sample,) = [one for one in ranking["completions"] if one not in dataset[ranking["row"]]["completions"]]
        assert [message["role"] for message in sample] == ["assistant"]


# Resuming

RUNS = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "dropout": {"disable_dropout": False, "model_init_kwargs": {"attention_dropout": 0.3, "dtype": "float32"}},
}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def train(model_dir, output_dir, resume=None, stop_at=0, ranker=checksum, **given) -> PROTrainer:
    """Ten rows, so parts of 4, 3 and 3: the third begins inside a step, in its batch or the second of two."""
    trainer = make_trainer(model_dir, output_dir, rankings(10), ranker, callbacks=[StopAt(stop_at)], **given)
    trainer.train(resume_from_checkpoint=str(output_dir / f"checkpoint-{resume}") if resume else None)
    return trainer


def logs_after(trainer: PROTrainer, step: int) -> list[dict[str, Any]]:
    logs = [log for log in trainer.state.log_history if "loss" in log and log["step"] > step]
    return [{name: value for name, value in log.items() if name != "num_tokens"} for log in logs]


def assert_same_end(trainer: PROTrainer, uninterrupted: PROTrainer, resumed_at: int = 0) -> None:
    assert logs_after(trainer, resumed_at) == logs_after(uninterrupted, resumed_at)
    assert len(logs_after(trainer, resumed_at)) == 10 - resumed_at
    expected = uninterrupted.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())


def poison(folder: Path, from_step: int) -> int:
    """Give another sample and other rewards to the rankings sampled at this step or later."""
    files = [file for file in folder.glob("*.json") if json.loads(file.read_text())["global_step"] >= from_step]
    for file in files:
        content = json.loads(file.read_text())
        for ranking in content["rankings"]:
            ranking["completions"][-1] = " poison"
            ranking["rewards"] = [9.0 * reward for reward in ranking["rewards"]]
        file.write_text(json.dumps(content))
    return len(files)


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama_dir, tmp_path_factory):
    """The run of each name, with a checkpoint after every step, and its folder."""
    runs: dict[str, tuple[PROTrainer, Path]] = {}

    def get(name: str) -> tuple[PROTrainer, Path]:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            runs[name] = train(tiny_llama_dir, folder, save_strategy="steps", save_steps=1, **RUNS[name]), folder
        return runs[name]

    return get


def copy_of(folder: Path, checkpoint: int, to: Path) -> Path:
    """The folder of a run with one of its checkpoints, and all its samples."""
    for name in (f"checkpoint-{checkpoint}", "bootstrap"):
        shutil.copytree(folder / name, to / name)
    return to


@pytest.fixture
def interrupted(uninterrupted, tmp_path) -> Path:
    """The folder of the plain run, stopped in the middle of the second part."""
    return copy_of(uninterrupted("plain")[1], 3, tmp_path / "resumed")


@pytest.mark.parametrize("name", list(RUNS))
@pytest.mark.parametrize(
    ("checkpoint", "later_parts"),
    [
        (2, 5),  # before the first step of the second part
        (3, 4),  # in the middle of the second part
        (4, 3),  # in the middle of the third part, whose first row was trained on in a step with the second's
        (5, 3),  # between two epochs
        (8, 1),  # in the middle of a part of the second epoch
    ],
)
def test_a_resumed_run_is_the_whole_one(name, checkpoint, later_parts, uninterrupted, tiny_llama_dir, tmp_path):
    whole, folder = uninterrupted(name)
    output_dir = copy_of(folder, checkpoint, tmp_path / "resumed")
    assert poison(output_dir / "bootstrap", from_step=checkpoint) == later_parts
    scored = []

    def counting(prompts, completions, **kwargs):
        scored.append(set(prompts))
        return checksum(prompts, completions)

    resumed = train(tiny_llama_dir, output_dir, resume=checkpoint, ranker=counting, **RUNS[name])
    assert_same_end(resumed, whole, resumed_at=checkpoint)
    prompts, parts = whole.train_dataset["prompt"], whole.bootstrap.parts * 2
    assert scored == [{prompts[row] for row in rows} for rows in parts[6 - later_parts :]]
    assert samples(output_dir / "bootstrap") == samples(folder / "bootstrap")


def test_the_runs_resumed_are_three_different_ones(uninterrupted):
    first_steps = [logs_after(uninterrupted(name)[0], 0)[0] for name in RUNS]
    assert uninterrupted("dropout")[0].model.config.attention_dropout == 0.3
    assert first_steps[0]["loss"] == pytest.approx(first_steps[1]["loss"], rel=1e-5)  # the same rows, accumulated
    assert first_steps[0]["loss"] != pytest.approx(first_steps[2]["loss"], rel=1e-5)


def test_a_resumed_run_trains_on_the_samples_from_before(interrupted, uninterrupted, tiny_llama_dir):
    whole, _ = uninterrupted("plain")
    poison(interrupted / "bootstrap", from_step=0)
    resumed = train(tiny_llama_dir, interrupted, resume=3, stop_at=4)
    assert logs_after(resumed, 3)[0]["loss"] != pytest.approx(logs_after(whole, 3)[0]["loss"], rel=1e-3)


def test_a_new_run_in_the_same_folder_samples_anew(uninterrupted, tiny_llama_dir, tmp_path):
    whole, folder = uninterrupted("plain")
    shutil.copytree(folder / "bootstrap", tmp_path / "bootstrap")
    assert poison(tmp_path / "bootstrap", from_step=0) == 6
    assert_same_end(train(tiny_llama_dir, tmp_path), whole)
    assert samples(tmp_path / "bootstrap") == samples(folder / "bootstrap")


def test_samples_of_an_earlier_run_in_larger_steps_are_not_taken(uninterrupted, tiny_llama_dir, tmp_path):
    whole, folder = uninterrupted("plain")
    train(tiny_llama_dir, tmp_path, per_device_train_batch_size=5, learning_rate=1e-3)
    assert samples(tmp_path / "bootstrap")["epoch-0-part-2.json"]["global_step"] == 1
    train(tiny_llama_dir, tmp_path, stop_at=2, save_strategy="steps", save_steps=2)  # has not come to that part yet
    assert_same_end(train(tiny_llama_dir, tmp_path, resume=2), whole, resumed_at=2)
    assert samples(tmp_path / "bootstrap") == samples(folder / "bootstrap")


@pytest.mark.parametrize(("name", "value"), [("bootstrap_parts", 2), ("seed", 7), ("max_new_tokens", 5)])
def test_samples_of_another_split_are_refused(name, value, interrupted, tiny_llama_dir):
    (interrupted / "checkpoint-3" / SETTINGS_FILE).unlink()  # which would refuse it first
    remedy = f"epoch-0-part-0.json was sampled with another `{name}`. Resume with the settings of the run"
    with pytest.raises(ValueError, match=remedy):
        train(tiny_llama_dir, interrupted, resume=3, **{name: value})


@pytest.mark.parametrize("missing", [1, 0])
def test_a_part_begun_before_the_checkpoint_is_not_sampled_again(missing, interrupted, tiny_llama_dir):
    (interrupted / "bootstrap" / f"epoch-0-part-{missing}.json").unlink()
    message = f"after the beginning of part {missing}, whose samples are not in .* `output_dir`"
    with pytest.raises(ValueError, match=message):
        train(tiny_llama_dir, interrupted, resume=3)


def test_another_ranker_is_said(interrupted, tiny_llama_dir, caplog):
    def other(prompts, completions, **kwargs):
        return [-float(len(completion)) for completion in completions]

    train(tiny_llama_dir, interrupted, resume=3, stop_at=4, ranker=other)
    assert "epoch-0-part-1.json was scored by a ranker with other settings. Its rewards are kept." in caplog.text


def test_samples_of_other_prompts_are_refused(interrupted, tiny_llama_dir):
    file = interrupted / "bootstrap" / "epoch-0-part-0.json"
    content = json.loads(file.read_text())
    content["rankings"][0]["prompt"] += " indeed"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="part-0.json was sampled for other prompts. Resume with the dataset of"):
        train(tiny_llama_dir, interrupted, resume=3)


def test_samples_of_an_earlier_run_are_moved_aside(uninterrupted, tiny_llama_dir, tmp_path, caplog):
    _, folder = uninterrupted("plain")
    for number in (1, 2):
        shutil.rmtree(tmp_path / "bootstrap", ignore_errors=True)
        shutil.copytree(folder / "bootstrap", tmp_path / "bootstrap")
        train(tiny_llama_dir, tmp_path, stop_at=1)
        assert f"samples of an earlier run were moved to {tmp_path / f'bootstrap-{number}'}" in caplog.text
        assert samples(tmp_path / f"bootstrap-{number}") == samples(folder / "bootstrap")


def test_tokens_and_operations_are_counted(tiny_llama_dir, tmp_path):
    trainer = train(tiny_llama_dir, tmp_path, stop_at=1, include_num_input_tokens_seen="all")
    assert trainer.state.num_input_tokens_seen > 0 and trainer.state.total_flos > 0


def test_the_seed_of_the_data_is_that_of_the_parts(tiny_llama_dir, tmp_path):
    def parts(**given):
        trainer = make_trainer(tiny_llama_dir, tmp_path, rankings(10), **given)
        return [rows.tolist() for rows in trainer.bootstrap.parts]

    assert parts(data_seed=7) == parts(seed=7) != parts()


# Bad input


def test_the_ranker_is_used(tiny_llama_dir, tmp_path, caplog):
    make_trainer(tiny_llama_dir, tmp_path, rankings(3))
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("prefopt_trl")]
    assert message.startswith("The ranker scores all completions of a prompt for `bootstrap_parts`, and the column")


STREAM = IterableDataset.from_generator(lambda: iter(rankings(3)))
UNEVEN = {"accelerator_config": {"even_batches": False}}


@pytest.mark.parametrize(
    ("dataset", "given", "message"),
    [
        (rankings(3), UNEVEN, "`even_batches=False` gives processes batches of different lengths"),
        (rankings(3), {"ranker": None}, "`ranker` is missing, and `bootstrap_parts` needs one"),
        (STREAM, {"max_steps": 1}, "an `IterableDataset` cannot be split. Pass a `Dataset`"),
        (rankings(2), {}, "`bootstrap_parts`=3 is more than the training dataset's 2 rows. Lower it."),
    ],
)
def test_what_cannot_be_bootstrapped_is_refused(dataset, given, message, tiny_llama_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_llama_dir, tmp_path, dataset, **given)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train_sampling_strategy", "sequential", "='sequential' has no effect with `bootstrap_parts`"),
        ("bootstrap_parts", -1, " must be a whole number, at least 0, got -1. 0 turns it off."),
    ],
)
def test_a_setting_that_has_no_sense_is_refused(name, value, message, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}`{message}"):
        config(tmp_path, **{name: value})


# Two processes


def train_in_one_of_two_processes(model_dir: str, output_dir: str) -> None:
    trainer = make_trainer(model_dir, output_dir, rankings(11), trainer_class=RecordingTrainer)
    seen = []

    class Seen(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            seen.append(copy.deepcopy(trainer.bootstrap.rankings))

    trainer.add_callback(Seen())
    trainer.train()
    record = {
        "world_size": torch.distributed.get_world_size(),
        "wrapper": type(trainer.model_wrapped).__name__,
        "batches": [rows for event, rows in trainer.events if event == "batch"],
        "seen": seen,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "weights": [value.double().sum().item() for value in trainer.model.state_dict().values()],
    }
    Path(output_dir, f"rank-{trainer.accelerator.process_index}.json").write_text(json.dumps(record))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_the_sampling_and_train_as_one_does(tiny_llama_dir, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, tiny_llama_dir]
    subprocess.run([sys.executable, *command, str(tmp_path)], check=True, timeout=120)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    for record in (first, second):
        assert (record["world_size"], record["wrapper"]) == (2, "DistributedDataParallel")
    assert first["seen"] == second["seen"] and first["weights"] == second["weights"]

    dataset, parts = rankings(11), make_bootstrap(11, 3, seed=42).parts
    by_row = []
    for epoch in range(2):
        by_row.append({})
        for part, rows in enumerate(parts):
            content = json.loads((tmp_path / "bootstrap" / f"epoch-{epoch}-part-{part}.json").read_text())
            assert sorted(ranking["row"] for ranking in content["rankings"]) == sorted(rows.tolist())
            by_row[-1] |= {ranking["row"]: ranking for ranking in content["rankings"]}
        for row, ranking in by_row[-1].items():
            assert len(ranking["completions"]) == len(dataset[row]["completions"]) + 1
            assert set(dataset[row]["completions"]) < set(ranking["completions"])

    trained = [[*one, *other] for one, other in zip(first["batches"], second["batches"], strict=True)]
    assert len(trained) == 6
    for epoch in range(2):
        rows = [row for batch in trained[3 * epoch : 3 * epoch + 3] for row in batch]
        assert sorted(set(rows)) == list(range(11)) and rows[11:] == rows[:1]  # the sampler fills the last batch up

    extended = [by_row[step // 3][row] for step, batch in enumerate(trained) for row in batch]
    given = {"bootstrap_parts": 0, "num_train_epochs": 1, "per_device_train_batch_size": 4, "ranker": None}
    in_order = Dataset.from_list([{"prompt": dataset[row["row"]]["prompt"], **row} for row in extended])
    given["train_sampling_strategy"] = "sequential"
    alone = make_trainer(tiny_llama_dir, tmp_path / "alone", in_order, **given)
    alone.train()
    assert first["losses"] == pytest.approx([log["loss"] for log in logs_after(alone, 0)], rel=1e-4)


if __name__ == "__main__":
    train_in_one_of_two_processes(*sys.argv[1:])
