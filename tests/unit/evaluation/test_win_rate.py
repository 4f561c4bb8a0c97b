"""The metrics of fresh samples, by which a Trainer chooses its checkpoint, against what is computed by hand."""

import gc
import inspect
import json
import math
import re
import sys
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerState
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from prefopt_trl import FunctionRanker, PROConfig, PROTrainer, RSOConfig, RSOTrainer, WinRateCallback
from prefopt_trl.evaluation import win_rate as module
from prefopt_trl.evaluation.samples import SamplingPlan, sample, seed_of
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.runtime.settings import read_lines
from prefopt_trl.sampling.shards import shard_seed
from tests.unit.trainers.conftest import save_with_large_weights

PROMPTS = [f"The fox number {number}" for number in range(12)]  # in two parts: a process samples `AT_ONCE`
AT_ONCE = 8
TARGETS = ["eelseels", "bees see, bees see", "aa", "tree tree"] * 3
PAIRS = Dataset.from_dict({"prompt": PROMPTS, "chosen": TARGETS, "rejected": [f"no {row}" for row in range(12)]})
COMPLETIONS = PAIRS.rename_column("chosen", "completion").remove_columns("rejected")
RANKINGS = PAIRS.select_columns("prompt").add_column("completions", [[text, "no"] for text in TARGETS])
TRAINERS = {
    "RSO": (RSOTrainer, RSOConfig, PAIRS),
    "PRO": (PROTrainer, PROConfig, RANKINGS.add_column("rewards", [[1.0, 0.0]] * 12)),
    "SFT": (SFTTrainer, SFTConfig, COMPLETIONS),
    "DPO": (DPOTrainer, DPOConfig, PAIRS),
    "GRPO": (GRPOTrainer, GRPOConfig, PAIRS.select_columns("prompt")),
}
ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
STEPS = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "logging_steps": 1}
# The name before transformers 5.23
CHECKPOINTING = ("activation" if hasattr(SFTConfig, "activation_checkpointing") else "gradient") + "_checkpointing"
SEED = 7  # with which no last checkpoint is the best one
CHOOSING = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward"}


@pytest.fixture(autouse=True)
def in_parts(monkeypatch):
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", AT_ONCE)


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


class Comparing(Judge):
    draws_baselines = True

    def score(self, prompts, completions, baselines=None, columns=None):
        return [np.full(len(of), 3.0) for of in completions]


@pytest.fixture(scope="module", autouse=True)
def _fast():
    """Each training collects garbage and draws plots, which takes longer than the training."""
    gc.freeze()
    transformers.logging.enable_propagation()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        yield
    transformers.logging.disable_propagation()
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tiny_llama_dir, tmp_path_factory):
    """A folder with two policies, `a` and `b`, and an adapter."""
    folder = tmp_path_factory.mktemp("policies")
    for seed, name in enumerate("ab"):
        save_with_large_weights(tiny_llama_dir, folder / name, seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(f"{folder}/a"), LoraConfig(init_lora_weights=False))
    model.save_pretrained(folder / "adapter")
    return folder


def make(name, model, output_dir, *callbacks, **options):
    trainer_class, config_class, data = TRAINERS[name]
    others = {key: options.pop(key) for key in ("peft_config", "ref_model", "reward_funcs") if key in options}
    sizes = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, CHECKPOINTING: False}
    args = config_class(str(output_dir), **ON_CPU | STEPS | sizes | options)
    return trainer_class(model, args=args, train_dataset=data, eval_dataset=data, callbacks=[*callbacks], **others)


def judging(judge, against="start", prompts=PROMPTS, **options):
    return WinRateCallback(judge, prompts, against, max_new_tokens=8, **options)


