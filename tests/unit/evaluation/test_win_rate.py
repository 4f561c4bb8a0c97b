"""The metrics of fresh samples, by which a Trainer chooses its checkpoint, against what is computed by hand."""

import gc
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerState
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from prefopt_trl import (
    FunctionRanker,
    PROConfig,
    PROTrainer,
    RSOConfig,
    RSOTrainer,
    WinRateCallback,
    sample_completions,
)
from prefopt_trl.evaluation import training_report
from prefopt_trl.evaluation.samples import SamplingPlan, sample
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.rankers.base import Ranker
from prefopt_trl.runtime.settings import read_lines
from prefopt_trl.sampling.shards import shard_seed

PROMPTS = [f"The fox number {number}" for number in range(12)]  # in two parts: a process samples 8 at once
WORDS = ["eels", " bees see", "a", " tree"]
PAIRS = {"chosen": [WORDS[row % 4] for row in range(12)], "rejected": [f"no {row}" for row in range(12)]}
DATA = Dataset.from_dict({"prompt": PROMPTS, **PAIRS})
RANKINGS = Dataset.from_dict(
    {
        "prompt": PROMPTS,
        "completions": [[*pair] for pair in zip(*PAIRS.values(), strict=True)],
        "rewards": [[1, 0]] * 12,
    }
)
TRAINERS = {
    "RSO": (RSOTrainer, RSOConfig, DATA),
    "PRO": (PROTrainer, PROConfig, RANKINGS),
    "SFT": (SFTTrainer, SFTConfig, DATA.rename_column("chosen", "completion").remove_columns("rejected")),
    "DPO": (DPOTrainer, DPOConfig, DATA),
}
CHAT = {"prompt": [[{"role": "user", "content": text}] for text in PROMPTS]}


def vowels(text):
    """The reward: close to 2 if 6 of the characters are vowels, and else lower."""
    return 2 - abs(6 - sum(letter in "aeiou" for letter in text)) / 3 + len(text) / 1000


class Judge(FunctionRanker):
    """Rewards by [`vowels`], or another function, and remembers what it was asked about."""

    def __init__(self, reward=vowels):
        self.asked = []

        def function(prompts, completions):
            texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
            self.asked += texts
            return [reward(text) for text in texts]

        super().__init__(function, version="1")


class Comparing(Ranker):
    """Prefers the longer of two completions by 3 nats."""

    def compare(self, prompts, first, second, columns=None):
        return np.array([1.0 if len(str(a)) > len(str(b)) else 0.0 for a, b in zip(first, second, strict=True)])

    def score(self, prompts, completions, baselines=None, columns=None):
        return [np.full(len(of), 3.0) for of in completions]

    def settings(self):
        return {}


