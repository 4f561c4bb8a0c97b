"""What the documentation says exists, runs, and is all there is."""

import ast
import dataclasses
import math
import pkgutil
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

import prefopt_trl

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TITLES = {page: text.splitlines()[0].removeprefix("# ") for page, text in PAGES.items()}
TRAINER_PAGES = [page for page, title in TITLES.items() if title.endswith("Trainer")]
# Logged by transformers itself
NOT_OURS = {"loss", "grad_norm", "learning_rate", "epoch", "step"}


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def table(page: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the table below a heading."""
    section = PAGES[page].split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


RunPage = Callable[[str], Iterator[dict]]


@pytest.fixture
def run_page(tiny_llama_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPage:
    """Runs the examples of a page as they are, but for the paths, on the CPU, and for one step; gives the names that
    each leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run_page(page: str) -> Iterator[dict]:
        namespace: dict = {}
        for block in python_blocks(README if page == "../README.md" else PAGES[page]):
            block = re.sub(r"path/to/my-(sft-)?model|Qwen/Qwen2\.5-0\.5B-Instruct", tiny_llama_dir, block)
            exec(re.sub(r"(Config\(\s*)", r"\1use_cpu=True, bf16=False, max_steps=1, ", block), namespace)
            yield namespace

    return run_page


@pytest.mark.parametrize("text", [README, *PAGES.values()], ids=["README.md", *(f"docs/{page}" for page in PAGES)])
def test_python_blocks_use_what_exists(text):
    for block in python_blocks(text):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = __import__(node.module, fromlist=[name.name for name in node.names])
                assert all(hasattr(module, name.name) for name in node.names)
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if name.endswith("Config") and name in prefopt_trl.__all__:
                fields = {field.name for field in dataclasses.fields(getattr(prefopt_trl, name))}
                assert {keyword.arg for keyword in node.keywords} <= fields


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{page}" for page in PAGES)])
def test_links_lead_to_files_and_headings(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}#{anchor}"


def test_the_picture_is_what_the_script_draws():
    drawings = ROOT / "docs" / "drawings"
    drawn = runpy.run_path(str(drawings / "shared_prefix.py"))["drawing"]()
    assert (drawings / "shared_prefix.svg").read_text(encoding="utf-8") == drawn


def test_the_example_of_the_readme_trains(run_page, tmp_path):
    list(run_page("../README.md"))
    assert (tmp_path / "outputs/rso/sampled/train/pairs").is_dir()
    assert (tmp_path / "outputs/rso/model.safetensors").is_file()


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE)
    assert targets == ["quickstart", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_way_from_prompt_to_loss_names_what_exists():
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## From prompt to loss")[1].split("## ")[0]
    names = re.findall(r"`((?:data|rankers|sampling|shared_prefix|trainers)\.[\w.]+)`", section)
    assert len(names) > 15
    for name in names:
        assert pkgutil.resolve_name(f"prefopt_trl.{name}"), name


def test_public_names_exist_and_every_page_is_in_the_index_and_every_trainer_has_a_page():
    assert all(getattr(prefopt_trl, name) is not None for name in prefopt_trl.__all__)
    assert dir(prefopt_trl) == sorted(prefopt_trl.__all__)
    linked = set(re.findall(r"\]\((\w+\.md)\)", PAGES["README.md"]))
    assert linked == PAGES.keys() - {"README.md"}
    trainers = {name for name in prefopt_trl.__all__ if name.endswith("Trainer")}
    assert {TITLES[page] for page in TRAINER_PAGES} == trainers


@pytest.mark.parametrize("page", TRAINER_PAGES)
def test_first_line_says_which_equation(page):
    first_paragraph = PAGES[page].split("\n\n")[1].replace("\n", " ")
    assert re.match(r"Minimizes .*\b(eq\. \d+|equation)\b", first_paragraph)


@pytest.mark.parametrize("page", TRAINER_PAGES)
def test_examples_run_and_log_what_the_page_says(page, run_page):
    logged: set[str] = set()
    for namespace in run_page(page):
        steps = [entry for entry in namespace["trainer"].state.log_history if "loss" in entry]
        logged |= set().union(*steps) - NOT_OURS
    documented = {name for row in table(page, "Logged metrics") for name in re.findall(r"`([^`]+)`", row[0])}
    assert documented == logged


def test_online_example_runs(run_page):
    *_, namespace = run_page("online_sampling.md")
    # One step, and before it policy and reference model agree
    assert namespace["trainer"].state.log_history[-1]["train_loss"] == pytest.approx(math.log(2))


def test_ranker_examples_run(run_page, tiny_llama_dir, tmp_path):
    save_tiny_t5(tmp_path / "path/to/my-t5-ranker", tiny_llama_dir)
    for name, auto_class, labels in [
        ("my-reward-model", AutoModelForSequenceClassification, ["REWARD"]),
        ("my-classifier", AutoModelForSequenceClassification, ["NEGATIVE", "POSITIVE"]),
        ("my-process-model", AutoModelForTokenClassification, ["WRONG", "RIGHT"]),
    ]:
        model = auto_class.from_pretrained(tiny_llama_dir, id2label=dict(enumerate(labels)))
        model.save_pretrained(tmp_path / "path/to" / name)
        AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path / "path/to" / name)
    *_, namespace = run_page("rankers.md")
    assert all(len(namespace[name][0]) == 2 for name in ("rewards", "sentiments", "of_steps"))
    assert "rewards/PairwiseRanker/mean" in namespace["trainer"].state.log_history[0]
    assert 0 < namespace["probability"].item() < 1


def test_ranker_quality_example_runs(run_page, tmp_path):
    *_, namespace = run_page("ranker_quality.md")
    assert (tmp_path / "outputs/quality/ranker_quality.png").is_file()
    assert namespace["ranker"].settings()["temperature"] == namespace["calibration"].temperature > 1


def test_tracker_example_runs(run_page, tmp_path):
    list(run_page("trackers.md"))
    (events,) = (tmp_path / "outputs/rso-logged/runs").rglob("events.out.tfevents*")
    assert b"train/completions/text_summary" in events.read_bytes()


def test_data_examples_run(run_page):
    *_, namespace = run_page("data_formats.md")
    assert namespace["made"][0] == {
        "prompt": "The sky is",
        "completions": [" wet.", " blue.", " green."],
        "rewards": [-5.0, -6.0, -7.0],
    }


def test_sampling_examples_run(run_page):
    *_, namespace = run_page("sampling.md")
    made = {name: len(namespace[name]) for name in ("pairs", "again", "best", "loaded", "from_elsewhere")}
    assert made == {"pairs": 4, "again": 4, "best": 12, "loaded": 4, "from_elsewhere": 2}
    assert namespace["from_elsewhere"]["chosen"] == [" wet.", " blue."]  # what the ranker prefers, not the rewards


def save_tiny_t5(folder: Path, tokenizer_dir: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, model_max_length=200)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = tokenizer.pad_token_id
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_shared_prefix_example_runs(run_page):
    *_, namespace = run_page("shared_prefix.md")
    assert len(namespace["texts"]) == len(namespace["logps"]) == 128


@pytest.mark.parametrize("page", TRAINER_PAGES)
def test_defaults_are_those_of_the_configuration(page):
    config_class = getattr(prefopt_trl, TITLES[page].replace("Trainer", "Config"))
    config = config_class("unused", use_cpu=True, bf16=False)
    for names, defaults, _ in table(page, "Defaults"):
        expected = ast.literal_eval(f"[{defaults.replace('`', '')}]")
        assert [getattr(config, name) for name in re.findall(r"`(\w+)`", names)] == expected
