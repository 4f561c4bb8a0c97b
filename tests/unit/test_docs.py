"""What the documentation says exists, runs, and is all there is."""

import ast
import dataclasses
import math
import re
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

import prefopt_trl

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TITLES = {page: text.splitlines()[0].removeprefix("# ") for page, text in PAGES.items()}
TRAINER_PAGES = [page for page, title in TITLES.items() if title.endswith("Trainer")]
# Logged by transformers itself
NOT_OURS = {"loss", "grad_norm", "learning_rate", "epoch", "step"}


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL)


def table(page: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the table below a heading."""
    section = PAGES[page].split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def run(block: str, namespace: dict, model_dir: str) -> None:
    """Run an example as it is, but for the paths, on the CPU, and for one step."""
    block = re.sub(r"path/to/my-(sft-)?model", model_dir, block)
    exec(re.sub(r"(Config\(\s*)", r"\1use_cpu=True, bf16=False, max_steps=1, ", block), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_use_what_exists(page):
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = __import__(node.module, fromlist=[name.name for name in node.names])
                assert all(hasattr(module, name.name) for name in node.names)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Config"):
                fields = {field.name for field in dataclasses.fields(getattr(prefopt_trl, node.func.id))}
                assert {keyword.arg for keyword in node.keywords} <= fields


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}" for page in PAGES)])
def test_links_lead_to_files_and_headings(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}#{anchor}"


def test_every_page_is_in_the_index_and_every_trainer_has_a_page():
    linked = set(re.findall(r"\]\((\w+\.md)\)", PAGES["README.md"]))
    assert linked == PAGES.keys() - {"README.md"}
    assert {TITLES[page] for page in TRAINER_PAGES} == {
        name for name in prefopt_trl.__all__ if name.endswith("Trainer")
    }


@pytest.mark.parametrize("page", TRAINER_PAGES)
def test_first_line_says_which_equation(page):
    first_paragraph = PAGES[page].split("\n\n")[1].replace("\n", " ")
    assert re.match(r"Minimises .*\b(eq\. \d+|equation)\b", first_paragraph)


@pytest.mark.parametrize("page", TRAINER_PAGES)
def test_examples_run_and_log_what_the_page_says(page, tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    logged: set[str] = set()
    for block in python_blocks(page):
        run(block, namespace, tiny_llama_dir)
        steps = [entry for entry in namespace["trainer"].state.log_history if "loss" in entry]
        logged |= set().union(*steps) - NOT_OURS
    documented = {name for row in table(page, "Logged metrics") for name in re.findall(r"`([^`]+)`", row[0])}
    assert documented == logged


def test_online_example_runs(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in python_blocks("online_sampling.md"):
        run(block, namespace, tiny_llama_dir)
    # One step, and before it policy and reference model agree
    assert namespace["trainer"].state.log_history[-1]["train_loss"] == pytest.approx(math.log(2))


def test_reward_function_example_runs(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in python_blocks("reward_functions.md"):
        run(block, namespace, tiny_llama_dir)
    assert "rewards/PairwiseRanker/mean" in namespace["trainer"].state.log_history[0]


def test_tracker_example_runs(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in python_blocks("trackers.md"):
        run(block, namespace, tiny_llama_dir)
    (events,) = (tmp_path / "outputs/rso-logged/runs").rglob("events.out.tfevents*")
    assert b"train/completions/text_summary" in events.read_bytes()


def test_data_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in python_blocks("data_formats.md"):
        exec(block, namespace)
    assert namespace["made"][0] == {
        "prompt": "The sky is",
        "completions": [" wet.", " blue.", " green."],
        "rewards": [-5.0, -6.0, -7.0],
    }


def test_sampling_examples_run(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_tiny_t5(tmp_path / "path/to/my-t5-ranker", tiny_llama_dir)
    namespace: dict = {}
    for block in python_blocks("sampling.md"):
        run(block, namespace, tiny_llama_dir)
    made = {name: len(namespace[name]) for name in ("pairs", "again", "best", "loaded", "from_elsewhere")}
    assert made == {"pairs": 4, "again": 4, "best": 12, "loaded": 4, "from_elsewhere": 2}
    assert namespace["from_elsewhere"]["chosen"] == [" wet.", " blue."]  # what the ranker prefers, not the rewards
    assert 0 < namespace["probability"].item() < 1


def save_tiny_t5(folder: Path, tokenizer_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, model_max_length=200)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = tokenizer.pad_token_id
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_shared_prefix_example_runs(tiny_llama_dir):
    namespace: dict = {}
    for block in python_blocks("shared_prefix.md"):
        run(block, namespace, tiny_llama_dir)
    assert len(namespace["texts"]) == len(namespace["logps"]) == 128


@pytest.mark.parametrize("page", TRAINER_PAGES)
def test_defaults_are_those_of_the_configuration(page):
    config_class = getattr(prefopt_trl, TITLES[page].replace("Trainer", "Config"))
    config = config_class("unused", use_cpu=True, bf16=False)
    for names, defaults, _ in table(page, "Defaults"):
        expected = ast.literal_eval(f"[{defaults.replace('`', '')}]")
        assert [getattr(config, name) for name in re.findall(r"`(\w+)`", names)] == expected
