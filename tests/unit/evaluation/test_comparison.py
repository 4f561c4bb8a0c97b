"""What is computed, printed, drawn and written of the rows of samples, whose truth is known."""

import itertools
import math
import re
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.stats import norm

from prefopt_trl.evaluation.comparison import PolicyEvaluation, Samples, instruction
from prefopt_trl.evaluation.metrics import Estimate
from prefopt_trl.evaluation.report import as_percentage, rounded
from prefopt_trl.rankers.base import sigmoid
from prefopt_trl.runtime.settings import read_json
from tests.unit.evaluation.test_metrics import FEWEST, SIMULATIONS, holds


def line(policy, row, sample, completion="a", rewards=(0.0,), wins=(None,), logp=None, ref_logp=None, tokens=None):
    judges = ("judge", "other")
    return {
        **{"row": row, "sample": sample, "policy": policy, "prompt": f"Prompt {row}", "completion": completion},
        **{"num_tokens": tokens, "finished": None, "logp": logp, "ref_logp": ref_logp},
        **{name: dict(zip(judges, of, strict=False)) for name, of in (("rewards", rewards), ("wins", wins))},
    }


def simulate(rng, num_prompts=60, per_prompt=4):
    """Rewards are those of the prompt, of the policy on this prompt, and of the sample; ours are higher by 0.5."""
    shape = (num_prompts, per_prompt)
    prompt, (us, them, kl) = rng.normal(0, 4, (num_prompts, 1)), rng.normal(0, 1, (3, num_prompts, 1))
    rewards = [0.5 + prompt + us + rng.normal(0, 1, shape), prompt + them + rng.normal(0, 1, shape)]
    logps = 3 + kl + rng.normal(0, 1, shape)
    won = np.stack([rewards[0] > rewards[1], rewards[0] < rewards[1]])
    made = []
    for of, wins in zip(rewards, won.astype(float), strict=True):
        places = [(place, ((of[place],), (wins[place],), logps[place], 0.0, 1)) for place in np.ndindex(shape)]
        made.append(Samples([line("", *place, "", *known) for place, known in places]))
    return made


def test_intervals_hold_the_truth_in_95_of_100_evaluations_and_would_not_without_the_prompts():
    rng = np.random.default_rng(0)
    truth = {"win_rate": norm.cdf(0.5 / 2), "reward": 0.5, "kl": 3.0, "difference": 0.5}
    held, as_if_independent = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    for _ in range(SIMULATIONS):
        us, them = simulate(rng)
        found = us.measure() | us.measure_by("judge", them) | {"difference": us.minus(them, "judge")}
        rewards, theirs = (one.judged("judge", "rewards") for one in (us, them))
        values = {"win_rate": us.judged("judge", "wins"), "reward": rewards, "kl": us.logps}
        values["difference"] = rewards - theirs
        for name, expected in truth.items():
            held[name] += holds(found[name], expected)
            as_if_independent[name] += holds(Estimate.of(values[name]), expected)
        assert found["difference"].standard_error < 0.8 * found["reward"].standard_error  # the prompts' part cancels
    assert min(held.values()) >= FEWEST
    assert max(as_if_independent.values()) < FEWEST


def test_measures_by_hand():
    rows = [
        line("us", 0, 0, "aa", (1.0,), (1,), -3.0, -4.0, 2),
        line("us", 0, 1, "aaaa", (3.0,), (0.5,), -1.0, -1.0, 4),
        line("us", 2, 0, "a", (None,), (None,), -4.0, -2.0, 2),
    ]
    rows[0]["finished"], rows[1]["finished"] = True, False
    us, them = Samples(rows), Samples([line("them", 2, 0), line("them", 0, 0, "b" * 9, (0.5,)), line("them", 3, 0)])
    found = us.measure()
    assert found["kl"] == Estimate.of([1, 0, -2], [0, 0, 2])
    assert found["tokens"] == Estimate.of([2, 4, 2], [0, 0, 2]) and found["finished"].mean == 0.5
    assert found["entropy"].mean == pytest.approx((3 + 1 + 4) / 8)
    # The ratio of two sums, for each prompt: (4 nats, 6 tokens) and (4 nats, 2 tokens), linearized
    assert found["entropy"].standard_error == pytest.approx(math.sqrt(2 * 2 * 2**2) / 8)
    found = us.measure_by("judge", them)
    assert [found[name].mean for name in ("reward", "sigmoid_reward")] == [2, sigmoid(np.array([1, 3])).mean()]
    assert [found[name].mean for name in ("win", "tie", "loss", "win_rate")] == [0.5, 0.5, 0, 0.75]
    assert us.minus(them, "judge").mean == 1.5 and math.isnan(us.minus(them, "judge").standard_error)
    assert set(Samples(rows).measure_by("judge", None)) == {"reward", "sigmoid_reward"}
    assert set(them.measure()) == {"characters"}


NAMES = ["base", "much/better", "much_better", "worse"]


def evaluation(judges=("judge", "other"), against="base", names=NAMES):
    rng = np.random.default_rng(0)
    samples = []
    for name, shift in zip(names, [0, 2, 1, -1], strict=False):
        for row, sample in np.ndindex(8, 1 if name == against else 2):
            given = {"completion": f"{name} {row} {'word ' * (sample + 1)}", "rewards": tuple(rng.normal(shift, 1, 2))}
            won = tuple(rng.choice([0, 0.5, 1], 2)) if against else (None, None)
            logps = {"logp": -10.0 - rng.exponential(), "ref_logp": -11.0, "tokens": 5}
            samples.append(line(name, row, sample, wins=won, **given, **logps))
    return PolicyEvaluation(samples, list(judges), against, against, {"seed": 0})


