import html
import json
import re
import sys
from collections import defaultdict

import numpy as np
import pytest
from markdown import Markdown
from markdown_it import MarkdownIt

from prefopt_trl.evaluation import training_report
from prefopt_trl.evaluation.report import as_html
from prefopt_trl.evaluation.training_report import plot_curves, write_training_report

HOSTILE = (
    "<script>alert(1)</script>\n\n# No title\n\n| a | b |\n| - | - |\n```\n</td></table><h1>Big</h1>\n[a](http://b.c) "
    "![a](d.png) <img src=x onerror=e> &lt; **bold** _it_ `code` ~~gone~~\n\n    indented\n- item\n1. one\n"
    "[r]: http://b.c\n<!-- \x02wzxhzdk:0\x03 \\* $x$ https://b.c a@b.c"
)


def evaluation(step, reward):
    found = {"step": step, "eval_win_rate": 0.5, "eval_win_rate_se": 0.05, "eval_kl": step / 10, "eval_length": 20.4}
    return found | {"eval_reward": reward, "eval_reward_se": 0.1}


def write_samples(folder, step, rewards, text="fine", prompt="Why?"):
    (folder / "evaluations").mkdir(exist_ok=True)
    with (folder / f"evaluations/step-{step:06}.jsonl").open("w") as file:
        for row, reward in enumerate(rewards):
            for sample in (0, 1):
                shown = {"row": row, "sample": sample, "prompt": prompt, "completion": f"{text} {step} {sample}"}
                print(json.dumps(shown | {"rewards": {"judge": reward}}), file=file)


def test_the_prompts_shown_are_chosen_by_rule(tmp_path):
    gains = [0, 3, -1, 2, 2, None, 5, -4, 2, 0, -1, 2, -0.5]
    write_samples(tmp_path, 0, [0.25] * len(gains))
    write_samples(tmp_path, 10, [9.0] * len(gains))
    write_samples(tmp_path, 20, [None if gain is None else 0.25 + gain for gain in gains])
    write_samples(tmp_path, 30, [99.0] * len(gains))  # of an earlier run, which was longer
    write_training_report(tmp_path, [evaluation(step, 0.0) for step in (0, 10, 20)])
    report = (tmp_path / "report.md").read_text()
    rows = re.compile(r"<tr><td>(\d+)<")
    assert {part.split("\n")[0]: list(map(int, rows.findall(part))) for part in report.split("\n## ")[1:]} == {
        "The first ten prompts": list(range(10)),
        "The five largest gains in reward from step 0 to step 20": [6, 1, 3, 4, 8],  # ties in the order of rows
        "The five largest losses in reward from step 0 to step 20": [7, 2, 10, 12],
    }
    column, end = '</td><td width="33%">', "<br>fine 20 0</td>"
    assert f"6{column}Why&#63;{column}<b>reward 0.25</b><br>fine 0 0{column}<b>reward 5.25</b>{end}" in report
    assert f"<b>reward nan</b>{end}" in report


def test_the_table_marks_the_first_of_the_highest_rewards(tmp_path):
    rewards = [*np.linspace(0, 0.7, 34), 0.7, *np.zeros(265)]
    history = [evaluation(10 * i, reward) for i, reward in enumerate(rewards)]
    del history[0]["eval_win_rate"]  # of the start against itself
    write_training_report(tmp_path / "my_run", history)
    title, _, note, _, header, _, first, *rows = (tmp_path / "my_run/report.md").read_text().splitlines()
    assert title == "# my&#95;run" and note.startswith("21 of 300 evaluations, means ± standard errors")
    assert re.split(r" *\| *", header)[1:-1] == ["step", "win rate", "reward", "KL (nats)", "length (tokens)"]
    (marked,) = [re.split(r" *\| *", row)[1:-1] for row in rows if "best" in row]
    assert marked == ["330 (best reward)", "50% ± 5%", "0.70 ± 0.10", "33", "20.4"]
    assert re.split(r" *\| *", first)[1:4] == ["0", "", "0.00 ± 0.10"]
    assert rows[19].startswith("| 2990 ") and rows[20] == ""


