"""What a run starts from must belong together."""

import json
import shutil
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOTrainer

from prefopt_trl import ListwiseDPOTrainer, PROConfig, PROTrainer, RRHFTrainer, RSOConfig, RSOTrainer, SLiCTrainer
from prefopt_trl.trainers.policy import check_adapter
from prefopt_trl.trainers.resuming import (
    GLOBAL_BATCH,
    MAY_CHANGE,
    SETTINGS_FILE,
    check_length,
    check_settings,
    data_fingerprint,
    save_settings,
    training_settings,
)

PAIRS = Dataset.from_dict(
    {
        "prompt": ["The capital of France is", "Why?", "Mix", "The quick brown", "Tell me", "A", "The dog", "Bread"],
        "chosen": [" Paris", " Because.", " the flour", " fox", " how", " dog", " sleeps", " and salt"],
        "rejected": [" bread.", " No.", " it", " dog and dog", " nothing at all", " b", " waits", "!"],
    }
)


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "prefopt_trl.trainers.resuming"]


# Settings in, error out


class Model(torch.nn.Module):
    """Stands for a model without an adapter."""


def settings_of(method, args, dataset=PAIRS):
    return training_settings(method, args, Model(), dataset, {"name": "brevity"})


def test_the_settings_are_those_that_decide_what_is_trained(config):
    settings = settings_of("RSO", config(RSOConfig, loss_type="hinge-norm", gamma=0.1, max_length=64))
    assert settings["method"] == "RSO" and settings["peft_config.peft_type"] is None
    assert settings["loss_type"] == ["hinge"] and settings["gamma"] == 0.1 and settings["max_length"] == 64
    assert settings["optim"] == "adamw_torch_fused" and settings["lr_scheduler_type"] == "linear"
    assert {"seed", "learning_rate", "sampling", "sync_ref_model", "dataloader_drop_last"} <= settings.keys()
    assert not {"output_dir", "logging_steps", "save_steps", "eval_steps", "hub_token", "report_to"} & settings.keys()
    assert not {"bf16", "share_prefix", "log_completions", "dataset_num_proc"} & settings.keys()
    assert json.loads(json.dumps(settings)) == settings
    assert {"bootstrap_parts", "sft_weight"} <= settings_of("PRO", config(PROConfig)).keys()


def test_a_setting_that_upstream_adds_must_stay_the_same(config, monkeypatch):
    args = config(RSOConfig)
    later = {**args.to_dict(), "of_a_later_version": 1, "logging_of_a_later_version": 2}
    monkeypatch.setattr(args, "to_dict", lambda: later)
    settings = settings_of("RSO", args)
    assert settings["of_a_later_version"] == 1 and "logging_of_a_later_version" not in settings


def test_every_pattern_names_a_setting():
    """So that one which upstream has renamed is noticed."""
    names = {field.name for config_class in (RSOConfig, PROConfig) for field in fields(config_class)}
    names |= {f"peft_config.{field.name}" for field in fields(LoraConfig)}
    unused = {pattern for pattern in MAY_CHANGE.split() if not any(fnmatch(name, pattern) for name in names)}
    assert unused <= {"activation_*"}  # of transformers 5.18


