"""The worlds that experiments run in: what all policies of one seed share, made once and kept in a folder.

In the *kitchen* the true reward of any text is known, and all models are trained from scratch in minutes. The *real*
world is any model, with any prompts and any ranker, which is the truth there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, ProgressCallback
from trl import SFTConfig, SFTTrainer

from prefopt_trl.data.formats import wrap_completion
from prefopt_trl.data.hindsight import HELPFUL, UNHELPFUL
from prefopt_trl.experiments.kitchen import MAX_NEW_TOKENS, ControlledTask, true_reward
from prefopt_trl.generation.sampler import sample_completions
from prefopt_trl.rankers.base import Ranker
from prefopt_trl.rankers.calibration import calibrate
from prefopt_trl.rankers.function import FunctionRanker
from prefopt_trl.rankers.pairwise import PairwiseRanker, pairwise_ranker_dataset
from prefopt_trl.rankers.templates import ANSWERS, dialogue
from prefopt_trl.runtime.processes import process_state
from prefopt_trl.runtime.settings import Settings, read_json, write_json, writing
from prefopt_trl.sampling.pipeline import build_preference_dataset

LABELS = [f"{space}{label}" for space in ("", " ", "\n\n") for label in (HELPFUL, UNHELPFUL)]  # a word each
LEARNED, WEAK, TRUTH = "learned", "weak", "truth"  # rankers

COMMON: Settings = {  # arguments of all trainings
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    # `gradient_checkpointing` before transformers 5.23
    ("activation" if hasattr(SFTConfig, "activation_checkpointing") else "gradient") + "_checkpointing": False,
    "dataloader_pin_memory": False,
    "logging_strategy": "no",
    "disable_tqdm": False,  # without a bar each training would print its last log
}
# Of the kitchen
TASK = {"num_prompts": 400, "num_eval_prompts": 512}
SFT: Settings = {"max_steps": 500, "per_device_train_batch_size": 64, "learning_rate": 3e-3}
RANKER: Settings = {"max_steps": 900, "per_device_train_batch_size": 128, "learning_rate": 3e-3}
RANKER_STEPS = {LEARNED: RANKER["max_steps"], WEAK: 200}
POLICY: Settings = {"max_steps": 120, "per_device_train_batch_size": 32, "learning_rate": 2e-4}
HELD_OUT = 2000  # comparisons, to calibrate rankers on
GAMMA = 0.5  # temperature of RSO eq. 10; SLiC's margin is 1 / gamma

# Of the real world: the temperature of the loss, and how reviews begin
REAL_GAMMA = 0.1
OPENINGS = ["I watched", "We visited", "Last week I tried", "Everyone talks about", "Yesterday we saw", "My review of"]
SUBJECTS = [
    "the new film", "this hotel", "the small restaurant", "her latest book", "that museum", "the evening show",
    "the old theater", "their first album", "this city park", "the seaside cafe", "a cooking class", "the night train",
]  # fmt: skip
RESTS = ["and I must say that", "because my friends", "with my family, and", "again, and this time"]


@dataclass(frozen=True)
class World:
    """What all policies of a seed share.

    `data` has prompts to sample for (`prompts`), pairs that others made (`comparisons`), answers of others to the
    prompts (`answers`), and prompts with a column `target` to choose checkpoints on (`validation`) and to report on
    (`test`).
    """

    seed: int
    folder: Path
    sft: str  # path of the SFT policy
    tokenizer: PreTrainedTokenizerBase
    rankers: dict[str, Callable[[], Ranker]]  # cached; `"learned"` is what a user would have, and `"truth"` decides
    data: dict[str, Dataset]
    sampling: Settings  # options of all samples
    training: Settings  # arguments of all trainings
    gamma: float  # temperature of the loss, where nothing else is said
    peft_config: PeftConfig | None = None

    def ranker(self, name: str) -> Ranker:
        """Return a ranker, trained or loaded once."""
        return self.rankers[name]()

    def policy(self) -> Any:
        """Load the SFT policy."""
        return load(self.sft)

    def candidates(self, ranker: str) -> Dataset:
        """Return candidates of all prompts, sampled once, with the rewards of a ranker."""
        if self.ranker(ranker) is self.ranker(LEARNED):
            ranker = LEARNED
        folder = self.folder / f"candidates-{ranker}"
        if not (folder / "statistics.json").exists():
            rows = self.data["prompts"]
            if ranker != LEARNED:
                rows = self.candidates(LEARNED).remove_columns("rewards")
            how = {"strategy": "sft", "num_samples": 2, "seed": self.seed, **self.sampling}
            build_preference_dataset(rows, self.policy(), self.tokenizer, self.ranker(ranker), folder, **how)
        return load_from_disk(str(folder / "candidates"))

    def accuracy(self, ranker: str) -> float:
        """Return how often a ranker orders two candidates of a prompt as the truth does, where the truth differs."""
        if self.ranker(ranker) is self.ranker(TRUTH):
            return 1.0
        rewards, truth = (np.array(self.candidates(name)["rewards"]) for name in (ranker, TRUTH))
        gaps, true_gaps = (of[:, 0::2] - of[:, 1::2] for of in (rewards, truth))
        return float((np.sign(gaps) == np.sign(true_gaps))[true_gaps != 0].mean())


def load(path: str) -> Any:
    """Load a policy."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(process_state().device)


