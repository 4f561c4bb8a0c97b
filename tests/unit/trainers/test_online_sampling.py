"""Pairs and rankings sampled batch by batch while training (`sampling="online"`)."""

import contextlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prefopt_trl import DataCollatorForRejectionSampling, FunctionRanker
from prefopt_trl.trainers.listwise_dpo_trainer import ListwiseDPOTrainer
from prefopt_trl.trainers.pro_trainer import PROTrainer
from prefopt_trl.trainers.rrhf_trainer import RRHFTrainer
from prefopt_trl.trainers.rso_config import RSOConfig
from prefopt_trl.trainers.rso_trainer import RSOTrainer
from prefopt_trl.trainers.slic_trainer import SLiCTrainer

PROMPTS = Dataset.from_dict({"prompt": ["The capital of", "Tell me how", "The quick brown", "What is", "Mix", "Why?"]})
PAIRS = Dataset.from_dict({"prompt": ["Why?"], "chosen": [" So."], "rejected": [" I will not say."]})
SELECTION = {"num_candidates": 6, "num_samples": 4, "max_new_tokens": 5}
SAMPLING = {**SELECTION, "sampling": "online", "generation_batch_size": 12, "per_device_train_batch_size": 2}
TRAINERS = [RSOTrainer, ListwiseDPOTrainer]
LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4}


def checksum(prompts, completions, **kwargs):
    """An arbitrary reward of a text."""
    return [sum(completion.encode()) % 11 / 4 for completion in completions]


class Batches(TrainerCallback):
    """Writes down what the collator was given, in which epoch, what it made of that, and the policy's weights."""

    def __init__(self):
        self.batches, self.weights = [], []

    def watch(self, trainer):
        collator, collate = trainer.data_collator, trainer.data_collator.torch_call

        def record(examples):
            was_training = collator.policy.training
            batch = collate(examples)
            assert collator.policy.training == was_training
            if "prompt_ids" not in examples[0]:
                self.batches.append((collator.epoch, [example["prompt"] for example in examples], batch))
                self.weights.append({name: value.clone() for name, value in collator.policy.state_dict().items()})
            return batch

        collator.torch_call = record
        return trainer


def train(make, trainer_class, resume=None, **given):
    watcher = Batches()
    settings = {**SAMPLING, "max_steps": -1, "num_train_epochs": 1, "learning_rate": 1e-2, **given}
    trainer = watcher.watch(make(trainer_class, PROMPTS, ranker=FunctionRanker(checksum), **settings))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watcher.batches


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def collator_by_hand(trainer_class, model_dir, strategy="rso", **given):
    pairing = "tournament" if trainer_class is SLiCTrainer else "first-round"
    return DataCollatorForRejectionSampling(
        AutoModelForCausalLM.from_pretrained(model_dir),
        AutoTokenizer.from_pretrained(model_dir),
        FunctionRanker(checksum),
        strategy=strategy,
        rejection_beta=0.5,
        pairing="ranking" if trainer_class.learns_from == "rankings" else pairing,
        seed=42,
        generation_batch_size=12,
        max_length=1024,
        **SELECTION,
        **given,
    )


def numbered(prompts):
    """Examples as the trainer gives them: with the row of the dataset that each prompt is of."""
    return [{"prompt": prompt, "row": PROMPTS["prompt"].index(prompt)} for prompt in prompts]


def same(batch, other):
    return batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in batch)


