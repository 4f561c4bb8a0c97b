"""The quickstart from end to end, with a few steps of everything."""

import json
import math

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt_trl.quickstart import study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"num_prompts": 12, "num_eval_prompts": 24, "num_sft": 2000, "num_comparisons": 400}
        patch.setattr(study, "TASK", sizes)
        patch.setattr(study, "SFT", {**study.SFT, "max_steps": 120, "per_device_train_batch_size": 32})
        patch.setattr(study, "RANKER", {**study.RANKER, "max_steps": 4, "per_device_train_batch_size": 16})
        patch.setattr(study, "POLICY", {**study.POLICY, "max_steps": 4, "per_device_train_batch_size": 8})
        patch.setattr(study, "NUM_CANDIDATES", 16)
        fewer = {name: {**how, "num_samples": how["num_samples"] // 2} for name, how in study.SAMPLED.items()}
        patch.setattr(study, "SAMPLED", fewer)
        patch.setattr(study, "CHECKPOINT_EVERY", 2)
        patch.setattr(study, "CHECKPOINTS", {**study.CHECKPOINTS, "eval_steps": 2, "save_steps": 2})
        study.run_quickstart(str(folder), seed=1)
    return folder


def test_everything_promised_is_written(folder):
    for name in ("results.json", "report.md", "evaluation/evaluation.png", "rso/model.safetensors"):
        assert (folder / name).stat().st_size > 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "rso")
    model = AutoModelForCausalLM.from_pretrained(folder / "rso")
    assert model.config.vocab_size == len(tokenizer)


def test_results_hold_every_method_its_curve_and_the_seed(folder):
    results = json.loads((folder / "results.json").read_text())
    assert set(results["results"]) == {"SFT policy", *study.METHODS}
    assert results["seed"] == 1
    assert results["results"]["SFT policy"]["kl"]["mean"] == 0
    assert 0 <= results["ranker_accuracy"] <= 1
    for method, step in results["best_step"].items():
        state = folder / "policies" / method.replace(", ", "-").replace(" ", "-") / f"checkpoint-{step}"
        history = json.loads((state / "trainer_state.json").read_text())["log_history"]
        rewards = {entry["step"]: entry["eval_reward"] for entry in history if "eval_reward" in entry}
        assert rewards[step] == max(reward for at, reward in rewards.items() if at) and 0 in rewards


def test_report_prints_the_numbers_of_the_results(folder):
    results, report = json.loads((folder / "results.json").read_text()), (folder / "report.md").read_text()
    for method, row in results["results"].items():
        (line,) = [line for line in report.splitlines() if line.startswith(f"| {method} ")]
        assert f"{row['true_reward']['mean']:.2f} ± {row['true_reward']['standard_error']:.2f}" in line
    assert f"{100 * results['ranker_accuracy']:.0f}% of pairs" in report


def test_all_sampled_methods_used_the_same_candidates(folder):
    sampling = json.loads((folder / "results.json").read_text())["sampling"]
    assert set(sampling) == set(study.SAMPLED)
    rso, *others = (made["reward_quantiles"] for made in sampling.values())
    assert all(other["candidates"] == rso["candidates"] for other in others)
    # The ranker of the short form has learned little: its rewards lie so close that beta 0.5 accepts nearly all
    lowest, highest = rso["candidates"][0], rso["candidates"][-1]
    assert math.exp((lowest - highest) / 0.5) <= next(iter(sampling.values()))["acceptance_rate"] < 1
    assert sampling["pairs-sft"]["acceptance_rate"] is None