def kitchen(seed: int, folder: Path) -> World:
    """Return the kitchen of a seed, with an SFT policy and pairwise rankers, which are trained once."""
    torch.set_num_threads(1)  # more do not speed up models this small, and change the sums
    task = ControlledTask(seed=seed, **TASK)
    tokenizer = task.tokenizer(extra_words=LABELS)
    # Only the ranker's tokenizer has the words of its template, as a policy that writes them would confuse the ranker
    of_ranker = task.tokenizer(extra_words=[*dialogue("|", "|", "|").split("|"), *ANSWERS, *LABELS])
    comparisons = _saved(folder / "comparisons", lambda: task.comparisons)
    model = task.policy_model(tokenizer, seed)
    _fine_tune(model, tokenizer, lambda: task.sft_dataset, SFT, folder / "sft", seed)
    train, held_out = (comparisons.select(of) for of in np.split(np.arange(len(comparisons)), [-HELD_OUT]))

    def train_ranker(name: str) -> Ranker:
        judge, path = task.policy_model(of_ranker, seed + 1), folder / f"ranker-{name}"
        how = {**RANKER, "max_steps": RANKER_STEPS[name]}
        _fine_tune(judge, of_ranker, lambda: pairwise_ranker_dataset(train, seed=seed), how, path, seed)
        ranker, known = PairwiseRanker(path, of_ranker, batch_size=512, seed=seed), path / "temperature.json"
        if not known.exists():
            write_json(known, calibrate(ranker, held_out).temperature)
        ranker.temperature = read_json(known)
        return ranker

    parts = task.eval_dataset.rename_column("completion", "target").train_test_split(test_size=0.75, seed=seed)
    return World(
        seed=seed,
        folder=folder,
        sft=str(folder / "sft"),
        tokenizer=tokenizer,
        rankers={
            **{name: cache(partial(train_ranker, name)) for name in RANKER_STEPS},
            TRUTH: cache(lambda: FunctionRanker(true_reward)),
        },
        data={
            "prompts": task.answers.select_columns(["prompt", "fair"]).rename_column("fair", "target"),
            "comparisons": comparisons,
            "answers": task.answers,
            "validation": parts["train"],
            "test": parts["test"],
        },
        sampling={"num_candidates": 64, "max_new_tokens": MAX_NEW_TOKENS, "generation_batch_size": 1024},
        training=POLICY,
        gamma=GAMMA,
    )