@pytest.fixture(scope="module", autouse=True)
def _fast():
    """Each training collects garbage and draws plots, which takes longer than the training."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_report, "plot_curves", lambda _: raise_import_error())
        yield
    gc.unfreeze()


def raise_import_error():
    raise ImportError


@pytest.fixture(scope="module")
def folder(tiny_llama_dir, tmp_path_factory):
    """A folder with two policies, `a` and `b`, and an adapter of the first; with large weights, which differ."""
    folder = tmp_path_factory.mktemp("policies")
    for seed, name in enumerate("ab"):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.2, generator=generator)
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(folder / name)
    get_peft_model(model, LoraConfig(init_lora_weights=False)).save_pretrained(folder / "adapter")
    return folder


def make(name, model, output_dir, *callbacks, **options):
    trainer_class, config_class, data = TRAINERS[name]
    trainer = {key: options.pop(key) for key in ("peft_config", "ref_model") if key in options}
    arguments = {
        "max_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,
    }
    args = config_class(str(output_dir), **arguments | options)
    model = str(model) if isinstance(model, Path) else model
    return trainer_class(model, args=args, train_dataset=data, eval_dataset=data, callbacks=[*callbacks], **trainer)


def judging(judge, against="start", prompts=PROMPTS, **options):
    return WinRateCallback(judge, prompts, against, max_new_tokens=8, **options)


def texts_of(model, tokenizer):
    how = {"max_new_tokens": 8}
    parts = [
        sample_completions(model, tokenizer, PROMPTS[at : at + 8], 1, seed=shard_seed(0, at), **how) for at in (0, 8)
    ]
    return [text for part in parts for (text,) in part]


def rewards_of(path, tokenizer):
    return np.array(list(map(vowels, texts_of(AutoModelForCausalLM.from_pretrained(path), tokenizer))))


def plain_logp(model, prompt, ids):
    with torch.no_grad():
        logps = model.eval()(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + place - 1, token].item() for place, token in enumerate(ids))


def measured(trainer):
    """The metrics in the log, by step."""
    logs = [log for log in trainer.state.log_history if "eval_win_rate" in log]
    assert len({log["step"] for log in logs}) == len(logs)
    return {log["step"]: {key: value for key, value in log.items() if key.startswith("eval_")} for log in logs}


@pytest.mark.parametrize(
    ("name", "metric"), [("RSO", "win_rate"), ("PRO", "reward"), ("SFT", "win_rate"), ("DPO", "reward")]
)
def test_the_checkpoint_kept_is_that_computed_by_hand(name, metric, folder, tmp_path):
    steps = range(1, 7)
    make(name, folder / "a", tmp_path / "all", max_steps=6, eval_strategy="no").train()
    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    start, by_hand = rewards_of(folder / "a", tokenizer), {"reward": [], "win_rate": []}
    for step in steps:
        rewards = rewards_of(tmp_path / "all" / f"checkpoint-{step}", tokenizer)
        by_hand["reward"].append(rewards.mean())
        by_hand["win_rate"].append(((np.sign(rewards - start) + 1) / 2).mean())
    best = steps[int(np.argmax(by_hand[metric]))]
    assert best != steps[-1]
    chosen_by = {"load_best_model_at_end": True, "metric_for_best_model": f"eval_{metric}", "save_total_limit": 1}
    trainer = make(name, folder / "a", tmp_path / "best", judging(Judge()), max_steps=6, **chosen_by)
    trainer.train()
    assert [path.name for path in (tmp_path / "best").glob("checkpoint-*")] == [f"checkpoint-{best}"]
    expected, loaded = load_file(tmp_path / "all" / f"checkpoint-{best}/model.safetensors"), trainer.model.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in expected.items())
    for one, values in by_hand.items():
        assert [measured(trainer)[step][f"eval_{one}"] for step in steps] == pytest.approx(values)
    assert trainer.evaluate()[f"eval_{metric}"] == pytest.approx(max(by_hand[metric]))  # of the loaded one


@pytest.mark.parametrize("by_trainer", [False, True])
def test_it_changes_no_loss_and_is_logged_once(by_trainer, folder, tmp_path, recwarn, caplog):
    """With dropout, checkpointed activations, a model without cache, and several datasets to evaluate on."""
    histories = []
    for output_dir in ("without", "with"):
        torch.manual_seed(0)
        lora = LoraConfig(lora_dropout=0.5)
        how = {"peft_config": lora, "activation_checkpointing": True, "eval_on_start": True}
        trainer = make("DPO", folder / "a", tmp_path / output_dir, **how)
        trainer.model.config.use_cache = False
        trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}
        judge = Judge()
        if output_dir == "with":
            trainer.add_callback(judging(judge, trainer=trainer if by_trainer else None))
        trainer.train()
        histories.append(trainer.state.log_history)
    assert len(judge.asked) == 4 * len(PROMPTS)
    assert [*measured(trainer)] == [0, 1, 2, 3]
    timed = "runtime", "per_second"
    without, others = (
        [
            {key: value for key, value in log.items() if not key.endswith(timed)}
            for log in history
            if "eval_win_rate" not in log
        ]
        for history in histories
    )
    assert without == others
    saved = json.loads((tmp_path / "with" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in saved if "eval_win_rate" in log] == [0, 1, 2]
    assert not [one for one in (*recwarn, *caplog.messages) if "cache" in str(one)]
    assert (tmp_path / "with" / "report.md").is_file()


def test_values_are_those_computed_by_hand(folder, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(folder / "b")
    targets = [word * 2 for word in PAIRS["chosen"]]
    callback = judging(Judge(), targets, num_completions=2, reference=reference)
    trainer = make("SFT", folder / "a", tmp_path, callback, eval_steps=9, save_steps=9, max_steps=9)
    trainer.train()
    plan, tokenizer = SamplingPlan.of(2, GenerationOptions(max_new_tokens=8), None), trainer.processing_class
    by_hand = {"win_rate": [], "reward": [], "kl": [], "length": [], "finished": []}
    for start in (0, 8):
        rows = [{"prompt": prompt} for prompt in PROMPTS[start : start + 8]]
        sampled = sample(trainer.model, tokenizer, rows, plan, shard_seed(0, start))
        for row, target, samples in zip(rows, targets[start:], sampled, strict=False):
            prompt = tokenizer(row["prompt"])["input_ids"]
            for one in samples:
                by_hand["reward"].append(vowels(one["completion"]))
                by_hand["win_rate"].append((np.sign(vowels(one["completion"]) - vowels(target)) + 1) / 2)
                by_hand["kl"].append(
                    plain_logp(trainer.model, prompt, one["ids"]) - plain_logp(reference, prompt, one["ids"])
                )
                by_hand["length"].append(len(one["ids"]))
                by_hand["finished"].append(one["ids"][-1] == tokenizer.eos_token_id)
    found = measured(trainer)[9]
    assert 0 < found["eval_win_rate"] < 1 and 0 < found["eval_finished"] < 1 and found["eval_kl"] > 1
    for name, values in by_hand.items():
        assert found[f"eval_{name}"] == pytest.approx(np.mean(values), rel=1e-4), name
        if f"eval_{name}_se" in found:
            of_prompts = np.reshape(values, (12, 2)).mean(1)
            assert found[f"eval_{name}_se"] == pytest.approx(of_prompts.std(ddof=1) / math.sqrt(12), rel=1e-3), name
    assert found.keys() == {f"eval_{name}" for name in by_hand} | {
        "eval_lc_win_rate",
        *(f"eval_{name}_se" for name in ("win_rate", "lc_win_rate", "reward", "kl")),
    }


@pytest.mark.parametrize("kind", ["start", "given", "ref_model", "adapter off", "copy", "path", "column", "texts"])
def test_the_opponent_is_made_once_and_kept_over_a_resume(kind, folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    targets = [f"target {number}" for number in range(12)]

    def trained(**how):
        judge, against, reference, model = Judge(), "reference", None, folder / "a"
        options, prompts = {}, Dataset.from_dict({"prompt": PROMPTS, "target": targets})
        if kind in ("start", "path", "column", "texts"):
            against = {"start": "start", "path": str(folder / "b"), "column": "target", "texts": targets}[kind]
        elif kind == "given":
            reference = AutoModelForCausalLM.from_pretrained(folder / "b")
        elif kind == "ref_model":
            options["ref_model"] = AutoModelForCausalLM.from_pretrained(folder / "b")
        elif kind == "adapter off":
            options["peft_config"] = LoraConfig(init_lora_weights=False)
        else:
            base = AutoModelForCausalLM.from_pretrained(model)
            model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
        trainer = make("RSO", model, tmp_path / "run", **options)
        trainer.add_callback(judging(judge, against, prompts, reference=reference, trainer=trainer))
        trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        trainer.train(**how)
        assert trainable == [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        return measured(trainer), judge.asked

    whole, asked = trained()
    assert len(asked) == 12 * (4 if kind == "start" else 5)
    expected = targets
    if kind not in ("column", "texts"):
        model = AutoModelForCausalLM.from_pretrained(folder / ("b" if kind in ("given", "ref_model", "path") else "a"))
        if kind == "copy":
            model = PeftModel.from_pretrained(model, folder / "adapter")
        expected = texts_of(model, tokenizer)
    opponent = read_lines(tmp_path / "run/evaluations/opponent.jsonl")
    assert [row["completion"] for row in opponent] == expected
    assert [row["rewards"]["judge"] for row in opponent] == [vowels(text) for text in expected]
    at_reference = kind in ("start", "column", "texts", "path", "copy")  # the policy when training begins
    assert (abs(whole[0]["eval_kl"]) < 1e-3) == at_reference
    resumed, asked = trained(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert len(asked) == 12 * 2 and not {*targets} & {*asked}
    assert resumed == {step: pytest.approx(found) for step, found in whole.items()}


def test_what_is_refused(folder, tmp_path):
    trainer = make("SFT", folder / "a", tmp_path, judging(Judge()))
    first = trainer.evaluate()
    assert first["eval_win_rate"] == 0.5 and first["eval_win_rate_se"] == 0  # the start against itself
    how = {"model": trainer.model, "processing_class": trainer.processing_class}

    def begin(error, args=trainer.args, step=1, callback=None, **changes):
        with pytest.raises(ValueError, match=error):
            callback = callback or judging(Judge(), **changes)
            callback.on_train_begin(args, TrainerState(global_step=step), None, **how | changes.pop("how", {}))

    begin(r"same settings \(against, seed\)", seed=1, against="reference")
    begin("Set `eval_strategy`", args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False))
    begin("Give `reference` or `trainer`", step=0, against="reference")
    how["processing_class"] = None
    begin("Give the trainer one", step=0)
    (tmp_path / "evaluations/opponent.jsonl").unlink()
    begin("opponent.jsonl is missing")


@pytest.mark.parametrize("stops_first", [False, True])
def test_early_stopping(stops_first, folder, tmp_path):
    judge, stop = Judge(lambda text: -float(len(judge.asked))), EarlyStoppingCallback(1)  # always worse
    chosen_by = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}
    callbacks = [stop] if stops_first else [judging(judge), stop]
    trainer = make("SFT", folder / "a", tmp_path, *callbacks, max_steps=5, **chosen_by)
    if stops_first:
        trainer.add_callback(judging(judge, trainer=trainer))
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.state.best_model_checkpoint.endswith("checkpoint-1")


@pytest.mark.parametrize(
    ("judge", "win_rate", "reward"),
    [
        (Judge(lambda text: None), None, None),
        (Judge(lambda text: None if text == "no" else float(text != "")), 1.0, 1.0),
        (Comparing(), 1.0, 3.0),
    ],
    ids=["no opinion", "few opinions", "comparing"],
)
def test_judges_against_empty_and_unjudged_texts(judge, win_rate, reward, folder, tmp_path, caplog):
    """Of conversational prompts, with a processor."""
    against = [[{"role": "assistant", "content": "" if row == 3 else "no"}] for row in range(12)]
    trainer = make("SFT", folder / "a", tmp_path, judging(judge, against, CHAT["prompt"]))
    trainer.callback_handler.processing_class = SimpleNamespace(tokenizer=trainer.processing_class)
    found = trainer.evaluate()
    if win_rate is None:
        assert math.isnan(found["eval_win_rate"]) and math.isnan(found["eval_reward"])
        assert "no opinion on any completion of step 0" in caplog.text
    else:
        assert (found["eval_win_rate"], found["eval_reward"]) == (win_rate, reward)
    assert all(math.isfinite(log["eval_length"]) for log in trainer.state.log_history if "eval_length" in log)
    assert "NaN" not in json.dumps([log for log in trainer.state.log_history if "eval_length" in log])


def test_grpo_gets_the_metrics(folder, tmp_path):
    args = GRPOConfig(
        str(tmp_path),
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        num_generations=2,
        max_completion_length=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        metric_for_best_model="eval_win_rate",
    )
    prompts = Dataset.from_dict({"prompt": PROMPTS[:2]})
    trainer = GRPOTrainer(
        str(folder / "a"),
        lambda completions, **_: [*map(vowels, completions)],
        args,
        prompts,
        prompts,
        callbacks=[judging(Judge())],
    )
    trainer.train()
    assert trainer.state.best_metric == measured(trainer)[1]["eval_win_rate"]