@pytest.mark.parametrize("sampling_policy", ["current", "reference"])
@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_an_epoch_trains_on_the_batches_of_the_collator(trainer_class, sampling_policy, make, policy_dir):
    watcher = Batches()
    settings = {**SAMPLING, "max_steps": -1, "num_train_epochs": 2, "learning_rate": 1e-2}
    settings["sampling_policy"] = sampling_policy
    trainer = watcher.watch(make(trainer_class, PROMPTS, ranker=FunctionRanker(checksum), **settings))
    trainer.train()
    assert len(losses(trainer)) == 6 and trainer.state.epoch == 2
    assert [epoch for epoch, _, _ in watcher.batches] == [0, 0, 0, 1, 1, 1]
    for epoch in range(2):
        prompts = [
            prompt for number, batch_prompts, _ in watcher.batches if number == epoch for prompt in batch_prompts
        ]
        assert sorted(prompts) == sorted(PROMPTS["prompt"])
    by_hand, unmoved = (collator_by_hand(trainer_class, policy_dir) for _ in range(2))
    moved = []
    for (epoch, prompts, batch), weights in zip(watcher.batches, watcher.weights, strict=True):
        assert len(batch["input_ids"]) == 2 * 4  # of each prompt two pairs, or a ranking of four
        by_hand.policy.load_state_dict(weights)
        by_hand.epoch = unmoved.epoch = epoch
        assert same(batch, by_hand(numbered(prompts)))
        moved.append(not same(batch, unmoved(numbered(prompts))))
    # In the first step policy and reference are one; afterwards the draws are others where the weights are
    assert moved == [False, *[sampling_policy == "current"] * 5]
    expected = {RSOTrainer: 0.693147, ListwiseDPOTrainer: 3.178054}[trainer_class]  # ln 2, ln 4!
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert losses(trainer)[-1] != pytest.approx(expected, rel=1e-3)


def test_at_a_low_temperature_the_policy_of_that_step_is_decoded_greedily(make, policy_dir):
    watcher = Batches()
    settings = {**SAMPLING, "max_steps": 3, "learning_rate": 1e-2, "temperature": 1e-5}
    watcher.watch(make(SLiCTrainer, PROMPTS, ranker=FunctionRanker(checksum), **settings)).train()
    model = AutoModelForCausalLM.from_pretrained(policy_dir)
    tokenizer, written = AutoTokenizer.from_pretrained(policy_dir), set()
    for (_, prompts, batch), weights in zip(watcher.batches, watcher.weights, strict=True):
        model.load_state_dict(weights)
        rows = [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]
        for place, prompt in enumerate(prompts):
            greedy = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=5)
            text = tokenizer.decode(greedy[0], skip_special_tokens=True)
            assert rows[3 * place : 3 * place + 3] == [text] * 3  # chosen of a knock-out of four equal candidates
            written.add(text.removeprefix(prompt))
    assert len(written) > 1


@pytest.mark.parametrize("trainer_class", [SLiCTrainer, PROTrainer, RRHFTrainer])
def test_a_method_without_a_reference_model_samples_from_its_policy(trainer_class, make, policy_dir):
    trainer, batches = train(make, trainer_class, num_train_epochs=2)
    assert trainer.ref_model is None and trainer.data_collator.policy is trainer.model
    by_hand = collator_by_hand(trainer_class, policy_dir, strategy="sft")
    for step, (by_hand.epoch, prompts, batch) in enumerate(batches):
        # Pairs of a knock-out of four, or a ranking of four
        assert len(batch["input_ids"]) == 2 * (2 * 3 if trainer_class is SLiCTrainer else 4)
        assert same(batch, by_hand(numbered(prompts))) == (step == 0)
    assert all(math.isfinite(loss) for loss in losses(trainer))


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_the_loss_is_that_of_the_pairs_as_a_dataset(trainer_class, make):
    """A step on what was sampled online is one on the same tokens given beforehand."""
    online, batches = train(make, trainer_class, max_steps=1)
    ((_, _, batch),) = batches[:1]
    offline = make(trainer_class, PAIRS)
    expected = offline.compute_loss(offline.model, batch)
    assert losses(online)[0] == pytest.approx(expected.item(), rel=1e-6)
    assert isinstance(offline.data_collator, DataCollatorForPreference) == (trainer_class is RSOTrainer)


def adapted_model(policy_dir):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(policy_dir)
    model = get_peft_model(base, LoraConfig(**LORA, init_lora_weights=False))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.normal_(0, 0.5)
    return model


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_a_new_adapter_is_off_while_sampling(trainer_class, make, policy_dir):
    given = {"peft_config": LoraConfig(**LORA), "sampling_policy": "reference"}
    trainer, _ = train(make, trainer_class, max_steps=1, **given)
    # Were it on, the samples would be others: it is made to change the policy visibly
    for name, parameter in trainer.model.named_parameters():
        if "lora" in name:
            parameter.data.normal_(0, 0.5)
    trainer.data_collator.epoch = 0
    examples = [{"prompt": prompt} for prompt in PROMPTS["prompt"][:2]]
    batch = trainer.data_collator(examples)
    by_hand = collator_by_hand(trainer_class, policy_dir)
    assert same(batch, by_hand(examples))
    trainer.data_collator.while_sampling = contextlib.nullcontext
    assert not same(trainer.data_collator(examples), batch)
    assert trainer.model.active_adapter == "default" and trainer.model.training