@pytest.mark.parametrize(
    ("entry", "titles"),
    [
        ({"loss": 0.5, "reward": 1.0, "completions/mean_length": 9.0}, ["Loss", "Length"]),
        ({"eval_loss": 0.5, "eval_rewards/margins": 1.0, "rewards/accuracies": 1}, ["Loss", "Margins", "Accuracies"]),
        ({"eval_win_rate": 0.5, "eval_kl": 0.0, "eval_lc_win_rate": None}, ["Win rate", "KL from the reference"]),
        ({"train_loss": 0.5, "loss": float("nan")}, []),  # a run shorter than `logging_steps`, and a diverged one
    ],
)
def test_what_was_logged_has_a_panel(entry, titles, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(training_report, "plot_curves", lambda series: drawn.append(plot_curves(series)) or drawn[0])
    write_training_report(tmp_path, [{"step": step, **entry} for step in (1, 2)])
    assert [axes.get_title("left") for figure in drawn for axes in figure.axes] == titles
    assert (tmp_path / "curves.png").exists() == bool(titles) and not (tmp_path / "frontier.png").exists()


def test_many_points_are_smoothed_and_few_are_not():
    (axes,) = plot_curves(defaultdict(dict, loss=dict(enumerate(range(150))), eval_loss={0: 3.0, 9: 2.0})).axes
    raw, smoothed, few = [line.get_ydata() for line in axes.lines]
    assert raw.tolist() == [*range(150)] and few.tolist() == [3.0, 2.0]
    assert smoothed[[0, 75, 149]].tolist() == [1.5, 75.0, 147.5]  # means of 4, 7 and 4 values


def test_equal_arguments_give_equal_files_also_if_a_resumed_run_measured_a_step_again(tmp_path):
    history, written = [{"step": 5, "loss": 0.6}, evaluation(0, 0.1), evaluation(10, 0.7)], []
    for entries in (history, history, [evaluation(10, 9.0), *history]):
        write_training_report(tmp_path, entries)
        written.append({file.name: file.read_bytes() for file in tmp_path.iterdir()})
    assert written[0].keys() == {"report.md", "curves.png", "frontier.png"}
    assert written[0] == written[1] == written[2]


def test_without_matplotlib_there_are_no_figures(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_training_report(tmp_path, [{"step": 1, "loss": 0.5}, evaluation(0, 0.1), evaluation(10, 0.7)])
    assert [file.name for file in tmp_path.iterdir()] == ["report.md"] and len(caplog.messages) == 1


@pytest.mark.parametrize("render", [Markdown(extensions=["extra"]).convert, MarkdownIt().enable("table").render])
def test_texts_are_shown_as_they_are(render, tmp_path):
    write_samples(tmp_path, 0, [0.0], HOSTILE, prompt=[{"role": "user", "content": HOSTILE}])
    write_samples(tmp_path, 10, [1.0], HOSTILE)
    write_training_report(tmp_path, [{"step": step, "eval_reward": step} for step in (0, 10)])
    page = render((tmp_path / "report.md").read_text())
    assert " ".join(sorted({*re.findall(r"<(\w+)", page)})) == "b br h1 h2 img p table tbody td th thead tr"
    text = html.unescape(re.sub("<.*?>", "", page.replace("<br>", "\n"))).replace("\xa0", " ")
    assert text.count(re.sub("[\x02\x03]", "�", HOSTILE)) == 6


def test_a_long_text_is_shortened_and_a_long_word_broken():
    shown = as_html("a" * 400 + "b" * 1234 + "c" * 400).replace("<wbr>", "")
    assert shown == "a" * 400 + " &#91;… 1&#44;234 characters left out …&#93; " + "c" * 400
    assert as_html("d" * 81) == f"{'d' * 40}<wbr>{'d' * 40}<wbr>d"
    assert as_html("\ud800\r\n\u2028x") == "�<br><br>x"
