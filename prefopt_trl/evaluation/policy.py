"""Evaluate policies: sample their completions, and ask judges about them, in shards that survive a kill."""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from accelerate import PartialState
from datasets import Dataset, Value
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Completion, Prompt, Row, check_completions, check_prompts
from prefopt_trl.data.tokenization import check_vocabulary
from prefopt_trl.evaluation.comparison import PolicyEvaluation
from prefopt_trl.evaluation.samples import (
    Sample,
    SamplingPlan,
    as_rows,
    best_of,
    given_samples,
    logps_of,
    sample,
    seed_of,
    verdicts,
)
from prefopt_trl.generation.options import GenerationOptions
from prefopt_trl.rankers.base import Ranker, check_ranker
from prefopt_trl.runtime.processes import gathered, interruptible, process_state
from prefopt_trl.runtime.settings import (
    Settings,
    as_json,
    dataset_fingerprint,
    model_fingerprint,
    read_lines,
    template_date,
    tokenizer_fingerprint,
)
from prefopt_trl.sampling.shards import shard_seed
from prefopt_trl.sampling.store import ShardStore

logger = logging.getLogger(__name__)

COMPLETIONS_PER_SHARD = 256  # of each policy: what an interruption loses


@dataclass(frozen=True)
class ModelPolicy:
    """A policy to sample from. `identity` recognizes the model, which `load` may load when it is needed."""

    load: Callable[[], PreTrainedModel]
    tokenizer: PreTrainedTokenizerBase
    identity: str
    model: PreTrainedModel | None = None  # if it is loaded already


@dataclass(frozen=True)
class BestOf:
    """The best of each `n` completions of a policy, by the reward of a ranker (best-of-n).

    Example:

    ```python
    evaluate_policy({"sft": model, "best of 16": BestOf(model, 16, ranker)}, tokenizer, prompts, judges=judge)
    ```
    """

    policy: Any
    n: int
    ranker: Ranker

    def __post_init__(self) -> None:
        check_ranker(self.ranker)
        if type(self.n) is not int or self.n < 1:
            raise ValueError(f"`n` of `BestOf` must be a whole number, at least 1, got {self.n!r}.")


GivenPolicy: TypeAlias = list[list[Completion]]  # for each prompt
Policy: TypeAlias = ModelPolicy | GivenPolicy | BestOf