def test_a_pretrained_adapter_is_sampled_as_it_was_before_training(make, policy_dir):
    given = {"model": adapted_model(policy_dir), "sampling_policy": "reference"}
    trainer, batches = train(make, RSOTrainer, num_train_epochs=2, **given)
    by_hand = collator_by_hand(RSOTrainer, policy_dir)
    by_hand.policy = adapted_model(policy_dir)
    for by_hand.epoch, prompts, batch in batches:
        assert same(batch, by_hand(numbered(prompts)))
    base = collator_by_hand(RSOTrainer, policy_dir)
    assert not same(batches[0][2], base(numbered(batches[0][1])))
    assert isinstance(trainer.model, PeftModel) and losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)


def test_an_adapter_is_on_where_the_current_policy_is_sampled(make, policy_dir):
    trainer, batches = train(make, RSOTrainer, model=adapted_model(policy_dir), num_train_epochs=2)
    by_hand = collator_by_hand(RSOTrainer, policy_dir)
    by_hand.policy = adapted_model(policy_dir)
    by_hand.epoch, prompts, batch = batches[0]
    assert same(batch, by_hand(numbered(prompts)))
    by_hand.epoch, prompts, batch = batches[-1]
    assert not same(batch, by_hand(numbered(prompts)))
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)  # its reference is the copy of the adapter


def test_dropout_is_off_while_sampling(make, policy_dir):
    adapter = LoraConfig(**LORA, lora_dropout=0.9, init_lora_weights=False)
    trainer = make(RSOTrainer, PROMPTS, ranker=FunctionRanker(checksum), peft_config=adapter, **SAMPLING)
    trainer.model.train()
    examples = numbered(PROMPTS["prompt"][:2])
    first, second = trainer.data_collator(examples), trainer.data_collator(examples)
    assert same(first, second) and trainer.model.training
    assert not any(parameter.grad is not None for parameter in trainer.model.parameters())


@pytest.mark.parametrize(
    ("how", "checkpoint"),
    [("plain", 2), ("plain", 3), ("accumulated", 2), ("accumulated", 3), ("LoRA", 4), ("reference", 4)],
)
def test_a_resumed_run_draws_what_the_uninterrupted_one_drew(how, checkpoint, make, tmp_path):
    given = {
        "plain": {},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        "LoRA": {"peft_config": LoraConfig(**LORA)},
        "reference": {"sampling_policy": "reference"},
    }[how]
    saving = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    whole, batches = train(make, RSOTrainer, output_dir=tmp_path / "whole", **saving, **given)
    assert len(losses(whole)) == 6 and len(set(losses(whole))) > 3
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{checkpoint}", tmp_path / "resumed" / f"checkpoint-{checkpoint}")
    resumed, resumed_batches = train(
        make,
        RSOTrainer,
        resume=str(tmp_path / "resumed" / f"checkpoint-{checkpoint}"),
        output_dir=tmp_path / "resumed",
        **saving,
        **given,
    )
    assert losses(resumed)[checkpoint:] == pytest.approx(losses(whole)[checkpoint:], abs=1e-6)
    per_step = given.get("gradient_accumulation_steps", 1)
    drawn = batches[checkpoint * per_step :]
    for (epoch, prompts, batch), (other_epoch, other_prompts, other) in zip(
        drawn, resumed_batches[-len(drawn) :], strict=True
    ):
        assert (epoch, prompts) == (other_epoch, other_prompts) and same(batch, other)


