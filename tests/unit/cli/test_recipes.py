"""Every recipe: the papers' numbers, written down here again, and a dry run with a tiny model in place of the 7B."""

import gzip
import json
from pathlib import Path

import pytest
import yaml
from datasets import load_from_disk

from prefopt_trl.cli.parsing import parse
from prefopt_trl.experiments.tiny import tiny_llama

FOLDER = Path(__file__).parents[3] / "examples" / "recipes" / "llama-7b"
ONE_GPU = FOLDER.parent / "one-gpu" / "rounds_rso.yaml"
COMMANDS = {path.stem: path.stem.split("_")[0] for path in FOLDER.glob("*.yaml")}
COMMANDS |= {recipe: "rounds rso" for recipe, command in COMMANDS.items() if command == "rounds"}
CPU = ["--use_cpu", "--bf16", "False"]
SMALL = "--max_steps 1 --gradient_accumulation_steps 1 --per_device_train_batch_size 2 --dtype float32"
HALVES = ["--dataset_train_split", "train[:50%]", "--dataset_test_split", "train[50%:]"]

# RSO section 5: "batch size 128 and learning rate 1e-5 with Adafactor", "64 response candidates", "sub-sample 8",
# "beta = 0.5 and gamma = 0.05". PRO section 4.3: "512, 2, and 5e-6", "128" new tokens, "a total batch size of 112".
RSO = {"batch": 128, "learning_rate": 1e-5, "optim": "adafactor"}
PRO = {"batch": 112, "max_length": 512, "num_train_epochs": 2, "learning_rate": 5e-6, "sft_weight": 0.05}
LORA = {"use_peft": True}
BASE = {"model_name_or_path": "huggyllama/llama-7b"}
# RSO section 5: "We use the helpfulness task". PRO section 4.1: "We combine training data from 4 sub-sets".
HELPFUL = {"dataset_name": "Anthropic/hh-rlhf", "dataset_config": "helpful"}
ALL_SUBSETS = {"dataset_name": "Anthropic/hh-rlhf", "dataset_config": None}
EXPECTED = {
    "sft": {**BASE, **HELPFUL},
    "ranker": {**BASE, **HELPFUL},
    "ranker_pro": {**BASE, **ALL_SUBSETS},
    "sample": {
        **HELPFUL,
        "num_candidates": 64,
        "num_samples": 8,
        "rejection_beta": "auto",
        "strategy": "rso",
        "top_k": 0,
    },
    "rso_full_zero3": {**RSO, "gamma": 0.05, "loss_type": ["sigmoid"], "use_peft": False, "accelerate": "zero3"},
    "rso_lora": {**RSO, "gamma": 0.05, **LORA, "learning_rate": 10 * 1e-5},
    "rso_qlora": {"batch": 128, "gamma": 0.05, **LORA, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "rounds_rso_zero3": {**RSO, "gamma": 0.05, "num_candidates": 64, "num_rounds": 3, "accelerate": "zero3"},
    "rounds_rso_lora": {**RSO, "gamma": 0.05, **LORA, "learning_rate": 10 * 1e-5, "reference": "first"},
    "slic_full_zero3": {**RSO, "delta": 1 / 0.05, "strategy": "sft", "num_samples": 8, "accelerate": "zero3"},
    "pro_full_zero3": {
        **PRO,
        **BASE,
        **ALL_SUBSETS,
        "reward_temperature": "dynamic",
        "max_new_tokens": 128,
        "accelerate": "zero3",
    },
    "pro_lora": {**PRO, **BASE, **ALL_SUBSETS, **LORA, "learning_rate": 10 * 5e-6},
}


def test_the_recipes_are_those_of_the_table():
    assert COMMANDS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("recipe", EXPECTED)
def test_values_are_the_papers(recipe):
    file = FOLDER / f"{recipe}.yaml"
    training = COMMANDS[recipe] != "sample"
    parsed, launched = parse(COMMANDS[recipe], ["--config", str(file), *(CPU if training else [])])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    assert launched["num_processes"] == 8
    values["accelerate"] = launched["accelerate_config"]
    if training:
        values["batch"] = 8 * values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    for name, value in EXPECTED[recipe].items():
        assert values[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    # What a user types first is at the top, and it is this file
    assert f"    prefopt-trl {COMMANDS[recipe]} --config examples/recipes/llama-7b/{recipe}.yaml" in file.read_text()


def test_recipes_hand_over_to_each_other():
    read = {path.stem: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")}
    made = {recipe["output_dir"] for recipe in read.values()}
    assert len(made) == len(read)
    for recipe in read.values():
        for name in ("model_name_or_path", "dataset_name", "ranker"):
            source = recipe.get(name, "huggyllama/llama-7b")
            assert source in made or source in ("huggyllama/llama-7b", "Anthropic/hh-rlhf")


@pytest.fixture
def pairs(tmp_path) -> str:
    """The helpful subsets of a small HH-RLHF."""
    for subset in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"):
        (tmp_path / "hh" / subset).mkdir(parents=True)
        start = f"\n\nHuman: {subset} "
        rows = [{side: f"{start}{i}?\n\nAssistant: {side}" for side in ("chosen", "rejected")} for i in range(2)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "hh" / subset / "train.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return "hh"


@pytest.fixture
def sampled(tiny, function_ranker, run_in_process):
    """What `sample.yaml` makes, at tiny size."""
    small = "--num_candidates 12 --max_new_tokens 4 --dtype float32 --output_dir sampled"
    run_in_process("sample", ["--config", str(FOLDER / "sample.yaml"), *tiny, *function_ranker, *small.split()])
    return "sampled"


def test_the_sampling_recipe_keeps_8_in_4_pairs(sampled):
    statistics = json.loads(Path(sampled, "statistics.json").read_text())
    assert statistics["num_candidates"] == 6 * 12
    assert len(load_from_disk(f"{sampled}/pairs")) == 4 * (6 - statistics["num_skipped"]) > 0


@pytest.mark.parametrize("recipe", ["rso_full_zero3", "rso_lora", "slic_full_zero3"])
def test_recipes_on_sampled_data_run(recipe, sampled, function_ranker, tiny_llama_dir, run_in_process):
    ranker = function_ranker if "slic" in recipe else []
    dry_run(recipe, [*on_half(sampled), *ranker, "--model_name_or_path", tiny_llama_dir], run_in_process)
    state = json.loads(Path("out/checkpoint-1/trainer_state.json").read_text())
    rewards = [entry["eval_reward"] for entry in state["log_history"] if "eval_reward" in entry]
    assert len(rewards) == 2  # of the start, and of the one step
    assert state["best_metric"] == rewards[1] < 0


def on_half(sampled):
    """As the recipes, which judge samples of 2% of the prompts."""
    return ["--dataset_name", sampled, *HALVES, "--judge", "own_reward.brevity"]


def test_the_recipe_in_4_bits_runs(sampled, tokenizer, run_in_process):
    tiny_llama(tokenizer, hidden_size=64, num_layers=1).save_pretrained("wide")  # 4 bits come in blocks of 64 weights
    tokenizer.save_pretrained("wide")
    dry_run("rso_qlora", [*on_half(sampled), "--model_name_or_path", "wide"], run_in_process)


@pytest.mark.parametrize("file", [FOLDER / "rounds_rso_zero3.yaml", FOLDER / "rounds_rso_lora.yaml", ONE_GPU])
def test_the_recipes_of_rounds_run(file, tiny, function_ranker, run_in_process):
    few = "--num_candidates 12 --max_new_tokens 4 --num_rounds 2 --prompts_per_round 3 --output_dir out"
    own = [*tiny, *CPU, *HALVES, *SMALL.split(), *few.split(), *function_ranker]
    config = yaml.safe_load(file.read_text())
    config.pop("dataset_config", None)
    Path("recipe.yaml").write_text(yaml.safe_dump(config))
    run_in_process("rounds rso", ["--config", "recipe.yaml", *own])
    is_adapter = config.get("use_peft", False)
    for number in (1, 2):
        model = Path(f"out/round-{number}/model")
        assert (model / ("adapter_model.safetensors" if is_adapter else "model.safetensors")).exists()
    assert f"    prefopt-trl rounds rso --config examples/recipes/{file.parent.name}/{file.name}" in file.read_text()


@pytest.mark.parametrize("recipe", ["sft", "ranker", "ranker_pro", "pro_full_zero3", "pro_lora"])
def test_recipes_on_comparisons_run(recipe, pairs, function_ranker, tiny_llama_dir, run_in_process):
    data = ["--dataset_name", pairs, "--model_name_or_path", tiny_llama_dir]
    dry_run(recipe, data + (function_ranker if recipe.startswith("pro") else []), run_in_process)


def dry_run(recipe, arguments, run_in_process):
    own = [*arguments, *CPU, *SMALL.split(), "--output_dir", "out"]
    run_in_process(COMMANDS[recipe], ["--config", str(FOLDER / f"{recipe}.yaml"), *own])
    adapter = EXPECTED[recipe].get("use_peft", False)
    assert Path("out", "adapter_model.safetensors" if adapter else "model.safetensors").exists()
    state = json.loads(Path("out/checkpoint-1/trainer_state.json").read_text())
    assert state["global_step"] == 1
