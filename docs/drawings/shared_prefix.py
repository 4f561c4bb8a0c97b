"""Draw shared_prefix.svg, the picture in the README. Run this script after changing it, from any folder."""

from pathlib import Path

STYLE = """
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 }
.caption { fill: #59636e }
.label { font-size: 12px; text-anchor: end }
.prompt-label, .completion-label { font-size: 12px; text-anchor: middle }
.prompt-label { fill: #ffffff }
.completion-label { fill: #1f2328 }
.prompt { fill: #1f6feb }
.completion, .newest { fill: #f2a65a }
.newest { stroke: #1f2328; stroke-width: 2 }
.padding { fill: none; stroke: #8c959f; stroke-dasharray: 3 3 }
.arrow { fill: none; stroke: #59636e; stroke-width: 1.5 }
.page { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .caption { fill: #9198a1 }
  .newest { stroke: #ffffff }
  .arrow { stroke: #9198a1 }
  .page { fill: #0d1117 }
}
"""
WIDTH, HEIGHT = 800, 334
TOP, ROW, STEP = 64, 18, 23  # of the first row, its height, and from one row to the next
TRAINING, SAMPLING = 16, 440  # left edges of the two halves
BATCH = [("prompt 1", 112, [64, 42, 86]), ("prompt 2", 84, [54, 76, 34])]  # widths of prompts and their completions
PROMPT, CELLS, CELL = 112, 606, 13  # width of the prompt in sampling, left edge of the tokens, and their pitch
TOKENS = 13  # of the completions that have not ended


def rect(kind: str, x: float, y: float, width: float, height: float = ROW) -> str:
    inset = 0.5 if kind == "padding" else 0  # a line of one pixel, not of two half ones
    return (
        f'<rect class="{kind}" x="{x + inset}" y="{y + inset}" width="{width - 2 - 2 * inset}" '
        f'height="{height - 2 * inset}" rx="3"/>'
    )


def text(kind: str, x: float, y: float, words: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{words}</text>'


def segments(y: float, parts: list[tuple[str, str, int]], longest: int) -> list[str]:
    """Draw the parts (kind, words, width) of a training row, and padding up to the longest row."""
    x, shapes = TRAINING, []
    for kind, words, width in parts:
        shapes += [rect(kind, x, y, width), text(f"{kind}-label", x + width / 2 - 1, y + 13, words)]
        x += width
    return shapes if x == TRAINING + longest else [*shapes, rect("padding", x, y, TRAINING + longest - x)]


def training() -> list[str]:
    rows, packed = [], []
    for prompt, length, widths in BATCH:
        completions = [("completion", f"y{number}", width) for number, width in enumerate(widths, start=1)]
        rows += [[("prompt", prompt, length), completion] for completion in completions]
        packed.append([("prompt", prompt, length), *completions])
    shapes = [text("title", TRAINING, 28, "Training")]
    y = TOP
    captions = (
        "TRL: one row per completion, with the prompt in each",
        "prefopt_trl: one row per prompt, computed once",
    )
    for caption, batch in zip(captions, (rows, packed), strict=True):
        shapes.append(text("caption", TRAINING, y - 10, caption))
        longest = max(sum(width for *_, width in parts) for parts in batch)
        for parts in batch:
            shapes += segments(y, parts, longest)
            y += STEP
        y += 34
    lines = ("A completion attends to its prompt and to itself.", "Dashed: padding.")
    return [*shapes, *(text("caption", TRAINING, y - 17 + 18 * i, line) for i, line in enumerate(lines))]


def tokens(y: float, name: str, number: int, padded: bool) -> list[str]:
    """Draw the tokens of a completion, of which the last is outlined while more are sampled."""
    kinds = ["completion"] * number
    if number == TOKENS:
        kinds[-1] = "newest"
    shapes = [text("label", CELLS - 8, y + 13, name)]
    shapes += [rect(kind, CELLS + CELL * place, y, CELL) for place, kind in enumerate(kinds)]
    if padded and number < TOKENS:
        shapes.append(rect("padding", CELLS + CELL * number, y, CELL * (TOKENS - number)))
    return shapes


def sampling() -> list[str]:
    completions = [("y1", TOKENS), ("y2", 6), ("⋮", 0), ("y64", TOKENS)]
    middle = SAMPLING + PROMPT / 2 - 1
    shapes = [text("title", SAMPLING, 28, "Sampling")]
    y = TOP
    shapes.append(text("caption", SAMPLING, y - 10, "generate: 64 copies of the prompt's keys and values"))
    for name, number in completions:
        if number:
            shapes += [rect("prompt", SAMPLING, y, PROMPT), text("prompt-label", middle, y + 13, "prompt")]
        shapes += tokens(y, name, number, padded=number > 0)
        y += STEP
    y += 34
    height = STEP * (len(completions) - 1) + ROW
    shapes.append(text("caption", SAMPLING, y - 10, "prefopt_trl: one prefill and one copy"))
    shapes += [rect("prompt", SAMPLING, y, PROMPT, height), text("prompt-label", middle, y + height / 2 + 4, "prompt")]
    for name, number in completions:
        shapes += tokens(y, name, number, padded=False)
        if number == TOKENS:
            shapes.append(f'<path class="arrow" d="M{SAMPLING + PROMPT + 19} {y + 9}h-16m5 -4l-5 4 5 4"/>')
        y += STEP
    lines = (
        "A new token (outlined) attends to the prompt and",
        "to its own row. Rows that ended leave the batch.",
    )
    return [*shapes, *(text("caption", SAMPLING, y + 17 + 18 * i, line) for i, line in enumerate(lines))]


def drawing() -> str:
    shapes = [rect("page", 0, 0, WIDTH + 2, HEIGHT), *training(), *sampling()]
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{STYLE}</style>", *shapes, "</svg>\n"]
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(drawing(), encoding="utf-8")