def test_the_tables_print_the_estimates():
    found = evaluation()
    tables = [
        [re.split(r"\s*\|\s*", line)[1:-1] for line in section.splitlines() if line.startswith("|")]
        for section in str(found).split("\n## ")[1:]
    ]
    for (judge, place), name in itertools.product(zip(found.judges, tables, strict=False), NAMES):
        of, row = found.judged[judge][name], place[2 + NAMES.index(name)]
        minus = [found.difference(name, other, judge) for other in NAMES]
        wins, difference = ["", "", ""], ["", ""]
        if name != "base":
            shares = " / ".join(f"{100 * of[key].mean:.0f}" for key in ("win", "tie", "loss"))
            controlled = of["lc_win_rate"]
            last = "" if np.isnan(controlled.mean) else as_percentage(controlled)
            wins = [as_percentage(of["win_rate"]), shares, last]
            p = minus[0].p_value()
            difference = [rounded(minus[0], "+"), "< 0.001" if p < 0.001 else f"{p:.3f}"]
        assert row == [name, *wins, rounded(of["reward"]), rounded(of["sigmoid_reward"]), *difference]
        paired = ["" if other == name else rounded(one, "+") for one, other in zip(minus, NAMES, strict=True)]
        assert place[8 + NAMES.index(name)] == [name, *paired]
    texts, means = dict(zip(tables[2][0], tables[2][5], strict=True)), found.estimates["worse"]
    assert texts["KL from base, nats per completion"] == rounded(means["kl"]) and "finished" not in texts
    assert [texts["tokens"], texts["BLEU"]] == [rounded(means["tokens"]), f"{found.texts['worse']['bleu']:.3g}"]


@pytest.mark.parametrize(("judges", "kinds"), [(("judge",), 3), (("judge", "other"), 3), (("judge",), 1)])
def test_the_plot_has_a_row_for_each_judge(monkeypatch, tmp_path, judges, kinds):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: drawn.append(figure) or path.touch())
    evaluation(judges, *((None, ("base",)) if kinds == 1 else ())).save(tmp_path)
    axes = drawn[0].axes
    assert [one.get_title() for one in axes] == [judge for judge in judges for _ in range(kinds)]
    assert kinds == 1 or [label.get_text() for label in axes[-1].get_legend().get_texts()] == NAMES


def test_alpaca_eval_reads_the_preferences(tmp_path):
    found = evaluation()
    found.save(tmp_path)
    folders = {"base": "base", "much/better": "much%2Fbetter", "much_better": "much_better", "worse": "worse"}
    assert {path.name for path in (tmp_path / "alpaca_eval").iterdir()} == {*folders.values()}  # one for each
    for name in NAMES[1:]:
        folder = tmp_path / "alpaca_eval" / folders[name]
        annotations, outputs = (
            read_json(folder / f"{file}.json") for file in ("annotations by other", "model_outputs")
        )
        assert outputs[3] == {"instruction": "Prompt 1", "generator": name, "output": f"{name} 1 word word "}
        assert annotations[3] == {
            **{"instruction": "Prompt 1", "annotator": "other", "generator_1": "base", "generator_2": name},
            **{"output_1": "base 1 word ", "output_2": f"{name} 1 word word "},
            "preference": 1 + found.policies[name].rows[3]["wins"]["other"],
        }
        preferences = np.array([one["preference"] for one in annotations])
        assert ((preferences >= 1) & (preferences <= 2)).all()
        # Its win rate: a preference of 2 counts 1, and 1.5, a draw, a half
        assert (preferences - 1).mean() == found.judged["other"][name]["win_rate"].mean


def test_the_instruction_of_a_conversation_may_have_any_roles():
    messages = [{"role": role, "content": role[0]} for role in ("user", "tool")]
    assert [instruction(one) for one in ("p", messages[:1], messages)] == ["p", "u", "user: u\n\ntool: t"]


def test_what_is_not_known_is_empty_and_null(tmp_path, monkeypatch, caplog):
    rows = [line(name, row, 0, "", (None, 1.0), (None, 0.5)) for name in ("us", "them") for row in range(2)]
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = PolicyEvaluation(rows, ["judge", "other"], "them", None, {})
    found.save(tmp_path)
    assert [message[:15] for message in caplog.messages] == ["BLEU is left ou", "No plot was dra"]
    written = read_json(tmp_path / "evaluation.json")
    silent, other = (written["policies"]["us"]["judges"][judge] for judge in ("judge", "other"))
    assert silent["reward"] == {"mean": None, "standard_error": None, "num_prompts": 0} and "win_rate" not in silent
    assert other["win_rate"] == other["lc_win_rate"] == {"mean": 0.5, "standard_error": 0.0, "num_prompts": 2}
    assert other["minus"]["them"] == {"mean": 0, "standard_error": 0, "num_prompts": 2}
    assert read_json(tmp_path / "alpaca_eval" / "us" / "annotations by judge.json")[1]["preference"] is None
    monkeypatch.undo()
    found.save(tmp_path)  # the plot of nothing
    assert (tmp_path / "evaluation.png").stat().st_size


def test_rows_with_equal_prompts_are_one_prompt():
    rows = [line(name, 10 * row + copy, 0, rewards=(row + shift, 0.0)) for name, shift in (("us", 0.5), ("them", 0))
            for row in range(5) for copy in range(10)]  # fmt: skip
    rows = [{**row, "prompt": f"Prompt {row['row'] // 10}"} for row in rows]
    found = PolicyEvaluation(rows, ["judge"], None, None, {})
    assert found.num_prompts == 5 and str(found).startswith("5 prompts, 100 completions.")
    assert found.judged["judge"]["us"]["reward"] == Estimate.of(np.arange(5) + 0.5)
    assert found.difference("us", "them") == Estimate(0.5, pytest.approx(0, abs=1e-12))
