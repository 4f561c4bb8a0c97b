"""`prefopt-trl evaluate`: the policies, judges and names that it takes, and that it computes what Python does."""

import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from prefopt_trl import FunctionRanker, PairwiseRanker
from prefopt_trl.cli import run
from prefopt_trl.cli.parsing import parse
from prefopt_trl.data.loading import load_rows
from prefopt_trl.evaluation.policy import BestOf, evaluate_policy
from prefopt_trl.runtime.settings import read_json, read_lines, write_lines

JUDGES = """
def text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]

def length(prompts, completions, **columns):
    return [float(len(text(one))) for one in completions]

def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in text(one))) for one in completions]
"""
SAMPLING = ["--max_new_tokens", "4", "--num_completions", "2", "--output_dir", "out"]


def length(prompts, completions):
    return [float(len(one)) for one in completions]


@pytest.fixture(autouse=True)
def models(tiny_llama_dir, pairs):
    """Models in `sft` and `rso`, an adapter on `sft`, a reward model, and judges in `judges.py`."""
    shutil.copytree(tiny_llama_dir, "sft")
    model = AutoModelForCausalLM.from_pretrained("sft")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).save_pretrained("adapter")
    model = AutoModelForCausalLM.from_pretrained("sft")
    model.lm_head.weight.data *= 20
    for save in (model, AutoTokenizer.from_pretrained("sft")):
        save.save_pretrained("rso")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, **sizes, num_labels=1, pad_token_id=0)
    for save in (LlamaForSequenceClassification(config), AutoTokenizer.from_pretrained("sft")):
        save.save_pretrained("reward")
    Path("judges.py").write_text(JUDGES)


@pytest.fixture
def evaluate(run_in_process):
    """Run the command on `pairs.jsonl`, and return `evaluation.json`."""

    def run(arguments: str, *words: str):
        base = ["--dataset_name", "pairs.jsonl", "--use_cpu", *SAMPLING]
        run_in_process("evaluate", [*base, *arguments.split(), *words])
        return read_json(Path("out/evaluation.json"))

    return run


def test_values_are_those_of_python(evaluate, capsys):
    found = evaluate(
        "--model_name_or_path rso --policies best=best-of-3:sft column:rejected --reference sft --against chosen "
        "--judges judges.py:length pairwise=sft --ranker_template summary --temperature 1 --seed 3"
    )
    tokenizer, sft = AutoTokenizer.from_pretrained("sft"), AutoModelForCausalLM.from_pretrained("sft")
    rows, judge = load_rows("pairs.jsonl"), FunctionRanker(length)
    expected = evaluate_policy(
        {
            "rso": AutoModelForCausalLM.from_pretrained("rso"),
            "best": BestOf(sft, 3, judge),
            "rejected": "rejected",
            "reference": sft,
        },
        tokenizer,
        rows,
        judges={"length": judge, "pairwise": PairwiseRanker("sft", template="summary")},
        against="chosen",
        reference="reference",
        num_completions=2,
        max_new_tokens=4,
        seed=3,
    )
    assert read_lines(Path("out/samples.jsonl")) == expected.samples
    assert found["policies"].keys() == {"rso", "best", "rejected", "reference", "chosen"}
    assert str(expected) in capsys.readouterr().out
    assert parse("evaluate", ["--config", "out/config.yaml"])[0][0].policies == [
        "best=best-of-3:sft",
        "column:rejected",
    ]


@pytest.mark.parametrize(
    ("arguments", "policies", "against", "reference"),
    [
        ("--model_name_or_path rso", ["rso", "chosen"], "chosen", None),
        ("--policies rso/ ./sft --reference sft", ["rso", "sft", "chosen"], "chosen", "sft"),
        ("--policies rso new=sft --reference sft --against reference", ["rso", "new"], "new", "new"),
        ("--policies rso --reference sft --against reference", ["rso", "reference"], "reference", "reference"),
        ("--policies rso base=sft --against sft", ["rso", "base"], "base", None),
        ("--policies best-of-2:sft best-of-1:sft", ["best-of-2 sft", "best-of-1 sft", "chosen"], "chosen", None),
        ("--policies adapter column:rejected --against rejected", ["adapter", "rejected"], "rejected", None),
        ("--policies rso --reference rso --dataset_name prompts.jsonl", ["rso"], "rso", "rso"),
        ("--policies rso --dataset_name prompts.jsonl", ["rso"], None, None),
    ],
)
def test_names(arguments, policies, against, reference, evaluate):
    write_lines(Path("prompts.jsonl"), [{"prompt": "Why?"}, {"prompt": "How?"}])
    found = evaluate(f"--judges judges.py:length {arguments}")
    assert (found["policies"].keys(), found["against"], found["reference"]) == ({*policies}, against, reference)


