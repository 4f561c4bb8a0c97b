"""What a table shows, against numbers worked out by hand."""

import csv
import math

import numpy as np
import pytest
from scipy import stats

from prefopt_trl.experiments import report
from prefopt_trl.experiments.cells import Cell
from prefopt_trl.experiments.tables import FRONTIER, MAP, TABLES, Table

REWARDS = {
    "SFT policy": [1.0, 2.0, 3.0, 2.0],
    "a": [3.0, 4.2, 4.9, 4.1],  # + 2.0, 2.2, 1.9, 2.1
    "b": [2.9, 4.3, 5.0, 3.9],  # about a
    "c": [0.0, 0.8, 2.1, 1.1],  # - 1.0, 1.2, 0.9, 0.9
}
CLAIMS = [("a", "SFT policy"), ("c", "SFT policy"), ("b", "a")]
FOUND = Table("A title", "a source", "the rest", {"a": (Cell(), "12")}, CLAIMS, "apples")


def results(rewards=REWARDS):
    made = {
        row: [{"seed": 7 + number, report.REWARD: one, "kl": 0.5} for number, one in enumerate(of)]
        for row, of in rewards.items()
    }
    for one in made["a"]:
        one["rows"] = 3  # which the SFT policy has not
    return made


def test_holm_by_hand():
    assert report.holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]
    assert report.holm([0.5, 0.6]) == [1.0, 1.0]
    corrected = report.holm([math.nan, 0.02])
    assert math.isnan(corrected[0]) and corrected[1] == 0.02


def test_claims_hold_are_reversed_or_not_decided():
    gaps = [np.subtract(REWARDS[better], REWARDS[worse]) for better, worse in FOUND.claims]
    p = [stats.ttest_1samp(gap, 0).pvalue for gap in gaps]
    rows = report.claims_of(FOUND, results())
    assert [row[-1] for row in rows] == ["holds", "the reverse", "not decided"]
    assert rows[0][0] == f"{gaps[0].mean():+.2f} ± {gaps[0].std(ddof=1) / 2:.2f}"
    ordered = sorted(p)
    sentence = report.conclusion(FOUND, [row[-1] for row in rows])
    assert sentence.startswith("**Decided by the reward: a > SFT policy; SFT policy > c.** Not decided: 1 of 3. ")
    expected = {ordered[0]: 3 * ordered[0], ordered[1]: 2 * ordered[1], ordered[2]: ordered[2]}
    printed = [0.0 if row[1] == "<0.001" else float(row[1]) for row in rows]
    assert printed == pytest.approx([expected[one] for one in p], abs=1e-3)


def test_one_seed_decides_nothing():
    rows = report.claims_of(FOUND, results({row: of[:1] for row, of in REWARDS.items()}))
    assert [row[-1] for row in rows] == ["not decided"] * 3
    sentence = report.conclusion(FOUND, [row[-1] for row in rows])
    assert sentence.startswith("**Decided by the reward: nothing.** Not decided: 3 of 3. ")
    text = report.as_markdown("one", FOUND, results({row: of[:1] for row, of in REWARDS.items()}), None, "")
    assert "corrected for" not in text and "| -: |" in text  # a Markdown table, where no p-value is known


def test_the_correction_counts_the_tests_of_both_metrics(tmp_path):
    made = results()
    for of in made.values():
        for one in of:
            one[report.WINS] = one[report.REWARD]
    p = [stats.ttest_1samp(np.subtract(REWARDS[better], REWARDS[worse]), 0).pvalue for better, worse in FOUND.claims]
    rows = report.claims_of(FOUND, made)
    for row in rows:
        assert row[1:3] == row[4:6]
    least = rows[int(np.argmin(p))][1]
    assert least == ("<0.001" if 6 * min(p) < 0.001 else f"{6 * min(p):.3f}")
    text = report.write("both", FOUND, made, tmp_path, None, "World: kitchen.")
    assert "p by Student's t over seeds, corrected for the 6 of them (Holm)." in text
    assert "Fixed: the rest. World: kitchen." in text


def test_the_table_has_differences_shares_and_the_papers_numbers(tmp_path):
    text = report.write("name", FOUND, results(), tmp_path, 10.0, "World: kitchen.")
    assert text == (tmp_path / "name.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| a  ")]
    gap = np.subtract(REWARDS["a"], REWARDS["SFT policy"])
    share = gap / (10 - np.array(REWARDS["SFT policy"]))
    for number in (
        f"{np.mean(REWARDS['a']):.2f} ± {np.std(REWARDS['a'], ddof=1) / 2:.2f}",
        f"{gap.mean():+.2f} ± {gap.std(ddof=1) / 2:.2f}",
        f"{share.mean():.0%} ± {share.std(ddof=1) / 2:.0%}",
        "  0.50 |",
        "  12 |",
    ):
        assert number in line
    assert "over the seeds 7, 8, 9, 10;" in text
    with (tmp_path / "name.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row[report.REWARD]) for row in rows if row["row"] == "c"] == REWARDS["c"]
    assert [(row["seed"], row["rows"]) for row in rows if row["row"] == "a"] == [(f"{7 + i}", "3") for i in range(4)]
    assert (tmp_path / "name.png").stat().st_size > 10_000


@pytest.mark.parametrize("kind", [FRONTIER, MAP])
def test_frontiers_and_maps_are_drawn(kind, tmp_path):
    name = next(name for name, table in TABLES.items() if table.kind == kind)
    rng = np.random.default_rng(0)
    made = {
        row: [{"seed": 0, report.REWARD: rng.normal(), "kl": rng.random(), "ranker accuracy": 0.8} for _ in range(3)]
        for row in ("SFT policy", *TABLES[name].cells)
    }
    report.write(name, TABLES[name], made, tmp_path, None, "World: kitchen.")
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_tables_name_their_own_rows():
    for name, table in TABLES.items():
        rows = {"SFT policy", *table.cells}
        assert {row for claim in table.claims for row in claim} <= rows, name
        assert table.paper.keys() <= rows, name
        assert all(isinstance(cell, Cell) for cell in table.cells.values())
