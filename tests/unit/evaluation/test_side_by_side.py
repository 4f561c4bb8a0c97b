"""Pages for raters show the right texts and nothing more; the scores are those computed by hand."""

import json
import math
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import pytest

from prefopt_trl.evaluation.side_by_side import make_pages, score_answers
from tests.side_by_side import save, write_samples


def shown_on(page: Path) -> list[dict]:
    return json.loads(page.read_text(encoding="utf-8").split('id="content">')[1].split("</script>")[0])["tasks"]


@pytest.mark.parametrize(("num_raters", "raters_per_task", "num_tasks"), [(3, 3, None), (5, 2, 7)])
def test_each_task_goes_to_raters_in_an_order_of_their_own(tmp_path, num_raters, raters_per_task, num_tasks):
    texts = {name: [f"{name.upper()} {row}" for row in range(10)] for name in ("policy-x", "policy-y", "policy-z")}
    samples, study = [write_samples(tmp_path / "samples.jsonl", texts)], tmp_path / "study"
    numbers = {"num_raters": num_raters, "raters_per_task": raters_per_task, "num_tasks": num_tasks}
    key = make_pages(samples, study, **numbers)
    given = key["raters"].values()
    times_shown = Counter(task for tasks in given for task, _ in tasks)
    assert times_shown == dict.fromkeys(range(num_tasks or 10), raters_per_task)
    assert len(given) == num_raters and max(map(len, given)) - min(map(len, given)) <= 1
    for rater, tasks in key["raters"].items():
        page = study / "pages" / f"rater_{rater}.html"
        assert "policy-" not in page.read_text(encoding="utf-8")  # anonymous
        for (number, order), task in zip(tasks, shown_on(page), strict=True):
            row = task["prompt"][0][1].split("?")[0]
            assert (
                task["completions"] == [[["", f"{name.upper()} {row}"]] for name in order] and task["task"] == number
            )
    assert len({tuple(order) for tasks in given for _, order in tasks}) > 3  # of 6; by another seed but for 0.2%
    assert len({tuple(task for task, _ in tasks) for tasks in given}) > 1
    assert make_pages(samples, study, **numbers) == key
    with pytest.raises(ValueError, match="key of another study"):
        make_pages(samples, study, **numbers, seed=1)


def test_texts_cannot_end_their_element_and_equal_or_missing_ones_are_left_out(tmp_path):
    texts = ["</script><!--<script>&amp;\u2028\u2029é", "same", "only a"]
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}  # shown as JSON
    a = [[{"role": "assistant", "content": text}] for text in texts]
    path = write_samples(tmp_path / "s.jsonl", {"a": a, "b": [[call], a[1], None]})
    assert make_pages([path, path], tmp_path, num_raters=1, raters_per_task=1)["num_left_out"] == 2
    page = tmp_path / "pages" / "rater_1.html"
    data = page.read_text(encoding="utf-8").split('id="content">')[1].split("</script>")[0]
    assert data.isascii() and not set("<>&") & set(data)
    (task,) = shown_on(page)
    assert sorted(task["completions"]) == sorted([[["assistant", json.dumps(call)]], [["assistant", texts[0]]]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policies": ["a", "e"]}, "two or three of a, b, c, d, got a, e"),
        ({}, "two or three of a, b, c, d, got a, b, c, d"),
        ({"policies": ["a", "b"], "num_tasks": 3}, "2 prompts .* num_tasks=3"),
        ({"policies": ["a", "b"], "num_tasks": 0}, "num_tasks=0"),
        ({"policies": ["a", "b"], "num_raters": 2}, "num_raters=2 and raters_per_task=3"),
    ],
)
def test_what_makes_no_study_is_refused(tmp_path, arguments, message):
    samples = write_samples(tmp_path / "s.jsonl", {name: [f"{name} 0", f"{name} 1"] for name in "abcd"})
    with pytest.raises(ValueError, match=message):
        make_pages([samples], tmp_path, **arguments)


def test_samples_that_disagree_or_lack_columns_are_refused(tmp_path):
    one, other = (write_samples(tmp_path / f"{text}.jsonl", {"a": [text]}) for text in ("yes", "maybe"))
    with pytest.raises(ValueError, match="two prompts in row 0, or two completions of 'a'"):
        make_pages([one, other], tmp_path)
    one.write_text('{"prompt": "p", "completion": "c", "row": 0, "sample": 0}\n')
    with pytest.raises(ValueError, match="have no policy, rewards. Give files of `prefopt-trl evaluate`"):
        make_pages([one], tmp_path)