def evaluate_policy(
    policies: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Dataset | Sequence[Prompt],
    *,
    judges: Ranker | Mapping[str, Ranker],
    against: str | None = None,
    reference: Any = None,
    num_completions: int = 1,
    options: GenerationOptions | None = None,
    seed: int = 0,
    generation_kwargs: dict[str, object] | None = None,
    output_dir: str | Path | None = None,
    **changes: object,
) -> PolicyEvaluation:
    """Sample completions of one or several policies, and let judges compare them.

    An interrupted call resumes from the finished shards of prompts in `output_dir` and writes the same bytes. Each
    process of `accelerate launch` or `torchrun` makes part of the shards.

    Args:
        policies (model or `dict`):
            A [`~transformers.PreTrainedModel`], which is named `"policy"`, or by name: models, pairs of a model and
            its tokenizer, completions (the name of a column of `prompts`, or a list with one or several for each
            prompt), and [`BestOf`] of any of them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the models that are given without one. May be None if there are none.
        prompts ([`~datasets.Dataset`] or `list`):
            Column `prompt`, plain text or messages. Other columns are passed to judges that read them.
        judges ([`Ranker`] or `dict[str, Ranker]`):
            Who compares, by name. By default the name is that of the class.
        against (`str`, *optional*):
            The opponent of all others: the name of a policy, or of a column, such as `"chosen"`. It may be left out if
            the judges reward each completion separately.
        reference (`str` or model, *optional*):
            The model from which the KL is measured, for models with the same tokenizer and samples whose distribution
            no option narrows: the name of one among `policies`, or another one, which is neither sampled nor judged.
        num_completions (`int`, *optional*, defaults to `1`):
            Samples of each prompt, for the policies that are sampled.
        options ([`GenerationOptions`], *optional*):
            How to sample. A `temperature` of 0 takes the most likely token.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples.
        generation_kwargs (`dict`, *optional*):
            As in [`sample_completions`], such as `{"stop_strings": ["\\n\\nHuman:"]}`.
        output_dir (`str` or `Path`, *optional*):
            Folder for everything [`PolicyEvaluation.save`] writes, which several processes need. A finished one with
            the same settings is read again.
        **changes:
            Fields of `options` by name.

    Returns:
        [`PolicyEvaluation`]: print it, or read its `estimates`, `judged` and `difference`.

    Raises:
        TypeError: if a policy, judge or option is of the wrong kind.
        ValueError: for names that are not there, completions that do not fit the prompts, an `output_dir` made with
            other settings (naming them), or a judge that needs an opponent.

    Example:

    ```python
    found = evaluate_policy(
        {"sft": sft, "rso": rso}, tokenizer, prompts, judges=judge, against="sft", reference="sft", num_completions=4
    )
    print(found)
    found.difference("rso", "sft").p_value()
    ```
    """
    prompts = as_prompts(prompts)
    judges = dict(judges) if isinstance(judges, Mapping) else {type(judges).__name__: judges}
    given = dict(policies) if isinstance(policies, Mapping) else {"policy": policies}
    if not judges or not given:
        raise ValueError("`policies` and `judges` need at least one entry each.")
    if against is not None and against not in given:
        given[against] = against  # the name of a column
    plan = SamplingPlan(num_completions, GenerationOptions.of(options, **changes), generation_kwargs or {})
    made = {name: _policy(name, value, tokenizer, prompts) for name, value in given.items()}
    reference_model: ModelPolicy | None = None
    if reference is not None:
        is_name = isinstance(reference, str)
        model = made.get(reference) if is_name else _policy("reference", reference, tokenizer, prompts)
        if not isinstance(model, ModelPolicy):
            raise ValueError(f"`reference` is {reference!r}. Give a model, or the name of a model among `policies`.")
        reference, reference_model = reference if is_name else "the reference", model
    columns = {name for name in prompts.column_names if name != "prompt"}
    for name, judge in judges.items():
        check_ranker(judge, "judges")
        judge.check_columns(columns)
        if against is None and judge.draws_baselines:
            raise ValueError(
                f"The judge {name!r} compares completions, so it needs an opponent. Give `against`: the name of a "
                "policy, or of a column with completions."
            )
    process = process_state()
    if output_dir is None and process.num_processes > 1:
        raise ValueError("Several processes share their results in `output_dir`. Give one, or start one process.")
    with ExitStack() as stack:
        store = EvaluationStore(output_dir or stack.enter_context(tempfile.TemporaryDirectory()), len(judges))
        parts = [part for policy in (*made.values(), reference_model) if policy for part in _parts(policy)]
        rankers = [*judges.values(), *(part.ranker for part in parts if isinstance(part, BestOf))]
        models = [part.model for part in parts if isinstance(part, ModelPolicy)]
        stack.enter_context(gathered(*models, *(ranker.model for ranker in rankers)))
        evaluation = _Evaluation(
            store, prompts, made, judges, against, reference, reference_model, plan, seed, process
        )
        settings = as_json(evaluation.settings())
        is_finished = store.finished(settings)  # raises for another evaluation, before this one begins
        if output_dir is not None:
            stack.enter_context(interruptible(lambda: f"Interrupted: {store.saved()}; the same call resumes."))
        return evaluation.run(settings, is_finished)


