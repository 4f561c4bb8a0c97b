"""From prompts and a ranker to preference pairs: sample, rank, reject, pair, label (RSO sections 3 and 5)."""

import contextlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, List, Value
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Prompt, check_columns, check_completions, check_prompts
from prefopt_trl.data.jsonl import check_candidates, read_jsonl
from prefopt_trl.data.tokenization import (
    chat_options,
    check_positions,
    check_prompts_fit,
    check_vocabulary,
    tokenize_prompts,
)
from prefopt_trl.generation.generators import Generator, SharedPrefixGenerator
from prefopt_trl.rankers.base import Ranker, check_ranker
from prefopt_trl.runtime.processes import gathered, interruptible, process_state
from prefopt_trl.runtime.settings import Settings, plotting, write_json, write_text, writing
from prefopt_trl.sampling.options import BEST, BY_REWARD, RANKING, SamplingOptions
from prefopt_trl.sampling.selection import OWN_COLUMNS, add_given
from prefopt_trl.sampling.shards import Shards
from prefopt_trl.sampling.statistics import dataset_card, plot_statistics, summarize
from prefopt_trl.sampling.store import SampleStore
from prefopt_trl.shared_prefix.support import partition_reason

logger = logging.getLogger(__name__)

# An interruption loses at most one shard per process
SHARD_COMPLETIONS = 2048  # sampled for a shard at most: so many are generated at full speed
SHARD_FLOPS = 5e12  # for a shard on a CPU at most: about a minute on two cores
GIVEN_COMPLETIONS = 512  # per shard, if they are given
MOST_SHARDS = 10_000  # each is two files
MANY_CONTRADICTED = 0.25  # share of pairs labeled against the given rewards, above which to warn
MANY_UNFINISHED = 0.1  # share of candidates cut at `max_new_tokens`, above which to warn


