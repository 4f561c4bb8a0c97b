import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, load_dataset, load_from_disk
from huggingface_hub import DatasetCard
from huggingface_hub.utils import filter_repo_objects
from markdown import markdown

from prefopt_trl.runtime.hub import PushError
from prefopt_trl.sampling.publishing import PUSHED, push_preference_dataset
from prefopt_trl.sampling.statistics import (
    SamplingStatistics,
    dataset_card,
    read_sampled,
)
from tests.hub_server import Hub

SETTINGS: dict[str, Any] = {
    "strategy": "rso",
    "num_samples": 4,
    "beta": 0.5,
    "pairing": "first-round",
    "prompts": "0123456789abcdef" * 4,
    "ranker": {"class": "FunctionRanker", "function": "brevity:" + "fedcba9876543210" * 4, "options": {}},
}
QUANTILES = [-2.0, -1.5, -0.5, 0.123456, 0.5, 1.5, 12345.678]
STATISTICS = SamplingStatistics(
    num_prompts=1200,
    num_skipped=12,
    num_candidates=76800,
    num_duplicates=345,
    num_unfinished=67,
    num_pairs=2376,
    acceptance_rate=0.12345,
    reward_quantiles={name: QUANTILES for name in ("candidates", "accepted", "chosen", "rejected")},
    label_probability_before=0.8125,
    label_probability_after=0.6875,
    num_short=34,
)
MESSAGES = [[{"role": "user", "content": "Hi"}]]
PAIRS = Dataset.from_dict(
    {
        "prompt": MESSAGES,
        "chosen": [[{"role": "assistant", "content": "Hello"}]],
        "rejected": [[{"role": "assistant", "content": "Go"}]],
        "chosen_reward": [1.0],
        "rejected_reward": [0.0],
        "label_probability": [0.75],
        "source": ["web"],
    }
)
CANDIDATES = Dataset.from_dict(
    {"prompt": ["Hi", "Ho"], "completions": [["a", "b"], ["c"]], "rewards": [[1.0, 2.0], []]}
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished dataset, with what a kill and a user may have left in the folder."""
    folder = tmp_path / "pairs"
    PAIRS.save_to_disk(str(folder / "pairs"))
    CANDIDATES.save_to_disk(str(folder / "candidates"))
    (folder / "manifest.json").write_text(json.dumps({"finished": True, "settings": SETTINGS}))
    (folder / "statistics.json").write_text(json.dumps(STATISTICS.as_dict()))
    (folder / "README.md").write_text(dataset_card(SETTINGS, STATISTICS, PAIRS), encoding="utf-8")
    (folder / "shards").mkdir()
    for name in ("shards/00000.ranked.jsonl", "statistics.json.partial", "secret.txt"):
        (folder / name).write_text("not for others")
    return folder


def rows(text: str) -> dict[str, list[str]]:
    """Rows of all tables by their first cell, as Markdown splits them: at each bar that has no backslash."""
    cells = [
        [cell.strip().replace("\0", "|") for cell in line[2:-2].replace(r"\|", "\0").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    return {first: others for first, *others in cells}


def code(cell: str) -> str:
    """What Markdown shows of code: the spaces that set off a backtick at its end are not part of it."""
    ticks = len(cell) - len(cell.lstrip("`"))
    inside = cell[ticks:-ticks]
    assert ticks and cell.endswith("`" * ticks) and "`" * ticks not in inside
    return inside[1:-1] if ticks > 1 else inside


# The card


@pytest.mark.parametrize(("name", "expected"), [("pairs", PAIRS), ("candidates", CANDIDATES), (None, PAIRS)])
def test_the_folder_loads_by_its_card(folder: Path, tmp_path: Path, name: str | None, expected: Dataset) -> None:
    load_from_disk(str(folder / "pairs")).map(lambda row: {"source": "changed"})  # leaves a cache beside the data
    caches = [path.relative_to(folder).as_posix() for path in folder.rglob("cache-*.arrow")]
    assert len(caches) == 1 and not list(filter_repo_objects(caches, allow_patterns=PUSHED))
    loaded = load_dataset(str(folder), name, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == expected.to_list()
    assert loaded.features == expected.features


def test_the_metadata_are_what_the_hub_reads() -> None:
    text = dataset_card(SETTINGS, STATISTICS, PAIRS)
    metadata = DatasetCard(text).data
    assert metadata.tags == ["trl", "prefopt-trl", "preference", "rso", "first-round"]
    description = metadata.configs[0]["description"]
    assert metadata.configs == [
        {"config_name": "pairs", "data_files": "pairs/data-*.arrow", "default": True, "description": description},
        {"config_name": "candidates", "data_files": "candidates/data-*.arrow", "description": description},
    ]
    _, front, _ = text.split("---\n", 2)
    assert yaml.safe_load(front) == metadata.to_dict()


def test_each_dataset_has_a_fingerprint_of_its_own_and_the_card_depends_on_its_arguments_alone() -> None:
    # By which `load_dataset` tells it from another one in the same folder
    card = dataset_card(SETTINGS, STATISTICS, PAIRS)
    other_pairs = PAIRS.map(lambda row: {"chosen_reward": row["chosen_reward"] + 1})
    cards = [
        card,
        dataset_card({**SETTINGS, "seed": 99}, STATISTICS, PAIRS),
        dataset_card(SETTINGS, STATISTICS, other_pairs),
    ]
    assert len({DatasetCard(text).data.configs[0]["description"] for text in cards}) == 3
    shuffled = {name: SETTINGS[name] for name in reversed(SETTINGS)}
    again = Dataset.from_list(PAIRS.to_list(), features=PAIRS.features)
    assert dataset_card(shuffled, STATISTICS, again) == card


def test_the_statistics_are_as_they_are_printed() -> None:
    text = dataset_card(SETTINGS, STATISTICS, PAIRS)
    assert f"\n```text\n{STATISTICS}\n```\n" in text and "\n2376 pairs from 1188 of 1200 prompts\n" in text
    assert "of which up to 4\ndistinct ones are kept by statistical rejection sampling" in text
    assert "Warning" not in text
    assert re.search(r"\n!\[.+\]\(statistics.png\)\n\n## Use", text)
    assert "statistics.png" not in dataset_card(SETTINGS, STATISTICS, PAIRS, has_plot=False)
    warned = dataset_card(SETTINGS | {"strategy": "top-k"}, replace(STATISTICS, warning="Too small a beta."), PAIRS)
    assert "\n> **Warning:** Too small a beta.\n" in warned
    assert "of which up to 4\ndistinct ones with the highest rewards are kept" in warned


def test_settings_are_listed_by_their_dotted_names_with_short_fingerprints() -> None:
    text = dataset_card(SETTINGS, STATISTICS, PAIRS)
    settings = {
        code(name): code(value) for name, (value,) in rows(text.split("## Settings")[1]).items() if "`" in name
    }
    assert settings == {
        "beta": "0.5",
        "num_samples": "4",
        "pairing": '"first-round"',
        "prompts": '"0123456789ab…"',
        "ranker.class": '"FunctionRanker"',
        "ranker.function": '"brevity:fedcba987654…"',
        "ranker.options": "{}",
        "strategy": '"rso"',
    }
    assert list(settings) == sorted(settings)


UNTRUSTED = [
    "a | b",
    "\\|",
    "`",
    "a``b`",
    "\n\n# Title\r\n",
    "<script>alert(1)</script>",
    "*a* _b_ [c](d)",
    "&lt; é空 {{ 7 * 7 }} {% raw %}",
]


@pytest.mark.parametrize("text", UNTRUSTED)
def test_no_text_is_read_as_markdown(text: str) -> None:
    named = PAIRS.add_column(text, [0])
    written = dataset_card(SETTINGS | {"stop_strings": [text], text: 1}, STATISTICS, named)
    usual = dataset_card(SETTINGS | {"stop_strings": [""], "text": 1}, STATISTICS, PAIRS.add_column("text", [0]))
    assert len(written.splitlines()) == len(usual.splitlines())
    columns, settings = written.split("## Columns")[1].split("## Settings")
    (cell,) = [value for name, (value, *_) in rows(settings).items() if name == "`stop_strings`"]
    assert json.loads(code(cell)) == [text]
    for table, value in ((columns, "given with the prompts"), (settings, "`1`")):
        names = [code(name) for name, (found, *_) in rows(table).items() if found == value]
        assert text in [json.loads(f'"{name}"') for name in names]


HOSTILE = [
    "# Title\n\n![image](http://x/y.png) [link](javascript:alert(1))\n\n---\n| a | b |\n| --- | --- |\n",
    "``` ````\n```html\n<h1>Title</h1>\n```\n",
    "` <img src=x onerror=alert(1)> `` <script>alert(1)</script> ``` [a](b) ` | ` <h1>",
    '</code></td></table><h1>Title</h1><a href="x">y</a> load_dataset("other", "pairs") <!-- ',
    "\\` <img src=x> \\| <script> {{ settings }} \\",
]


@pytest.mark.parametrize("made", ["pairs", "rankings"])
def test_no_example_is_read_as_markdown_or_html(made: str) -> None:
    def card(texts: list[str]) -> str:
        columns: dict[str, list] = {"prompt": [f"{row} {text}" for row, text in enumerate(texts)]}
        if made == "pairs":
            columns |= {"chosen": texts, "rejected": texts, "chosen_reward": [1.0] * 5, "rejected_reward": [0.0] * 5}
        else:
            columns |= {"completions": [texts] * 5, "rewards": [[0.0] * 5] * 5}
        return dataset_card(SETTINGS, replace(STATISTICS, made=made), Dataset.from_dict(columns))

    def tags(card: str) -> list[str]:
        return re.findall(r"<[!/]?[a-z-]+", markdown(card.split("---\n", 2)[2], extensions=["tables", "fenced_code"]))

    hostile = card(HOSTILE)
    assert tags(hostile) == tags(card(["usual"] * 5))
    assert hostile.index('load_dataset("this/repository"') == hostile.index("load_dataset(")  # as a push expects


def test_examples_are_the_first_rows_of_different_prompts_and_long_texts_are_shortened() -> None:
    rows_of = [
        {"prompt": prompt, "chosen": f"{row}\nbest", "rejected": " ", "chosen_reward": row, "rejected_reward": -1.234}
        for row, prompt in enumerate("aabcdef")
    ]
    rows_of[3]["chosen"], rows_of[4]["chosen"] = "x" * 1501, "y" * 500
    examples = dataset_card(SETTINGS, STATISTICS, Dataset.from_list(rows_of)).split("## Examples")[1]
    lines = [line for line in examples.split("## Columns")[0].splitlines() if line.startswith("| ")][2:]
    assert lines[:3] == ["| **prompt** |  | `a` |", "| chosen | 0.00 | `0 ⏎ best` |", "| rejected | -1.23 | (empty) |"]
    assert [line for line in lines if "prompt" in line] == [f"| **prompt** |  | `{name}` |" for name in "abcde"]
    assert f"| chosen | 3.00 | `{'x' * 500}` … (1,501 characters) |" in lines
    assert f"| chosen | 4.00 | `{'y' * 500}` |" in lines
    assert "| chosen | 1.00 | `assistant: Hello` |" in dataset_card(SETTINGS, STATISTICS, PAIRS)


def test_rankings_are_for_the_trainers_on_rankings() -> None:
    rankings = Dataset.from_dict({"prompt": ["Hi"], "completions": [["a", "b"]], "rewards": [[2.0, 1.0]]})
    statistics = replace(STATISTICS, made="rankings")
    text = dataset_card(SETTINGS | {"pairing": "ranking"}, statistics, rankings)
    assert "\n2376 rankings from 1188 of 1200 prompts\n" in text
    assert "trainer = PROTrainer(model, train_dataset=rankings)" in text and "RSOTrainer" not in text
    assert rows(text)["`completions`"] == ["the completions kept, best first"]


# The way to the Hub


def test_only_the_dataset_is_pushed_and_loads_by_its_card(hub: Hub, folder: Path) -> None:
    hub.repos["dataset", "someone/pairs"] = {"notes.md": b"mine", "pairs/data-00001-of-00002.arrow": b"of an earlier"}
    url = push_preference_dataset(folder, "pairs", private=True)
    assert url == f"{hub.url}/datasets/someone/pairs"
    expected = {"README.md", "manifest.json", "statistics.json", "notes.md"}
    for name in ("pairs", "candidates"):
        expected |= {f"{name}/{file}" for file in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")}
    pushed = hub.files("someone/pairs", "dataset")
    assert pushed.keys() == expected
    assert all(content == (folder / name).read_bytes() for name, content in pushed.items() if name != "notes.md")

    text = pushed["README.md"].decode()
    (line,) = [line for line in text.splitlines() if line.startswith("pairs = load_dataset(")]
    assert line.startswith('pairs = load_dataset("someone/pairs", "pairs", split="train")')
    namespace: dict[str, Any] = {"load_dataset": load_dataset}
    exec(line, namespace)
    assert namespace["pairs"].to_list() == PAIRS.to_list()
    assert load_dataset("someone/pairs", "candidates", split="train").to_list() == CANDIDATES.to_list()


def test_a_card_that_was_edited_stays_so(hub: Hub, folder: Path) -> None:
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\nMy notes.\n", encoding="utf-8")
    for repo_id in ("my-org/one", "my-org/two"):
        push_preference_dataset(folder, repo_id)
        text = hub.files(repo_id, "dataset")["README.md"].decode()
        assert text.endswith("\nMy notes.\n")
        assert text.count(f'load_dataset("{repo_id}", "pairs"') == 1 == text.count('load_dataset("')


@pytest.mark.parametrize("state", ["unfinished", "nothing"])
def test_what_is_not_finished_is_not_pushed(hub: Hub, tmp_path: Path, state: str) -> None:
    if state == "unfinished":
        (tmp_path / "manifest.json").write_text(json.dumps({"finished": False, "settings": SETTINGS}))
    with pytest.raises(ValueError) as error:
        push_preference_dataset(tmp_path, "someone/pairs")
    said = f"{tmp_path} holds no finished dataset. Give `build_preference_dataset` the same settings"
    assert said in str(error.value) and hub.requests == []


def test_how_it_was_sampled_is_read_again(folder: Path) -> None:
    assert read_sampled(folder) == (SETTINGS, STATISTICS)
    earlier = STATISTICS.as_dict()  # without numbers that came later
    del earlier["length_quantiles"], earlier["acceptance_quantiles"]
    (folder / "statistics.json").write_text(json.dumps(earlier))
    assert read_sampled(folder) == (SETTINGS, STATISTICS)


def test_a_push_that_fails_has_the_command_and_can_be_repeated(hub: Hub, folder: Path) -> None:
    hub.fail("POST .*/commit/", 403, "Private repository storage limit reached")
    with pytest.raises(PushError) as error:
        push_preference_dataset(folder, "someone/pairs")
    message = str(error.value)
    assert f"\n    hf upload someone/pairs {folder} --repo-type dataset --include README.md " in message
    assert message.rstrip().endswith("--delete 'candidates/*' --delete 'pairs/*'")
    hub.failures.clear()
    push_preference_dataset(folder, "someone/pairs")
    assert "pairs/data-00000-of-00001.arrow" in hub.files("someone/pairs", "dataset")
