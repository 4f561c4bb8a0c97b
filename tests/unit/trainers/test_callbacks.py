"""What TensorBoard, trackio and Weights & Biases are given, read back from what they wrote."""

import html
import json
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trackio
import wandb
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from trackio.sqlite_storage import SQLiteStorage
from wandb.proto.wandb_internal_pb2 import Record

from prefopt_trl import FunctionRanker, ListwiseDPOTrainer, PROConfig, PROTrainer, RSOConfig, RSOTrainer
from prefopt_trl.trainers.callbacks import LogPreferencesCallback, first_examples, html_table, table_of
from tests.unit.known_rankers import brevity

PROMPTS = Dataset.from_dict({"prompt": ["The capital of France is", "Why?", "Mix"]})
SAMPLING = {"num_candidates": 6, "num_samples": 4, "max_new_tokens": 6, "strategy": "sft"}


# The table


QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
ANSWER = [{"role": "assistant", "content": "So."}]
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
REWARDS = {"chosen_reward": 2.0, "rejected_reward": -1.0, "label_probability": 0.75}
RANKING = {"prompt": "p", "completions": ["a", "b", "c"], "rewards": [0, 2, 1]}


@pytest.mark.parametrize(
    ("example", "columns", "rows"),
    [
        ({**PAIR, **REWARDS, "source": "x"}, [*PAIR, *REWARDS], [["p", "c", "r", 2.0, -1.0, 0.75]]),
        (
            {"prompt": QUESTION, "chosen": ANSWER, "rejected": ANSWER},
            [*PAIR],
            [["system: Be brief.\nuser: Why?", "assistant: So.", "assistant: So."]],
        ),
        ({"chosen": ANSWER, "rejected": ANSWER}, ["chosen", "rejected"], [["assistant: So."] * 2]),  # with the prompt
        (
            RANKING,
            ["prompt", "completion", "reward", "rank"],
            [["p", "b", 2.0, 1], ["p", "c", 1.0, 2], ["p", "a", 0.0, 3]],
        ),
    ],
)
def test_a_table_has_a_row_for_each_pair_or_completion(example, columns, rows):
    assert table_of([example, example]) == (columns, rows + rows)


@pytest.mark.parametrize(
    "text",
    [
        "\n\nHuman: Why?\n\nAssistant: ",
        "<script>alert(1)</script><img src=x onerror=alert(1)></td></table>",
        "a | b || `code` ``` *bold* _it_ __init__ [link](http://x.y) ![i](j) # h\\ \\| & &lt; &#60;",
        "# no heading\n- no list\n\n1. nor this\n| no | row |\n| --- | --- |\n> quote\r\n    code\n```\u2028fence",
        "ünï — 漢字 🙂 \x02\x03 0_0",
    ],
)
def test_tensorboard_shows_a_text_as_it_is(text):
    """Its own renderer: one cell, in which nothing is Markdown or HTML."""
    page = markdown_to_safe_html(html_table(["head", "next"], [[text, 1]]))
    ((cell, _),) = cells(page)
    assert not set(re.findall(r"<(\w+)", cell)) - {"br"}
    shown = html.unescape(cell.replace("<br>", "\n"))
    lines = re.sub("[\x02\x03]", "", text).strip().splitlines()  # no HTML has these
    assert [line.split() for line in shown.split("\n")] == [line.split() for line in lines]


def test_tensorboard_shows_numbers_in_few_digits():
    row = [12345, "1.50000", 0.46000120043754721, -12.0, 0.99999]
    assert cells(html_table(list("abcde"), [row])) == [["12345", "1.50000", "0.46", "-12", "1"]]


