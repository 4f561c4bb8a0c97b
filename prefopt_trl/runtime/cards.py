"""Cards in Markdown, from the files in `templates/`. Foreign text is shown as code, so it is not read as Markdown."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, RepoCard

from prefopt_trl.runtime.settings import Settings

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, data: CardData, **values: object) -> RepoCard:
    """Fill in `templates/<template>.md`, which may call the functions below."""
    filled: dict[str, Any] = {"code": code, "name": name, "table": table, "settings_table": settings_table, **values}
    return RepoCard.from_template(data, template_path=str(TEMPLATES / f"{template}.md"), **filled)


def code(text: str) -> str:
    """Format text as code on one line, also in a cell of a table: none of it is read as Markdown or HTML.

    Line breaks become spaces, and a SHA-256 is shortened.
    """
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1…", " ".join(text.splitlines()))
    if "`" in text:
        longest = max(map(len, re.findall("`+", text)))
        text = f"{'`' * longest} {text} {'`' * longest}"  # these spaces are not shown
    return f"`{text}`".replace("|", r"\|")


def name(text: str) -> str:
    """Format a name as code, with JSON's escapes."""
    return code(json.dumps(text, ensure_ascii=False)[1:-1])  # without the quotes


def public_name(source: str) -> str:
    """Return a name on the Hub unchanged, and only the last part of a local path."""
    return Path(source).name if Path(source).exists() else source


def table(head: list[str], rows: list[list[str]]) -> str:
    """Format a table whose cells are Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_table(settings: Settings) -> str:
    """Format settings as a table, sorted by name; nested settings have dotted names."""
    rows = [[name(key), code(json.dumps(value, ensure_ascii=False))] for key, value in _flat(settings)]
    return table(["setting", "value"], rows)


def _flat(settings: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(settings, dict) and settings:
        for key in sorted(settings, key=str):
            yield from _flat(settings[key], f"{name}.{key}" if name else str(key))
    else:
        yield name, settings
