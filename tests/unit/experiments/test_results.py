"""The results in docs/results and the README's, against the numbers that they were made of."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from prefopt_trl.experiments.kitchen import PERFECT_MARKS
from prefopt_trl.experiments.report import as_markdown
from prefopt_trl.experiments.tables import TABLES

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "results"


def read(file: Path) -> dict[str, list[dict[str, float | int | None]]]:
    """The metrics of each row by seed, as the runner returns them."""
    found: dict[str, list[dict[str, float | int | None]]] = {}
    with file.open(encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            row = line.pop("row")
            numbers = {name: float(text) if text else None for name, text in line.items()}
            found.setdefault(row, []).append({**numbers, "seed": int(line["seed"])})
    return found


@pytest.mark.parametrize(
    "table", sorted(str(file.relative_to(RESULTS).with_suffix("")) for file in RESULTS.rglob("*.csv"))
)
def test_a_table_is_what_its_numbers_make(table: str) -> None:
    name, file = Path(table).name, RESULTS / f"{table}.md"
    text = file.read_text(encoding="utf-8")
    without_samples, results = replace(TABLES[name], shows_samples=False), read(file.with_suffix(".csv"))
    origin = text[text.index("World: ") :].partition("\n")[0]
    assert ", with python" in origin
    highest = PERFECT_MARKS if origin.startswith("World: kitchen") else None
    numbers, _, figure = as_markdown(name, without_samples, results, highest, origin).rpartition("\n\n")
    assert text.startswith(numbers) and text.endswith(figure)
    assert TABLES[name].shows_samples or text == f"{numbers}\n\n{figure}"
    assert f"[{TABLES[name].title}]({name}.md)" in (file.parent / "README.md").read_text(encoding="utf-8")
    assert file.with_suffix(".png").stat().st_size > 10_000


def test_the_readme_has_the_table_and_the_figure_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = (RESULTS / "quickstart.md").read_text(encoding="utf-8").split("\n\n")[2]
    assert table.startswith("|") and table in readme
    assert "](docs/results/quickstart.png)" in readme
