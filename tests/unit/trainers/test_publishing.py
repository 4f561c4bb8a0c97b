import gc
import json
import os
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import DPOTrainer

from prefopt_trl import FunctionRanker, PROTrainer, RSOTrainer, SLiCTrainer
from prefopt_trl.runtime.hub import PushError
from tests.hub_server import TOKEN, Hub, contents, said
from tests.unit.known_rankers import brevity

REPO = "my-org/my-model"
PROMPTS = Dataset.from_dict({"prompt": ["The sky is", "Why?"]})
PAIRS = Dataset.from_dict({"prompt": ["Hi", "Ho"], "chosen": [" blue", " wet"], "rejected": [" green", " no"]})
IDS = torch.tensor([[5, 6, 7, 8, 9]])
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


SAMPLING = {"num_candidates": 8, "num_samples": 4, "max_new_tokens": 5, "rejection_beta": 5.0}
SAMPLING |= {"ranker": FunctionRanker(brevity)}


def of_the_model(folder: Path) -> dict[str, bytes]:
    apart = ("checkpoint-", "_pushed/", "sampled/", "training_args.bin", "evaluations/")
    return {name: content for name, content in contents(folder).items() if not name.startswith(apart)}


def section(card: str, title: str) -> str:
    return card.split(f"\n{title}\n")[1].split("\n## ")[0]


# What is pushed, and that it loads