def build_preference_dataset(
    prompts: Dataset | list[Prompt] | str | Path,
    policy: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    ranker: Ranker,
    output_dir: str | Path,
    options: SamplingOptions | None = None,
    *,
    seed: int = 0,
    max_length: int | None = None,
    keep_logps: bool = False,
    generation_kwargs: dict[str, object] | None = None,
    job: tuple[int, int] = (1, 1),
    generator: Generator | None = None,
    proposal: PreTrainedModel | None = None,
    proposal_clip: float | None = None,
    given: Sequence[str] = (),
    **changes: object,
) -> Dataset:
    """Build a dataset of preference pairs from prompts, a policy to sample from, and a ranker.

    For each prompt, sample `num_candidates` completions of `policy`, score them, keep `num_samples` by `strategy`,
    pair them by `pairing`, and let the ranker label the pairs. With `pairing="ranking"` the kept completions are
    ranked by reward instead, for [`PROTrainer`], [`RRHFTrainer`] and [`ListwiseDPOTrainer`]; with `pairing="best"` the
    best of them is the target of TRL's `SFTTrainer`.

    `output_dir` gets the candidates with their rewards (`candidates/`, which can be the `prompts` of another run with
    another `rejection_beta` or `strategy`), the pairs (`pairs/`), `manifest.json` with every setting,
    `statistics.json`, `statistics.png` and a dataset card (`README.md`). A finished `output_dir` with the same
    settings is read again.

    After an interruption, the same call resumes from the finished shards of prompts (`shards/`) and writes the same
    bytes. Each process of `accelerate launch` or `torchrun`, on any number of nodes that share `output_dir`, makes
    part of the shards and returns the whole dataset, which does not depend on the number of processes. Each process
    loads the policy and the ranker; sharded weights are gathered once.

    Args:
        prompts ([`~datasets.Dataset`], `list`, or path of a `.jsonl` file):
            Column `prompt`, plain text or messages. With a column `completions` (a list of any number of candidates
            per row) nothing is sampled, and with a column `rewards` nothing is scored. Other columns are kept. A file
            has one JSON object with these columns per line.
        policy ([`~transformers.PreTrainedModel`]):
            Policy to sample from, the SFT model in the paper. May be None if candidates are given.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. May be None if candidates are given; otherwise candidates that its chat template formats
            equally count as one.
        ranker ([`~prefopt_trl.rankers.Ranker`]):
            Scores candidates and labels pairs.
        output_dir (`str` or `Path`):
            Folder to save to, on a file system that all processes share.
        options ([`SamplingOptions`], *optional*):
            How to sample and select; `prefopt-trl sample --help` explains each field. `"rso"` and `"top-k"` keep up
            to `num_samples` distinct texts. `"sft"` draws among all candidates, including equal texts, as in the
            paper; pairs of equal texts are left out, because their gradient is zero.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampling, rejection and pairing.
        max_length (`int`, *optional*):
            Maximum length of prompt and completion in training, in tokens; prompts must be shorter.
        keep_logps (`bool`, *optional*, defaults to `False`):
            Whether pairs have `ref_chosen_logps` and `ref_rejected_logps`: log-probabilities under the policy, in
            nats, summed over the tokens that training reads with `max_length` (`ref_max_length`). They are those of
            the decoder (`logps` of the candidates) if it drew these tokens, and otherwise computed from the text.
            Given candidates need a column `logps`, and the policy if one of them is None.
        generation_kwargs (`dict`, *optional*):
            As in [`sample_completions`].
        job (`tuple[int, int]`, *optional*):
            `(i, n)` makes the shards of job i of n alone, from 1, for clusters without a common start: run all n, at
            any time, and then the call without `job`, which assembles the dataset and makes what is missing.
        generator ([`Generator`], *optional*):
            What samples candidates, in place of `policy` and `generation_kwargs`, such as [`OpenAIGenerator`].
        proposal ([`~transformers.PreTrainedModel`], *optional*):
            Model that samples candidates in place of `policy`. What is accepted still follows the optimal policy of
            `policy`: Algorithm 1 runs on `reward - rejection_beta * log_ratio`, where the log-ratio of a candidate is
            its log-probability under `proposal` minus that under `policy`. Candidates have a column `log_ratios`. In
            rounds, `policy` is the reference model. For `strategy="rso"`.
        proposal_clip (`float`, *optional*):
            Limit of the distance of a log-ratio from the median of its prompt, in nats: less noise, and some bias
            towards the proposal.
        given (`list` of `str`, *optional*):
            Columns of `prompts` with one completion each, or None, such as `["chosen", "rejected", "chatgpt"]`. They
            are candidates beside the sampled ones, or the only ones if `policy` is None. A column `source` of
            candidates and rankings, and `chosen_source` and `rejected_source` of pairs, say where each comes from.
        **changes:
            Fields of `options` to change, by name.

    Returns:
        [`~datasets.Dataset`] with `prompt`, `chosen`, `rejected` in the prompts' format, `chosen_reward`,
        `rejected_reward` (the ranker's scores) and `label_probability` (the ranker's probability of the label, in
        [0.5, 1]); for rankings, `prompt`, `completions` and `rewards`, best first; for the best of n, `prompt`,
        `completion` and `reward`. These rewards have the penalties subtracted. With `job`, the rows of that job.

    Raises:
        TypeError: if `prompts` is not a dataset, list or file, `ranker` is not a ranker, or an option is unknown.
        ValueError: for missing columns, an empty dataset, candidates that do not fit their prompts, an option out of
            range, a prompt that fills `max_length` (naming its row), a tokenizer without an EOS token, a ranker that
            returns the wrong number of values or NaN, an `output_dir` made with other settings (naming them), or no
            prompt with two candidates that differ.
        OSError: if a file cannot be written, for example to a full disk. Saved files are unchanged.
        RuntimeError: if this process does not see the files of the main process in `output_dir`, or another run is
            making a dataset there.

    Example:

    ```python
    pairs = build_preference_dataset(
        prompts, model, tokenizer, PairwiseRanker("my-org/my-ranker"), "outputs/pairs", max_new_tokens=128
    )
    DPOTrainer(model, args=DPOConfig("outputs/dpo", beta=0.05), train_dataset=pairs).train()
    ```
    """
    options = SamplingOptions.of(options, **changes)
    dataset = _as_dataset(prompts)
    check_ranker(ranker)
    ranker.check_columns(set(dataset.column_names) - OWN_COLUMNS)
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"`seed` must be a whole number, at least 0, got {seed!r}.")
    if not 1 <= job[0] <= job[1]:
        raise ValueError(f"`job` is {job[0]} of {job[1]}. The first number is from 1 to the second.")
    if keep_logps and options.pairing in (RANKING, BEST):
        raise ValueError(f"`keep_logps` is for pairs only, and pairing={options.pairing!r} makes none. Leave it out.")
    if generator is not None:
        if "completions" in dataset.column_names:
            raise ValueError("`generator` has nothing to sample, because `prompts` have `completions`. Leave one out.")
        if policy is not None or generation_kwargs or (generator.tokenizer is not None and tokenizer is not None):
            raise ValueError(
                "`generator` takes the place of `policy` and `generation_kwargs`, and of `tokenizer` if it has one. "
                "Leave these out."
            )
        policy, tokenizer = generator.model, tokenizer if generator.tokenizer is None else generator.tokenizer
        if max_length is not None and tokenizer is None:
            raise ValueError("`max_length` is in tokens, and needs `tokenizer`, that of the model to be trained.")
    _check_sources(dataset, given)
    if given and (proposal is not None or "log_ratios" in dataset.column_names):
        raise ValueError("`given` completions have no log-ratio to a `proposal`. Leave one of them out.")
    nothing_samples = policy is None and generator is None
    if given and (nothing_samples or "completions" in dataset.column_names):
        dataset = dataset.map(add_given, fn_kwargs={"given": given}, remove_columns=list(given), keep_in_memory=True)
    if isinstance(tokenizer, str):
        raise TypeError(f"`tokenizer` is {tokenizer!r}. Load it, with `AutoTokenizer.from_pretrained`.")
    if "completions" in dataset.column_names:
        check_candidates(dataset, "`prompts`")
        if options.unfinished_penalty and "finished" not in dataset.column_names:
            raise ValueError("`unfinished_penalty` needs a column `finished` beside `completions`. Add it.")
        if keep_logps and "logps" not in dataset.column_names:
            raise ValueError(
                "`keep_logps` needs a column `logps` beside the `completions` of `prompts`, with the log-probability "
                "of each. Add it, or leave `keep_logps` out."
            )
    elif isinstance(policy, str):
        raise TypeError(
            f"`policy` is the path {policy!r}. Load the model, with `AutoModelForCausalLM.from_pretrained`, and its "
            "tokenizer."
        )
    elif generator is None and (policy is None or tokenizer is None):
        raise ValueError(
            "`policy` and `tokenizer` are needed to sample candidates. Give them, or a column `completions` in "
            f"`prompts`; it has {', '.join(dataset.column_names)}."
        )
    elif keep_logps and policy is None:
        raise ValueError(
            "`keep_logps` needs the log-probabilities of the policy's tokens, which a generator without a `model` "
            "does not give. Leave it out."
        )
    elif keep_logps and policy is not None and policy.config.is_encoder_decoder:
        raise ValueError("`keep_logps` is for training, which takes no encoder-decoder. Leave it out.")
    elif policy is not None and tokenizer is not None:
        check_vocabulary(tokenizer, policy)
    corrects = "log_ratios" in dataset.column_names and options.can_correct
    if proposal is not None:
        _check_proposal(dataset, policy, generator, options, generation_kwargs or {})
    if proposal_clip is not None and not ((proposal is not None or corrects) and proposal_clip > 0):
        raise ValueError(
            f"`proposal_clip` is {proposal_clip!r}. It must be above 0, and needs a `proposal`, or candidates with "
            "`log_ratios`, strategy='rso' and a `rejection_beta` above 0."
        )
    if generator is None and policy is not None and tokenizer is not None:
        generator = SharedPrefixGenerator(proposal or policy, tokenizer, generation_kwargs or {})

    if "rewards" in dataset.column_names and options.pairing in BY_REWARD:
        logger.warning(
            "`ranker` is not asked: the candidates have `rewards`, which decide pairing=%r alone. To score them "
            "again, remove the column (of the command: --rescore).",
            options.pairing,
        )

    store, process = SampleStore(output_dir), process_state()
    how = (options, seed, keep_logps, max_length, proposal_clip, given)
    shards = Shards(store, dataset, generator, policy, tokenizer, ranker, *how)
    run = [None if shards.are_given and not keep_logps else policy, proposal, ranker.model]
    models = [model for model in run if model is not None]
    with gathered(*models):
        if sharded := [model for model in models if partition_reason(model)]:
            raise ValueError(
                f"A {type(sharded[0]).__name__} cannot be sampled or asked: {partition_reason(sharded[0])}. Build the "
                "dataset before the model is sharded, with a whole one on each process."
            )
        settings = shards.settings()
        if not store.finished(settings):
            layout = shard_layout(len(dataset), prompts_at_once(shards))
            with interruptible(lambda: f"Interrupted: {store.saved()}; the same call resumes from there."):
                if job[1] > 1:
                    return _make_part(shards, settings, layout, process, job)
                _make(shards, settings, layout, process)
        elif process.is_main_process:
            with contextlib.suppress(OSError):  # a read-only disk
                store.clear()  # if the run that finished it was stopped before it had removed the shards
            logger.info("Reusing the dataset in %s, made with the same settings.", output_dir)
        return store.pairs()


