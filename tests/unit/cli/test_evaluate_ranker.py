"""`prefopt-trl evaluate-ranker`: what it prints and writes, and that `ranker.yaml` is the calibrated ranker."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from prefopt_trl.cli.arguments import RankerArguments
from prefopt_trl.cli.parsing import parse
from prefopt_trl.cli.rankers import load_ranker
from prefopt_trl.rankers.calibration import Calibration
from prefopt_trl.rankers.pairwise import PairwiseRanker
from prefopt_trl.rankers.templates import TEMPLATES

FUNCTION = "def reward(prompts, completions, weight):\n    return [len(c) * w for c, w in zip(completions, weight)]\n"


@pytest.fixture
def comparisons(tmp_path):
    """Rows of which the longer completion is chosen in 30 of 40, by 2 characters."""
    texts = [("abcd", "ab")] * 30 + [("ab", "abcd")] * 10
    rows = [{"prompt": f"{i}?", "chosen": c, "rejected": r, "weight": 1.5} for i, (c, r) in enumerate(texts)]
    (tmp_path / "comparisons.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(FUNCTION)
    return ["--dataset_name", "comparisons.jsonl", "--use_cpu"]


def test_it_prints_and_writes_the_report_and_the_calibrated_function(comparisons, run_in_process, capsys):
    run_in_process(
        "evaluate-ranker", [*comparisons, "--ranker", "own.py:reward", "--output_dir", "out", "--calibrate"]
    )
    printed = capsys.readouterr().out
    report = Path("out/ranker_quality.md").read_text().removeprefix("# Ranker quality\n\n")
    assert report in printed and "temperature 2.73 (95% interval" in printed
    assert json.loads(Path("out/ranker_quality.json").read_text())["estimates"]["accuracy"]["mean"] == 0.75
    assert Path("out/ranker_quality.png").stat().st_size > 10_000
    calibration = json.loads(Path("out/calibration.json").read_text())
    assert calibration["temperature"] == pytest.approx(3 / np.log(3))  # sigmoid(2 * 1.5 / T) = 3 / 4
    again = load_ranker(RankerArguments(ranker="out/ranker.yaml"))
    assert again.settings()["temperature"] == calibration["temperature"]
    assert again.compare(["?"], ["abcd"], ["ab"], {"weight": [1.5]}) == pytest.approx([0.75])
    assert parse("evaluate-ranker", ["--config", "out/config.yaml"])[0][0].calibrate
    # A specification is completed, and its own temperature does not count twice
    run_in_process(
        "evaluate-ranker", [*comparisons, "--ranker", "out/ranker.yaml", "--output_dir", "more", "--calibrate"]
    )
    assert yaml.safe_load(Path("more/ranker.yaml").read_text()) == pytest.approx(
        {"class": "FunctionRanker", "function": "own.py:reward", "temperature": calibration["temperature"]}
    )


def test_a_model_keeps_its_arguments(comparisons, run_in_process, tiny_llama_dir, monkeypatch):
    found = Calibration(2.5, (1.0, float("inf")), 40, 40, 0.7, 0.6)
    monkeypatch.setattr("prefopt_trl.cli.evaluate_ranker.fit_temperature", lambda compared: found)
    options = ["--ranker_template", "summary", "--ranker_batch_size", "8", "--output_dir", "out", "--calibrate"]
    run_in_process("evaluate-ranker", [*comparisons, "--ranker", tiny_llama_dir, *options])
    assert "order_bias" in json.loads(Path("out/ranker_quality.json").read_text())["estimates"]
    assert json.loads(Path("out/calibration.json").read_text())["interval"] == [1.0, None]
    again = load_ranker(RankerArguments(ranker="out/ranker.yaml"))
    assert isinstance(again, PairwiseRanker) and again.settings()["temperature"] == 2.5
    assert (again.template, again.ranking_model.batch_size) == (TEMPLATES["summary"], 8)


def test_other_columns_are_named(comparisons, run_in_process):
    Path("comparisons.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n')
    with pytest.raises(ValueError, match="has the columns prompt, completion, and needs `chosen` and `prompt` and"):
        run_in_process("evaluate-ranker", [*comparisons, "--ranker", "own.py:reward", "--output_dir", "out"])