@pytest.mark.parametrize(("per_device", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_the_batch_size_is_that_of_a_step_of_the_optimiser(per_device, accumulation, config):
    args = config(RSOConfig, per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation)
    assert settings_of("RSO", args)[GLOBAL_BATCH] == 8


def test_other_settings_are_refused_and_each_is_named(tmp_path):
    saved = {"method": "RSO", GLOBAL_BATCH: 16, "learning_rate": 1e-5, "seed": 42, "loss_type": ["sigmoid"]}
    save_settings(tmp_path, saved)
    check_settings(tmp_path, dict(saved))
    with pytest.raises(ValueError) as error:
        check_settings(tmp_path, {**saved, GLOBAL_BATCH: 32, "learning_rate": 2e-5, "loss_type": ["hinge"]})
    message = str(error.value)
    assert f"`{GLOBAL_BATCH}` was 16 and is 32" in message
    assert "`learning_rate` was 1e-05 and is 2e-05" in message and "seed" not in message
    assert "`loss_type` was ['sigmoid'] and is ['hinge']" in message
    assert message.startswith(f"{tmp_path} was") and "pass the checkpoint as `model` to a new run" in message


@pytest.mark.parametrize(
    ("state", "given", "refused"),
    [
        ({"global_step": 40, "epoch": 2.0}, {"max_steps": 8}, "for 40 steps already, .* at `max_steps`=8. Raise it"),
        ({"global_step": 40, "epoch": 2.0}, {"max_steps": 40}, None),  # the run was finished
        ({"global_step": 40, "epoch": 2.0}, {"max_steps": 41, "num_train_epochs": 1.0}, None),  # steps decide
        (
            {"global_step": 40, "epoch": 2.5},
            {"max_steps": -1, "num_train_epochs": 2.0},
            "2.5 epochs .* at `num_train_",
        ),
        ({"global_step": 40, "epoch": 2.0}, {"max_steps": -1, "num_train_epochs": 2.0}, None),
        (None, {"max_steps": 8}, None),
    ],
)
def test_a_checkpoint_beyond_the_end_of_the_run_is_refused(state, given, refused, config, tmp_path):
    if state is not None:
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    args = config(RSOConfig, **given)
    if refused is None:
        check_length(tmp_path, args)
    else:
        with pytest.raises(ValueError, match=f"{tmp_path} was trained .*{refused}"):
            check_length(tmp_path, args)


def test_settings_that_only_one_version_knows_are_not_compared(tmp_path):
    save_settings(tmp_path, {"seed": 1, "of_an_older_version": 2})
    check_settings(tmp_path, {"seed": 1, "of_a_newer_version": 3})


@pytest.mark.parametrize("longer", [{"max_steps": 20}, {"num_train_epochs": 3.0}])
def test_another_length_is_said(longer, tmp_path, caplog):
    saved = {"max_steps": 10, "num_train_epochs": 1.0}
    save_settings(tmp_path, saved)
    check_settings(tmp_path, {**saved, **longer})
    ((name, value),) = longer.items()
    (said,) = warnings(caplog)
    assert f"`{name}` was {saved[name]} and is {value}. The learning rate follows the schedule of the" in said


def test_options_of_sampling_are_settings_where_it_is_online(config):
    options = {"max_new_tokens", "num_candidates", "top_p", "temperature", "pairing", "rejection_beta", "ranker"}
    options |= {"generation_batch_size", "generation_memory_budget", "share_prefix"}  # other batches, other samples
    assert not options & settings_of("RSO", config(RSOConfig)).keys()  # of offline sampling the data are compared
    assert options <= settings_of("RSO", config(RSOConfig, sampling="online")).keys()


def test_the_fingerprint_of_data():
    columns = {"prompt_ids": [[1, 2], [3]], "rewards": [[0.5], [1.0]]}

    def fingerprint(**others):
        return data_fingerprint(Dataset.from_dict({**columns, **others}))

    assert fingerprint() == fingerprint(ref_chosen_logps=[0.1, 0.2])
    assert fingerprint() != fingerprint(rewards=[[0.5], [1.5]])
    assert fingerprint() != fingerprint(prompt_ids=[[3], [1, 2]])
    assert data_fingerprint(Dataset.from_dict(columns).to_iterable_dataset()) is None


def test_the_fingerprint_of_many_rows_reads_64_of_them():
    """Evenly spaced, the first and the last among them: 0, 100, ..., 6300."""

    def fingerprint(*changed, length=6301):
        rows = [0] * length
        for row in changed:
            rows[row] = 1
        return data_fingerprint(Dataset.from_dict({"prompt_ids": rows}))

    assert fingerprint(50, 6299) == fingerprint()
    assert len({fingerprint(), fingerprint(0), fingerprint(3100), fingerprint(6300), fingerprint(length=6302)}) == 5


# Trainers


def as_rankings(pairs: Dataset) -> Dataset:
    completions = [[row["chosen"], row["rejected"], " maybe"] for row in pairs]
    return Dataset.from_dict(
        {"prompt": pairs["prompt"], "completions": completions, "rewards": [[1.0, 0.0, -0.5]] * len(pairs)}
    )


RUN = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "steps"}
RUN["save_steps"] = 1


def train(make, trainer_class, dataset, output_dir: Path, resume=None, **given):
    trainer = make(trainer_class, dataset, output_dir=output_dir, **{**RUN, **given})
    trainer.train(resume_from_checkpoint=resume)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("trainer_class", [RSOTrainer, SLiCTrainer, PROTrainer, ListwiseDPOTrainer, RRHFTrainer])
@pytest.mark.parametrize("step", [1, 3])  # in the first epoch and in the second
def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(trainer_class, step, make, tmp_path):
    dataset = as_rankings(PAIRS) if trainer_class.learns_from == "rankings" else PAIRS
    whole = train(make, trainer_class, dataset, tmp_path / "whole")
    assert len(set(whole)) == 4
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    assert json.loads((checkpoint / SETTINGS_FILE).read_text())["method"] == trainer_class._name
    # The same batch, in two parts
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    resumed = train(make, trainer_class, dataset, tmp_path / "resumed", str(checkpoint), **parts)
    assert resumed[:step] == whole[:step]  # read from the checkpoint
    assert resumed[step:] == pytest.approx(whole[step:], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("which", ["path", "latest"])
def test_a_checkpoint_of_other_settings_is_refused_before_it_is_loaded(which, make, tmp_path):
    train(make, RSOTrainer, PAIRS, tmp_path, max_steps=1)
    resume = str(tmp_path / "checkpoint-1") if which == "path" else True
    with pytest.raises(
        ValueError, match=r"checkpoint-1 was .*`gamma` was 0.05 and is 0.5; .*`learning_rate` was 0.01"
    ):
        train(make, RSOTrainer, PAIRS, tmp_path, resume, gamma=0.5, learning_rate=0.1)
    with pytest.raises(ValueError, match="`method` was 'RSO' and is 'SLiC'"):
        train(make, SLiCTrainer, PAIRS, tmp_path, resume)


def test_another_adapter_is_refused(make, tmp_path):
    def adapter(**given):
        return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"], **given})

    train(make, RSOTrainer, PAIRS, tmp_path, max_steps=1, peft_config=adapter())
    settings = json.loads((tmp_path / "checkpoint-1" / SETTINGS_FILE).read_text())
    assert settings["peft_config.target_modules"] == ["q_proj", "v_proj"]
    assert settings["peft_config.peft_type"] == "LORA"
    with pytest.raises(ValueError, match="`peft_config.lora_alpha` was 8 and is 512") as error:
        train(make, RSOTrainer, PAIRS, tmp_path, True, max_steps=1, peft_config=adapter(lora_alpha=512))
    assert "peft_config.r`" not in str(error.value) and "training data" not in str(error.value)
    with pytest.raises(ValueError, match="`peft_config.peft_type` was 'LORA' and is None"):
        train(make, RSOTrainer, PAIRS, tmp_path, True, max_steps=1)
    same = adapter(target_modules=["q_proj", "v_proj"])
    train(make, RSOTrainer, PAIRS, tmp_path, True, max_steps=2, peft_config=same, num_candidates=9)  # not sampled


@pytest.mark.parametrize("trainer_class", [RSOTrainer, PROTrainer])
def test_other_data_are_refused(trainer_class, make, tmp_path):
    dataset = as_rankings(PAIRS) if trainer_class is PROTrainer else PAIRS
    train(make, trainer_class, dataset, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="was trained with other settings: the training data are others. Resume"):
        train(make, trainer_class, dataset.select(range(7, -1, -1)), tmp_path, True, max_steps=2)
    dataset.save_to_disk(tmp_path / "copy")
    train(make, trainer_class, Dataset.load_from_disk(tmp_path / "copy"), tmp_path, True, max_steps=2)


def test_a_checkpoint_of_trl_resumes_and_it_is_said(make, tmp_path, caplog):
    losses = {}
    for name, trainer_class in {"rso": RSOTrainer, "dpo": DPOTrainer}.items():
        losses[name] = train(make, trainer_class, PAIRS, tmp_path / name, beta=0.05)
    assert not warnings(caplog)
    resumed = train(make, RSOTrainer, PAIRS, tmp_path / "on", str(tmp_path / "dpo" / "checkpoint-2"), beta=0.05)
    assert resumed == pytest.approx(losses["rso"], abs=1e-4) == losses["dpo"]
    (said,) = warnings(caplog)
    assert "checkpoint-2 has no training_settings.json" in said
    assert (tmp_path / "on" / "checkpoint-3" / SETTINGS_FILE).exists()


def test_a_longer_run_goes_on(make, tmp_path, caplog):
    constant = {"lr_scheduler_type": "constant"}  # which has no length
    whole = train(make, RSOTrainer, PAIRS, tmp_path / "whole", **constant)
    train(make, RSOTrainer, PAIRS, tmp_path / "short", max_steps=2, **constant)
    longer = train(make, RSOTrainer, PAIRS, tmp_path / "long", str(tmp_path / "short" / "checkpoint-2"), **constant)
    assert longer == pytest.approx(whole, abs=1e-6)
    assert "`max_steps` was 2 and is 4" in warnings(caplog)[0]


def test_nothing_is_saved_over_by_a_run_that_ends_before_its_checkpoint(make, tmp_path):
    train(make, RSOTrainer, PAIRS, tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="checkpoint-2 was trained for 2 steps already, .* at `max_steps`=1"):
        train(make, RSOTrainer, PAIRS, tmp_path, True, max_steps=1)


@pytest.mark.parametrize("content", [None, "", '{"log_history": [{"step": 3}'])
def test_a_checkpoint_that_was_cut_off_is_passed_over(content, make, tmp_path, caplog):
    whole = train(make, RSOTrainer, PAIRS, tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    state.unlink()
    if content is not None:
        state.write_text(content)
    assert train(make, RSOTrainer, PAIRS, tmp_path, True) == whole
    (said,) = [message for message in caplog.messages if "checkpoint-" in message]
    assert said == (
        f"{tmp_path}/checkpoint-3 is incomplete, as its saving was interrupted. Resuming from {tmp_path}/checkpoint-2."
    )
    with pytest.raises(ValueError, match="finds no checkpoint in .*/new. Leave it out to start anew"):
        train(make, RSOTrainer, PAIRS, tmp_path / "new", True)


def test_ctrl_c_while_training_names_the_checkpoint(make, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    for every, message in {
        4: "before the first checkpoint was saved in",
        1: "checkpoint-2 is saved\\. Resume",
    }.items():
        trainer = make(RSOTrainer, PAIRS, output_dir=tmp_path, **RUN | {"save_steps": every})
        trainer.add_callback(Stop())
        with pytest.raises(KeyboardInterrupt, match=message):
            trainer.train()


# Models


def peft_model(folder: Path, base: str, trained_on: str | None) -> PeftModel:
    config = LoraConfig(target_modules=["q_proj"], r=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": trained_on}))
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder), is_trainable=True)


@pytest.mark.parametrize("trained_on", ["{base}", "{base}/", "elsewhere/{name}", "org/{name}", "", None])
def test_an_adapter_of_the_same_base_passes(trained_on, policy_dir, tmp_path, caplog):
    name = Path(policy_dir).name
    if trained_on is not None:
        trained_on = trained_on.format(base=policy_dir, name=name)
    check_adapter(peft_model(tmp_path, policy_dir, trained_on))
    assert not [record for record in caplog.records if record.name.startswith("prefopt_trl")]


def test_an_adapter_of_another_base_is_warned_of(policy_dir, make, tmp_path, caplog):
    make(RSOTrainer, PAIRS, model=peft_model(tmp_path / "adapter", policy_dir, "huggyllama/llama-7b"))
    (message,) = [record.getMessage() for record in caplog.records if "adapter" in record.getMessage()]
    assert f"'default' was trained on huggyllama/llama-7b, and is loaded on {policy_dir}." in message


@pytest.mark.parametrize("how", ["path", "object"])
def test_a_tokenizer_of_another_vocabulary_is_refused_before_anything_is_sampled(how, make, policy_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    size = len(tokenizer)
    tokenizer.add_tokens(["<more>", "<and more>"])
    model = policy_dir if how == "path" else AutoModelForCausalLM.from_pretrained(policy_dir)
    args = RSOConfig(str(tmp_path), use_cpu=True, bf16=False)
    message = rf"token ids up to {size + 1}, and the model embeddings for {size} tokens only.*resize_token_embeddings"
    with pytest.raises(ValueError, match=message):
        RSOTrainer(model, args=args, train_dataset=PAIRS, processing_class=tokenizer)
    assert list(tmp_path.iterdir()) == []