def _check_proposal(
    dataset: Dataset,
    policy: PreTrainedModel | None,
    generator: Generator | None,
    options: SamplingOptions,
    generation_kwargs: dict[str, object],
) -> None:
    """Refuse what the importance correction cannot be made for, naming the argument."""
    if policy is None or generator is not None or "completions" in dataset.column_names:
        raise ValueError("`proposal` samples in place of `policy`. Give both, and neither `generator` nor candidates.")
    if policy.config.is_encoder_decoder:
        raise ValueError("`proposal` and `policy` must be causal language models.")
    if not options.can_correct:
        raise ValueError("`proposal` corrects Algorithm 1: set strategy='rso' and a `rejection_beta` above 0.")
    if not options.is_whole_distribution(generation_kwargs):
        raise ValueError(
            "`proposal` needs samples of its own distribution. Leave `temperature` and `top_p` at 1, `top_k` at 0, "
            "and of `generation_kwargs` all but `stop_strings` out."
        )


def _as_dataset(prompts: Dataset | list[Prompt] | str | Path) -> Dataset:
    if isinstance(prompts, str | Path):
        if not str(prompts).endswith(".jsonl"):
            raise TypeError(
                f"`prompts` is {str(prompts)!r}. Give a dataset, a list of prompts, or the path of a `.jsonl` file, "
                "which has one JSON object per line and is not compressed."
            )
        return read_jsonl(prompts)
    if isinstance(prompts, Sequence):
        check_prompts(prompts)
        prompts = Dataset.from_dict({"prompt": list(prompts)})
    check_columns(prompts, ["prompt"], "`prompts`")
    return prompts.with_format(None)