def sampled(model, tokenizer, of="policy", seed=0, prompts=PROMPTS, num_completions=1):
    """The samples of each prompt, as the package's sampler makes them for these two parts."""
    plan = SamplingPlan(num_completions, GenerationOptions(max_new_tokens=8), {})
    rows, seed = [{"prompt": prompt} for prompt in prompts], seed_of(seed, of)
    parts = [sample(model, tokenizer, rows[at : at + AT_ONCE], plan, shard_seed(seed, at)) for at in (0, AT_ONCE)]
    return parts[0] + parts[1]


def texts_of(model, tokenizer, of="policy", seed=0):
    return [one["completion"] for (one,) in sampled(model, tokenizer, of, seed)]


def win_rate(rewards, opponents):
    return ((np.sign(np.subtract(rewards, opponents)) + 1) / 2).mean()


def plain_logp(model, prompt, ids):
    with torch.no_grad():
        logps = model.eval()(input_ids=torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) + place - 1, token].item() for place, token in enumerate(ids))


def measured(trainer):
    logs = [log for log in trainer.state.log_history if "eval_win_rate" in log]
    assert len({log["step"] for log in logs}) == len(logs)
    return {log["step"]: {key: value for key, value in log.items() if key.startswith("eval_")} for log in logs}


@pytest.mark.parametrize("case", ["RSO win_rate", "PRO win_rate", "PRO reward", "SFT win_rate", "DPO reward"])
def test_the_checkpoint_kept_is_that_computed_by_hand(case, folder, tmp_path):
    steps, (name, metric) = range(1, 7), case.split()
    make(name, f"{folder}/a", tmp_path / "all", max_steps=6, eval_strategy="no").train()
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/a")
    models = [f"{folder}/a", *(f"{tmp_path}/all/checkpoint-{step}" for step in steps)]
    models = [AutoModelForCausalLM.from_pretrained(model) for model in models]
    texts = [
        texts_of(models[0], tokenizer, "opponent", SEED),
        *(texts_of(model, tokenizer, seed=SEED) for model in models),
    ]
    opponents, *rewards = [list(map(vowels, one)) for one in texts]
    by_hand = {"reward": list(map(np.mean, rewards)), "win_rate": [win_rate(one, opponents) for one in rewards]}
    best = steps[int(np.argmax(by_hand[metric][1:]))]
    assert best != steps[-1]
    choosing = CHOOSING | {"metric_for_best_model": f"eval_{metric}", "save_total_limit": 1, "max_steps": 6}
    trainer = make(name, f"{folder}/a", tmp_path / "best", judging(Judge(), seed=SEED), **choosing)
    trainer.train()
    assert [path.name for path in (tmp_path / "best").glob("checkpoint-*")] == [f"checkpoint-{best}"]
    expected, loaded = load_file(tmp_path / "all" / f"checkpoint-{best}/model.safetensors"), trainer.model.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in expected.items())
    for one, values in by_hand.items():
        assert [measured(trainer)[step][f"eval_{one}"] for step in (0, *steps)] == pytest.approx(values)
    assert trainer.evaluate()[f"eval_{metric}"] == pytest.approx(by_hand[metric][best])  # of the loaded one


