"""Cards in Markdown, from the files in `templates/`. They show text of others as code, so that none is Markdown."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, RepoCard

from prefopt_trl.runtime.settings import Settings

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, data: CardData, **values: Any) -> RepoCard:
    """Fill in `templates/<template>.md` with metadata and values; it calls the functions below."""
    functions: dict[str, Any] = {"code": code, "name": name, "table": table, "settings_table": settings_table}
    return RepoCard.from_template(data, template_path=str(TEMPLATES / f"{template}.md"), **functions, **values)


def code(text: str) -> str:
    """Write text as code on one line: nothing in it ends the code or the cell of a table, or is read as HTML.

    Line breaks become spaces, and a SHA-256 is shortened.
    """
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", " ".join(text.splitlines()))
    if "`" in text:
        longest = max(map(len, re.findall("`+", text)))
        text = f"{'`' * longest} {text} {'`' * longest}"  # these spaces are not shown
    return f"`{text}`".replace("|", r"\|")


def name(text: str) -> str:
    """Write a name as code, with what JSON escapes in it escaped."""
    return code(json.dumps(text, ensure_ascii=False)[1:-1])  # without the quotes


def public_name(source: str) -> str:
    """Return a name on the Hub unchanged, and only the last part of a path on this machine."""
    return Path(source).name if Path(source).exists() else source


def table(head: list[str], rows: list[list[str]]) -> str:
    """Write a table whose cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_table(settings: Settings) -> str:
    """Write settings as a table, sorted by name, nested ones by their dotted names."""
    rows = [[name(key), code(json.dumps(value, ensure_ascii=False))] for key, value in _flat(settings)]
    return table(["setting", "value"], rows)


def _flat(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(settings, dict) and settings:
        for key in sorted(settings, key=str):
            yield from _flat(settings[key], f"{name}.{key}" if name else str(key))
    else:
        yield name, settings
