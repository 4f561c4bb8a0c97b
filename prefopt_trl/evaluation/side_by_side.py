"""Human side by side (RSO section 5.3 and appendix A.4): pages for raters, and what their answers say."""

import base64
import hashlib
import json
import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prefopt_trl.data.formats import Completion, Prompt
from prefopt_trl.data.jsonl import read_jsonl
from prefopt_trl.evaluation.metrics import Estimate, wins
from prefopt_trl.runtime.settings import read_json, write_json, write_text

TEMPLATE = Path(__file__).parent / "templates" / "side_by_side.html"
NO_PREFERENCE = "no preference"


def make_pages(
    samples: Sequence[str | Path],
    output_dir: str | Path,
    *,
    policies: Sequence[str] | None = None,
    num_raters: int = 3,
    raters_per_task: int = 3,
    num_tasks: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a page for each rater, `pages/rater_1.html` and so on, and `key.json`, which names the policies.

    A task shows a prompt and the first completion of two or three `policies` (by default all) in `samples`, JSON Lines
    of `prefopt-trl evaluate`. Prompts with equal or missing completions are left out and counted, and `num_tasks` of
    the others drawn (by default all). Each goes to `raters_per_task` raters, and each rater sees tasks, and the
    completions of a task, in an order of their own. Return the content of `key.json`.

    Raises:
        ValueError: if samples and numbers do not make a study, or the folder has another study.
    """
    rows: dict[int, dict[str, Any]] = {}
    for one in (one for path in samples for one in read_jsonl(path)):
        if missing := {"row", "sample", "policy", "completion", "rewards"} - one.keys():
            raise ValueError(f"`samples` have no {', '.join(sorted(missing))}. Give files of `prefopt-trl evaluate`.")
        if one["sample"] == 0:
            name, prompt, text = one["policy"], _turns(one["prompt"]), _turns(one["completion"])
            task = rows.setdefault(one["row"], {"prompt": prompt, "completions": {}, "rewards": {}})
            if task["prompt"] != prompt or task["completions"].setdefault(name, text) != text:
                raise ValueError(f"`samples` have two prompts in row {one['row']}, or two completions of {name!r}.")
            task["rewards"][name] = one["rewards"] or {}
    found = list(dict.fromkeys(name for task in rows.values() for name in task["completions"]))
    policies = found if policies is None else list(policies)
    if len(policies) not in (2, 3) or len({*policies} & {*found}) < len(policies):
        raise ValueError(f"`policies` must be two or three of {', '.join(found)}, got {', '.join(policies)}.")
    for task in rows.values():
        task["completions"] = {name: task["completions"][name] for name in policies if name in task["completions"]}
    tasks = [task for task in rows.values() if len({*map(str, task["completions"].values())}) == len(policies)]
    draw, most = random.Random(seed), len(tasks)
    tasks = draw.sample(tasks, min(num_tasks or most, most))
    if num_tasks not in (None, len(tasks)) or not 1 <= raters_per_task <= num_raters <= raters_per_task * len(tasks):
        raise ValueError(
            f"{most} prompts have different completions, which does not allow {num_tasks=}, {num_raters=} and "
            f"{raters_per_task=}. Every task needs as many raters, and every rater a task."
        )
    raters: dict[str, list[list[Any]]] = {str(number): [] for number in range(1, num_raters + 1)}
    for number in range(len(tasks)):
        for rater in sorted(raters, key=lambda rater: (len(raters[rater]), draw.random()))[:raters_per_task]:
            raters[rater].insert(draw.randint(0, len(raters[rater])), [number, draw.sample(policies, len(policies))])
    key: dict[str, Any] = {"policies": policies, "tasks": tasks, "raters": raters, "num_left_out": len(rows) - most}
    key["study"] = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    if read_json(file := Path(output_dir, "key.json")) not in (None, key):
        raise ValueError(f"{file} is the key of another study, whose answers need it. Give another `output_dir`.")
    write_json(file, key)
    for rater, given in raters.items():
        content = [
            {"task": one, "prompt": tasks[one]["prompt"], "completions": [tasks[one]["completions"][n] for n in order]}
            for one, order in given
        ]
        page = _page({"study": key["study"], "rater": rater, "tasks": content})
        write_text(Path(output_dir, "pages", f"rater_{rater}.html"), page)
    return key


def score_answers(study: str | Path, answers: Sequence[str | Path]) -> dict[str, int | Estimate]:
    """Score the files that raters saved on the pages of a study, the folder of [`make_pages`].

    Returns:
        `dict` of means with standard errors over prompts. Of policies: `chosen/...`, share of tasks by majority (the
        choice with the most votes; a tie is no preference), and `quality/...`, 1 to 5. Of pairs: `win_rate/...` over
        answers (the best one wins, others are compared by quality; equal quality or no preference counts half). Of
        pairs of raters, and of the majority with each judge, who prefers the highest reward: `agreement/...`, share of
        equal choices, and `cohens_kappa/...`; of all raters `fleiss_kappa/raters`, over the tasks with the most
        answers. Kappa is NaN if only one choice occurs. The others count raters, tasks and answers.

    Raises:
        ImportError: if statsmodels is not installed.
        ValueError: for a file of another study, a rater's second file, or no complete answer.
    """
    try:
        from statsmodels.stats.inter_rater import cohens_kappa, fleiss_kappa
    except ImportError as error:
        raise ImportError("Kappa needs statsmodels. Run `pip install 'prefopt-trl[evaluation]'`.") from error
    key, given, rows = json.loads(Path(study, "key.json").read_bytes()), [], []
    policies, tasks, names = key["policies"], key["tasks"], [*key["policies"], NO_PREFERENCE]
    for path in answers:
        try:
            saved = json.loads(Path(path).read_bytes())
            rater, by_task = saved["rater"], {one["task"]: one for one in saved["answers"]}
            if saved["study"] != key["study"] or rater in given:
                raise ValueError(f"it is of study {saved['study']}, or a second one of rater {rater}")
            for task, order in key["raters"][rater]:
                best, quality = by_task[task]["best"], dict(zip(order, by_task[task]["quality"], strict=True))
                if best not in (None, *range(len(order) + 1)) or not {*quality.values()} <= {None, *range(1, 6)}:
                    raise ValueError(f"task {task} has the quality {[*quality.values()]} and the best {best}")
                choice = None if best is None else [*order, NO_PREFERENCE][best]
                rows.append([task, rater, choice, *(quality[name] for name in policies)])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{path} is not the one file that a rater of this study saved: {error}.") from error
        given.append(rater)
    asked = pd.DataFrame(rows, columns=["task", "rater", "choice", *range(len(policies))])
    frame = asked.dropna()
    if frame.empty:
        raise ValueError("`answers` have no complete one, with a quality for each completion, and the best or none.")
    prompts = np.array([json.dumps(task["prompt"]) for task in tasks])
    clusters = prompts[frame["task"]]
    choices = frame.pivot(index="task", columns="rater", values="choice")
    modes = choices.mode(axis=1)
    majority = modes[0].where(modes.count(axis=1) == 1, NO_PREFERENCE)
    scores: dict[str, int | Estimate] = {"raters": len(given), "tasks": len(choices), "answers": len(frame)}
    scores["incomplete_answers"] = len(asked) - len(frame)
    scores |= {f"chosen/{name}": Estimate.of(majority == name, prompts[majority.index]) for name in names}
    scores |= {f"quality/{name}": Estimate.of(frame[index], clusters) for index, name in enumerate(policies)}
    for a, b in combinations(range(len(policies)), 2):
        by_choice = [frame["choice"] == name for name in (policies[a], policies[b], NO_PREFERENCE)]
        won = np.select(by_choice, [1, 0, 0.5], wins(frame[a] - frame[b]))
        scores[f"win_rate/{policies[a]} against {policies[b]}"] = Estimate.of(won, clusters)
    pairs = {"raters": list(combinations((choices[rater] for rater in choices), 2))}
    for judge in sorted({judge for task in tasks for rewards in task["rewards"].values() for judge in rewards}):
        known = pd.DataFrame([{n: task["rewards"][n].get(judge) for n in policies} for task in tasks]).dropna()
        is_tie = known.eq(known.max(axis=1), axis=0).sum(axis=1) > 1
        pairs[judge] = [(known.idxmax(axis=1).mask(is_tie, NO_PREFERENCE), majority)]
    with np.errstate(divide="ignore", invalid="ignore"):  # only one choice occurs
        for name, some in pairs.items():
            if shared := [both for pair in some if len(both := pd.concat(pair, axis=1, keys=[0, 1]).dropna())]:
                equal = pd.concat([both[0] == both[1] for both in shared])
                crossed = [pd.crosstab(one[0], one[1]).reindex(names, columns=names, fill_value=0) for one in shared]
                kappas = pd.Series([cohens_kappa(one, return_results=False) for one in crossed])
                scores[f"agreement/{name}"] = Estimate.of(equal, prompts[equal.index])
                scores[f"cohens_kappa/{name}"] = Estimate(float(kappas.mean()), np.nan)
        votes = pd.crosstab(frame["task"], frame["choice"])
        full = votes[votes.sum(axis=1) == votes.sum(axis=1).max()]
        scores["fleiss_kappa/raters"] = Estimate(float(fleiss_kappa(full)), np.nan)
    return scores


def _turns(text: Prompt | Completion) -> list[list[str]]:
    """Return the role and text of each message; one with more than text, such as a tool call, is shown as JSON."""
    if isinstance(text, str):
        return [["", text.strip()]]  # a leading space would tell policies apart
    messages = [{name: value for name, value in one.items() if value is not None} for one in text]
    return [
        [one["role"], one["content"] if one.keys() == {"role", "content"} else json.dumps(one)] for one in messages
    ]


def _page(content: dict[str, Any]) -> str:
    """Return a page whose policy allows its own code by hash, with the content as JSON that cannot end its element."""
    page = TEMPLATE.read_text(encoding="utf-8")
    for tag in ("style", "script"):
        code = page.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        page = page.replace(f"{tag}-hash", f"sha256-{digest}")
    data = json.dumps(content).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")  # and ASCII
    return page.replace("page-content", data)
