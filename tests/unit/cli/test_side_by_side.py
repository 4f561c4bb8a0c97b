"""`prefopt-trl side-by-side make` and `score`: two words, one command each."""

import json
from pathlib import Path

import pytest

from prefopt_trl.cli.main import main
from tests.side_by_side import save, write_samples


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_study_is_made_and_scored(tmp_path, capsys):
    write_samples(tmp_path / "s.jsonl", {"a": ["yes", "same"], "b": ["no", "same"]})
    main(["side-by-side", "make", "--samples", "s.jsonl", "--output_dir", ".", "--policies", "b", "a"])
    assert "1 tasks; 1 prompts with equal or missing completions left out." in capsys.readouterr().out
    files = [str(save(tmp_path, rater, ["a"], [{"a": 5, "b": 1}])) for rater in "123"]
    main(["side-by-side", "score", "--study", ".", "--answers", *files, "--output_dir", "scores"])
    report = capsys.readouterr().out
    assert "| quality/a            |                     5 |" in report
    assert report in Path("scores/side_by_side.md").read_text()
    found = json.loads(Path("scores/side_by_side.json").read_text())
    assert found["agreement/raters"] == {"mean": 1.0, "standard_error": None, "num_prompts": 1}
    assert found["cohens_kappa/raters"]["mean"] is found["fleiss_kappa/raters"]["mean"] is None  # one choice only
