"""The prompts of a judge: files with a header, which says how to read the answers, and a text to fill in."""

import hashlib
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "prompts"
PLACEHOLDERS = {"pair": ("prompt", "first", "second"), "rating": ("prompt", "completion")}


@dataclass
class JudgePrompt:
    """A prompt for a judge and the way to read its answer. See `docs/judges.md` for the lines of the header."""

    text: str  # with placeholders such as {first}
    fingerprint: str  # SHA-256 of the file
    kind: str
    verdict: str
    answers: str = "A, B"
    margin: float = 0.0

    def __post_init__(self) -> None:
        answers = [answer.strip().casefold() for answer in self.answers.split(",")]
        letters = [answer[:1] for answer in answers]
        # With a tie, or answers that begin alike, no single token has the probabilities of all answers
        are_told_apart = len({*letters}) == len(letters) == 2 and "".join(letters).isalnum()
        self.has_log_probs = self.kind == "pair" and are_told_apart
        self.values = dict(zip(answers, (1.0, 0.0, 0.5), strict=False))  # for the completion shown first
        self.pattern = re.compile(self.verdict, re.MULTILINE | re.IGNORECASE)
        self.margin = float(self.margin)
        if lacking := [name for name in PLACEHOLDERS[self.kind] if f"{{{name}}}" not in self.text]:
            raise ValueError(f"the text has no {{{lacking[0]}}}")
        if self.pattern.groups != 1 or len(answers) not in (2, 3):
            raise ValueError("`verdict` needs one group, and `answers` are two or three")

    @classmethod
    def load(cls, name: str | Path) -> "JudgePrompt":
        """Read a built-in prompt or a file; raise `ValueError` if there is none or it is malformed."""
        built_in = FOLDER / f"{name}.md"
        try:
            content = (built_in if built_in.is_file() else Path(name)).read_text(encoding="utf-8")
            _, head, text = content.split("---\n", 2)
            header: dict[str, Any] = dict(line.split(": ", 1) for line in head.splitlines())
            return cls(text.strip(), hashlib.sha256(content.encode()).hexdigest(), **header)
        except (OSError, TypeError, ValueError, KeyError, re.error) as error:
            names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.md")))
            raise ValueError(
                f"`prompt`={str(name)!r} cannot be read ({error}). Give one of {names}, or a file that begins with "
                "`---`, the lines `kind: pair` or `kind: rating` and `verdict: <regular expression>`, and `---` again."
            ) from error

    def fill(self, **texts: str) -> str:
        """Put the texts into the prompt in one pass, so that a placeholder within a text stays as it is."""
        return re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1], found[0]), self.text)

    def read(self, answer: str) -> float | None:
        """Return the value of an answer's verdict: a finite rating, or 1, 0 or 0.5 for the completion shown first.

        None if the answer has no verdict in the form asked for, or two different ones.
        """
        found = {str(match[1]).casefold() for match in self.pattern.finditer(answer)}
        if len(found) != 1:
            return None
        verdict = found.pop()
        if self.kind == "pair":
            return self.values.get(verdict)
        with suppress(ValueError):  # a word
            if math.isfinite(rating := float(verdict)):
                return rating
        return None

    def read_tokens(self, tokens: list[tuple[str, dict[str, float]]]) -> float | None:
        """Return P(first preferred) by the log-probs of the tokens that a verdict begins with, or None.

        This needs `has_log_probs`.
        """
        text = "".join(token for token, _ in tokens)
        if self.read(text) is None:
            return None
        place = next(self.pattern.finditer(text)).start(1)
        ends = accumulate(len(token) for token, _ in tokens)
        alternatives = next(likely for (_, likely), end in zip(tokens, ends, strict=True) if end > place)
        total = weighted = 0.0
        for token, logp in alternatives.items():
            word = re.sub(r"\W", "", token).casefold()  # of a token such as " (A"
            value = next((value for answer, value in self.values.items() if word and answer.startswith(word)), None)
            if value is not None:
                total, weighted = total + math.exp(logp), weighted + value * math.exp(logp)
        return weighted / total if total else None