def as_prompts(prompts: Dataset | Sequence[Prompt]) -> Dataset:
    """Return the prompts of an evaluation, checked, as a dataset."""
    if not isinstance(prompts, Dataset):
        check_prompts(prompts)  # a single text is no list
        prompts = Dataset.from_dict({"prompt": list(prompts)})
    elif "prompt" not in prompts.column_names:
        raise ValueError(f"`prompts` has no column `prompt`; it has {', '.join(prompts.column_names)}. Rename one.")
    if len(prompts) < 2:
        raise ValueError(f"Standard errors need at least 2 prompts, and `prompts` has {len(prompts)}.")
    check_prompts(prompts["prompt"][:])
    return prompts.with_format(None)


def _policy(name: str, value: Any, tokenizer: PreTrainedTokenizerBase | None, prompts: Dataset) -> Policy:
    """Return a policy that the user has given, checked."""
    if isinstance(value, ModelPolicy):
        return value
    if isinstance(value, BestOf):
        value.ranker.check_columns({*prompts.column_names} - {"prompt"})
        policy = _policy(name, value.policy, tokenizer, prompts)
        for row, several in enumerate(policy if isinstance(policy, list) else ()):
            if len(several) < value.n:
                found = f"row {row} of `prompts` has {len(several)}"
                raise ValueError(f"`BestOf` of {name!r} needs {value.n} completions, and {found}. Give more of them.")
        return BestOf(policy, value.n, value.ranker)
    if isinstance(value, str):
        if value not in prompts.column_names:
            raise ValueError(
                f"{value!r} is neither a policy nor a column of `prompts`, which has "
                f"{', '.join(prompts.column_names)}. Give a loaded model (the command: a folder), or name a column."
            )
        value = prompts[value][:]
    if isinstance(value, Sequence) and not isinstance(value, tuple):
        return given_completions(name, list(value), prompts)
    model, own = value if isinstance(value, tuple) else (value, tokenizer)
    if own is None or not hasattr(model, "generate"):
        raise TypeError(
            f"The policy {name!r} is a {type(model).__name__} without a tokenizer. Give a model that generates and "
            "`tokenizer`, a pair of both, a column or a list of completions, or `BestOf`."
        )
    check_vocabulary(own, model)
    return ModelPolicy(lambda: model, own, model_fingerprint(model), model)


def _parts(policy: Policy) -> list[Policy]:
    """Return a policy and, of a best-of-n, the policies within."""
    return [policy, *(_parts(policy.policy) if isinstance(policy, BestOf) else ())]


def given_completions(name: str, values: list[Any], prompts: Dataset) -> GivenPolicy:
    """Return completions that the user has given, one or several for each prompt, checked."""
    if len(values) != len(prompts):
        raise ValueError(f"The policy {name!r} has completions of {len(values)} prompts; there are {len(prompts)}.")
    completions = []
    for row, (prompt, value) in enumerate(zip(prompts["prompt"], values, strict=True)):
        is_one = not isinstance(value, list | tuple) or (bool(value) and isinstance(value[0], Mapping))
        several = [value] if is_one else list(value)
        if not several:
            raise ValueError(f"The policy {name!r} has no completion for row {row} of `prompts`. Leave the row out.")
        check_completions(prompt, several, f"the policy {name!r}, row {row}")
        completions.append(several)
    return completions


class EvaluationStore(ShardStore):
    """The folder of an evaluation."""

    made, results, written = "an evaluation", ("samples.jsonl",), ("evaluation.json", "samples.jsonl")

    def __init__(self, folder: str | Path, num_judges: int) -> None:
        super().__init__(folder)
        self.last_stage = f"verdicts-{num_judges - 1}"

    def saved(self) -> str:
        shards = len(list(self.shards.glob("*.jsonl")))
        return f"{shards} shards of completions or verdicts are saved in {self.folder}" if shards else super().saved()

    def advice(self) -> str:
        return (
            "To judge the same completions in another way, give the finished `samples.jsonl` as the completions of "
            "each policy."
        )