@pytest.mark.parametrize("chat", [False, True])
def test_files_of_completions(chat, evaluate):
    rows = read_lines(Path("pairs.jsonl"))
    evaluate("--judges judges.py:length --policies sft column:rejected --output_dir before")
    said = [row["completion"] for row in read_lines(Path("before/samples.jsonl")) if row["policy"] == "sft"]
    write_lines(Path("many.jsonl"), [{"prompt": row["prompt"], "completions": ["a", "bcd"]} for row in rows])
    lines = [{"instruction": row["prompt"], "output": f"\u2028 {row['prompt']}", "generator": "g"} for row in rows]
    Path("outputs.json").write_text(json.dumps(lines[::-1]))
    if chat:
        prompts = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        write_lines(Path("pairs.jsonl"), [{"prompt": prompt} for prompt in prompts])
    found = evaluate(
        "--judges judges.py:length judges.py:vowels --policies before/samples.jsonl:sft many.jsonl outputs.json "
        "best-of-2:many.jsonl"
    )["policies"]
    again = [row["completion"] for row in read_lines(Path("out/samples.jsonl")) if row["policy"] == "sft"]
    assert [one[0]["content"] for one in again] == said if chat else again == said
    means = {name: of["judges"]["length"]["reward"]["mean"] for name, of in found.items()}
    assert means["many.jsonl"] == 2 and means["best-of-2 many.jsonl"] == 3
    assert means["outputs.json"] == pytest.approx(2 + sum(len(row["prompt"]) for row in rows) / len(rows))


def test_temperature_stop_strings_and_rows(evaluate):
    found = evaluate(
        "--judges judges.py:length --policies rso --temperature 0 --num_completions 1 --num_rows 3 --stop_strings e",
        "a",
    )
    samples = [row for row in read_lines(Path("out/samples.jsonl")) if row["policy"] == "rso"]
    assert [row["row"] for row in samples] == [0, 1, 2] and "kl" not in found["policies"]["rso"]
    assert not any("e" in row["completion"] or "a" in row["completion"] for row in samples)
    assert found["settings"]["stop_strings"] == ["e", "a"]


def test_options_of_rankers_are_for_the_judges_that_are_models(evaluate):
    found = evaluate("--policies column:rejected --judges reward judges.py:length --ranker_batch_size 1")
    assert found["policies"]["rejected"]["judges"].keys() == {"reward", "length"}


