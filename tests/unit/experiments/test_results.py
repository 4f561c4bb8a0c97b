"""The results in docs/results and the README's, against the numbers that they were made of."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prefopt_trl.evaluation.report import table as as_table
from prefopt_trl.experiments.kitchen import PERFECT_MARKS
from prefopt_trl.experiments.report import REWARD, WINS, as_markdown, claims_of, difference, shown
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


def replication() -> list[str]:
    """How many claims that five seeds decide have the same sign on five others; the rest; and all that are decided."""
    lines, others, signs, distances = [], [], [], []
    for name, found in TABLES.items():
        first, second = (read(folder / f"{name}.csv") for folder in (RESULTS, RESULTS / "seeds-5-9"))
        runs = [first, second, {row: first[row] + second[row] for row in first}]
        verdicts = [claims_of(found, results) for results in runs]
        for number, claim in enumerate(found.claims):
            for metric, place, judge in ((REWARD, 2, "reward"), (WINS, 5, "ranker's wins")):
                decided = [of[number][place] != "not decided" for of in verdicts]
                one, other, _ = gaps = [difference(results, *claim, metric) for results in runs]
                texts = [shown(gap, metric, "+") for gap in gaps]
                if any(decided):
                    cells = [f"**{text}**" if sure else text for text, sure in zip(texts, decided, strict=True)]
                    lines.append([f"[{name}]({name}.md)", " > ".join(claim), judge, *cells])
                if any(decided[:2]):
                    signs.append(one.mean * other.mean > 0)
                    error = np.hypot(one.standard_error, other.standard_error)
                    distances.append(abs(one.mean - other.mean) / error)
                    if not signs[-1]:
                        others.append(f"- {' > '.join(claim)}, by the {judge}: {texts[0]}, and {texts[1]}")
    return [
        f"Five seeds decide {len(signs)} claims. {sum(signs)} of these have the same sign on both sets, and in "
        f"{int((np.array(distances) < 2).sum())} the two differ by less than two standard errors of their difference.",
        "\n".join(others),
        as_table(["table", "claim", "by", "seeds 0 to 4", "seeds 5 to 9", "all ten"], lines),
    ]


def test_what_five_seeds_decide_is_shown_beside_what_five_others_find() -> None:
    page = (RESULTS / "replication.md").read_text(encoding="utf-8")
    for part in replication():
        assert part and part in page