@pytest.mark.parametrize("by_trainer", [False, True])
def test_it_changes_no_loss_and_is_logged_once(by_trainer, folder, tmp_path, recwarn, caplog):
    """With dropout, checkpointed activations, a model without cache, and several datasets to evaluate on."""
    histories = []
    for output_dir in ("without", "with"):
        torch.manual_seed(0)
        how = {"disable_dropout": False, CHECKPOINTING: True, "eval_on_start": True}
        lora = LoraConfig(lora_dropout=0.5)
        trainer = make("DPO", f"{folder}/a", tmp_path / output_dir, peft_config=lora, **how)
        trainer.model.config.use_cache = False
        trainer.eval_dataset = {"one": trainer.eval_dataset, "two": trainer.eval_dataset}
        judge = Judge()
        if output_dir == "with":
            trainer.add_callback(judging(judge, trainer=trainer if by_trainer else None))
        trainer.train()
        seen = "loss", "grad_norm", "rewards/margins", "eval_one_loss", "eval_two_rewards/margins"
        histories.append([{key: log[key] for key in seen if key in log} for log in trainer.state.log_history])
    assert [*filter(None, histories[0])] == [*filter(None, histories[1])]
    assert len(judge.asked) == 5 * 12 and [*measured(trainer)] == [0, 1, 2, 3]
    saved = json.loads((tmp_path / "with" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [log["step"] for log in saved if "eval_win_rate" in log] == [0, 1, 2]
    assert not [one for one in (*recwarn, *caplog.messages) if "use_cache" in str(one)]
    assert "<th>step 0</th><th>step 3</th>" in (tmp_path / "with" / "report.md").read_text()
    assert trainer.evaluate() and len(judge.asked) == 6 * 12  # again, after training


def test_values_are_those_computed_by_hand(folder, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(f"{folder}/b")
    prompts = PROMPTS[:10] + PROMPTS[:2]  # two of them twice
    callback = judging(Judge(), TARGETS, prompts, num_completions=2, reference=reference)
    trainer = make("SFT", f"{folder}/a", tmp_path, callback, eval_steps=9, save_steps=9, max_steps=9)
    trainer.train()
    policy, tokenizer, by_hand = trainer.model, trainer.processing_class, defaultdict(list)
    of_prompts = sampled(policy, tokenizer, prompts=prompts, num_completions=2)
    for text, target, samples in zip(prompts, TARGETS, of_prompts, strict=True):
        prompt = tokenizer(text)["input_ids"]
        for one in samples:
            ids, reward = one["ids"], vowels(one["completion"])
            by_hand["reward"].append(reward)
            by_hand["win_rate"].append((np.sign(reward - vowels(target)) + 1) / 2)
            by_hand["kl"].append(plain_logp(policy, prompt, ids) - plain_logp(reference, prompt, ids))
            by_hand["length"].append(len(ids))
            by_hand["finished"].append(ids[-1] == tokenizer.eos_token_id)
    found = measured(trainer)[9]
    assert 0 < found["eval_win_rate"] < 1 and 0 < found["eval_finished"] < 1 and found["eval_kl"] > 1
    for name, values in by_hand.items():
        assert found[f"eval_{name}"] == pytest.approx(np.mean(values), rel=1e-4), name
        if f"eval_{name}_se" in found:
            deviations = np.subtract(values, np.mean(values)).reshape(12, 2).sum(1)
            by_text = np.append(deviations[:2] + deviations[10:], deviations[2:10])
            error = math.sqrt(10 / 9 * (by_text**2).sum()) / 24
            assert found[f"eval_{name}_se"] == pytest.approx(error, rel=1e-3), name
    assert 0 < found["eval_lc_win_rate"] < 1 and found["eval_lc_win_rate_se"] > 0


@pytest.mark.parametrize("kind", ["start", "given", "ref_model", "adapter off", "copy", "path", "column", "texts"])
def test_the_opponent_is_made_once_and_kept_over_a_resume(kind, folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/a")
    targets = [f"target {number}" for number in range(12)]

    def trained(**how):
        judge, model, options = Judge(), f"{folder}/a", {}
        named = {"start": "start", "path": f"{folder}/b", "column": "target", "texts": targets}
        other, prompts = AutoModelForCausalLM.from_pretrained(f"{folder}/b"), PAIRS.add_column("target", targets)
        if kind in ("ref_model", "adapter off"):
            lora = LoraConfig(init_lora_weights=False)
            options = {"ref_model": other} if kind == "ref_model" else {"peft_config": lora}
        if kind == "copy":
            base = AutoModelForCausalLM.from_pretrained(model)
            model = PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True)
        reference = other if kind == "given" else None
        trainer = make("RSO", model, tmp_path / "run", **options)
        callback = judging(judge, named.get(kind, "reference"), prompts, reference=reference, trainer=trainer)
        trainer.add_callback(callback)
        trainable = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        trainer.train(**how)
        assert trainable == [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
        return measured(trainer), judge.asked

    whole, asked = trained()
    assert len(asked) == 12 * 5
    name = "b" if kind in ("given", "ref_model", "path") else "a"
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}")
    if kind == "copy":
        model = PeftModel.from_pretrained(model, f"{folder}/adapter")
    expected = targets if kind in ("column", "texts") else texts_of(model, tokenizer, "opponent")
    opponent, start = (read_lines(tmp_path / f"run/evaluations/{name}.jsonl") for name in ("opponent", "step-000000"))
    assert [row["completion"] for row in opponent] == expected and {row["policy"] for row in opponent} == {"opponent"}
    assert not {*expected} & {row["completion"] for row in start}  # of another seed
    assert [row["rewards"]["judge"] for row in opponent] == [vowels(text) for text in expected]
    at_reference = kind in ("start", "column", "texts", "path", "copy")  # the policy when training begins
    assert (abs(whole[0]["eval_kl"]) < 1e-3) == at_reference
    resumed, asked = trained(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert len(asked) == 12 * 2 and not {*targets} & {*asked}
    assert resumed == {step: pytest.approx(found) for step, found in whole.items()}


def test_an_evaluation_before_training_leaves_the_files_of_an_earlier_run(folder, tmp_path):
    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def evaluated(output_dir=tmp_path, **options):
        judge = Judge()
        trainer = make("SFT", f"{folder}/b", output_dir, judging(judge, **options))
        found = trainer.evaluate()
        assert files() == of_run
        return [found[f"eval_{name}"] for name in ("reward", "win_rate")], len(judge.asked), trainer

    def by_hand(opponent, seed=0):
        """Of `b`, against the start of another or of its own."""
        rewards = [*map(vowels, texts_of(models["b"], tokenizer, seed=seed))]
        opponents = [*map(vowels, texts_of(models[opponent], tokenizer, "opponent", seed))]
        return pytest.approx([np.mean(rewards), win_rate(rewards, opponents)])

    models = {name: AutoModelForCausalLM.from_pretrained(f"{folder}/{name}") for name in "ab"}
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/a")
    make("SFT", f"{folder}/a", tmp_path, judging(Judge())).train()
    of_run = files()
    assert tmp_path / "evaluations/step-000000.jsonl" in of_run and by_hand("a") != by_hand("b").expected
    assert evaluated(seed=SEED)[:2] == (by_hand("b", SEED), 24)  # other settings: an opponent of its own
    assert evaluated(tmp_path / "other")[:2] == (by_hand("b"), 24)
    *found, trainer = evaluated()
    assert found == [by_hand("a"), 12]
    assert trainer.evaluate()["eval_reward"] == found[0][0] and files() == of_run
    trainer.train()  # begins anew
    assert [measured(trainer)[0][f"eval_{name}"] for name in ("reward", "win_rate")] == by_hand("b")
    opponent = read_lines(tmp_path / "evaluations/opponent.jsonl")
    assert [row["completion"] for row in opponent] == texts_of(models["b"], tokenizer, "opponent")


def test_what_is_refused(folder, tmp_path):
    trainer = make("SFT", f"{folder}/a", tmp_path, judging(Judge()), max_steps=1)
    trainer.train()

    def begin(error, args=trainer.args, step=1, tokenizer=trainer.processing_class, **changes):
        with pytest.raises(ValueError, match=error):
            how = {"model": trainer.model, "processing_class": tokenizer}
            judging(Judge(), **changes).on_train_begin(args, TrainerState(global_step=step), None, **how)

    begin(r"same settings \(against, seed\)", seed=1, against="reference")
    begin("Set `eval_strategy`", args=SFTConfig(str(tmp_path), **ON_CPU))
    begin("Give `reference` or `trainer`", step=0, against="reference")
    begin("Give the trainer one", step=0, tokenizer=None)
    for against in ("targets", f"{tmp_path}/nowhere", f"{tmp_path}/evaluations"):
        begin(f"`against` is '{against}', which is neither .* nor a column", step=0, against=against)
    (tmp_path / "evaluations/opponent.jsonl").unlink()
    begin("opponent.jsonl is missing")


@pytest.mark.parametrize("stops_first", [False, True])
def test_early_stopping(stops_first, folder, tmp_path):
    judge, stop = Judge(lambda text: -float(len(judge.asked))), EarlyStoppingCallback(1)  # always worse
    callbacks = [stop] if stops_first else [judging(judge), stop]
    trainer = make("SFT", f"{folder}/a", tmp_path, *callbacks, **CHOOSING)
    if stops_first:
        trainer.add_callback(judging(judge, trainer=trainer))
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.state.best_model_checkpoint.endswith("checkpoint-1")


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        (Judge(lambda text: None), (math.nan, math.nan)),
        (Judge(lambda text: None if text == "no" else float(text != "")), (1.0, 1.0)),
        (Comparing(), (1.0, 3.0)),
    ],
    ids=["none", "few", "comparing"],
)
def test_judges_of_chats_with_an_empty_completion(judge, expected, folder, tmp_path, caplog):
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    against = [[{"role": "assistant", "content": "" if row == 3 else "no"}] for row in range(12)]
    trainer = make("SFT", f"{folder}/a", tmp_path, judging(judge, against, prompts))
    trainer.callback_handler.processing_class = SimpleNamespace(tokenizer=trainer.processing_class)  # a processor
    found = trainer.evaluate()
    assert (found["eval_win_rate"], found["eval_reward"]) == pytest.approx(expected, nan_ok=True)
    assert ("no opinion on any completion" in caplog.text) == math.isnan(expected[0])
    logged = [log for log in trainer.state.log_history if "eval_length" in log]
    assert len(logged) == 1 and "NaN" not in json.dumps(logged)


def test_the_metrics_replace_those_of_grpo(folder, tmp_path, caplog):
    transformers.utils.logging.warning_once.cache_clear()
    how = {
        "reward_funcs": lambda completions, **_: [100.0] * len(completions),
        "max_completion_length": 4,
        "beta": 0.1,
    }
    trainer = make("GRPO", f"{folder}/a", tmp_path, **how | CHOOSING, num_generations=2)
    trainer.add_callback(judging(Judge(), trainer=trainer))
    trainer.train()
    assert [log["eval_reward"] for log in trainer.state.log_history if "eval_reward_std" in log] == [100.0] * 3
    found = measured(trainer)
    assert trainer.state.best_metric == max(found[step]["eval_reward"] for step in (1, 2, 3)) < 100
    after, best = trainer.evaluate(), found[int(trainer.state.best_model_checkpoint.rsplit("-")[-1])]
    assert after["eval_reward_std"] == 0 and best.items() <= after.items()
    assert caplog.text.count("replaces the metric") == 1
    assert "The judge's eval_kl, eval_reward replaces the metric of the trainer" in caplog.text


def test_the_example_trains(folder, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(WinRateCallback), flags=re.DOTALL)
    example = re.sub("=50", "=1", example).replace("outputs/sft", str(tmp_path))
    names = {"train": COMPLETIONS, "test": COMPLETIONS, "SFTTrainer": SFTTrainer, "WinRateCallback": WinRateCallback}
    names |= {"SFTConfig": partial(SFTConfig, max_steps=1, **ON_CPU), "RewardModelRanker": lambda path: Judge()}
    exec(example.replace("Qwen/Qwen2.5-0.5B", f"{folder}/a"), names)
    names["trainer"].train()
    assert [*measured(names["trainer"])] == [0, 1]