def _check_sources(dataset: Dataset, given: Sequence[str]) -> None:
    """Raise `ValueError` unless the given columns hold completions, and `source` their sources, if it is a list."""
    check_columns(dataset, given, "`prompts`")
    source, columns = dataset.features.get("source"), dataset.column_names
    if given and "rewards" in columns:
        raise ValueError("`given` adds candidates without rewards. Remove the column `rewards`, to score all of them.")
    if (isinstance(source, List) and "completions" not in columns) or (given and isinstance(source, Value)):
        raise ValueError("The column `source` of `prompts` does not name the sources of `completions`. Rename it.")
    for row, example in enumerate(dataset.select_columns(["prompt", *given]) if given else []):
        texts = [example[name] for name in given if example[name] is not None]
        check_completions(example["prompt"], texts, f"the given columns, row {row} of `prompts`,")


def _make(shards: Shards, settings: Settings, layout: tuple[int, int], process: PartialState) -> None:
    """Make the shards of this process and, on the main process, the dataset."""
    store = shards.store
    if not process.is_main_process:
        store.wait_for_settings(settings)
        _make_shards(shards, process)
        store.wait_until_finished()
        return
    with store.held():
        if store.finished(settings):  # by another run, in the meantime
            return
        if "date_in_chat_template" in settings:
            logger.warning(
                "The chat template writes the date (%s) into the prompts, so this run cannot be resumed on another "
                "day. To fix it, replace `strftime_now(...)` in `tokenizer.chat_template`.",
                settings["date_in_chat_template"],
            )
        store.begin(settings, *layout)
        _make_shards(shards, process)
        _assemble(shards, settings)