def test_a_dataset_of_tokens_has_no_examples():
    assert first_examples(Dataset.from_dict({"prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[3]]})) is None
    pairs = Dataset.from_dict({"prompt": ["p"] * 9, "chosen": ["c"] * 9, "rejected": ["r"] * 9})
    assert len(first_examples(pairs)) == len(first_examples(pairs.to_iterable_dataset())) == 8


# Trackers


def of_tensorboard(folder: Path) -> tuple[dict[str, dict[int, float]], list[tuple[int, str]]]:
    (events,) = folder.rglob("events.out.tfevents*")
    written = EventAccumulator(str(events)).Reload()
    scalars = {tag: {event.step: event.value for event in written.Scalars(tag)} for tag in written.Tags()["scalars"]}
    texts = written.Tensors("train/completions/text_summary")
    return scalars, [(event.step, event.tensor_proto.string_val[0].decode()) for event in texts]


def cells(table: str) -> list[list[str]]:
    _, *rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.DOTALL)
    return [re.findall(r"<td>(.*?)</td>", row, flags=re.DOTALL) for row in rows]


def of_wandb(folder: Path) -> list[dict]:
    """What was logged. `wandb.finish` may return before its file is whole, which ends with a record of the exit."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while not (records := records_of(file.read_bytes())) or not records[-1].HasField("exit"):
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.1)
    rows = [record.history.item for record in records if record.history.item]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def records_of(data: bytes) -> list[Record]:
    """The whole records of a log in LevelDB's format."""
    position, record, records = 7, b"", []
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4) and position <= len(data):  # whole, or its last part
            records.append(Record.FromString(record))
            record = b""
    return records


def keep_trackio_in(folder: Path, monkeypatch) -> None:
    """Its folder is read from the environment when it is imported."""
    before = trackio.utils.TRACKIO_DIR
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trackio":
            for attribute, value in list(vars(module).items()):
                if isinstance(value, Path) and value.is_relative_to(before):
                    monkeypatch.setattr(module, attribute, folder / value.relative_to(before))


@pytest.fixture
def trackers(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    keep_trackio_in(tmp_path / "trackio", monkeypatch)
    yield tmp_path
    wandb.finish()


def test_every_tracker_receives_metrics_and_the_sampled_table(trackers, make):
    given = {"report_to": ["tensorboard", "trackio", "wandb"], "project": "ours", "run_name": "one", "max_steps": 2}
    trainer = make(RSOTrainer, PROMPTS, ranker=FunctionRanker(brevity), log_completions=True, **given, **SAMPLING)
    trainer.train()
    wandb.finish()

    sampled = Dataset.load_from_disk(str(trackers / "sampled" / "train" / "pairs")).to_list()[:8]
    assert len(sampled) == 6
    columns = ["prompt", "chosen", "rejected", "chosen_reward", "rejected_reward", "label_probability"]
    rows = [[0, *(row[name] for name in columns)] for row in sampled]
    assert all(row[4] == -len(row[2]) and row[5] == -len(row[3]) for row in rows)

    scalars, texts = of_tensorboard(trackers)
    ((step, table),) = texts
    assert step == 0
    assert cells(table) == [["0", *map(shown, row[1:4]), *(f"{number:.4g}" for number in row[4:])] for row in rows]

    of_trackio = SQLiteStorage.get_logs("ours", "one")
    (table,) = [entry["completions"]["_value"] for entry in of_trackio if "completions" in entry]
    assert table == [dict(zip(["step", *columns], row, strict=True)) for row in rows]

    logged = of_wandb(trackers)
    (entry,) = [entry for entry in logged if any(name.startswith("completions") for name in entry)]
    assert entry["train/global_step"] == 0
    (file,) = trackers.glob("wandb/offline-run-*/files/media/table/completions*.table.json")
    written = json.loads(file.read_text())
    assert written["columns"] == ["step", *columns] and written["data"] == rows

    ours = {"loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "entropy"}
    for log in trainer.state.log_history[:2]:
        assert ours <= log.keys()
        for name in ours:
            expected = pytest.approx(log[name], rel=1e-6)
            assert scalars[f"train/{name}"][log["step"]] == expected
            for entries in (of_trackio, logged):
                at_step = [entry for entry in entries if entry.get("train/global_step") == log["step"]]
                (found,) = [entry[f"train/{name}"] for entry in at_step if f"train/{name}" in entry]
                assert found == expected


# Batches that are sampled while training


def shown(text: str) -> str:
    return "<br>".join(html.escape(text.strip()).splitlines())


class Brevity(FunctionRanker):
    """Knows the reward of each completion as a table writes it, with the token that ends it."""

    def __init__(self) -> None:
        super().__init__(brevity)
        self.seen: dict[str, float] = {}

    def rewards(self, prompts, completions, columns=None):
        rewards = super().rewards(prompts, completions)
        for row, of_row in zip(completions, rewards, strict=True):
            written = [shown(text + "</s>") for text in row]
            self.seen |= dict(zip(written, map(float, of_row), strict=True))
        return rewards


WRITTEN_PROMPTS = {shown("<s>" + prompt) for prompt in PROMPTS["prompt"]}


def test_online_pairs_are_those_of_each_logged_batch(make, tmp_path):
    ranker = Brevity()
    online = {"sampling": "online", "per_device_train_batch_size": 1, "max_steps": 2}
    given = {"ranker": ranker, "report_to": "tensorboard", "log_completions": True}
    make(RSOTrainer, PROMPTS, **given, **SAMPLING, **online).train()
    _, texts = of_tensorboard(tmp_path)
    assert [step for step, _ in texts] == [1, 2]
    prompts = []
    for step, table in texts:
        rows = cells(table)
        assert len(rows) == 2 and {row[0] for row in rows} == {str(step)}
        prompts.append({row[1] for row in rows})
        assert all(ranker.seen[row[2]] >= ranker.seen[row[3]] for row in rows)
        assert len({row[2] for row in rows} | {row[3] for row in rows}) == 4
    assert all(len(of_batch) == 1 for of_batch in prompts) and prompts[0] != prompts[1]
    assert prompts[0] | prompts[1] < WRITTEN_PROMPTS


@pytest.mark.parametrize("how", ["online", "bootstrap"])
def test_rankings_sampled_while_training_have_the_rankers_rewards(how, make, tmp_path):
    ranker = Brevity()
    given = {"ranker": ranker, "report_to": "tensorboard", "log_completions": True}
    if how == "online":
        given |= {"sampling": "online", **SAMPLING, "pairing": "ranking", "per_device_train_batch_size": 3}
        trainer = make(ListwiseDPOTrainer, PROMPTS, **given)
    else:  # the data's completions have the best rewards, so that none is dealt to another (PRO, footnote 6)
        rankings = PROMPTS.add_column("completions", [["", "."]] * 3)
        trainer = make(PROTrainer, rankings, **given, bootstrap_parts=1, max_new_tokens=6)
    trainer.train()
    _, ((step, table),) = of_tensorboard(tmp_path)
    rows = cells(table)
    num_completions = 4 if how == "online" else 3
    assert step == 1 and len(rows) == 3 * num_completions
    assert {row[1] for row in rows} == WRITTEN_PROMPTS
    assert [int(row[4]) for row in rows] == list(range(1, num_completions + 1)) * 3
    assert [float(row[3]) for row in rows] == [ranker.seen[row[2]] for row in rows]
    own = [row for row in rows if row[2] not in {shown(text) for text in ("</s>", ".</s>")}]
    assert len(own) == (12 if how == "online" else 3)


def test_other_processes_log_nothing(monkeypatch):
    monkeypatch.setattr("prefopt_trl.trainers.callbacks.table_of", lambda examples: pytest.fail("a table was made"))
    callback = LogPreferencesCallback(SimpleNamespace(), [{"prompt": "p", "chosen": "c", "rejected": "r"}])
    callback.on_train_begin(SimpleNamespace(), SimpleNamespace(is_world_process_zero=False), SimpleNamespace())


@pytest.mark.parametrize("config_class", [RSOConfig, PROConfig])
@pytest.mark.parametrize("report_to", ["none", "mlflow"])
def test_a_table_that_nobody_shows_is_refused(config_class, report_to, config):
    with pytest.raises(ValueError, match="`log_completions` has no effect .*none of tensorboard, trackio, wandb"):
        config(config_class, log_completions=True, report_to=report_to)
