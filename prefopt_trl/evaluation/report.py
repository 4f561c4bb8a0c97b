"""Tables and plots of policies compared."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from prefopt_trl.data.formats import Row
from prefopt_trl.evaluation.metrics import Estimate


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, readable in a terminal too; the first column is left-aligned."""
    widths = [max(2, *(len(str(row[column])) for row in [header, *rows])) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cells[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(aligned) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def json_numbers(values: object) -> Any:
    """Return values as JSON has them: NaN and infinity become None."""
    return json.loads(json.dumps(values), parse_constant=lambda _: None)


def with_error(estimate: Estimate, form: str = ".2f", sign: str = "") -> str:
    """`mean ± standard error`, each in a form of Python's `format`; the mean alone if its error is not known."""
    error = "" if math.isnan(estimate.standard_error) else f" ± {estimate.standard_error:{form}}"
    return f"{estimate.mean:{sign}z{form}}{error}"  # z: no -0.00


def rounded(estimate: Estimate, sign: str = "") -> str:
    """`mean ± standard error`, both with the decimals that leave two digits of the error."""
    error, mean = estimate.standard_error, round(estimate.mean, 12) + 0.0  # no -0 of rounding
    if not estimate.has_error:
        return f"{mean:{sign}.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{mean:{sign}.{decimals}f} ± {error:.{decimals}f}"


def as_percentage(estimate: Estimate) -> str:
    """`mean ± standard error` of a share, in per cent; the mean alone if all values are equal."""
    return with_error(estimate, ".0%") if estimate.has_error else f"{estimate.mean:.0%}"


def completions_side_by_side(policies: dict[str, list[Row]]) -> Iterator[str]:
    """Yield tables in HTML of policies' first completions side by side, of prompts chosen by rule.

    `policies` are rows of `samples.jsonl` by policy. Gains and losses are those of the second policy against the
    first, by the first judge.
    """
    sides = [{row["row"]: row for row in rows if row["sample"] == 0} for rows in policies.values()]
    names, judge = [*map(as_html, policies)], next(iter(next(iter(policies.values()))[0]["rewards"]))
    change = f"in reward from {names[0]} to {names[1]}"
    both = np.array(sorted(set.intersection(*(set(side) for side in sides))))
    rewards = [np.array([side[row]["rewards"][judge] for row in both], dtype=float) for side in sides]
    gains = rewards[1] - rewards[0]  # NaN where a reward is not known
    chosen = {
        "The first ten prompts": [*range(len(both))][:10],
        f"The five largest gains {change}": [one for one in np.argsort(-gains, kind="stable") if gains[one] > 0][:5],
        f"The five largest losses {change}": [one for one in np.argsort(gains, kind="stable") if gains[one] < 0][:5],
    }
    for title, selected in chosen.items():
        head = "</th><th>".join(["row", "prompt", *names])
        lines = [f"## {title}\n\nRewards are those of {as_html(judge)}.\n\n<table>\n<tr><th>{head}</th></tr>"]
        for one in selected:
            cells = [f"{both[one]}", as_html(sides[0][both[one]]["prompt"])]
            for side, values in zip(sides, rewards, strict=True):
                cells.append(f"<b>reward {values[one]:.3g}</b><br>{as_html(side[both[one]]['completion'])}")
            lines.append("<tr><td>" + f'</td><td width="{100 // (len(sides) + 1)}%">'.join(cells) + "</td></tr>")
        if selected:
            yield "\n".join([*lines, "</table>"])


def as_html(text: str | Sequence[dict[str, str]]) -> str:
    """Return a text as one line of HTML that has no markup, no control characters and at most 800 characters."""
    text = text if isinstance(text, str) else "\n".join(f"{one['role']}: {one['content']}" for one in text)
    text = text if len(text) <= 800 else f"{text[:400]} [… {len(text) - 800:,} characters left out …] {text[-400:]}"
    # Without control characters, and what UTF-8 cannot encode
    text = re.sub(r"[\x00-\x09\x0b-\x1f\ud800-\udfff]", "�", "\n".join(text.expandtabs(4).splitlines()))
    text = re.sub(r"(\S{40})(?=\S)", "\\1\0", text)  # where a long word may be broken
    text = re.sub(r"[!-/:-@\[-`{-~]", lambda match: f"&#{ord(match[0])};", text)  # all ASCII punctuation
    return text.replace("  ", "&nbsp; ").replace("\0", "<wbr>").replace("\n", "<br>")
