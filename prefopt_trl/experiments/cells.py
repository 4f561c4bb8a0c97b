"""A cell of an experiment: one policy, trained on data that are made in one way, and measured."""

import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import ProgressCallback
from trl import SFTConfig, SFTTrainer

import prefopt_trl
from prefopt_trl.data.hindsight import HELPFUL, chain_of_hindsight
from prefopt_trl.evaluation.policy import BestOf, evaluate_policy
from prefopt_trl.evaluation.win_rate import WinRateCallback
from prefopt_trl.experiments.worlds import COMMON, LEARNED, TRUTH, World, load
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.generation.sampler import sample_completions
from prefopt_trl.rounds.rounds import train_in_rounds
from prefopt_trl.runtime.settings import Settings, read_json, write_json
from prefopt_trl.sampling.pipeline import build_preference_dataset
from prefopt_trl.trainers import METHODS

SFT, HINDSIGHT, NOTHING = "sft", "chain-of-hindsight", "nothing"  # methods beside those of `METHODS`
METRICS = ("reward", "win_rate")
SAMPLES = 4  # of each prompt of the test
CHECKPOINTS = 4  # of a training, among which the one with the highest reward by the ranker is kept (RSO section 5)


@dataclass(frozen=True)
class Cell:
    """What a policy is trained on, and how. Equal cells of several tables are trained once.

    `data` is the name of a dataset of the world, or the options of [`build_preference_dataset`] that select from the
    world's candidates; with `given`, names of columns, from the answers of others.
    """

    data: Any = "comparisons"
    method: str = "rso"
    training: Settings = field(default_factory=dict)  # arguments of the method
    ranker: str = LEARNED
    length: float = 1.0  # steps of training, in those of the world
    rounds: Settings | None = None  # options of `train_in_rounds`, which share the prompts and the steps
    best_of: int = 1  # samples, of which the ranker takes the best
    is_last: bool = False  # whether the last checkpoint is reported, instead of that with the highest reward


def measure(cell: Cell, world: World, folder: Path) -> None:
    """Train a policy, evaluate it, and write its means over the test prompts as `results.json`, the last file."""
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
    policy, made = (world.policy(), {}) if cell.method == NOTHING else _train(cell, world, folder)
    options, samples = _options(world), policy
    if cell.best_of > 1:
        samples = BestOf(policy, cell.best_of, world.ranker(cell.ranker))
        made = {"kl": math.log(cell.best_of) - (cell.best_of - 1) / cell.best_of}  # an upper bound
    elif cell.method == HINDSIGHT:
        prompts = [f"{prompt} {HELPFUL}" for prompt in world.data["test"]["prompt"]]
        sampled = sample_completions(policy, world.tokenizer, prompts, SAMPLES, options, seed=world.seed)
        samples = [[text.partition("\n\n")[0] for text in of] for of in sampled]
    judges = {"truth": world.ranker(TRUTH)}
    if world.ranker(LEARNED) is not judges["truth"]:
        judges["ranker"] = world.ranker(LEARNED)
    evaluation = evaluate_policy(
        {"policy": samples},
        world.tokenizer,
        world.data["test"],
        judges=judges,
        against="target",
        reference=world.policy(),
        num_completions=SAMPLES if cell.best_of == 1 else 1,
        options=options,
        seed=world.seed,
        output_dir=folder / "evaluation",
    )
    judged = {"ranker": evaluation.judged["truth"], **evaluation.judged}
    first = [row for row in evaluation.samples if row["policy"] == "policy" and not row["sample"]][:3]
    found = {
        "seed": world.seed,
        **{f"{judge}'s {name}": of["policy"][name].mean for judge, of in judged.items() for name in METRICS},
        **{name: one.mean for name, one in evaluation.estimates["policy"].items() if name in ("kl", "tokens")},
        **{name: value for name, value in evaluation.texts["policy"].items() if name == "bleu"},
        **made,
        "samples": [[row["prompt"], row["completion"]] for row in first],
        "cell": asdict(cell),
    }
    shutil.rmtree(folder / "training", ignore_errors=True)
    write_json(folder / "results.json", found)