def test_scores_are_those_by_hand(tmp_path):
    texts = {name: [f"{name} {row}" for row in range(4)] for name in "ab"}
    rewards = {"a": [2.0, 1.0, 3.0, None], "b": [1.0, 1.0, 2.0, 0.0]}  # prefers a, none, a, and has no opinion
    make_pages([write_samples(tmp_path / "s.jsonl", texts, rewards)], tmp_path)
    votes = {"1": ["a", "a", "b", "none"], "2": ["a", "b", "b", "a"], "3": ["a", "none", "b", "none"]}
    qualities = {rater: [{"a": a, "b": 3} for a in (6 - int(rater), 3, 1, 2)] for rater in votes}
    expected = {  # means, and standard errors over 4 rows
        "chosen/a": (1 / 4, 1 / 4),
        "chosen/b": (1 / 4, 1 / 4),
        "chosen/no preference": (1 / 2, math.sqrt(4 / 3) / 4),  # rows 1 (a tie of three) and 3
        "quality/a": (2.5, math.sqrt(4 / 3 * (4.5**2 + 1.5**2 + 4.5**2 + 1.5**2)) / 12),  # sums 12, 9, 3, 6
        "quality/b": (3.0, 0.0),
        "win_rate/a against b": (6.5 / 12, math.sqrt(4 / 3 * (1.375**2 + 0.125**2 + 1.625**2 + 0.375**2)) / 12),
        "agreement/raters": (7 / 12, math.sqrt(4 / 3 * (1.25**2 + 1.75**2 + 1.25**2 + 0.75**2)) / 12),
        # (observed - by chance) / (1 - by chance) of raters 1 and 2, 1 and 3, 2 and 3
        "cohens_kappa/raters": ((0.125 / 0.625 + 0.4375 / 0.6875 + 0.25 / 0.75) / 3, math.nan),
        "fleiss_kappa/raters": ((84 - 50) / (144 - 50), math.nan),  # observed 7/12; votes of all: 5, 4 and 3 of 12
        "agreement/judge": (2 / 3, 1 / 3),
        "cohens_kappa/judge": ((2 / 3 - 1 / 3) / (1 - 1 / 3), math.nan),
    }
    scores = score_answers(tmp_path, [save(tmp_path, rater, votes[rater], qualities[rater]) for rater in votes])
    assert [scores.pop(name) for name in ("raters", "tasks", "answers", "incomplete_answers")] == [3, 4, 12, 0]
    exact = {name: pytest.approx(values, nan_ok=True) for name, values in expected.items()}
    assert {name: astuple(estimate)[:2] for name, estimate in scores.items()} == exact


@pytest.mark.filterwarnings("error")
def test_of_three_the_others_are_compared_by_quality_and_incomplete_answers_are_left_out(tmp_path):
    texts = {name: [f"{name} {row}" for row in range(4)] for name in "abc"}
    make_pages([write_samples(tmp_path / "s.jsonl", texts)], tmp_path, num_raters=1, raters_per_task=1)
    qualities = [{"a": 4, "b": 2, "c": 1}, {"a": 3, "b": 3, "c": 3}, {"a": 3, "b": 3}, {"a": 1, "b": 2, "c": 3}]
    scores = score_answers(tmp_path, [save(tmp_path, "1", ["c", "c", "c", None], qualities)])
    assert scores["tasks"] == scores["answers"] == scores["incomplete_answers"] == 2
    wins = {"a against b": 0.75, "a against c": 0.0, "b against c": 0.0}  # c is the best of both
    assert {name: scores[f"win_rate/{name}"].mean for name in wins} == wins
    assert math.isnan(scores["fleiss_kappa/raters"].mean) and "agreement/raters" not in scores


@pytest.mark.parametrize(
    ("other", "message"),
    [({"study": "old"}, "study old"), ({"rater": "1"}, "second one"), ({"rater": "9"}, "saved: '9'")],
)
def test_a_file_that_is_not_of_the_study_is_named(tmp_path, other, message):
    make_pages([write_samples(tmp_path / "s.jsonl", {"a": ["yes"], "b": ["no"]})], tmp_path)
    first, second = (save(tmp_path, rater, [None], [{"a": 5, "b": 1}]) for rater in "12")
    second.write_text(json.dumps(json.loads(second.read_text()) | other))
    with pytest.raises(ValueError, match=f"{second.name} is not the one file .*{message}"):
        score_answers(tmp_path, [first, second])
    with pytest.raises(ValueError, match="no complete one"):
        score_answers(tmp_path, [first])