@pytest.mark.parametrize("lora", [False, True])
def test_a_pushed_model_loads_by_its_card(hub: Hub, make: Any, tmp_path: Path, capsys: Any, lora: bool) -> None:
    folder = tmp_path / "rso"
    given = {"output_dir": folder, "hub_model_id": REPO, "hub_token": TOKEN, **EVERY_STEP, **SAMPLING}
    trainer = make(RSOTrainer, PROMPTS, peft_config=LoraConfig(init_lora_weights=False) if lora else None, **given)
    trainer.train()
    (folder / "evaluations").mkdir()
    (folder / "evaluations/step-000000.jsonl").write_text("a prompt")
    assert trainer.push_to_hub() == f"{hub.url}/{REPO}"
    pushed = hub.files(REPO)
    assert pushed == of_the_model(folder)
    assert (folder / "sampled" / "train" / "pairs").exists() and (folder / "checkpoint-1").exists()
    assert not any(TOKEN.encode() in content for content in pushed.values())

    (snippet,) = re.findall(r"```python\n(.*?)```", pushed["README.md"].decode(), flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(snippet.replace("max_new_tokens=64", "max_new_tokens=2"), namespace)
    assert capsys.readouterr().out
    with torch.no_grad():
        expected = trainer.model.eval()(IDS).logits
        torch.testing.assert_close(namespace["model"](IDS).logits, expected)
        base = AutoModelForCausalLM.from_pretrained(trainer.model.config.name_or_path)
        assert not torch.allclose(base(IDS).logits, expected)


def test_all_is_saved_before_the_hub_is_called_and_a_failed_push_is_repeated(hub, make, tmp_path, monkeypatch, caplog):
    """A sharded model is saved by all processes together: the main one must not fail before it."""
    caplog.set_level("INFO", logger="prefopt_trl")
    trainer = make(SLiCTrainer, PAIRS, output_dir=tmp_path / "slic", hub_model_id=REPO)
    trainer.train()
    asked: list[list[str]] = []
    save_model = type(trainer).save_model

    def save(self: Any, *args: Any, **kwargs: Any) -> None:
        save_model(self, *args, **kwargs)
        asked.append(list(hub.requests))

    monkeypatch.setattr(type(trainer), "save_model", save)
    hub.fail("POST /api/repos/create", 401, "Invalid credentials")
    with pytest.raises(PushError) as error:
        trainer.push_to_hub()
    assert asked == [[]] and said(caplog) == [f"Saved in {tmp_path / 'slic'}. Pushing it to {REPO}."]
    assert f"hf upload {REPO} {tmp_path / 'slic'} --exclude '_*' --exclude 'checkpoint-*'" in str(error.value)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= contents(tmp_path / "slic").keys()
    saved = AutoModelForCausalLM.from_pretrained(str(tmp_path / "slic"))
    torch.testing.assert_close(saved.state_dict(), trainer.model.state_dict())

    hub.failures.clear()
    trainer.push_to_hub()
    assert hub.files(REPO) == of_the_model(tmp_path / "slic")


def test_a_push_that_does_not_block_and_none_before_it_with_hub_strategy_end(hub: Hub, make: Any, tmp_path: Path):
    given = {"push_to_hub": True, "hub_strategy": "end", **EVERY_STEP}
    trainer = make(SLiCTrainer, PAIRS, output_dir=tmp_path / "my-slic", **given)
    trainer.train()
    assert hub.files("someone/my-slic") == {}
    assert trainer.push_to_hub(blocking=False).result(timeout=20) == f"{hub.url}/someone/my-slic"
    assert hub.files("someone/my-slic") == of_the_model(tmp_path / "my-slic")


# Before and during training


@pytest.mark.parametrize("given", ["refused", "reads only"])
def test_a_token_that_may_not_write_is_told_before_sampling(hub: Hub, make: Any, tmp_path: Path, given: str) -> None:
    if given == "refused":
        hub.fail("POST /api/repos/create", 401, "Invalid credentials")
    else:
        hub.repos["model", REPO] = {}
        hub.fail("GET .*/auth-check/write", 403, "You may only read")
    with pytest.raises(PushError) as error:
        make(RSOTrainer, PROMPTS, output_dir=tmp_path / "rso", push_to_hub=True, hub_model_id=REPO, **SAMPLING)
    assert f"{REPO} cannot be pushed to: the Hub answered 40" in str(error.value)
    assert "Nothing was sampled or trained yet." in str(error.value)
    assert f"\n    hf upload {REPO} {tmp_path / 'rso'} --exclude '_*' --exclude 'checkpoint-*'" in str(error.value)
    assert not (tmp_path / "rso").exists()


class _Slow(TrainerCallback):
    """Waits for the push of a checkpoint, which training is too short for."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.trainer.push_in_progress.wait_until_done()


@pytest.mark.parametrize(
    ("strategy", "checkpoints"),
    [("every_save", []), ("checkpoint", ["last-checkpoint"]), ("all_checkpoints", ["checkpoint-1", "checkpoint-2"])],
)
def test_training_goes_on_without_a_push(hub, make, tmp_path, caplog, strategy, checkpoints) -> None:
    folder, waiting = tmp_path / "rso", _Slow()
    given = {"push_to_hub": True, "hub_model_id": REPO, "hub_strategy": strategy, "hub_token": TOKEN, **EVERY_STEP}
    given |= {"save_total_limit": None if strategy == "all_checkpoints" else 1, "callbacks": [waiting], **SAMPLING}
    trainer = waiting.trainer = make(RSOTrainer, PROMPTS, output_dir=folder, max_steps=2, **given)
    hub.fail("POST .*/commit/", 507, "Insufficient storage", times=1)
    trainer.train()
    assert trainer.state.global_step == 2
    (told,) = [record for record in caplog.records if "and the run continues" in record.getMessage()]
    assert told.levelname == "WARNING"
    latest = folder / "_pushed"
    assert f"{latest} was not pushed to {REPO}: the Hub answered 507: Insufficient storage." in told.getMessage()
    assert f"\n    hf upload {REPO} {latest} --exclude '_*'" in told.getMessage()

    pushed = hub.files(REPO)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= pushed.keys()
    torch_state = {name for name in pushed if name.endswith("optimizer.pt")}
    assert torch_state == {f"{name}/optimizer.pt" for name in checkpoints}
    assert not [name for name in pushed if "sampled" in name or "training_args" in name]
    assert not any(TOKEN.encode() in content for content in pushed.values())
    assert pushed["model.safetensors"] == (folder / "checkpoint-2" / "model.safetensors").read_bytes()


# The card


@pytest.mark.parametrize("log_completions", [False, True])
def test_prompts_are_not_pushed_with_a_model(log_completions: bool, hub: Hub, make: Any, tmp_path: Path) -> None:
    given = {"bootstrap_parts": 1, "max_new_tokens": 4, "log_completions": log_completions, "report_to": "tensorboard"}
    given |= {"ranker": FunctionRanker(brevity), "hub_model_id": REPO}
    prompts = {"prompt": ["Only between us: why?"], "completions": [[" So", " no."]], "rewards": [[1.0, 0.0]]}
    for _ in range(2):  # the second run puts the parts of the first aside
        trainer = make(PROTrainer, Dataset.from_dict(prompts), **given)
        trainer.train()
    trainer.push_to_hub()
    kept = [file for file in tmp_path.rglob("*") if file.is_file() and b"Only between us" in file.read_bytes()]
    names = {file.relative_to(tmp_path).parts[0] for file in kept}
    assert {"bootstrap", "bootstrap-1"} <= names and ("runs" in names) == log_completions
    assert not [name for name, content in hub.files(REPO).items() if b"Only between us" in content]


def test_a_ranker_that_has_scored_is_let_go_and_the_card_has_its_settings(make: Any, tmp_path: Path) -> None:
    ranker = FunctionRanker(brevity)
    settings, held = ranker.settings(), weakref.ref(ranker)
    trainer = make(PROTrainer, PAIRS, ranker=ranker)
    del ranker
    gc.collect()
    assert held() is None
    assert trainer.training_data.ranker == settings


def test_the_card_says_how_the_data_were_sampled(make: Any, tmp_path: Path) -> None:
    trainer = make(RSOTrainer, PROMPTS, seed=3, gamma=0.25, **SAMPLING)
    trainer.train()
    trainer.create_model_card(model_name="My model", dataset_name="my-org/my-prompts", tags="extra")
    card = ModelCard.load(tmp_path / "README.md")
    data = section(card.text, "## Training data")
    assert "Dataset: `my-org/my-prompts`.\n\nSampled before training.\n\n```text\n" in data
    sampled = f"\n```text\n{trainer.training_data.sampled[1]}\n```\n"
    assert sampled in data and "4 pairs from 2 of 2 prompts\n" in data
    settings = {"rejection_beta": "5.0", "num_candidates": "8", "num_samples": "4", "strategy": '"rso"'}
    for setting, value in settings.items():
        assert f"| `{setting}` | `{value}` |" in data
    assert '| `class` | `"FunctionRanker"` |' in section(data, "### Ranker")
    hyperparameters = section(card.text, "## Hyperparameters")
    for setting, value in {"gamma": "0.25", "learning_rate": "0.001", "seed": "3", "steps": "1"}.items():
        assert f"| `{setting}` | `{value}` |" in hyperparameters
    assert "| `batch size, over all processes` | `7` |" in hyperparameters
    assert "A copy of the model as it was before training." in section(card.text, "## Reference model")
    assert f"| trl | {trl.__version__} |" in section(card.text, "## Framework versions")
    assert card.data.model_name == "My model" and card.data.datasets == "my-org/my-prompts"
    assert {"trl", "prefopt-trl", "rso", "dpo", "extra"} <= set(card.data.tags)
    assert trainer._paper["citation"] in card.text and "title   = {{TRL: Transformers Reinforcement" in card.text
    assert "https://huggingface.co/papers/2309.06657" in card.text

    pairs = Dataset.load_from_disk(str(tmp_path / "sampled" / "train" / "pairs"))
    make(RSOTrainer, pairs, output_dir=tmp_path / "second").create_model_card()  # sampled before this run
    assert sampled in section(card_of(tmp_path / "second"), "## Training data")


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


ADAPTER = {"peft_config": LoraConfig()}
ONLINE = {"sampling": "online", "remove_unused_columns": False, **SAMPLING}


@pytest.mark.parametrize(
    ("trainer_class", "dataset", "given", "data", "reference"),
    [
        (SLiCTrainer, PAIRS, {}, "Preference pairs that were given.", "None: SLiC needs none."),
        (PROTrainer, PAIRS, {}, "Rankings that were given.", "None: PRO needs none."),
        (PROTrainer, PAIRS, {"ranker": FunctionRanker(brevity)}, "given, scored by the ranker.", "None: PRO needs"),
        (RSOTrainer, PROMPTS, ONLINE, "sampled from the policy itself during training", "A copy of the model"),
        (RSOTrainer, PAIRS, ADAPTER, "pairs that were given", "The base model, without the adapter"),
    ],
)
def test_data_ranker_and_reference_model(make, tmp_path, trainer_class, dataset, given, data, reference) -> None:
    trainer = make(trainer_class, dataset, **given)
    trainer.create_model_card()
    text = card_of(tmp_path)
    assert data in section(text, "## Training data")
    assert ("### Ranker" in text) == ("ranker" in given)
    assert reference in section(text, "## Reference model")


def test_other_reference_models(make: Any, policy_dir: str, tmp_path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(policy_dir)
    make(RSOTrainer, PAIRS, ref_model=reference).create_model_card()
    assert f"Another model: `{Path(policy_dir).name}`." in card_of(tmp_path)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(policy_dir), LoraConfig(task_type="CAUSAL_LM"))
    make(RSOTrainer, PAIRS, model=adapted, loss_type="hinge-norm").create_model_card()
    assert "The base model with a frozen copy of the adapter" in card_of(tmp_path)
    assert '| `loss_type` | `["hinge"]` |' in card_of(tmp_path)  # TRL's name


NF4 = {"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
NF4 |= {"load_in_4bit": True}
ALL = "14 modules named down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
TWO = ["model.layers.0.mlp.up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("asked", "modules", "quantization", "settings"),
    [
        ("all-linear", ALL, None, {}),
        (TWO, TWO, BitsAndBytesConfig(**NF4), NF4),
        (".*layers.1.*proj", ".*layers.1.*proj", {"quant_method": "gptq"}, {"quant_method": "gptq"}),
    ],
)
def test_the_card_has_adapter_and_quantization_in_few_words(make, tmp_path, asked, modules, quantization, settings):
    trainer = make(RSOTrainer, PAIRS, peft_config=LoraConfig(target_modules=asked, r=3))
    if quantization:
        trainer.model.config.quantization_config = quantization
    trainer.create_model_card()
    lines = card_of(tmp_path).splitlines()
    assert "| `adapter.r` | `3` |" in lines and f"| `adapter.target_modules` | `{json.dumps(modules)}` |" in lines
    rows = [f"| `quantization.{name}` | `{json.dumps(value)}` |" for name, value in sorted(settings.items())]
    assert [line for line in lines if line.startswith("| `quantization")] == rows


def test_names_are_not_read_as_markdown_and_no_folder_is_told(make: Any, policy_dir: str, tmp_path: Path) -> None:
    trainer = make(SLiCTrainer, PAIRS)
    trainer.create_model_card(model_name="a\n# b <script> `c`", dataset_name="my|data\n\n# Title")
    text = card_of(tmp_path)
    assert ModelCard(text).data.model_name == "a\n# b <script> `c`"
    headings = [line for line in ModelCard(text).text.splitlines() if line.startswith("# ")]
    assert headings == ["# `` a # b <script> `c` ``"]
    assert "Dataset: `my\\|data  # Title`." in text
    assert f"`{Path(policy_dir).name}`, trained with SLiC" in text and policy_dir not in text

    (tmp_path / "pairs.jsonl").touch()
    trainer.create_model_card(dataset_name=str(tmp_path / "pairs.jsonl"))
    assert "Dataset: `pairs.jsonl`." in card_of(tmp_path)
    assert ModelCard(card_of(tmp_path)).data.datasets is None


def test_the_card_keeps_what_trl_knows(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags of jobs and trackers, and links to these, are TRL's."""
    badge = '[<img src="https://example.org/badge.svg" alt="Visualize"/>](https://example.org/run)'

    def write(self: Any, *args: Any) -> None:
        written = f"---\ntags: [hf_jobs, slic]\nbase_model: my-org/base\n---\n\n# Card\n\n{badge} \n"
        ModelCard(written).save(tmp_path / "README.md")

    monkeypatch.setattr(DPOTrainer, "create_model_card", write)
    make(SLiCTrainer, PAIRS).create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["hf_jobs", "slic"] and card.data.base_model == "my-org/base"
    assert badge in section(card.text, "## Hyperparameters")


# What a user sees

USERS_SCRIPT = """\
from datasets import Dataset
from prefopt_trl import SLiCConfig, SLiCTrainer

pairs = Dataset.from_dict({"prompt": ["Hi", "Ho"], "chosen": [" blue", " wet"], "rejected": [" green", " no"]})
args = SLiCConfig("outputs/slic", hub_model_id="my-org/my-model", max_steps=1, use_cpu=True, bf16=False)
trainer = SLiCTrainer("my-sft-model", args=args, train_dataset=pairs)
trainer.train()
trainer.push_to_hub()
"""


@pytest.mark.slow
def test_a_push_that_fails_halfway_and_then_succeeds(hub: Hub, policy_dir: str, tmp_path: Path) -> None:
    """The transcript in docs/hub.md: run with `-s` to print it. The client really waits and tries again."""
    (tmp_path / "my-sft-model").symlink_to(policy_dir)
    (tmp_path / "train.py").write_text(USERS_SCRIPT)
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def run(command: str) -> subprocess.CompletedProcess[str]:
        options = {"cwd": tmp_path, "env": hub.environment | env, "capture_output": True, "text": True, "timeout": 240}
        ended = subprocess.run(command, shell=True, **options)
        print(f"$ {command}\n{ended.stdout}{ended.stderr}")
        return ended

    hub.lfs_from = 5_000  # the tokenizer is a large file too
    hub.fail("PUT /lfs/", None, after=1)
    failed = run("python train.py")
    assert failed.returncode == 1
    assert "outputs/slic was not pushed to my-org/my-model: RemoteProtocolError: Server disconnected" in failed.stderr
    assert len(hub.objects) == 1 and hub.files(REPO) == {}

    hub.failures.clear()
    hub.requests.clear()
    (command,) = re.findall(r"^    (hf upload .*)$", failed.stderr, flags=re.MULTILINE)
    succeeded = run(command)
    assert succeeded.returncode == 0 and f"{hub.url}/{REPO}" in succeeded.stdout
    assert len([line for line in hub.requests if line.startswith("PUT /lfs/")]) == 1  # the other one is there
    assert hub.files(REPO) == of_the_model(tmp_path / "outputs" / "slic")


# Several processes

SCRIPT = """
import sys, time
from datasets import Dataset
from prefopt_trl import SLiCConfig, SLiCTrainer
model, folder, push_to_hub = sys.argv[1:]
pairs = Dataset.from_dict({"prompt": ["Hi", "Ho"], "chosen": [" blue", " wet"], "rejected": [" green", " no"]})
args = SLiCConfig(folder, use_cpu=True, bf16=False, max_steps=1, report_to="none",
                  save_strategy="steps" if push_to_hub == "early" else "no", save_steps=1,
                  push_to_hub=push_to_hub == "early", hub_model_id="my-org/my-model")
trainer = SLiCTrainer(model, args=args, train_dataset=pairs)
assert args.world_size == 2
trainer.train()
url = trainer.push_to_hub()
print(f"process {args.process_index}: {url}", flush=True)
"""


def launch(hub: Hub, model_dir: str, folder: Path, early: bool) -> tuple[subprocess.CompletedProcess[str], float]:
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    command += [model_dir, str(folder), "early" if early else "late"]
    started = time.monotonic()
    ended = subprocess.run(command, env=hub.environment, capture_output=True, text=True, timeout=240)
    return ended, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.distributed
def test_of_two_processes_the_main_one_pushes(hub: Hub, policy_dir: str, tmp_path: Path) -> None:
    ended, _ = launch(hub, policy_dir, tmp_path / "slic", early=True)
    assert ended.returncode == 0, ended.stderr
    assert f"process 0: {hub.url}/{REPO}" in ended.stdout and "process 1: None" in ended.stdout
    assert len([line for line in hub.requests if "/preupload/" in line]) == 2  # of the checkpoint, and at the end
    assert hub.files(REPO) == of_the_model(tmp_path / "slic")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("early", [True, False])
def test_of_two_processes_none_hangs_when_a_push_fails(hub: Hub, policy_dir: str, tmp_path: Path, early: bool) -> None:
    hub.fail("POST /api/repos/create", 401, "Invalid credentials")
    ended, seconds = launch(hub, policy_dir, tmp_path / "slic", early)
    assert ended.returncode != 0 and seconds < 120
    assert "the Hub answered 401: Invalid credentials." in ended.stderr
    assert ("process 1: None" in ended.stdout) is not early  # refused early on both, late on the main one alone
    assert (tmp_path / "slic" / "model.safetensors").exists() is not early