def real(
    seed: int,
    folder: Path,
    *,
    model: str,
    prompts: Dataset,
    load_ranker: Callable[[], Ranker],
    training: Settings,
    sampling: Settings,
    num_judged: int,
) -> World:
    """Return the world of a model, whose samples are the targets, and a ranker, which is both learned and the truth.

    `prompts` may have pairs in columns `chosen` and `rejected`. Otherwise others are the model at a temperature of
    1.5, and the ranker labels a pair of their answers with the probability that it gives to the label.
    """
    tokenizer, ranker = AutoTokenizer.from_pretrained(model), _loaded(load_ranker)

    def complete() -> Dataset:
        rows = prompts.shuffle(seed=seed)
        if "chosen" in rows.column_names:
            rows = rows.select_columns(["prompt", "chosen", "rejected"])
            return rows.add_column("target", rows["chosen"][:])
        texts, policy = rows["prompt"][:], load(model)

        def sample(number: int, **how: Any) -> list[list[Any]]:
            how |= {"max_new_tokens": sampling["max_new_tokens"]}
            sampled = sample_completions(policy, tokenizer, texts, number, **how)
            return [[wrap_completion(text, one) for one in of] for text, of in zip(texts, sampled, strict=True)]

        first, second = map(list, zip(*sample(2, seed=seed + 1, temperature=1.5), strict=True))
        probability = ranker.compare(texts, first, second)
        is_first = np.random.default_rng(seed).random(len(texts)) < probability
        pairs = [(a, b) if label else (b, a) for a, b, label in zip(first, second, is_first, strict=True)]
        chosen, rejected = map(list, zip(*pairs, strict=True))
        target = [one for [one] in sample(1, seed=seed)]
        made = Dataset.from_dict({"prompt": texts, "target": target, "chosen": chosen, "rejected": rejected})
        return made.select(np.flatnonzero(np.isfinite(probability)))  # without a verdict there is no label

    rows = _saved(folder / "rows", complete)
    test, validation = num_judged, num_judged + num_judged // 2
    train = rows.select(range(validation, len(rows)))
    asked = ["prompt", "target"]
    return World(
        seed=seed,
        folder=folder,
        sft=model,
        tokenizer=tokenizer,
        rankers=dict.fromkeys((LEARNED, TRUTH), lambda: ranker),
        data={
            "prompts": train.select_columns(asked),
            "comparisons": train.select_columns(["prompt", "chosen", "rejected"]),
            "validation": rows.select(range(test, validation)).select_columns(asked),
            "test": rows.select(range(test)).select_columns(asked),
        },
        sampling=sampling,
        training=training,
        gamma=REAL_GAMMA,
        peft_config=LoraConfig(target_modules="all-linear", r=16, lora_alpha=32, task_type="CAUSAL_LM"),
    )


def reviews() -> Dataset:
    """Return beginnings of reviews, of 2 to 8 words, as in DPO's sentiment task (section 6): `prompt`."""
    beginnings = [f"{opening} {subject} {rest}" for opening in OPENINGS for subject in SUBJECTS for rest in RESTS]
    lengths = np.random.default_rng(0).integers(2, 9, size=len(beginnings))
    cut = [" ".join(text.split()[:length]) for text, length in zip(beginnings, lengths, strict=True)]
    return Dataset.from_dict({"prompt": list(dict.fromkeys(cut))})


def sentiment(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    """Return five times VADER's sentiment of prompt and completion, in [-5, 5]."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("The sentiment reward needs VADER. Run `pip install vaderSentiment`.") from error
    analyzer = SentimentIntensityAnalyzer()
    texts = (prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
    return [5 * analyzer.polarity_scores(text)["compound"] for text in texts]


@cache
def _loaded(load_ranker: Callable[[], Ranker]) -> Ranker:
    """Load a ranker, which may be large, once for the worlds of all seeds."""
    return load_ranker()


def _saved(folder: Path, make: Callable[[], Dataset]) -> Dataset:
    """Return a dataset that is made once."""
    if not folder.exists():
        with writing(folder) as unfinished:
            make().save_to_disk(unfinished)
    return load_from_disk(str(folder))


def _fine_tune(
    model: Any, tokenizer: Any, make: Callable[[], Dataset], how: Settings, folder: Path, seed: int
) -> None:
    """Train a model on prompts and completions with TRL's SFTTrainer, and save it, unless that was done."""
    if folder.exists():
        return
    with writing(folder) as unfinished:
        args = SFTConfig(str(unfinished), warmup_steps=0.1, seed=seed, **COMMON, **how)
        trainer = SFTTrainer(model, args=args, train_dataset=make(), processing_class=tokenizer)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