def test_a_repeated_prompt_has_a_share_of_its_completions_in_a_file(evaluate):
    write_lines(Path("pairs.jsonl"), [{"prompt": prompt} for prompt in ("Why?", "How?", "Why?")])
    said = [("Why?", "a"), ("Why?", "bb"), ("How?", "c"), ("Why?", "ddd"), ("Why?", "e")]
    write_lines(Path("said.jsonl"), [{"prompt": prompt, "completion": one} for prompt, one in said])
    evaluate("--judges judges.py:length --policies said.jsonl")
    rows = read_lines(Path("out/samples.jsonl"))
    assert [(row["row"], row["completion"]) for row in rows] == [(0, "a"), (0, "bb"), (1, "c"), (2, "ddd"), (2, "e")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "There is no policy. Give `model_name_or_path` or `policies`."),
        ("--model_name_or_path ./m", "`model_name_or_path`: there is no folder ./m."),
        ("--policies ./m", "`policies`: there is no folder ./m."),
        ("--policies sft --reference ./m", "`reference`: there is no folder ./m."),
        ("--policies sft sub/sft", "`policies` has two with the name 'sft'. Give names: NAME=sub/sft."),
        ("--policies sft --judges judges.py:length x/judges.py:length", "`judges` has two with the name 'length'."),
        ("--policies sft --judges judges.py", "`judges`='judges.py' is a file. Name a function"),
        ("--policies sft --judges ./m", "`judges`='./m' cannot be loaded"),
        ("--policies sft --ranker_batch_size 2", "`ranker_batch_size` has no effect on `judges`='judges.py:length'."),
        ("--policies sft --against m", "'m' is neither a policy nor a column of `prompts`, which has prompt, chosen"),
        ("--policies sft --against reference", "'reference' is neither a policy nor a column"),
        ("--policies column:m", "'m' is neither a policy nor a column"),
        (
            "--policies sft column:chosen --reference chosen",
            "`reference` is 'chosen'. Give a model, or the name of a mod",
        ),
        ("--policies best-of-3:column:chosen", "`BestOf` of 'best-of-3 chosen' needs 3 completions, and row 0"),
        ("--policies few.jsonl", "`policies`: few.jsonl has no completion for row 0 of the prompts."),
        ("--policies none.jsonl", "`policies`: none.jsonl cannot be read (FileNotFoundError"),
        ("--policies judges.json", "`policies`: judges.json cannot be read (JSONDecodeError"),
        ("--policies two.jsonl", "`policies`: two.jsonl has completions of a, b. Name one of them: two.jsonl:NAME."),
        ("--policies two.jsonl:c", "`policies`: two.jsonl has completions of a, b. Name one of them"),
        ("--policies sft --dataset_name few.jsonl", "Standard errors need at least 2 prompts, and `prompts` has 1."),
        ("--policies sft --dataset_name other.jsonl", "other.jsonl has the columns question, and needs `prompt`."),
        ("--policies sft --dataset_name other.jsonl --judges sft", "other.jsonl has the columns question"),
        ("--policies sft --temperature 0", "With `temperature`=0 all completions of a prompt are equal."),
        ("--policies sft --temperature -1", "`temperature` must be at least 0"),
        ("--policies sft --num_completions 0", "`num_completions` must be a whole number, at least 1"),
        ("--policies sft --seed -1", "`seed` must be a whole number, at least 0"),
        ("--policies sft --use_peft", "`use_peft` is for training"),
        ("--policies sft --polices sft", "unknown argument 'polices'. Did you mean 'policies'?"),
    ],
)
def test_errors_are_one_line_before_anything_begins(arguments, message, capsys):
    prompt = read_lines(Path("pairs.jsonl"))[1]["prompt"]
    write_lines(Path("few.jsonl"), [{"prompt": prompt, "completion": "a"}])
    write_lines(Path("two.jsonl"), [{"prompt": prompt, "completion": "a", "policy": one} for one in "ab"])
    write_lines(Path("other.jsonl"), [{"question": "Why?"}] * 2)
    shutil.copy("judges.py", "judges.json")
    base = ["--dataset_name", "pairs.jsonl", "--use_cpu", *SAMPLING, "--judges", "judges.py:length"]
    with pytest.raises(SystemExit, match="^2$"):
        run.main("evaluate", [*base, *arguments.split()])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"prefopt-trl evaluate: error: {message}")
    assert not Path("out").exists()


def test_ctrl_c_says_what_is_saved(capsys):
    Path("judges.py").write_text("def stop(prompts, completions):\n    raise KeyboardInterrupt\n")
    words = [
        "--dataset_name",
        "pairs.jsonl",
        "--use_cpu",
        *SAMPLING,
        "--policies",
        "sft",
        "--judges",
        "judges.py:stop",
    ]
    with pytest.raises(SystemExit, match="^130$"):
        run.main("evaluate", words)
    said = "2 shards of completions or verdicts are saved in out; the same call resumes."
    assert capsys.readouterr().err.splitlines()[-1] == f"prefopt-trl evaluate: Interrupted: {said}"


def test_a_folder_of_other_settings_is_refused_and_one_of_the_same_is_read_again(evaluate, capsys):
    found = evaluate("--judges judges.py:length --policies sft")
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        evaluate("--judges judges.py:length --policies sft --seed 1")
    shutil.copytree("sft", "moved")  # the contents are the same, and so is the name
    assert evaluate("--judges judges.py:length --policies sft=moved") == found
    shutil.copy("rso/model.safetensors", "moved")
    with pytest.raises(ValueError, match="policies.sft.model: "):
        evaluate("--judges judges.py:length --policies sft=moved")
