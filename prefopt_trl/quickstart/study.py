"""`prefopt-trl quickstart`: test RSO's claim on a task with known true reward (RSO sections 3 and 5) in six minutes.

Train one SFT policy and one pairwise ranker, then the same loss on four sources of pairs, and SLiC and PRO. Evaluate
each policy at the checkpoint with the highest ranker reward.
"""

import json
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset, load_from_disk
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
)
from trl import SFTConfig, SFTTrainer

from prefopt_trl.evaluation.metrics import Estimate
from prefopt_trl.evaluation.policy import evaluate_policy
from prefopt_trl.evaluation.report import as_percentage, table, with_error
from prefopt_trl.evaluation.win_rate import WinRateCallback
from prefopt_trl.generation.sampler import sample_completions
from prefopt_trl.quickstart.kitchen import MAX_NEW_TOKENS, ControlledTask, true_reward
from prefopt_trl.rankers.function import FunctionRanker
from prefopt_trl.rankers.pairwise import PairwiseRanker, pairwise_ranker_dataset
from prefopt_trl.rankers.templates import ANSWERS, dialogue
from prefopt_trl.runtime.settings import versions
from prefopt_trl.sampling.pipeline import build_preference_dataset
from prefopt_trl.trainers.base import PreferenceTrainer
from prefopt_trl.trainers.pro_trainer import PROTrainer
from prefopt_trl.trainers.rso_trainer import RSOTrainer
from prefopt_trl.trainers.slic_trainer import SLiCTrainer

Arguments = dict[str, Any]
Measured = dict[str, Estimate]

COMMON: Arguments = {
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    # `gradient_checkpointing` before transformers 5.23
    ("activation" if hasattr(SFTConfig, "activation_checkpointing") else "gradient") + "_checkpointing": False,
    "dataloader_pin_memory": False,
    "logging_strategy": "no",
    "disable_tqdm": False,  # its default depends on the verbosity that `_quiet` lowers
}
TASK = {"num_prompts": 400, "num_eval_prompts": 512}
SFT: Arguments = {"max_steps": 500, "per_device_train_batch_size": 64, "learning_rate": 3e-3}
RANKER: Arguments = {"max_steps": 900, "per_device_train_batch_size": 128, "learning_rate": 3e-3}
POLICY: Arguments = {"max_steps": 240, "per_device_train_batch_size": 32, "learning_rate": 1e-4}
GAMMA = 0.5  # temperature of RSO eq. 10; SLiC's margin is 1 / gamma
NUM_CANDIDATES = 64
BETA, LARGER_BETA = 0.5, 2.0  # the paper's value, and one to try if the ranker is unsure of its labels
CHECKPOINT_EVERY = 20
CHECKPOINTS: Arguments = {  # the one with the highest reward of the ranker is kept (RSO section 5)
    **{"eval_strategy": "steps", "eval_steps": CHECKPOINT_EVERY},
    **{"save_strategy": "steps", "save_steps": CHECKPOINT_EVERY, "save_total_limit": 1},
    **{"metric_for_best_model": "eval_reward", "load_best_model_at_end": True},
}

# Arguments of `build_preference_dataset` for each dataset, all made from the same candidates
SAMPLED: dict[str, Arguments] = {
    "pairs-rso": {"rejection_beta": BETA, "num_samples": 8},
    "pairs-sft": {"strategy": "sft", "num_samples": 8},
    "pairs-rso-larger-beta": {"rejection_beta": LARGER_BETA, "num_samples": 8},
    "pairs-slic": {"strategy": "sft", "num_samples": 8, "pairing": "tournament"},
    "rankings-pro": {"strategy": "sft", "num_samples": 4, "pairing": "ranking"},
}


@dataclass(frozen=True)
class Method:
    """One row of the report: a dataset, and the trainer and arguments used on it."""

    dataset: str
    source: str
    trainer: type[PreferenceTrainer] = RSOTrainer
    loss: str = "RSO eq. 10"
    arguments: Arguments = field(default_factory=lambda: {"gamma": GAMMA})


METHODS = {
    "direct": Method("comparisons", "the given comparisons (DPO)"),
    "sft-sample-rank": Method("pairs-sft", "8 of 64 SFT samples, at random, labeled by the ranker"),
    "rso": Method(
        "pairs-rso", f"8 of 64 SFT samples, by rejection sampling with the paper's beta of {BETA:g}, labeled likewise"
    ),
    "rso, larger beta": Method(
        "pairs-rso-larger-beta", f"the same with beta {LARGER_BETA:g}, which trusts the ranker less"
    ),
    "slic": Method(
        "pairs-slic",
        "8 of 64 SFT samples, at random, labeled by the ranker in a tournament",
        SLiCTrainer,
        "RSO eq. 1",
        {"delta": 1 / GAMMA},
    ),
    "pro": Method(
        "rankings-pro", "4 of 64 SFT samples, at random, ranked by the ranker's reward", PROTrainer, "PRO eq. 7", {}
    ),
}


