"""Samples to compare side by side, and what a rater's page saves."""

import json
from pathlib import Path


def write_samples(
    path: Path, texts: dict[str, list], rewards: dict[str, list] | None = None, prompt: str = ""
) -> Path:
    """Write the samples of each policy by row, without those that are None, and a second one that is not shown."""
    rows = [
        {"row": row, "sample": sample, "policy": policy, "prompt": f"{row}? {prompt}", "completion": completion}
        | {"rewards": {"judge": rewards[policy][row]} if rewards else {}}
        for policy in texts
        for row, text in enumerate(texts[policy])
        for sample, completion in enumerate([] if text is None else [text, text[:1]])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save(folder: Path, rater: str, choices: list[str | None], qualities: list[dict[str, int]]) -> Path:
    """Write what the page of a rater saves, from the choice ("none", None if open) and qualities by row."""
    key, answers = json.loads((folder / "key.json").read_text()), []
    for task, order in key["raters"][rater]:
        row = int(key["tasks"][task]["prompt"][0][1].split("?")[0])
        best = None if choices[row] is None else [*order, "none"].index(choices[row])
        answers.append({"task": task, "quality": [qualities[row].get(name) for name in order], "best": best})
    saved = {"study": key["study"], "rater": rater, "answers": answers}
    (path := folder / f"answers_{rater}.json").write_text(json.dumps(saved))
    return path
