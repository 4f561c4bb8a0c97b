"""Win rate, reward and KL of fresh samples as metrics of any Trainer, by which the best checkpoint is chosen."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from prefopt_trl.data.formats import Completion, Prompt, Row
from prefopt_trl.data.tokenization import check_vocabulary
from prefopt_trl.evaluation.comparison import Samples
from prefopt_trl.evaluation.metrics import Estimate
from prefopt_trl.evaluation.policy import as_prompts, given_completions
from prefopt_trl.evaluation.samples import SamplingPlan, as_rows, given_samples, logps_of, sample, seed_of, verdicts
from prefopt_trl.evaluation.training_report import write_training_report
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.rankers.base import Ranker, check_ranker
from prefopt_trl.runtime.processes import gathered, process_state
from prefopt_trl.runtime.settings import (
    as_json,
    dataset_fingerprint,
    differences,
    read_json,
    read_lines,
    write_json,
    write_lines,
)
from prefopt_trl.sampling.shards import shard_seed

PROMPTS_AT_ONCE = 16  # sampled by one process; samples do not depend on the number of processes
FOLDER, OPPONENT = "evaluations", "opponent"  # in `output_dir`, and the name of its policy
JUDGE = "judge"  # its name in the rows that are written
START, REFERENCE = "start", "reference"

logger = logging.get_logger(__name__)
Policy: TypeAlias = tuple[Any, Callable[[], AbstractContextManager[object]]]  # a model, and in which context it is one


class WinRateCallback(TrainerCallback):
    """Sample the policy whenever a Trainer evaluates it, and let a judge compare the samples to an opponent's.

    It adds to the metrics of [`~transformers.Trainer.evaluate`], so `metric_for_best_model="eval_reward"`,
    `load_best_model_at_end` and [`~transformers.EarlyStoppingCallback`] (after this one in `callbacks`) work: RSO
    takes the checkpoint with the highest reward (section 5). The metrics are means over prompts:

    - `eval_reward`, in nats: the judge's own reward, or against the opponent's completion if it only compares;
    - `eval_win_rate`, a tie counting half, and `eval_lc_win_rate`, of completions as long as the opponent's
      ([`length_controlled_win_rate`]);
    - `eval_kl`, from the reference model by the tokens drawn, in nats per completion;
    - `eval_length`, in tokens, and `eval_finished`, the share of completions that ended by themselves;
    - the standard errors of all but the last two, as `eval_reward_se`; NaN if the judge has no opinion at all.

    `output_dir/evaluations/` gets every completion and verdict, of the start of training and of each evaluation. The
    opponent is sampled and rewarded once, and read again by a resumed run. Each process does its share. At the end of
    training, [`write_training_report`] writes `report.md` and its plots. Both hold texts, and TRL's own trainers push
    them with the model. In a hyperparameter search, give a `compute_objective`: the default is the sum of all metrics.
    The `eval_reward` and `eval_kl` of [`~trl.GRPOTrainer`] are replaced in the metrics, with a warning.

    Args:
        judge ([`Ranker`]):
            Who compares.
        prompts ([`~datasets.Dataset`] or `list`):
            Column `prompt`, plain or conversational: at least 2 that are not trained on. The other columns are passed
            to a judge that reads them.
        against (`str` or `list`, *optional*, defaults to `"start"`):
            The opponent: `"start"`, the policy before its first step; `"reference"`, the reference model; another
            column of `prompts`; the path of a model, with the policy's tokenizer; or a list with a completion for each
            prompt.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            Reference model, for the KL, which is moved to the policy's device. By default the `ref_model` of
            `trainer`, or else the policy without its adapter (with TRL's copy of a trained one). Without any,
            `eval_kl` is left out.
        trainer ([`~transformers.Trainer`], *optional*):
            The trainer, if its trackers shall get the metrics too: add the callback with `trainer.add_callback`, as
            transformers passes no trainer to callbacks. Early stopping may then be anywhere in `callbacks`.
        num_completions (`int`, *optional*, defaults to `1`):
            Samples of each prompt.
        options ([`GenerationOptions`], *optional*):
            How to sample.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples, the same at each evaluation, and another one for the opponent.
        generation_kwargs (`dict`, *optional*):
            As in [`sample_completions`].
        **changes:
            Fields of `options` by name.

    Raises:
        ValueError: when training begins, if nothing will be evaluated, or if a resumed run has other settings than the
            samples it finds.

    Example:

    ```python
    trainer = SFTTrainer(
        "Qwen/Qwen2.5-0.5B",
        args=SFTConfig(
            "outputs/sft", eval_strategy="steps", eval_steps=50, save_steps=50, save_total_limit=1,
            metric_for_best_model="eval_reward", load_best_model_at_end=True,
        ),
        train_dataset=train, eval_dataset=test,
        callbacks=[WinRateCallback(RewardModelRanker("my-reward-model"), test, against="start")],
    )
    ```
    """

    def __init__(
        self,
        judge: Ranker,
        prompts: Dataset | Sequence[Prompt],
        against: str | Sequence[Completion] = START,
        *,
        reference: PreTrainedModel | None = None,
        trainer: Trainer | None = None,
        num_completions: int = 1,
        options: GenerationOptions | None = None,
        seed: int = 0,
        generation_kwargs: dict[str, object] | None = None,
        **changes: object,
    ) -> None:
        check_ranker(judge)
        self.judge, self.prompts, self.trainer = judge, as_prompts(prompts), cast(Any, trainer)
        judge.check_columns({*self.prompts.column_names} - {"prompt"})
        options = GenerationOptions.of(options, **changes)
        self.plan = SamplingPlan(num_completions, options, generation_kwargs or {})
        self.seed, self.reference = seed, cast(Any, reference)
        self.given: list[list[Completion]] | None = None
        if not isinstance(against, str):
            against, self.given = "given texts", given_completions("against", list(against), self.prompts)
        elif against not in (START, REFERENCE) and against in self.prompts.column_names:
            self.given = given_completions(against, self.prompts[against][:], self.prompts)
        self.against = against
        settings = {"seed": seed, "prompts": dataset_fingerprint(self.prompts), "judge": judge.settings()}
        self.settings = as_json(self.plan.settings() | settings | {"against": self.given or against})
        self.opponent: list[Row] = []
        self.measured: dict[str, float] = {}
        self.measured_as, self.phase = "", "before"
        self.measured_with: set[frozenset[str]] = set()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if args.eval_strategy == "no":
            raise ValueError("`WinRateCallback` samples when the trainer evaluates. Set `eval_strategy`.")
        if self.trainer is not None:  # ahead of `EarlyStoppingCallback`, which reads the metrics
            callbacks = self.trainer.callback_handler.callbacks
            callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        self.phase, self.measured_as, folder = "training", "", Path(str(args.output_dir), FOLDER)
        if not state.global_step:
            self.opponent = []
            self.opponent = self._sample(OPPONENT, self._opponent(kwargs["model"]), **kwargs)
            if state.is_world_process_zero:
                write_json(folder / "settings.json", self.settings)
                write_lines(folder / f"{OPPONENT}.jsonl", self.opponent)
            return self._measure(self._sample("step 0", (kwargs["model"], nullcontext), **kwargs), args, state)
        if changed := self._read_opponent(folder):
            raise ValueError(
                f"This run resumes, but {folder} has no samples of the opponent that were made with the same "
                f"settings ({changed}). Restore them, or start anew."
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if not self.opponent and self._read_opponent(Path(str(args.output_dir), FOLDER)):  # before training
            self.opponent = self._sample(OPPONENT, self._opponent(kwargs["model"]), **kwargs)
        name = f"step {state.global_step}" if self.phase == "training" else f"{self.phase} training"
        dataset = frozenset(kwargs["metrics"])  # the metrics of several have different names
        if name != self.measured_as or dataset in self.measured_with:
            self._measure(self._sample(name, (kwargs["model"], nullcontext), **kwargs), args, state)
        self.measured_with.add(dataset)
        if theirs := sorted(dataset & self.measured.keys()):
            logger.warning_once(f"The judge's {', '.join(theirs)} replaces the metric of the trainer with this name.")
        kwargs["metrics"].update(self.measured)  # in place: `metric_for_best_model` is looked up in this very dict

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.phase = "after"
        if state.is_world_process_zero:
            rewards = [entry["eval_reward"] for entry in state.log_history if "eval_reward_se" in entry]
            if len(rewards) > 1 and rewards[0] >= max(rewards[1:]):
                logger.warning(
                    "No checkpoint has a higher reward than the start: %.4g at most, and %.4g before training.",
                    max(rewards[1:]),
                    rewards[0],
                )
            write_training_report(str(args.output_dir), state.log_history)

    def _read_opponent(self, folder: Path) -> str | None:
        """Read the opponent of an earlier run, or return why there is none."""
        if not (folder / f"{OPPONENT}.jsonl").is_file():
            return f"{OPPONENT}.jsonl is missing"
        if changed := differences(read_json(folder / "settings.json") or {}, self.settings):
            return ", ".join(changed)
        self.opponent = read_lines(folder / f"{OPPONENT}.jsonl")
        return None

    def _opponent(self, model: Any) -> Policy:
        if self.given is not None:
            return None, nullcontext
        if self.against == START:
            return model, nullcontext
        if self.against != REFERENCE:
            try:
                loaded: Any = AutoModelForCausalLM.from_pretrained(self.against, dtype=model.dtype)
            except (OSError, ValueError) as error:  # a folder without a model is either
                raise ValueError(
                    f"`against` is {self.against!r}, which is neither 'start', 'reference' nor a column of `prompts`, "
                    "and no model can be loaded from it."
                ) from error
            return loaded.to(model.device), nullcontext
        if (reference := self._reference(model))[0] is None:
            raise ValueError("`against` is the reference model, and there is none. Give `reference` or `trainer`.")
        return reference

    def _reference(self, model: Any) -> Policy:
        if self.reference is not None:
            if self.reference.device != model.device:
                self.reference.to(model.device)
            return self.reference, nullcontext
        if getattr(self.trainer, "ref_model", None) is not None:
            return self.trainer.accelerator.unwrap_model(self.trainer.ref_model), nullcontext
        if not isinstance(model, PeftModel):
            return None, nullcontext
        return model, partial(_with_copy, model) if "ref" in model.peft_config else model.disable_adapter

    def _sample(self, name: str, policy: Policy, model: Any, processing_class: Any, **_: Any) -> list[Row]:
        """Sample a policy, or take the given completions, and judge them; each process does a share."""
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if tokenizer is None:
            raise ValueError("`WinRateCallback` samples with the trainer's `processing_class`. Give the trainer one.")
        (sampled, as_policy), (reference, as_reference) = policy, self._reference(model)
        if sampled is not None:
            check_vocabulary(tokenizer, sampled)
        if sampled is None or not self.plan.is_of_policy:
            reference = None
        opponents, process = [list(of) for _, of in groupby(self.opponent, lambda row: row["row"])], process_state()
        starts = range(0, len(self.prompts), PROMPTS_AT_ONCE)[process.process_index :: process.num_processes]
        made: list[Row] = []
        seed = seed_of(self.seed, OPPONENT if name == OPPONENT else "policy")  # the same at each step
        with gathered(sampled, reference, self.judge.model):
            for start in tqdm(starts, desc=f"Judging {name}", disable=not process.is_main_process, leave=False):
                rows = self.prompts.select(range(start, min(start + PROMPTS_AT_ONCE, len(self.prompts)))).to_list()
                ref_logps = None
                if sampled is None:
                    samples = [given_samples(of) for of in (self.given or [])[start : start + len(rows)]]
                else:
                    with as_policy():
                        samples = sample(sampled, tokenizer, rows, self.plan, shard_seed(seed, start))
                if reference is not None and samples[0][0]["logp"] is not None:
                    with as_reference():
                        ref_logps = logps_of(samples, reference, tokenizer, rows)
                theirs = opponents[start : start + len(rows)] or samples
                known = {}
                if opponents:
                    known[OPPONENT] = [np.array([one["rewards"][JUDGE] for one in of], float) for of in theirs]
                found = verdicts(self.judge, rows, {name: samples, OPPONENT: theirs}, OPPONENT, known)
                made += as_rows(name, start, rows, samples, ref_logps, {JUDGE: found[name]})
        return sorted(gather_object(made), key=lambda row: (row["row"], row["sample"]))

    def _measure(self, rows: list[Row], args: TrainingArguments, state: TrainerState) -> None:
        """Keep the metrics of rows, log them, and write the rows."""
        samples = Samples(rows)
        found = samples.measure() | samples.measure_by(JUDGE, Samples(self.opponent))
        self.measured, self.measured_as, self.measured_with = {}, rows[0]["policy"], set()
        for name in ("win_rate", "lc_win_rate", "reward", *{"kl"} & found.keys()):
            one = found.get(name, Estimate(math.nan, math.nan))  # `metric_for_best_model` must be there
            self.measured |= {f"eval_{name}": one.mean, f"eval_{name}_se": one.standard_error}
        self.measured |= {"eval_length": found["tokens"].mean, "eval_finished": found["finished"].mean}
        known = {name: value for name, value in self.measured.items() if math.isfinite(value)}
        if self.trainer is not None:
            self.trainer.log(dict(known))
        else:
            state.log_history.append({"epoch": state.epoch, **known, "step": state.global_step})
        if state.is_world_process_zero:
            names = {"training": f"step-{state.global_step:06d}.jsonl", "after": "after-training.jsonl"}
            if self.phase in names:  # before, the folder may hold an earlier run
                write_lines(Path(str(args.output_dir), FOLDER, names[self.phase]), rows)
            if "eval_win_rate" not in known:
                logger.warning("The judge has no opinion on any completion of %s.", self.measured_as)
            if self.trainer is None:
                tqdm.write(str({name: f"{value:.4g}" for name, value in known.items()}))


@contextmanager
def _with_copy(model: PeftModel) -> Iterator[None]:
    """Within, TRL's copy of a trained adapter is the active one."""
    active = model.active_adapter
    model.set_adapter("ref")
    try:
        yield
    finally:
        model.set_adapter(active)