def run_quickstart(output_dir: str, seed: int) -> None:
    """Run the study, print its table, and save everything in `output_dir`."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # more threads do not speed up models this small, and slow them on a busy machine
    _quiet()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*SAMPLED, "policies", "evaluation"):  # an earlier run may have had another seed
        shutil.rmtree(folder / name, ignore_errors=True)
    started = time.perf_counter()

    def say(message: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {message}", flush=True)

    say(f"The controlled task, seed {seed}; everything is saved in {folder}")
    task = ControlledTask(seed=seed, **TASK)
    tokenizer = task.tokenizer()
    # Only the ranker's tokenizer has the words of its template, as a policy that writes them would confuse the ranker
    ranker_tokenizer = task.tokenizer(extra_words=[*dialogue("|", "|", "|").split("|"), *ANSWERS])
    example = task.comparisons[0]
    say(f"A comparison: {example['prompt']!r}, chosen {example['chosen']!r}, rejected {example['rejected']!r}")

    say(f"SFT policy: {SFT['max_steps']} steps on {len(task.sft_dataset):,} examples")
    sft = fine_tune(task.policy_model(tokenizer, seed), tokenizer, task.sft_dataset, SFT, folder / "sft", seed)

    say(f"Pairwise ranker: {RANKER['max_steps']} steps on {len(task.comparisons):,} comparisons")
    answers = pairwise_ranker_dataset(task.comparisons, seed=seed)
    judge = task.policy_model(ranker_tokenizer, seed + 1)
    fine_tune(judge, ranker_tokenizer, answers, RANKER, folder / "ranker", seed)
    ranker = PairwiseRanker(judge, ranker_tokenizer, batch_size=512, seed=seed)
    accuracy = _ranker_accuracy(ranker, sft, tokenizer, task.eval_dataset["prompt"][:], seed)
    say(f"Ranker accuracy on pairs of SFT samples, against the true reward: {accuracy:.3f}")

    say(f"Sampling {NUM_CANDIDATES} completions for each of {len(task.prompts)} prompts, and ranking them")
    candidates: Dataset | None = None  # sampled and scored once for all datasets
    made: dict[str, Dataset] = {"comparisons": task.comparisons}
    for name, how in SAMPLED.items():
        made[name] = build_preference_dataset(
            task.prompts if candidates is None else candidates,
            sft,
            tokenizer,
            ranker,
            output_dir=folder / name,
            num_candidates=NUM_CANDIDATES,
            max_new_tokens=MAX_NEW_TOKENS,
            generation_batch_size=1024,
            seed=seed,
            **how,
        )
        candidates = candidates or load_from_disk(str(folder / name / "candidates"))
    statistics = {name: json.loads((folder / name / "statistics.json").read_text()) for name in SAMPLED}

    # Checkpoints are chosen on one half of the evaluation prompts and reported on the other
    halves = task.eval_dataset.train_test_split(test_size=0.5, seed=seed)
    policies, best_step = {"SFT policy": sft}, {}
    for name, method in METHODS.items():
        say(f"{name}: {POLICY['max_steps']} steps on {method.source}")
        policy = AutoModelForCausalLM.from_pretrained(folder / "sft")
        judged = WinRateCallback(
            ranker, halves["train"], against="completion", reference=sft, max_new_tokens=MAX_NEW_TOKENS, seed=seed
        )
        trained = folder / "policies" / name.replace(", ", "-").replace(" ", "-")
        best_step[name] = _train(policy, method, tokenizer, made[method.dataset], judged, trained, seed)
        policies[name] = policy
        if name == "rso":
            policy.save_pretrained(str(folder / "rso"))
            tokenizer.save_pretrained(str(folder / "rso"))
            say(f"The trained RSO model is saved in {folder / 'rso'}")

    found = evaluate_policy(
        policies,
        tokenizer,
        halves["test"],
        judges={"ranker": ranker, "truth": FunctionRanker(true_reward)},
        against="completion",
        reference="SFT policy",
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
        output_dir=folder / "evaluation",
    )
    measured = {
        name: {
            "true_reward": found.judged["truth"][name]["reward"],
            "true_win_rate": found.judged["truth"][name]["win_rate"],
            "ranker_win_rate": found.judged["ranker"][name]["win_rate"],
            "kl": found.estimates[name]["kl"],
        }
        for name in policies
    }
    results = {
        "seed": seed,
        "ranker_accuracy": accuracy,
        "results": measured,
        "best_step": best_step,
        "sampling": statistics,
        "settings": {
            "task": TASK,
            "sft": SFT,
            "ranker": RANKER,
            "policy": POLICY,
            "methods": {name: method.arguments for name, method in METHODS.items()},
            "sampling": {"num_candidates": NUM_CANDIDATES, **SAMPLED},
        },
        "versions": versions(),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2, default=asdict) + "\n")
    report = _report(measured, best_step, accuracy, statistics["pairs-rso"], seed, len(halves["test"]))
    (folder / "report.md").write_text(report)
    print("\n" + report.split("\n", 2)[2], flush=True)
    say(f"Written: report.md, results.json, evaluation/ and the RSO model, in {folder}")


def _quiet() -> None:
    """Silence the progress bars of small datasets and the per-step logs of all trainings."""
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Dataset,
    hyperparameters: Arguments,
    folder: Path,
    seed: int,
) -> PreTrainedModel:
    """Train a model on prompts and completions with TRL's SFTTrainer, and save it."""
    args = SFTConfig(f"{folder}_trainer", warmup_steps=0.1, seed=seed, **COMMON, **hyperparameters)
    trainer = SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    _train_without_logs(trainer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def _train(
    policy: PreTrainedModel,
    method: Method,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Dataset,
    judged: WinRateCallback,
    folder: Path,
    seed: int,
) -> int:
    """Train the SFT policy with one method, and return the step of the checkpoint with the highest reward."""
    given = {**COMMON, **CHECKPOINTS, **POLICY, **method.arguments}
    args = method.trainer.config_class(str(folder), seed=seed, lr_scheduler_type="constant", **given)
    data = dataset.train_test_split(test_size=args.per_device_eval_batch_size, seed=seed)
    trainer = method.trainer(
        policy,
        args=args,
        callbacks=[judged],
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
    )
    _train_without_logs(trainer)
    return int(str(trainer.state.best_model_checkpoint).rpartition("-")[2])


class _Bar(ProgressCallback):
    """The trainer's progress bar without its printed logs."""

    def on_log(self, *args: object, **kwargs: object) -> None:
        pass


def _train_without_logs(trainer: Trainer) -> None:
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar)
    trainer.train()