def _train(cell: Cell, world: World, folder: Path) -> tuple[Any, Settings]:
    """Return the policy of a cell, and what is known of its data and its training."""
    if cell.rounds is not None:
        return _train_in_rounds(cell, world, folder)
    data, statistics = _data(cell, world, folder / "data")
    training = _arguments(cell, world)
    others: dict[str, Any] = {}
    if cell.training.get("bootstrap_parts"):
        others["ranker"] = world.ranker(cell.ranker)
        training |= {name: value for name, value in world.sampling.items() if name != "num_candidates"}
    if not cell.is_last:
        every = -(-training["max_steps"] // CHECKPOINTS)
        training |= {"eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every}
        training |= {"save_total_limit": 1, "metric_for_best_model": "eval_reward", "load_best_model_at_end": True}
    trainer_class, args = _trainer(cell.method, folder / "training", training)
    parts = data.train_test_split(test_size=args.per_device_eval_batch_size, seed=world.seed)
    trainer = trainer_class(
        world.policy(),
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=world.tokenizer,
        peft_config=world.peft_config,
        **others,
    )
    trainer.remove_callback(ProgressCallback)
    if not cell.is_last:
        asked = (world.ranker(cell.ranker), world.data["validation"], "target")
        trainer.add_callback(WinRateCallback(*asked, options=_options(world), seed=world.seed, trainer=trainer))
    trainer.train()
    best = str(trainer.state.best_model_checkpoint or "").rpartition("-")[2] or trainer.state.global_step
    curve = {str(one["step"]): one["eval_reward"] for one in trainer.state.log_history if "eval_reward" in one}
    policy = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # as it is loaded
    policy.save_pretrained(folder / "policy")
    return policy.eval(), {"step": int(best), "ranker's reward by step": curve, "rows": len(data), **statistics}


def _train_in_rounds(cell: Cell, world: World, folder: Path) -> tuple[Any, Settings]:
    """Return the policy of the last round, and the records of all rounds."""
    assert cell.rounds is not None
    training = _arguments(cell, world) | _selection(cell, world)
    training["max_steps"] = -(-training["max_steps"] // cell.rounds["num_rounds"])
    trainer_class, args = _trainer(cell.method, folder / "training", training)
    prompts = world.data["prompts"]
    rounds = train_in_rounds(
        trainer_class,
        world.sft,
        args,
        prompts,
        world.ranker(cell.ranker),
        eval_prompts=world.data["validation"],
        against="target",
        peft_config=world.peft_config,
        prompts_per_round=-(-len(prompts) // cell.rounds["num_rounds"]),
        **cell.rounds,
    )
    last = rounds.model_of(cell.rounds["num_rounds"])
    shutil.copytree(last, folder / "policy", ignore=shutil.ignore_patterns("checkpoint-*"))
    return load(last), {"rounds": rounds.records}


def _arguments(cell: Cell, world: World) -> Settings:
    """Return the arguments of a training: those of the world and of the cell."""
    steps = max(1, round(world.training["max_steps"] * cell.length))
    of_loss = {"rso": {"gamma": world.gamma}, "slic": {"delta": 1 / world.gamma}}.get(cell.method, {})
    if cell.method == "slic" and "loss_type" in cell.training:  # unlikelihood has no margin
        of_loss = {}
    return {**COMMON, **world.training, "max_steps": steps, "seed": world.seed, **of_loss, **cell.training}


def _selection(cell: Cell, world: World) -> Settings:
    """Return the options of a cell's sampling, which keeps no more candidates than there are."""
    how = world.sampling | cell.data
    how["num_candidates"] = len(cell.data.get("given", ())) or how["num_candidates"]
    return how | {"num_samples": min(how["num_samples"], how["num_candidates"])}


def _options(world: World) -> GenerationOptions:
    return GenerationOptions.of(None, **{name: of for name, of in world.sampling.items() if name != "num_candidates"})


def _trainer(method: str, folder: Path, training: Settings) -> tuple[Any, Any]:
    """Return the trainer of a method, and its configuration."""
    if method not in METHODS:
        return SFTTrainer, SFTConfig(str(folder), lr_scheduler_type="constant", **training)
    trainer_class = getattr(prefopt_trl, f"{METHODS[method].name}Trainer")
    return trainer_class, trainer_class.config_class(str(folder), lr_scheduler_type="constant", **training)


def _data(cell: Cell, world: World, folder: Path) -> tuple[Dataset, Settings]:
    """Return what a policy is trained on, with the statistics of its sampling."""
    if isinstance(cell.data, str):
        data, statistics = world.data[cell.data], {}
    else:
        answers = cell.data.get("given", ())
        rows = world.data["answers"] if answers else world.candidates(cell.ranker)
        if cell.data.get("pairing") == "correct-wrong":  # correct is what has more reward than half of the candidates
            rows = rows.map(
                lambda row: {"rewards": [float(one > np.median(row["rewards"])) for one in row["rewards"]]}
            )
        given = (rows, None, None, world.ranker(cell.ranker), folder)
        data = build_preference_dataset(*given, seed=world.seed, **_selection(cell, world))
        found = read_json(folder / "statistics.json")
        statistics = {
            "label probability": found["label_probability_after"],
            "label probability at random": found["label_probability_before"],
            "acceptance": found["acceptance_rate"],
            "beta": (found["beta_quantiles"] or [None] * 4)[3],
            "ranker accuracy": None if answers else world.accuracy(cell.ranker),
            "temperature": getattr(world.ranker(cell.ranker), "temperature", None),
        }
    if cell.method == HINDSIGHT:
        data = Dataset.from_list([row for pair in data for row in chain_of_hindsight(pair)])
    return data, statistics
