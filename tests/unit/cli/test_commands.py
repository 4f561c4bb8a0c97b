"""Each command at tiny size, in this process: what it writes, and that the written file gives the same run again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from prefopt_trl.cli.parsing import config_text, parse
from prefopt_trl.data.loading import load_rows
from prefopt_trl.trainers.rso_trainer import RSOTrainer
from tests.chat_server import serving

TRAINERS = ["rso", "slic", "pro", "listwise-dpo", "rrhf"]
SAMPLING = "--num_candidates 4 --num_samples 2 --max_new_tokens 4 --temperature 1.0 --max_length 64"


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_save_a_model_and_their_configuration(name, training, run_in_process, tiny_llama_dir, capsys):
    arguments = [*training, "--output_dir", "out", "--learning_rate", "1e-3"]
    arguments += ["--delta", "1000"] if name == "slic" else []  # or no pair would be within the margin
    run_in_process(name, arguments)
    before, after = load_file(f"{tiny_llama_dir}/model.safetensors"), load_file("out/model.safetensors")
    moved = max((after[key] - before[key]).abs().max().item() for key in before)
    assert 1e-4 < moved <= 1.1e-3  # Adam's first step is the learning rate, for weights with a gradient
    assert "The trained model is saved in out." in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained("out")
    again, _ = parse(name, ["--config", "out/config.yaml"])
    assert again == parse(name, arguments)[0]


def test_what_is_saved_is_the_local_model_before_anything_is_pushed(training, run_in_process, monkeypatch):
    order = []
    monkeypatch.setattr(RSOTrainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(
        RSOTrainer,
        "push_to_hub",
        lambda self, **given: order.append((given["dataset_name"], Path("out/model.safetensors").exists())),
    )
    monkeypatch.setattr("prefopt_trl.trainers.base.check_repository", lambda args: None, raising=False)
    run_in_process("rso", [*training, "--output_dir", "out", "--push_to_hub", "--hub_token", "hf_secret"])
    assert order == [("pairs.jsonl", True)]
    assert "hf_secret" not in Path("out/config.yaml").read_text()


@pytest.mark.parametrize("name", ["rso", "pro"])
def test_prompts_alone_are_sampled_and_ranked(name, training, run_in_process, function_ranker):
    sampling = [word for word in SAMPLING.split() if name == "rso" or word not in ("--temperature", "1.0")]
    run_in_process(name, [*training, *function_ranker, *sampling, "--only_prompts", "--output_dir", "out"])
    sampled = load_from_disk("out/sampled/train/pairs")
    assert 0 < len(sampled) <= 6
    if name == "rso":
        assert all(row["chosen_reward"] == -len(row["chosen"]) for row in sampled)


def test_a_judge_that_cannot_be_loaded_ends_the_command_before_it_samples(training, run_in_process, function_ranker):
    halves = "--dataset_train_split train[:50%] --dataset_test_split train[50%:] --eval_strategy steps --eval_steps 1"
    words = [*training, *function_ranker, *SAMPLING.split(), *halves.split(), "--only_prompts", "--output_dir", "out"]
    with pytest.raises(ValueError, match="`judge`='none.py:judge' is not a folder"):
        run_in_process("rso", [*words, "--judge", "none.py:judge"])
    assert not Path("out/sampled").exists()


def sequence_logp(folder, prompt, completion):
    """Summed over the tokens of the completion and EOS, row by row without any of the package."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    start = len(tokenizer(prompt)["input_ids"])
    ids = tokenizer(prompt + completion + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    return logps[start - 1 :].sum().item()


@pytest.mark.parametrize("target", ["chosen", "rejected", "other"])
@pytest.mark.parametrize("source", ["prompts", "candidates", "pairs"])
def test_slics_target_is_the_one_of_the_data(
    source, target, training, tiny, run_in_process, function_ranker, tiny_llama_dir
):
    lines = Path("pairs.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "other": f" Maybe {i}."} for i, line in enumerate(lines)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [*training, *function_ranker, *SAMPLING.split(), "--output_dir", "out", "--save_strategy", "steps"]
    if source == "prompts":
        arguments += ["--only_prompts"]
    else:
        run_in_process("sample", [*tiny, *function_ranker, *SAMPLING.split(), "--output_dir", "sampled"])
        arguments += ["--dataset_name", "sampled", "--dataset_config", source]
    if source == "pairs" and target != "other":  # here the names without "given_" are those of the sampled pair
        target = f"given_{target}"
    batch = "--per_device_train_batch_size 6 --learning_rate 0 --logging_steps 1 --delta 1e-6"
    own = ["--regularization_weight", "0.5", "--target_column", target]
    run_in_process("slic", [*arguments, *batch.split(), *own])
    history = json.loads(Path("out/checkpoint-1/trainer_state.json").read_text())["log_history"]
    logps = [sequence_logp(tiny_llama_dir, row["prompt"], row[target.removeprefix("given_")]) for row in rows]
    assert history[0]["loss/regularization"] == pytest.approx(-0.5 * sum(logps) / 6, rel=1e-5)


STEPPING = ["--save_strategy", "steps", "--save_steps", "1", "--output_dir", "out"]


def test_training_resumes_from_a_checkpoint(training, run_in_process):
    longer = [*training, *STEPPING, "--max_steps", "2"]
    run_in_process("rso", longer)
    whole = load_file("out/model.safetensors")
    Path("out/model.safetensors").unlink()
    run_in_process("rso", [*longer, "--resume_from_checkpoint", "out/checkpoint-1"])
    resumed = load_file("out/model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_second_run_names_the_checkpoints_and_resumes_from_the_latest(training, run_in_process, capsys):
    run_in_process("rso", [*training, *STEPPING])
    assert "earlier run" not in capsys.readouterr().out
    run_in_process("rso", [*training, *STEPPING])
    assert "out has checkpoints of an earlier run (checkpoint-1), and this one writes over" in capsys.readouterr().out
    run_in_process("rso", [*training, *STEPPING, "--max_steps", "2", "--resume_from_checkpoint"])
    assert "earlier run" not in capsys.readouterr().out
    assert Path("out/checkpoint-2").is_dir()
    again = parse("rso", ["--config", "out/config.yaml"])[0]
    assert again[1].resume_from_checkpoint is None  # the next run starts anew
    assert again[1].max_steps == 2


@pytest.mark.parametrize("name", ["pro", "ranker"])
def test_a_start_that_fails_leaves_the_configuration_of_the_run_that_is_there(name, training, run_in_process):
    Path("out").mkdir()
    Path("out/config.yaml").write_text("of: the run before\n")
    with pytest.raises(ValueError, match="`completions`|lacks the columns chosen"):
        run_in_process(name, [*training, "--dataset_name", prompts_alone(), "--output_dir", "out"])
    assert Path("out/config.yaml").read_text() == "of: the run before\n"


@pytest.mark.parametrize("name", [*TRAINERS, "sft", "sample"])
def test_other_columns_are_named_with_the_way_to_rename_them(name, training, tiny, run_in_process, function_ranker):
    Path("pairs.jsonl").write_text('{"question": "Why?", "answer": " So."}\n')
    arguments = [*(tiny if name == "sample" else training), *([] if name == "sft" else function_ranker)]
    with pytest.raises(ValueError, match="has the columns question, answer, and needs `") as error:
        run_in_process(name, [*arguments, "--max_length", "64", "--output_dir", "o"])
    assert "`dataset.rename_column('question', " in str(error.value)


def test_pairs_whose_prompt_is_what_both_begin_with_are_scored(training, run_in_process, function_ranker):
    Path("pairs.jsonl").write_text('{"chosen": "Why? So.", "rejected": "Why? No idea."}\n' * 2)
    run_in_process("pro", [*training, *function_ranker, "--max_length", "64", "--output_dir", "out"])
    assert Path("out/model.safetensors").exists()


def prompts_alone():
    Path("prompts.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n')
    return "prompts.jsonl"


def test_evaluation_takes_the_other_split(training, run_in_process, tmp_path):
    (tmp_path / "both").mkdir()
    lines = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    Path("both/train.jsonl").write_text("".join(lines[:4]))
    Path("both/test.jsonl").write_text("".join(lines[4:]))
    run_in_process("rso", [*training, *STEPPING, "--dataset_name", "both", "--eval_strategy", "steps"])
    history = json.loads(Path("out/checkpoint-1/trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in history)


def test_sft_learns_chosen_completions(training, run_in_process, tiny_llama_dir):
    run_in_process("sft", [*training, "--max_steps", "20", "--learning_rate", "1e-2", "--output_dir", "out"])

    def logp(folder, completion):  # per token, with EOS
        tokens = AutoTokenizer.from_pretrained(folder)(completion)["input_ids"]
        return sequence_logp(folder, "Question 1?", completion) / len(tokens)

    assert logp(tiny_llama_dir, " Yes 1.") < -5  # about the log of 1 / 300, for a random model
    assert logp("out", " Yes 1.") > -2.5  # and of what it has not seen:
    assert logp("out", " Yes 1.") > logp("out", " Not 1, no.") + 1


def test_sample_makes_pairs_that_rso_trains_on(tiny, training, run_in_process, function_ranker, capsys):
    arguments = [*tiny, *function_ranker, *SAMPLING.split(), "--output_dir", "sampled"]
    run_in_process("sample", arguments)
    pairs = load_from_disk("sampled/pairs")
    assert all(row["chosen_reward"] == -len(row["chosen"]) for row in pairs)
    assert parse("sample", ["--config", "sampled/config.yaml"])[0] == parse("sample", arguments)[0]

    run_in_process("rso", [*training, *STEPPING, "--dataset_name", "sampled"])  # with a card
    assert Path("out/model.safetensors").exists()
    assert "Sampled before training" in Path("out/README.md").read_text()
    capsys.readouterr()

    again = "--dataset_name sampled --output_dir again --dataset_config candidates --strategy top-k"
    run_in_process("sample", [*arguments, *again.split()])
    candidates = load_from_disk("sampled/candidates")
    assert load_from_disk("again/candidates")["completions"] == candidates["completions"]


def test_sample_in_parts_that_a_last_command_assembles(tiny, run_in_process, function_ranker, capsys):
    given = [*tiny, *function_ranker, *SAMPLING.split()]
    for part in ("2/2", "1/2"):
        run_in_process("sample", [*given, "--output_dir", "parts", "--shard", part])
        assert not Path("parts/pairs").exists() and f"Part {part} is in parts" in capsys.readouterr().out
    run_in_process("sample", [*given, "--output_dir", "parts"])
    run_in_process("sample", [*given, "--output_dir", "whole"])
    for file in ("statistics.json", "pairs/data-00000-of-00001.arrow"):
        assert Path("parts", file).read_bytes() == Path("whole", file).read_bytes()
    with pytest.raises(ValueError, match="`shard` must be a part such as 3/8"):
        run_in_process("sample", [*given, "--output_dir", "parts", "--shard", "3/2"])


def test_sample_ranks_the_answers_of_other_models_without_any_model(pairs, tiny, run_in_process, function_ranker):
    rows = [{"prompt": f"Question {i}?", "completion": " No.", "policy": "gpt"} for i in range(6)]
    others = [{**row, "completion": " I do.", "policy": "alpaca"} for row in rows]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows + others)))
    words = ["--dataset_name", pairs, "--use_cpu", *function_ranker, "--pairing", "ranking", "--strategy", "sft"]
    given = ["--given", "chosen", "rejected", "chatgpt=answers.jsonl:gpt", "alpaca=answers.jsonl:alpaca"]
    run_in_process("sample", [*words, *given, "--output_dir", "out"])
    ranking = load_from_disk("out/pairs")[3]
    assert ranking["source"] == ["chatgpt", "alpaca", "chosen", "rejected"]
    assert ranking["completions"] == [" No.", " I do.", " Yes 3.", " Not 3, no."]

    one = [*tiny, *function_ranker, *SAMPLING.split(), "--given", "chosen", "--output_dir", "beside"]
    run_in_process("sample", one)  # beside sampled ones, and the other one is the user's column
    candidates = load_from_disk("beside/candidates")
    assert candidates["source"][0] == ["sampled"] * 4 + ["chosen"]
    assert "given_rejected" in candidates.column_names
    Path("answers.jsonl").write_text("".join(json.dumps({**row, "policy": "gpt"}) + "\n" for row in rows + others))
    with pytest.raises(ValueError, match="`given`: answers.jsonl has several completions of a prompt"):
        run_in_process("sample", [*words, "--given", "chatgpt=answers.jsonl", "--output_dir", "two"])
    with pytest.raises(ValueError, match="`given`: none.jsonl cannot be read"):
        run_in_process("sample", [*words, "--given", "chatgpt=none.jsonl", "--output_dir", "none"])


@pytest.mark.parametrize("options", [["--pairing", "best"], ["--chain_of_hindsight"]])
def test_sft_learns_from_the_best_of_n_and_from_hindsight(options, tiny, training, run_in_process, function_ranker):
    if options[0] == "--pairing":
        run_in_process("sample", [*tiny, *function_ranker, *SAMPLING.split(), *options, "--output_dir", "best"])
        options = ["--dataset_name", "best"]
    run_in_process("sft", [*training, *options, "--output_dir", "out"])
    assert Path("out/model.safetensors").exists()


def test_sample_takes_another_generator(tiny, run_in_process, function_ranker):
    sampling = [*tiny, *function_ranker, *SAMPLING.split(), "--generation_memory_budget", "0.1"]
    run_in_process("sample", [*sampling, "--generator", "continuous", "--output_dir", "continuous"])
    with serving(lambda body: {"text": f" {body['seed']}", "finish_reason": "stop"}) as chat:
        remote = ["--generator", chat.url, "--model_name_or_path", "served", "--max_length", "None"]
        run_in_process("sample", [*sampling, *remote, "--output_dir", "remote"])
        assert {body["model"] for body in chat.requests} == {"served"}
        with pytest.raises(ValueError, match="`dtype` has no effect on the model of a server"):
            run_in_process("sample", [*sampling, *remote, "--dtype", "bfloat16", "--output_dir", "other"])
    for folder in ("continuous", "remote"):
        candidates = load_from_disk(f"{folder}/candidates")
        assert set(map(len, candidates["completions"])) == {4} and len(candidates) == 6
        given = ["--dataset_name", folder, "--dataset_config", "candidates", "--output_dir", "again"]
        with pytest.raises(ValueError, match="`generator` has nothing to sample"):
            run_in_process("sample", [*sampling, *given, "--generator", "continuous"])
    with pytest.raises(ValueError, match="`generator` must be one of shared-prefix, continuous, the URL of a server"):
        parse("sample", [*sampling, "--generator", "vllm", "--output_dir", "out"])


def test_sample_leaves_out_prompts_without_room(tiny, run_in_process, function_ranker, capsys):
    arguments = [*tiny, *function_ranker, *SAMPLING.split(), "--output_dir", "sampled"]
    with open("pairs.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "Long " * 40, "chosen": " a", "rejected": " b"}) + "\n")
    run_in_process("sample", arguments)
    assert "1 of 7 prompts are left out: with `max_new_tokens`=4 they would exceed `max_length`=64 tokens." in (
        capsys.readouterr().out
    )
    assert len(load_from_disk("sampled/candidates")) == 6
    with pytest.raises(ValueError, match="7 of 7 prompts are left out: .* would exceed `max_length`=8"):
        run_in_process("sample", [*arguments, "--max_length", "8", "--output_dir", "s"])


def test_sample_pushes_what_is_finished(tiny, run_in_process, function_ranker, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        "prefopt_trl.cli.sample.push_preference_dataset",
        lambda folder, repo: pushed.append((folder, repo, Path(folder, "pairs").is_dir())),
    )
    arguments = [*tiny, *function_ranker, *SAMPLING.split(), "--output_dir", "sampled", "--hub_dataset_id", "me/pairs"]
    run_in_process("sample", arguments)
    assert pushed == [("sampled", "me/pairs", True)]


def test_a_saved_configuration_has_no_tokens_in_it():
    arguments = "--dataset_name d --model_name_or_path m --output_dir out --use_cpu --bf16 no --hub_token hf_secret"
    init = ["--model_init_kwargs", '{"token": "hf_other", "use_cache": false}']
    text = config_text(*parse("rso", [*arguments.split(), *init]))
    assert "hf_" not in text
    assert "use_cache: false" in text


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("rso", "--pad_token <pad> --num_processes 1 --accelerate_config ddp --multi_gpu"),
        ("sft", "--eos_token </s> --num_processes=1"),
    ],
)
def test_a_saved_configuration_is_the_same_run_again(name, given, tiny, tmp_path):
    parsed = parse(name, [*tiny, "--output_dir", "out", "--bf16", "False", *given.split()])
    Path("config.yaml").write_text(config_text(*parsed))
    again = parse(name, ["--config", "config.yaml"])
    assert again[0] == parsed[0]
    assert yaml.safe_load(config_text(*again)) == yaml.safe_load(Path("config.yaml").read_text())


def test_a_reward_model_is_known_by_its_class(training, run_in_process, tiny_llama_dir, tokenizer):
    config = LlamaConfig.from_pretrained(tiny_llama_dir, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained("reward")
    tokenizer.save_pretrained("reward")
    run_in_process("pro", [*training, "--ranker", "reward", "--output_dir", "out"])
    assert Path("out/model.safetensors").exists()


def test_completions_for_a_ranker_are_left_out_where_training_would_cut_them(
    training, run_in_process, function_ranker, capsys
):
    with open("pairs.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "Short?", "chosen": " a", "rejected": " b" * 400}) + "\n")
    arguments = [*training, *function_ranker, "--output_dir", "out"]
    run_in_process("pro", [*arguments, "--max_length", "300"])
    assert "1 of 7 rows are left out: they exceed `max_length`=300 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="7 of 7 rows are left out: they exceed `max_length`=8"):
        run_in_process("pro", [*arguments, "--max_length", "8"])
    run_in_process("slic", [*arguments, "--max_length", "300"])  # on pairs, which no ranker reads
    assert "left out" not in capsys.readouterr().out


def test_pairs_sampled_anew_in_the_same_folder_are_the_ones_that_are_read(tiny, run_in_process, function_ranker):
    arguments = [*tiny, *function_ranker, *SAMPLING.split(), "--output_dir", "sampled"]
    read = []
    for seed in ("1", "2"):
        shutil.rmtree("sampled", ignore_errors=True)
        run_in_process("sample", [*arguments, "--seed", seed])
        read.append(load_rows("sampled").to_list())
        assert read[-1] == load_from_disk("sampled/pairs").to_list()
    assert read[0] != read[1]