def test_a_run_with_another_ranker_does_not_resume(make, tmp_path):
    given = {"output_dir": tmp_path, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    train(make, RSOTrainer, **given)
    trainer = make(RSOTrainer, PROMPTS, ranker=FunctionRanker(lambda prompts, completions: [0.0]), **SAMPLING, **given)
    with pytest.raises(ValueError, match="`ranker.function` was .*checksum"):
        trainer.train(resume_from_checkpoint=True)


def test_each_epoch_and_seed_draws_anew(make):
    first, batches = train(make, RSOTrainer, num_train_epochs=2, per_device_train_batch_size=6)
    assert len(batches) == 2 and not same(batches[0][2], batches[1][2])
    _, others = train(make, RSOTrainer, seed=1, per_device_train_batch_size=6)
    assert not same(batches[0][2], others[0][2])
    _, again = train(make, RSOTrainer, per_device_train_batch_size=6)
    assert same(batches[0][2], again[0][2]) and first.data_collator.epoch == 1


def test_evaluation_prompts_are_sampled_before(make, tmp_path):
    trainer, batches = train(make, RSOTrainer, eval_dataset=PROMPTS.select([0, 1]), eval_strategy="epoch")
    assert [path.name for path in (tmp_path / "sampled").iterdir()] == ["eval"]
    assert trainer.eval_dataset.num_rows == 4 and "chosen_ids" in trainer.eval_dataset.column_names
    assert len(batches) == 3  # of training
    assert any("eval_loss" in log for log in trainer.state.log_history)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_the_data_of_training_are_prompts_as_they_came(make, tmp_path):
    trainer, _ = train(make, RSOTrainer, max_steps=1)
    assert list(trainer.train_dataset) == numbered(PROMPTS["prompt"])
    assert not (tmp_path / "sampled").exists()


def test_conversations_are_sampled_as_conversations(make):
    conversations = [[{"role": "user", "content": text}] for text in ("Why?", "How?")]
    prompts = Dataset.from_dict({"prompt": conversations, "chat_template_kwargs": [{"style": "terse"}] * 2})

    def ranker(prompts, completions, **kwargs):
        return checksum(prompts, [completion[0]["content"] for completion in completions])

    trainer = make(RSOTrainer, prompts, ranker=FunctionRanker(ranker), **SAMPLING)
    prefer, seen = trainer.data_collator._prefer, []
    trainer.data_collator._prefer = lambda examples, *rest: seen.extend(examples) or prefer(examples, *rest)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)
    assert seen and all(example["chat_template_kwargs"] == {"style": "terse"} for example in seen)


# What cannot be


@pytest.mark.parametrize("trainer_class", TRAINERS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataloader_num_workers": 1}, "generates inside the training process.* Set `dataloader_num_workers=0`."),
        ({"ranker": None}, "has prompts but no .* Pass a `ranker`"),
        ({"max_length": 4}, r"The prompt of row \d has \d+ tokens and fills `max_length`=4 .* Raise `max_length`"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(given, message, trainer_class, make):
    with pytest.raises(ValueError, match=message):
        make(trainer_class, PROMPTS, **{"ranker": FunctionRanker(checksum), **SAMPLING, **given})


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (PAIRS, "`sampling='online'` needs a training dataset of prompts, and this one has completions. Remove them"),
        (
            Dataset.from_dict({"prompt": ["Why?"], "completions": [[" So.", " No"]]}),
            "`sampling='online'` needs a training dataset of prompts, and this one has completions. Remove them",
        ),
        (PROMPTS.to_iterable_dataset(), "is an `IterableDataset` of prompts, .* Pass a `Dataset`"),
    ],
)
@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_data_that_do_not_go_with_it_are_refused(dataset, message, trainer_class, make):
    with pytest.raises(ValueError, match=message):
        make(trainer_class, dataset, ranker=FunctionRanker(checksum), **SAMPLING)


def test_a_collator_of_ones_own_is_refused(config, policy_dir):
    with pytest.raises(ValueError, match="`sampling='online'` collates batches itself. Leave `data_collator` out."):
        RSOTrainer(
            policy_dir,
            args=config(RSOTrainer.config_class, **SAMPLING),
            data_collator=DataCollatorForPreference(pad_token_id=0),
            train_dataset=PROMPTS,
            ranker=FunctionRanker(checksum),
        )