@dataclass(frozen=True)
class _Evaluation:
    """All inputs of an evaluation. What a shard gets depends only on these and on its number."""

    store: EvaluationStore
    prompts: Dataset
    policies: dict[str, Policy]
    judges: dict[str, Ranker]
    against: str | None
    reference: str | None
    reference_model: ModelPolicy | None
    plan: SamplingPlan
    seed: int
    process: PartialState

    def run(self, settings: Settings, is_finished: bool) -> PolicyEvaluation:
        if is_finished:
            logger.info("Reusing the evaluation in %s, made with the same settings.", self.store.folder)
            if self.process.is_main_process:
                with suppress(OSError):  # a read-only disk
                    self.store.clear()  # if the run that finished it was stopped before it had removed the shards
        elif self.process.is_main_process:
            with self.store.held():
                if not self.store.finished(settings):  # by another run, in the meantime
                    per_shard = max(1, COMPLETIONS_PER_SHARD // self.plan.num_completions)
                    self.store.begin(settings, per_shard, -(-len(self.prompts) // per_shard))
                    self._make_shards()
                    self.store.wait_for_shards()
                    self._assemble(settings)
        else:
            self.store.wait_for_settings(settings)
            self._make_shards()
            self.store.wait_until_finished()
        saved = read_lines(self.store.folder / "samples.jsonl")
        return PolicyEvaluation(saved, list(self.judges), self.against, self.reference, settings)

    def settings(self) -> Settings:
        settings: Settings = {
            **self.plan.settings(),
            "seed": self.seed,
            "prompts": dataset_fingerprint(self.prompts),
            "policies": {name: _identity(policy) for name, policy in self.policies.items()},
            "judges": {name: judge.settings() for name, judge in self.judges.items()},
            "order": [list(self.policies), list(self.judges)],
            "against": self.against,
            "reference": self.reference,
        }
        if self.reference_model is not None and self.reference not in self.policies:
            settings["reference_model"] = _identity(self.reference_model)
        if not isinstance(self.prompts.features["prompt"], Value):
            for part in (part for policy in self.policies.values() for part in _parts(policy)):
                settings |= template_date(part.tokenizer) if isinstance(part, ModelPolicy) else {}
        return settings

    def _make_shards(self) -> None:
        """Make the shards of this process, one policy after the other, so that one model is loaded at a time."""
        mine = range(self.process.process_index, self.store.layout()[1], self.process.num_processes)
        for number, (name, policy) in enumerate(self.policies.items()):
            completing = partial(self._completing, policy, self.plan, seed_of(self.seed, name))
            self._each(mine, f"completions-{number}", f"Completions of {name}", completing)
        if self.reference is not None and not self.plan.is_of_policy:
            logger.warning("The KL is not known, as the options of sampling narrow the distribution of the policy.")
        elif self.reference is not None:
            self._each(mine, "reference", f"Log-probabilities under {self.reference}", self._referring)
        for number, name in enumerate(self.judges):
            self._each(mine, f"verdicts-{number}", f"Verdicts of {name}", partial(partial, self._judge, name))

    def _each(self, mine: range, stage: str, title: str, begin: Callable[[], Callable[[int], list[Row]]]) -> None:
        """Make a stage of all shards, if any is missing: `begin` loads what it needs and returns what makes one."""
        missing = [shard for shard in mine if not self.store.has_shard(shard, stage)]
        if not missing or self.store.is_finished():
            return
        make = begin()
        total, left = (sum(len(self._rows(shard)) for shard in shards) for shards in (mine, missing))
        hidden = not self.process.is_main_process
        with tqdm(total=total, initial=total - left, desc=title, unit="prompt", disable=hidden) as bar:
            for shard in missing:
                rows = self._rows(shard)
                try:
                    self.store.write_shard(shard, stage, make(shard))
                except Exception as error:
                    error.add_note(f"{title}: rows are counted from row {rows.start} of `prompts`.")
                    raise
                bar.update(len(rows))

    def _completing(self, policy: Policy, plan: SamplingPlan, seed: int) -> Callable[[int], list[Row]]:
        """Load a policy, and return the function that makes its completions of a shard."""
        if isinstance(policy, BestOf):
            plan = replace(plan, num_completions=policy.n * plan.num_completions)
            inner = self._completing(policy.policy, plan, seed)

            def make(shard: int) -> list[Row]:
                sampled = [row["samples"] for row in inner(shard)]
                return [{"samples": of} for of in best_of(policy.ranker, self._given(shard), sampled, policy.n)]

            return make
        if isinstance(policy, ModelPolicy):
            model = policy.load()
            return lambda shard: [
                {"samples": of}
                for of in sample(model, policy.tokenizer, self._given(shard), plan, shard_seed(seed, shard), True)
            ]
        return lambda shard: [{"samples": given_samples(policy[row])} for row in self._rows(shard)]

    def _referring(self) -> Callable[[int], list[Row]]:
        """Load the reference, and return the function that computes its log-probabilities of a shard's samples."""
        reference = self.reference_model
        assert reference is not None
        model, tokenizer, known = reference.load(), reference.tokenizer, tokenizer_fingerprint(reference.tokenizer)
        sampled = {number: of for number, of in enumerate(self.policies.values()) if isinstance(of, ModelPolicy)}
        same = [number for number, of in sampled.items() if tokenizer_fingerprint(of.tokenizer) == known]
        if len(same) < len(sampled) and self.process.is_main_process:
            logger.warning("The KL of policies with another tokenizer than %s is not known.", self.reference)

        def make(shard: int) -> list[Row]:
            rows = self._given(shard)
            logps: list[Row] = [{} for _ in rows]
            for number in same if not model.config.is_encoder_decoder else ():
                samples = [row["samples"] for row in self.store.read_shard(shard, f"completions-{number}")]
                own = [[one["logp"] for one in of] for of in samples] if sampled[number] is reference else None
                for row, of_row in zip(logps, own or logps_of(samples, model, tokenizer, rows), strict=True):
                    row[str(number)] = of_row
            return logps

        return make

    def _judge(self, judge: str, shard: int) -> list[Row]:
        found = verdicts(self.judges[judge], self._given(shard), self._completions(shard), self.against)
        return [dict(zip(found, of_row, strict=True)) for of_row in zip(*found.values(), strict=True)]

    def _assemble(self, settings: Settings) -> None:
        samples = []
        for shard in range(self.store.layout()[1]):
            completions = self._completions(shard)
            judged = {
                judge: self.store.read_shard(shard, f"verdicts-{number}") for number, judge in enumerate(self.judges)
            }
            has_logps = self.store.has_shard(shard, "reference")
            referred = self.store.read_shard(shard, "reference") if has_logps else []
            rows = self._given(shard)
            for number, (name, sampled) in enumerate(completions.items()):
                ref_logps = [row[str(number)] for row in referred if str(number) in row] or None
                verdicts_on = {judge: [row[name] for row in of] for judge, of in judged.items()}
                samples += as_rows(name, self._rows(shard).start, rows, sampled, ref_logps, verdicts_on)
        PolicyEvaluation(samples, list(self.judges), self.against, self.reference, settings).save(self.store.folder)
        self.store.finish()

    def _completions(self, shard: int) -> dict[str, list[list[Sample]]]:
        return {
            name: [row["samples"] for row in self.store.read_shard(shard, f"completions-{number}")]
            for number, name in enumerate(self.policies)
        }

    def _given(self, shard: int) -> list[Row]:
        return self.prompts.select(self._rows(shard)).to_list()

    def _rows(self, shard: int) -> range:
        per_shard, _ = self.store.layout()
        return range(shard * per_shard, min((shard + 1) * per_shard, len(self.prompts)))


def _identity(policy: Policy) -> Settings:
    if isinstance(policy, BestOf):
        return {"best_of": policy.n, "ranker": policy.ranker.settings(), "policy": _identity(policy.policy)}
    if isinstance(policy, ModelPolicy):
        return {"model": policy.identity, "tokenizer": tokenizer_fingerprint(policy.tokenizer)}
    return {"completions": dataset_fingerprint(Dataset.from_dict({"completions": policy}))}
