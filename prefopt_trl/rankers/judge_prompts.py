"""The prompts of a judge: files with a header, which says how to read the answers, and a text to fill in."""

import hashlib
import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

FOLDER = Path(__file__).parent / "prompts"
PLACEHOLDERS = {"pair": ("prompt", "first", "second"), "rating": ("prompt", "completion")}
VALUES = (1.0, 0.0, 0.5)  # of the answers of a pair, in the order of the header: A, B and same


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt for a judge and the way to read its answer. See `docs/judges.md` for the format of the file."""

    kind: str  # "pair" or "rating"
    verdict: re.Pattern[str]  # its first group is the verdict of an answer
    answers: dict[str, float]  # of a pair: what each verdict, in lower case, counts for the completion shown first
    margin: float  # how far the probability must be from 0.5 for a win or a loss
    text: str  # with placeholders such as {first}
    fingerprint: str  # SHA-256 of the file

    @classmethod
    def load(cls, name: str | Path) -> "JudgePrompt":
        """Read a built-in prompt or a file; raise `ValueError` if there is none or it is malformed."""
        built_in = {path.stem: path for path in sorted(FOLDER.glob("*.md"))}
        path = built_in.get(str(name), Path(name))
        if not path.is_file():
            raise ValueError(f"`prompt` is {str(name)!r}. Give the path of a file, or one of {', '.join(built_in)}.")
        try:
            content = path.read_text(encoding="utf-8")
            _, head, text = content.split("---\n", 2)
            header = dict(line.split(": ", 1) for line in head.splitlines())
            kind, margin = header.pop("kind"), float(header.pop("margin", 0))
            answers = [answer.strip().casefold() for answer in header.pop("answers", "A, B").split(",")]
            verdict = re.compile(header.pop("verdict"), re.MULTILINE | re.IGNORECASE)
            problems = [f"the text has no {{{name}}}" for name in PLACEHOLDERS[kind] if f"{{{name}}}" not in text]
            problems += [f"`{name}` is unknown" for name in header]
            problems += ["`verdict` needs one group"] * (verdict.groups != 1)
            problems += ["`answers` are two or three"] * (len(answers) not in (2, 3))
            if problems:
                raise ValueError(problems[0])
        except (ValueError, LookupError, re.error) as error:
            raise ValueError(
                f"`prompt` {path} cannot be read ({error}). It begins with `---`, the lines `kind: pair` or "
                "`kind: rating` and `verdict: <regular expression with one group>`, and `---` again."
            ) from error
        values = dict(zip(answers, VALUES, strict=False))
        return cls(kind, verdict, values, margin, text.strip(), hashlib.sha256(content.encode()).hexdigest())

    def fill(self, **texts: str) -> str:
        """Put the texts into the prompt in one pass, so that a placeholder within a text stays as it is."""
        return re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1], found[0]), self.text)

    def read(self, answer: str) -> float | None:
        """Return the value of an answer's verdict: a rating, or 1, 0 or 0.5 for the completion shown first.

        None if the answer has no verdict in the form asked for, or two different ones.
        """
        found = {str(match[1]).casefold() for match in self.verdict.finditer(answer)}
        if len(found) != 1:
            return None
        verdict = found.pop()
        return float(verdict) if self.kind == "rating" else self.answers.get(verdict)

    def read_tokens(self, tokens: list[tuple[str, dict[str, float]]]) -> float | None:
        """Return the expected value of the verdict, by the log-probs of the tokens that it begins with, or None."""
        text = "".join(token for token, _ in tokens)
        if self.read(text) is None:
            return None
        starts = accumulate((len(token) for token, _ in tokens), initial=0)
        place = next(self.verdict.finditer(text)).start(1)
        _, alternatives = tokens[bisect_right(list(starts), place) - 1]
        total = weighted = 0.0
        for token, logp in alternatives.items():
            word = re.sub(r"\W", "", token).casefold()  # of a token such as " (A"
            value = next((value for answer, value in self.answers.items() if word and answer.startswith(word)), None)
            if value is not None:
                total, weighted = total + math.exp(logp), weighted + value * math.exp(logp)
        return weighted / total if total else None
