"""`prefopt-trl reproduce` with a model, prompts and a ranker of the user."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prefopt_trl.experiments.tables import TABLES
from prefopt_trl.experiments.worlds import reviews
from prefopt_trl.sampling.store import lock

SIZES = "--world real --num_seeds 1 --num_workers 1 --num_judged 8 --max_steps 2 --per_device_train_batch_size 2"
SIZES += " --num_candidates 9 --max_new_tokens 4 --max_length 64"


@pytest.fixture
def real(tiny_llama_dir, function_ranker) -> list[str]:
    return ["--model_name_or_path", tiny_llama_dir, *function_ranker, *SIZES.split()]


def test_a_real_model_by_ones_own_ranker(real, run_in_process, monkeypatch, capsys):
    for name, rows in {
        "quickstart": ["given pairs (DPO)", "rejection sampling, beta 2"],
        "rounds": ["3 rounds"],
    }.items():
        cells = {row: TABLES[name].cells[row] for row in rows}
        monkeypatch.setitem(TABLES, name, replace(TABLES[name], rows=cells, claims=[]))
    run_in_process("reproduce", ["--tables", "quickstart", "rounds", *real, "--results_dir", "results"])
    printed = capsys.readouterr().out
    for name in ("quickstart", "rounds"):
        text = Path(f"results/{name}.md").read_text()
        assert text in printed and f"| {next(iter(TABLES[name].cells))} " in text
        assert "of the possible" not in text
        assert " on beginnings of reviews by " in text
        assert " (gamma 0.1, num_judged 8, max_steps 2, learning_rate 0.0002, per_device_train_batch_size 2, " in text
    found = [json.loads(file.read_text()) for file in Path("outputs/reproduce/policies/seed-0").glob("*/results.json")]
    assert len(found) == 1 + 2 + 1
    assert all(one["truth's reward"] < 0 for one in found)


def test_prompts_with_pairs_bring_the_given_ones(real, run_in_process):
    rows = [{"prompt": f"Question {i}?", "chosen": f" Yes {i}.", "rejected": f" No {i}."} for i in range(32)] * 2
    Path("many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_in_process("reproduce", ["--tables", "dpo-table-3", *real, "--dataset_name", "many.jsonl"])
    files = Path("outputs/reproduce/policies/seed-0").glob("*/evaluation/samples.jsonl")
    samples = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    targets = {one["completion"] for one in samples if one["policy"] == "target"}
    assert len(targets) == 8 and targets <= {row["chosen"] for row in rows}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tables", "map"], "`tables`: 'map' is none of the real world's: quickstart, rso-table-1"),
        (["--num_judged", "128"], "`num_judged`=128 leaves too few"),
        (["--world", "kitchen"], "`ranker` has no effect without `--world real`"),
        (["--dataset_split", "test"], "`dataset_split` has no effect without `dataset_name`"),
        (["--num_workers", "0"], "`num_workers` must be"),
        (["--num_seeds", "0"], "`num_seeds` must be"),
        (["--num_judged", "0"], "`num_judged` must be"),
        (["--max_steps", "0"], "`max_steps` must be"),
        (["--num_candidates", "8"], "`num_candidates` must be a whole number, at least 9"),
    ],
)
def test_wrong_arguments_are_refused(more, message, real, run_in_process):
    with pytest.raises(ValueError, match=message):
        run_in_process("reproduce", ["--tables", "quickstart", *real, *more])


def test_a_folder_of_other_settings_is_refused_and_left_alone(real, run_in_process):
    folder = Path("outputs/reproduce/policies")
    (folder / "seed-0").mkdir(parents=True)
    (folder / "settings.json").write_text('{"world": "kitchen"}')
    with pytest.raises(ValueError, match="has results with other .*Choose another `output_dir`") as refused:
        run_in_process("reproduce", ["--tables", "quickstart", *real])
    assert not hasattr(refused.value, "__notes__")  # such as how to resume
    assert not (folder.parent / "config.yaml").exists()


def test_two_runs_do_not_share_a_folder(real, run_in_process):
    with lock(Path("outputs/reproduce/policies"), "experiments"), pytest.raises(RuntimeError, match="Another run is"):
        run_in_process("reproduce", ["--tables", "quickstart", *real])


def test_beginnings_of_reviews_have_2_to_8_words():
    prompts = reviews()["prompt"][:]
    lengths = {len(prompt.split()) for prompt in prompts}
    assert lengths == set(range(2, 9)) and len(set(prompts)) == len(prompts) > 192
