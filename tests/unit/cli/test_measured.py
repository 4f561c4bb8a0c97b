"""The commands that train rankers: which prompts are held out, what is measured on them, and what is saved."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from prefopt_trl.cli.arguments import RankerArguments, RewardModelData
from prefopt_trl.cli.data import hold_out, load_comparisons
from prefopt_trl.cli.measured import RankerTrainer
from prefopt_trl.cli.parsing import parse
from prefopt_trl.cli.rankers import load_ranker
from prefopt_trl.evaluation.metrics import Estimate
from prefopt_trl.rankers import PairwiseRanker, RewardModelRanker

LORA = ["--use_peft", "--lora_target_modules", "all-linear"]


def pair(i: int, j: int = 0) -> dict[str, str]:
    return {"prompt": f"Question {i}?", "chosen": f" Yes {i}{'!' * j}.", "rejected": f" Not {i}, no."}


def write(file: str, rows: list[dict]) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def both() -> list[str]:
    """A folder with both splits. One test prompt is trained on, one has three pairs, and one pair is a tie."""
    held_out = [pair(20), pair(20, 1), pair(20, 2), *map(pair, range(21, 26)), {**pair(26), "rejected": " Yes 26."}]
    write("both/train.jsonl", [pair(i) for i in range(10)])
    write("both/test.jsonl", [*held_out, {**pair(0), "rejected": " Never."}])
    own = "--dataset_name both --dataset_test_split test --output_dir out --per_device_eval_batch_size 4"
    return own.split()


@pytest.fixture
def tiny_t5_dir(tiny_llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    sizes = {"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    special = {"decoder_start_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5ForConditionalGeneration(T5Config(**sizes, **special, dropout_rate=0.0)).save_pretrained("t5")
    tokenizer.save_pretrained("t5")
    return "t5"


def history(checkpoint: str) -> list[dict]:
    return json.loads(Path("out", checkpoint, "trainer_state.json").read_text())["log_history"]


# The held-out prompts


def test_no_prompt_is_on_both_sides():
    prompts = [[{"role": "user", "content": f"{i}?"}] for i in range(50)]
    rows = [
        {"prompt": prompts[i], "chosen": f"{i} {j}", "rejected": "no"} for i in range(50) for j in range(1 + i % 4)
    ]
    trained, held_out = hold_out(Dataset.from_list(rows), 0.1)
    sides = [{json.dumps(row["prompt"]) for row in side} for side in (trained, held_out)]
    assert len(sides[1]) == 5 and len(sides[0] | sides[1]) == 50 and not sides[0] & sides[1]
    assert sorted([*trained["chosen"], *held_out["chosen"]]) == sorted(row["chosen"] for row in rows)
    _, again = hold_out(Dataset.from_list(rows[::-1]), 0.1)
    assert sorted(again["chosen"]) == sorted(held_out["chosen"])


SIX = [pair(i) for i in range(6)]


@pytest.mark.parametrize(
    ("rows", "options", "sizes"),
    [
        (SIX, {}, (4, 2)),
        (SIX, {"held_out": 0.5}, (3, 3)),
        (SIX, {"dataset_train_split": "train[:50%]", "dataset_test_split": "train[50%:]"}, (3, 3)),
        (SIX, {"dataset_test_split": "train[50%:]"}, "6 comparisons to train on, and 0 of other prompts"),
        ([pair(0), pair(0, 1), pair(1)], {}, "0 comparisons to train on, and 3 of other prompts"),
        (SIX, {"held_out": 1.5}, "`held_out` must be a share of the prompts, such as 0.05, got 1.5"),
        (SIX, {"held_out": 0.1, "dataset_test_split": "test"}, "`held_out` has no effect with `dataset_test_split`"),
    ],
)
def test_what_is_held_out(rows, options, sizes):
    write("pairs.jsonl", rows)

    def sides():
        own = RewardModelData(dataset_name="pairs.jsonl", **options)
        return tuple(map(len, load_comparisons(own, SimpleNamespace(eval_strategy="epoch")).values()))

    if isinstance(sizes, tuple):
        assert sides() == sizes
    else:
        with pytest.raises(ValueError, match=sizes):
            sides()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", ("epoch", "epoch", True)),
        ("--save_steps 4", ("steps", "steps", True)),
        ("--eval_steps 4", ("steps", "steps", True)),
        ("--eval_steps 4 --save_steps 8", ("steps", "steps", False)),
        ("--save_strategy no", ("epoch", "no", False)),
        ("--eval_strategy no", ("no", "epoch", False)),
        ("--load_best_model_at_end False", ("epoch", "epoch", False)),
    ],
)
def test_each_checkpoint_is_measured_unless_set_otherwise(options, expected):
    own = ["--dataset_name", "d", "--output_dir", "o", "--use_cpu", "--bf16", "False", *options.split()]
    (_, args, _), _ = parse("ranker", own)
    assert (args.eval_strategy, args.save_strategy, args.load_best_model_at_end) == expected
    assert args.metric_for_best_model == "eval_accuracy" and args.greater_is_better
    assert args.save_steps == ({"4": 4, "8": 8}.get(options[-1:], 500))


# The accuracy


@pytest.mark.parametrize("options", [[], LORA])
@pytest.mark.parametrize("name", ["ranker", "reward-model", "t5"])
def test_the_accuracy_is_that_of_the_ranker_on_prompts_it_has_not_seen(
    name, options, both, training, run_in_process, tiny_t5_dir, capsys
):
    model, options = (["--model_name_or_path", "t5"], options[:1]) if name == "t5" else ([], options)
    command = "reward-model" if name == "reward-model" else "ranker"
    own = [*both, *model, *options, "--learning_rate", "3e-3", "--max_steps", "6"]
    run_in_process(command, [*training, *own, "--save_strategy", "epoch"])
    said = capsys.readouterr().out
    assert "1 of 10 comparisons of the split 'test' are left out: their prompts are trained on." in said
    ranker = load_ranker(RankerArguments(ranker="out"))
    assert type(ranker) is (RewardModelRanker if name == "reward-model" else PairwiseRanker)
    rows = [json.loads(line) for line in Path("both/test.jsonl").read_text().splitlines()][:9]
    prompts, chosen, rejected = ([row[key] for row in rows] for key in ("prompt", "chosen", "rejected"))
    correct = (ranker.compare(prompts, chosen, rejected) > 0.5).astype(float)
    correct[8] = 0.5  # the tie
    accuracy = Estimate.of(correct, np.array(prompts))
    expected = f"{100 * accuracy.mean:.1f}% ± {100 * accuracy.standard_error:.1f}% of 9 comparisons of 7 held-out "
    expected += "prompts, where the longer completion is chosen in 5.6%"  # the tie: half of 1/9
    assert f"The ranker is right on {expected}. The saved weights are those of step " in said
    card = ModelCard.load("out/README.md").text
    assert f'| `accuracy` | `"{expected}"` |' in card and '| `held out` | `"split test"` |' in card
    measured = [entry for entry in history("checkpoint-6") if "eval_accuracy" in entry]
    assert len(measured) == 2 and all("eval_loss" in entry for entry in measured)
    assert accuracy in [Estimate(entry["eval_accuracy"], entry["eval_accuracy_se"]) for entry in measured]


@pytest.mark.parametrize("name", ["ranker", "reward-model", "t5"])
def test_the_most_accurate_checkpoint_is_the_one_that_is_saved(
    name, training, run_in_process, tiny_t5_dir, monkeypatch, capsys
):
    accuracies = [0.6, 0.9, 0.7]
    monkeypatch.setattr(RankerTrainer, "accuracy", lambda self: Estimate(accuracies.pop(0), 0.1))
    model = ["--model_name_or_path", "t5"] if name == "t5" else []
    own = [*model, "--max_steps", "3", "--save_strategy", "steps", "--save_steps", "1", "--output_dir", "out"]
    run_in_process("reward-model" if name == "reward-model" else "ranker", [*training, *own])
    saved, best, last = (load_file(f"out/{part}model.safetensors") for part in ("", "checkpoint-2/", "checkpoint-3/"))
    assert all(torch.equal(saved[key], best[key]) for key in saved)
    assert any(not torch.equal(saved[key], last[key]) for key in saved)
    assert "right on 90.0% ± 10.0% of 2 comparisons" in capsys.readouterr().out
    card = Path("out/README.md").read_text()
    assert "| `step of the saved weights` | `2` |" in card and "0.05 of the prompts, by SHA-256" in card


def test_the_last_weights_are_measured_where_no_checkpoint_is_saved(training, run_in_process, capsys):
    run_in_process("ranker", [*training, "--eval_strategy", "steps", "--eval_delay", "9", "--output_dir", "out"])
    assert "The ranker is right on " in capsys.readouterr().out
    run_in_process("ranker", [*training, "--eval_strategy", "no", "--output_dir", "out"])
    assert "right on" not in capsys.readouterr().out
    assert '| `accuracy` | `"not measured"` |' in Path("out/README.md").read_text()


@pytest.mark.parametrize("name", ["ranker", "reward-model"])
def test_what_exceeds_max_length_is_left_out_and_counted(name, training, run_in_process, capsys):
    write("pairs.jsonl", [*SIX, {"prompt": "Long " * 200, "chosen": " a", "rejected": " b"}])
    arguments = [*training, "--eval_strategy", "no", "--output_dir", "out"]
    run_in_process(name, [*arguments, "--max_length", "300"])
    rows = "comparisons" if name == "ranker" else "rows"
    assert f"1 of 7 {rows} are left out: they exceed `max_length`=300 tokens." in capsys.readouterr().out
    assert 0 < load_ranker(RankerArguments(ranker="out")).compare(["Question 1?"], [" Yes 1."], [" No."])[0] < 1
    with pytest.raises(ValueError, match=f"7 of 7 {rows} are left out: they exceed `max_length`=9 .* Raise it."):
        run_in_process(name, [*arguments, "--max_length", "9"])


# What is trained

UNMOVED = "--learning_rate 0 --eval_strategy no --save_strategy epoch --logging_steps 1 --output_dir out"


@pytest.mark.parametrize("conversational", [False, True])
def test_a_reward_model_is_scored_on_the_texts_it_is_trained_on(conversational, training, run_in_process):
    rows = [pair(i, i) for i in range(4)]
    if conversational:
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in rows]
    write("pairs.jsonl", rows)
    run_in_process("reward-model", [*training, *UNMOVED.split(), "--per_device_train_batch_size", "4"])
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    ranker = RewardModelRanker("out")
    rewards = ranker.score(columns["prompt"], list(zip(columns["chosen"], columns["rejected"], strict=True)))
    losses = [math.log1p(math.exp(rejected - chosen)) for chosen, rejected in rewards]
    assert history("checkpoint-1")[0]["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_an_adapter_is_trained_further_if_it_is_of_the_same_task(training, run_in_process):
    own = [*training, "--eval_strategy", "no", "--learning_rate", "1e-2"]
    run_in_process("reward-model", [*own, *LORA, "--output_dir", "first"])
    run_in_process("reward-model", [*own, "--model_name_or_path", "first", "--output_dir", "second"])
    before, after = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("first", "second"))
    moved = {key.split(".")[-2] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"lora_A", "lora_B", "score"}
    run_in_process("sft", [*training, *LORA, "--output_dir", "policy"])
    for command, folder, task in [("reward-model", "policy", "CAUSAL_LM"), ("ranker", "first", "SEQ_CLS")]:
        with pytest.raises(ValueError, match=f"{folder} is an adapter for {task}, which this command does not train"):
            run_in_process(command, [*own, "--model_name_or_path", folder, "--output_dir", "out"])


def test_a_t5_ranker_reads_in_its_encoder_and_answers_in_its_decoder(training, run_in_process, tiny_t5_dir):
    write("pairs.jsonl", [pair(1)])
    run_in_process("ranker", [*training, "--model_name_or_path", tiny_t5_dir, *UNMOVED.split()])
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    letters = [tokenizer(letter).input_ids[0] for letter in "AB"]
    losses, probabilities = [], []
    for letter, first, second in [("A", "Yes 1.", "Not 1, no."), ("B", "Not 1, no.", "Yes 1.")]:
        text = f"[CONTEXT] Question 1? [RESPONSE A] {first} [RESPONSE B] {second}"
        answer = tokenizer(letter, return_tensors="pt").input_ids
        assert answer.shape == (1, 2) and answer[0, 1] == tokenizer.eos_token_id
        with torch.no_grad():
            output = model(**tokenizer(text, return_tensors="pt"), labels=answer)
        losses.append(pytest.approx(output.loss.item(), rel=1e-5))  # per token
        probabilities.append(output.logits[0, 0, letters].softmax(0)["AB".index(letter)].item())
    assert history("checkpoint-1")[0]["loss"] in losses
    compared = PairwiseRanker("out").compare(["Question 1?"], [" Yes 1."], [" Not 1, no."])
    assert compared == pytest.approx([sum(probabilities) / 2], abs=1e-6)


def test_an_option_of_trls_sft_trainer_is_refused_for_an_encoder_decoder(training, run_in_process, tiny_t5_dir):
    with pytest.raises(ValueError, match="`packing` has no effect on an encoder-decoder. Leave it"):
        run_in_process("ranker", [*training, "--model_name_or_path", "t5", "--output_dir", "out", "--packing"])