def _make_part(
    shards: Shards, settings: Settings, layout: tuple[int, int], process: PartialState, job: tuple[int, int]
) -> Dataset:
    """Make the shards of this process of a job, and return the rows of the dataset that they make."""
    with shards.store.held(shared=True):
        if process.is_main_process:
            shards.store.begin(settings, *layout)  # all jobs write the same
        shards.store.wait_for_settings(settings)
        rows = list(shards.preference_rows(_make_shards(shards, process, job)))
        features = shards.preference_features()
        return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def prompts_at_once(shards: Shards) -> int:
    """Return how many prompts to handle at a time; raise `ValueError` with the row of a prompt that is too long."""
    prompts = shards.prompts
    if shards.are_given:
        return GIVEN_COMPLETIONS * len(prompts) // max(1, sum(map(len, prompts["completions"])))
    assert shards.generator is not None
    options, policy, longest = shards.options, shards.generator.model, 0
    if shards.tokenizer is not None:
        prompt_ids = tokenize_prompts(shards.tokenizer, list(prompts["prompt"]), list(map(chat_options, prompts)))
        check_prompts_fit(prompt_ids, shards.max_length)
        if policy is not None:
            check_positions(policy, prompt_ids, options.max_new_tokens)
        longest = max(map(len, prompt_ids))
    at_once = shards.generator.prompts_at_once(longest, options.num_candidates, options)
    at_once = min(at_once, SHARD_COMPLETIONS // options.num_candidates)
    if policy is not None and policy.device.type == "cpu":
        flops = 2 * sum(map(torch.numel, policy.parameters())) * options.num_candidates * options.max_new_tokens
        at_once = min(at_once, int(SHARD_FLOPS // flops))
    return at_once


def shard_layout(num_prompts: int, at_once: int) -> tuple[int, int]:
    """Return the prompts per shard, a multiple of `at_once`, and the number of shards."""
    at_once = max(at_once, 1)
    prompts_per_shard = at_once * -(-num_prompts // (at_once * MOST_SHARDS))
    return prompts_per_shard, -(-num_prompts // prompts_per_shard)


def _make_shards(shards: Shards, process: PartialState, job: tuple[int, int] = (1, 1)) -> list[int]:
    """Make the shards of this process, and return them; on the main process, also wait for those of the others."""
    store, num_prompts = shards.store, len(shards.prompts)
    prompts_per_shard, num_shards = store.layout()
    of_job = range(job[0] - 1, num_shards, job[1])
    mine = list(of_job[process.process_index :: process.num_processes])

    def num_in(some: Iterable[int]) -> int:
        return sum(min(prompts_per_shard, num_prompts - shard * prompts_per_shard) for shard in some)

    def num_ranked() -> int:
        return num_in(shard for shard in store.shards_with("ranked") if shard in of_job)

    with tqdm(
        total=num_in(of_job),
        initial=num_ranked(),
        desc="Sampling and ranking",
        unit="prompt",
        disable=not process.is_main_process,
    ) as bar:
        for shard in mine:
            if not store.has_shard(shard, "ranked") and not store.is_finished():  # which removes the shards
                shards.make(shard)
                bar.update(num_ranked() - bar.n)
        if process.is_main_process and job[1] == 1:
            store.wait_for_shards(lambda: bar.update(num_ranked() - bar.n))
    return mine


def _warn_of_contradictions(pairs: Dataset) -> None:
    """Warn if the given rewards seem to come from another ranker than the one that labels."""
    rewards = zip(pairs["chosen_reward"], pairs["rejected_reward"], strict=True)
    contradicted = sum(chosen < rejected for chosen, rejected in rewards)
    if contradicted > MANY_CONTRADICTED * len(pairs):
        logger.warning(
            "In %d of %d pairs the ranker prefers the completion with the lower of the given `rewards`, which decided "
            "what was kept. Give the ranker of these rewards, or remove the column `rewards` to score them again.",
            contradicted,
            len(pairs),
        )


def _assemble(shards: Shards, settings: Settings) -> None:
    """Write the dataset from its finished shards, row by row, with statistics and card."""
    store = shards.store
    store.write_dataset("candidates", shards.candidate_rows(), shards.candidate_features())
    temperature = None if shards.has_rewards else settings["ranker"].get("temperature")
    statistics, numbers = summarize(shards.selected(), shards.options, temperature)
    pairs = store.write_dataset("pairs", shards.preference_rows(), shards.preference_features())
    write_json(store.folder / "statistics.json", statistics.as_dict())
    if shards.are_given and "chosen_reward" in pairs.column_names:
        _warn_of_contradictions(pairs)
    with plotting(), writing(store.folder / "statistics.png") as temporary:
        plot_statistics(statistics, numbers, shards.options, temporary)
    has_plot = (store.folder / "statistics.png").exists()
    write_text(store.folder / "README.md", dataset_card(settings, statistics, pairs, has_plot))
    store.finish()

    tqdm.write(f"{statistics.made.capitalize()} saved in {store.folder}\n{statistics}")
    if statistics.num_unfinished and statistics.num_unfinished > MANY_UNFINISHED * statistics.num_candidates:
        logger.warning(
            "%d of %d candidates were cut at `max_new_tokens`. Training adds EOS to them all the same: raise it.",
            statistics.num_unfinished,
            statistics.num_candidates,
        )
    if statistics.warning:
        logger.warning("%s", statistics.warning)