def _ranker_accuracy(
    ranker: PairwiseRanker, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], seed: int
) -> float:
    """Return how often ranker and true reward agree on pairs of the policy's samples with different true rewards."""
    samples = sample_completions(
        policy, tokenizer, prompts, 2, max_new_tokens=MAX_NEW_TOKENS, seed=seed, generation_batch_size=512
    )
    first, second = ([pair[index] for pair in samples] for index in (0, 1))
    truth = np.subtract(true_reward(prompts, first), true_reward(prompts, second))
    preferred = ranker.compare(prompts, first, second) > 0.5
    return float((preferred == (truth > 0))[truth != 0].mean())


def _report(
    measured: dict[str, Measured],
    best_step: dict[str, int],
    accuracy: float,
    statistics: Arguments,
    seed: int,
    num_prompts: int,
) -> str:
    header = ["policy", "true reward", "wins by truth", "wins by ranker", "KL, nats", "best step"]
    rows = [
        [
            method,
            with_error(result["true_reward"]),
            as_percentage(result["true_win_rate"]),
            as_percentage(result["ranker_win_rate"]),
            with_error(result["kl"]),
            str(best_step.get(method, "")),
        ]
        for method, result in measured.items()
    ]
    sources = "\n".join(f"- **{name}** ({method.loss}): {method.source}" for name, method in METHODS.items())
    warning = f"\n\n> {statistics['warning']}" if statistics["warning"] else ""
    before, after = statistics["label_probability_before"], statistics["label_probability_after"]
    return f"""# Quickstart: preferences sampled in different ways, and different losses

All policies start from the same SFT policy and train for {POLICY["max_steps"]} steps. The first four minimize
RSO eq. 10 (the DPO loss) with gamma {GAMMA:g}, and only their pairs differ; SLiC has the margin {1 / GAMMA:g}:

{sources}

{table(header, rows)}

Means over {num_prompts} evaluation prompts, one sample each, with standard errors over prompts. Wins are
against the SFT targets. Each policy is at the checkpoint with the highest reward by the ranker on other
prompts (RSO section 5). The true reward is at most 10. This is one seed ({seed}): differences of a few
standard errors can be luck.

The ranker agrees with the true reward on {100 * accuracy:.0f}% of pairs of SFT samples. It gives its own
labels a mean probability of {before:.2f} on random pairs of SFT samples, and of {after:.2f} after rejection
with beta {BETA:g}, where the acceptance rate is {statistics["acceptance_rate"]:.3f}.{warning}

![wins, rewards and KL](evaluation/evaluation.png)
"""
