"""Win rate, reward and KL of fresh samples as metrics of any Trainer, by which the best checkpoint is chosen."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from prefopt_trl.data.formats import Completion, Prompt, Row
from prefopt_trl.data.tokenization import chat_options, tokenize_prompts
from prefopt_trl.evaluation.comparison import Samples
from prefopt_trl.evaluation.policy import as_prompts, given_completions
from prefopt_trl.evaluation.samples import SamplingPlan, as_rows, drawn_logps, given_samples, sample, verdicts
from prefopt_trl.evaluation.training_report import write_training_report
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.rankers.base import Ranker, check_ranker
from prefopt_trl.runtime.processes import gathered, process_state
from prefopt_trl.runtime.settings import (
    Settings,
    as_json,
    dataset_fingerprint,
    differences,
    read_json,
    read_lines,
    write_json,
    write_lines,
)
from prefopt_trl.sampling.selection import user_columns
from prefopt_trl.sampling.shards import shard_seed

PROMPTS_AT_ONCE = 8  # sampled by one process; samples do not depend on the number of processes
FOLDER, OPPONENT = "evaluations", "opponent.jsonl"  # in `output_dir`
JUDGE = "judge"  # its name in the rows that are written
START, REFERENCE = "start", "reference"


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
    - the standard errors of all but the last two, as `eval_reward_se` and so on.

    `output_dir/evaluations/` gets every completion and verdict, of the start of training and of each evaluation. The
    opponent is sampled and rewarded once, and read again by a resumed run. Each process does its share. At the end of
    training, [`write_training_report`] writes `report.md` and its plots.

    Args:
        judge ([`Ranker`]):
            Who compares.
        prompts ([`~datasets.Dataset`] or `list`):
            Column `prompt`, plain or conversational: at least 2 that are not trained on. The other columns are passed
            to a judge that reads them.
        against (`str` or `list`, *optional*, defaults to `"start"`):
            The opponent: `"start"`, the policy before its first step; `"reference"`, the reference model; a column of
            `prompts`; the path of a model, with the policy's tokenizer; or a list with a completion for each prompt.
        reference ([`~transformers.PreTrainedModel`], *optional*):
            Reference model, for the KL. By default the policy without its adapter (with TRL's copy of a trained one),
            or the `ref_model` of `trainer`. Without any, `eval_kl` is left out.
        trainer ([`~transformers.Trainer`], *optional*):
            The trainer, if its trackers shall get the metrics too: add the callback with `trainer.add_callback`, as
            transformers passes no trainer to callbacks.
        num_completions (`int`, *optional*, defaults to `1`):
            Samples of each prompt.
        options ([`GenerationOptions`], *optional*):
            How to sample.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples, the same at each evaluation.
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
        self.judge, self.prompts, self.trainer = judge, as_prompts(prompts), trainer
        judge.check_columns({*self.prompts.column_names} - {"prompt"})
        options = GenerationOptions.of(options, **changes)
        self.plan = SamplingPlan.of(num_completions, options, generation_kwargs)
        self.seed, self.reference = seed, reference
        self.given: list[list[Completion]] | None = None
        if not isinstance(against, str):
            against, self.given = "given texts", given_completions("against", list(against), self.prompts)
        elif against in self.prompts.column_names:
            self.given = given_completions(against, self.prompts[against][:], self.prompts)
        self.against = against
        self.opponent: list[Row] = []
        self.measured: dict[str, float] = {}
        self.measured_as, self.is_over = "", False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.eval_strategy == "no":
            raise ValueError("`WinRateCallback` samples when the trainer evaluates. Set `eval_strategy`.")
        folder, settings, self.is_over = Path(str(args.output_dir), FOLDER), as_json(self._settings()), False
        if state.global_step:
            changed = differences(read_json(folder / "settings.json") or {}, settings)
            if changed or not (folder / OPPONENT).is_file():
                raise ValueError(
                    f"This run resumes, but {folder} has no samples of the opponent that were made with the same "
                    f"settings ({', '.join(changed) or f'{OPPONENT} is missing'}). Restore them, or start anew."
                )
            self.opponent = read_lines(folder / OPPONENT)
            return
        self.opponent = []
        if self.against != START:
            self.opponent = self._sample(self.against, **kwargs)
        start = self._sample(START, **kwargs)
        self.opponent = self.opponent or start
        if state.is_world_process_zero:
            write_json(folder / "settings.json", settings)
            write_lines(folder / OPPONENT, self.opponent)
        self._log(start, args, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.opponent:  # `evaluate` before training
            self.on_train_begin(args, state, control, **kwargs)
        name = "after training" if self.is_over else f"step {state.global_step}"
        if name != self.measured_as or self.is_over:  # in training once, also if there are several datasets
            self._log(self._sample(name, **kwargs), args, state)
        kwargs["metrics"].update(self.measured)  # in place: `metric_for_best_model` is looked up in this very dict

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.is_over = True
        if state.is_world_process_zero:
            write_training_report(str(args.output_dir), state.log_history)

    def _settings(self) -> Settings:
        return {
            **self.plan.settings(),
            "seed": self.seed,
            "prompts": dataset_fingerprint(self.prompts),
            "judge": self.judge.settings(),
            "against": self.against if self.given is None else self.given,
        }

    def _sample(self, name: str, model: Any, processing_class: Any, **_: Any) -> list[Row]:
        """Return the judged completions of a policy, or of the opponent as long as there is none."""
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if name != self.against or self.against == START:
            return self._rows(name, model, model, tokenizer)
        if self.given is not None:
            return self._rows(name, None, model, tokenizer)
        if name != REFERENCE:
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype)
            return self._rows(name, loaded.to(model.device), model, tokenizer)
        reference, as_reference = self._reference(model)
        if reference is None:
            raise ValueError("`against` is the reference model, and there is none. Give `reference` or `trainer`.")
        with as_reference():
            return self._rows(name, reference, model, tokenizer)

    def _rows(self, name: str, policy: Any, model: Any, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """Sample `policy`, or take the given completions, and judge them; each process does a share."""
        process, (reference, as_reference) = process_state(), self._reference(model)
        opponents, own_reference = _by_prompt(self.opponent), reference if self.plan.is_of_policy else None
        starts = range(0, len(self.prompts), PROMPTS_AT_ONCE)[process.process_index :: process.num_processes]
        made: list[Row] = []
        with gathered(policy, own_reference, self.judge.model):
            for start in tqdm(starts, desc=f"Judging {name}", disable=not process.is_main_process, leave=False):
                rows = self.prompts.select(range(start, min(start + PROMPTS_AT_ONCE, len(self.prompts)))).to_list()
                prompts, ref_logps = [row["prompt"] for row in rows], None
                if policy is None:
                    samples = [given_samples(of) for of in (self.given or [])[start : start + len(rows)]]
                else:
                    samples = sample(policy, tokenizer, rows, self.plan, shard_seed(self.seed, start))
                if own_reference is not None and samples[0][0]["logp"] is not None:
                    with as_reference():
                        ids = tokenize_prompts(tokenizer, prompts, list(map(chat_options, rows)))
                        ref_logps = drawn_logps(own_reference, ids, samples)
                completions = {name: [[one["completion"] for one in of] for of in samples]}
                known = {}
                if opponents:
                    theirs = opponents[start : start + len(rows)]
                    completions[self.against] = [[one["completion"] for one in of] for of in theirs]
                    if not self.judge.draws_baselines:
                        known[self.against] = [np.array([one["rewards"][JUDGE] for one in of], float) for of in theirs]
                against = self.against if opponents else None
                found = verdicts(self.judge, prompts, completions, against, user_columns(rows), known)
                made += as_rows(name, start, prompts, samples, ref_logps, {JUDGE: found[name]})
        return sorted(gather_object(made), key=lambda row: (row["row"], row["sample"]))

    def _reference(self, model: Any) -> tuple[Any, Callable[[], AbstractContextManager[object]]]:
        """Return the reference model, and the context in which it is one."""
        reference = self.reference or getattr(self.trainer, "ref_model", None)
        if reference is None and isinstance(model, PeftModel):
            return model, partial(_without_adapter, model)
        return reference, nullcontext

    def _log(self, rows: list[Row], args: TrainingArguments, state: TrainerState) -> None:
        """Keep the metrics of rows, and write both."""
        samples = Samples(rows)
        opponent = Samples(self.opponent) if self.opponent is not rows else None
        found = samples.measure() | samples.measure_by(JUDGE, opponent)
        self.measured = {}
        for name in ("win_rate", "lc_win_rate", "reward", "kl"):
            if name in found and not math.isnan(found[name].mean):
                self.measured |= {f"eval_{name}": found[name].mean, f"eval_{name}_se": found[name].standard_error}
        self.measured |= {"eval_length": found["tokens"].mean, "eval_finished": found["finished"].mean}
        self.measured_as = rows[0]["policy"]
        if self.trainer is not None:
            self.trainer.log(dict(self.measured))
        else:
            state.log_history.append({"epoch": state.epoch, **self.measured, "step": state.global_step})
        if state.is_world_process_zero:
            name = "after-training" if self.is_over else f"step-{state.global_step:06d}"
            write_lines(Path(str(args.output_dir), FOLDER, f"{name}.jsonl"), rows)
            if self.trainer is None:
                tqdm.write(str({name: f"{value:.4g}" for name, value in self.measured.items()}))


def _by_prompt(rows: list[Row]) -> list[list[Row]]:
    return [list(of) for _, of in groupby(rows, key=lambda row: row["row"])]


@contextmanager
def _without_adapter(model: PeftModel) -> Iterator[None]:
    """Within, a PEFT model is its own reference: without its adapter, or with TRL's copy of one that was trained."""
    if "ref" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    model.set_adapter("ref")
    try:
        yield
    finally:
        model.set_adapter(active)