def test_rows_of_one_prompt_are_sampled_anew(make):
    repeated = Dataset.from_dict({"prompt": ["The capital of"] * 4})
    settings = {**SAMPLING, "per_device_train_batch_size": 1}
    trainer = make(RSOTrainer, repeated, ranker=FunctionRanker(checksum), **settings)
    batches = [trainer.data_collator([example]) for example in trainer.train_dataset]
    assert not any(same(batch, other) for number, batch in enumerate(batches) for other in batches[:number])


def test_a_split_for_evaluation_may_be_called_train(make):
    trainer = make(RSOTrainer, PROMPTS, eval_dataset={"train": PAIRS}, ranker=FunctionRanker(checksum), **SAMPLING)
    assert "chosen_ids" in trainer.eval_dataset["train"].column_names
    assert "eval_train_loss" in trainer.evaluate()


@pytest.mark.parametrize("trainer_class", TRAINERS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sync_ref_model": True, "sampling_policy": "reference"}, "`sync_ref_model` moves the reference model"),
        ({"accelerator_config": {"dispatch_batches": True}}, "`dispatch_batches=True` deals out the rows of a batch"),
    ],
)
def test_what_would_tear_it_apart_is_refused(given, message, trainer_class, make):
    with pytest.raises(ValueError, match=message):
        make(trainer_class, PROMPTS, ranker=FunctionRanker(checksum), **{**SAMPLING, **given})


# Two processes


def train_in_one_of_two_processes(model_dir, output_dir):
    """What torchrun runs: samples of a single token, so that many prompts have few distinct candidates."""
    args = RSOConfig(
        output_dir,
        sampling="online",
        pairing="all",
        num_candidates=6,
        num_samples=6,
        max_new_tokens=1,
        temperature=0.3,
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
    )
    prompts = Dataset.from_dict({"prompt": [f"Row {row}" for row in range(8)]})
    watcher = Batches()
    trainer = watcher.watch(RSOTrainer(model_dir, args=args, train_dataset=prompts, ranker=FunctionRanker(checksum)))
    trainer.train()
    record = {
        "world_size": torch.distributed.get_world_size(),
        "wrapper": type(trainer.model_wrapped).__name__,
        "rows": [len(batch["input_ids"]) for _, _, batch in watcher.batches],
        "prompts": [prompt for _, prompts, _ in watcher.batches for prompt in prompts],
        "num_short": trainer.data_collator.num_short,
        "losses": losses(trainer),
    }
    Path(output_dir, f"rank-{trainer.accelerator.process_index}.json").write_text(json.dumps(record))


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_sample_their_own_prompts_and_make_as_many_pairs(policy_dir, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, policy_dir]
    subprocess.run([sys.executable, *command, str(tmp_path)], check=True, timeout=120)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    for record in (first, second):
        assert (record["world_size"], record["wrapper"]) == (2, "DistributedDataParallel")
        assert set(record["rows"]) == {2 * 2 * 15}
    assert set(first["prompts"]) | set(second["prompts"]) == {f"Row {row}" for row in range(8)}
    assert not set(first["prompts"]) & set(second["prompts"])
    assert first["num_short"] and second["num_short"]  # so that they have had to repeat pairs
    assert first["losses"] == second["losses"] and first["losses"][0] == pytest.approx(0.693147, abs=1e-5)


if __name__ == "__main__":
    train_in_one_of_two_processes(*sys.argv[1:])


@pytest.mark.parametrize("has_column", [True, False])
def test_a_ranker_reads_the_columns_of_its_rows(has_column, tiny_llama_dir, tmp_path):
    seen = []

    def reward(prompts, completions, solution):
        seen.extend(zip(prompts, solution, strict=True))
        return [float(len(text)) for text in completions]

    prompts = ["Why?", "Mix", "Bread:"]
    rows = {"prompt": prompts, **({"solution": [prompt.lower() for prompt in prompts]} if has_column else {})}
    on_cpu = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_steps": 2}
    args = RSOConfig(str(tmp_path), **SAMPLING, **on_cpu)

    def make():
        given = {"train_dataset": Dataset.from_dict(rows), "ranker": FunctionRanker(reward)}
        return RSOTrainer(tiny_llama_dir, args=args, **given)

    if not has_column:
        with pytest.raises(ValueError, match="needs the column `solution`"):
            make()
        return
    make().train()
    assert len(seen) > 6 and all(solution == prompt.lower() for prompt, solution in seen)
