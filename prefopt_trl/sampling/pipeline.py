"""From prompts and a ranker to preference pairs: sample, rank, reject, pair, label (RSO sections 3 and 5)."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.fingerprints import dataset_fingerprint, model_fingerprint, tokenizer_fingerprint
from prefopt_trl.data.formats import Prompt, check_columns, wrap_completion
from prefopt_trl.rankers.base import Ranker, check_ranker, check_rewards
from prefopt_trl.sampling.generation import (
    check_prompts_fit,
    check_unused_columns,
    eos_token_ids,
    generation_options,
    sample_candidates,
    tokenize_prompts,
)
from prefopt_trl.sampling.selection import OWN_COLUMNS, RANKING, STRATEGIES, check_selection, select_and_pair
from prefopt_trl.sampling.statistics import plot_statistics
from prefopt_trl.sampling.store import SampleStore

logger = logging.getLogger(__name__)

MANY_UNFINISHED = 0.1  # share of candidates cut short that is worth a warning


def build_preference_dataset(
    prompts: Dataset | list[Prompt],
    policy: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    ranker: Ranker | None,
    *,
    output_dir: str | Path,
    strategy: str = "rso",
    num_candidates: int = 64,
    num_samples: int = 8,
    beta: float = 0.5,
    pairing: str = "first-round",
    seed: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    max_length: int | None = None,
    batch_size: int = 64,
    generation_kwargs: dict[str, Any] | None = None,
) -> Dataset:
    """Build a dataset of preference pairs from prompts, a policy to sample from, and a ranker.

    Each prompt gets `num_candidates` completions of `policy`; the ranker scores them; `num_samples` distinct ones are
    kept by `strategy`; `pairing` decides which of them meet, and the ranker says which of the two is preferred.
    With `pairing="ranking"` those kept are ranked by reward instead, for [`PROTrainer`] and its relatives.

    Everything is saved in `output_dir`: the candidates with their rewards (`candidates/`, which another run with
    another `beta` or `strategy` may be given as its `prompts`), the pairs (`pairs/`), `manifest.json` with every
    setting, `statistics.json` and `statistics.png`. A finished `output_dir` made with the same settings is read, not
    made again; one that stopped after sampling goes on from its candidates.

    Args:
        prompts ([`~datasets.Dataset`] or `list`):
            Column `prompt`, plain text or messages. With a column `completions` (a list of candidates per row, not
            necessarily of one length) nothing is sampled, so the arguments of sampling are not looked at, and with
            `rewards` beside it nothing is scored either. Other columns are carried over to the result.
        policy ([`~transformers.PreTrainedModel`]):
            Policy to sample from, the SFT model in the paper. May be None where the candidates are given.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. May be None where the candidates are given.
        ranker ([`~prefopt_trl.rankers.Ranker`]):
            Scores candidates and labels pairs.
        output_dir (`str` or `Path`):
            Folder to save to.
        strategy (`str`, *optional*, defaults to `"rso"`):
            `"rso"`: statistical rejection sampling (Algorithm 1). `"sft"`: at random. `"top-k"`: the highest rewards.
            `"direct"`: `prompts` already has `chosen` and `rejected`, which are returned as they are, and nothing is
            saved.
        num_candidates (`int`, *optional*, defaults to `64`):
            Completions sampled per prompt.
        num_samples (`int`, *optional*, defaults to `8`):
            Completions kept per prompt, at least 2.
        beta (`float`, *optional*, defaults to `0.5`):
            Algorithm 1's beta, at least 0, in units of the ranker's reward. Only `"rso"` uses it.
        pairing (`str`, *optional*, defaults to `"first-round"`):
            `"first-round"` (`num_samples // 2` pairs), `"tournament"` (`num_samples - 1`) or `"all"`; or `"ranking"`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of sampling, rejection and pairing.
        max_new_tokens, temperature, top_p, top_k, batch_size, generation_kwargs:
            As in [`sample_completions`].
        max_length (`int`, *optional*):
            Longest prompt and completion the training will take, in tokens; prompts must be shorter.

    Returns:
        [`~datasets.Dataset`] with `prompt`, `chosen`, `rejected` in the prompts' format, `chosen_reward`,
        `rejected_reward` (the ranker's scores) and `label_probability` (the ranker's probability of the label, in
        [0.5, 1]); of rankings, `prompt`, `completions` and `rewards`, best first.

    Raises:
        TypeError: if `prompts` is neither a dataset nor a list, for example all the splits at once.
        ValueError: for missing columns, an empty dataset, `num_samples` over `num_candidates`, an option out of range,
            a prompt that fills `max_length` (naming its row), a tokenizer without an EOS token, a ranker that returns
            the wrong number of values or NaN, an `output_dir` made with other settings (naming them), or no prompt
            with enough distinct candidates.

    Example:

    ```python
    pairs = build_preference_dataset(
        prompts, model, tokenizer, PairwiseRanker("my-org/my-ranker"), output_dir="outputs/pairs", max_new_tokens=128
    )
    DPOTrainer(model, args=DPOConfig("outputs/dpo", beta=0.05), train_dataset=pairs).train()
    ```
    """
    if strategy not in (*STRATEGIES, "direct"):
        raise ValueError(f"`strategy` must be one of {', '.join(STRATEGIES)} and direct, got {strategy!r}.")
    if isinstance(prompts, Sequence) and not isinstance(prompts, str):
        prompts = Dataset.from_dict({"prompt": list(prompts)})
    if strategy == "direct":
        check_columns(prompts, ["prompt", "chosen", "rejected"], "`prompts`")
        return prompts.select_columns(["prompt", "chosen", "rejected"])
    check_columns(prompts, ["prompt"], "`prompts`")
    if ranker is None:
        raise ValueError(f"`ranker` is missing, and strategy={strategy!r} needs one to label the pairs.")
    check_ranker(ranker)
    check_unused_columns(prompts, "`prompts`")
    given = "completions" in prompts.column_names
    check_selection(pairing, num_samples, beta, num_candidates=None if given else num_candidates)

    settings = {
        "strategy": strategy,
        "num_samples": num_samples,
        "beta": beta,
        "pairing": pairing,
        "seed": seed,
        "prompts": dataset_fingerprint(prompts),
        "ranker": ranker.settings(),
    }
    sample: Callable[[], Dataset] | None = None
    if not given:
        if isinstance(policy, str):
            raise TypeError(
                f"`policy` is the path {policy!r}. Load the model, with `AutoModelForCausalLM.from_pretrained`, and "
                "its tokenizer."
            )
        if policy is None or tokenizer is None:
            raise ValueError(
                "`policy` and `tokenizer` are needed to sample candidates. Give them, or a column `completions` in "
                "`prompts`."
            )
        generation = generation_options(
            generation_kwargs, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k
        )
        settings |= {
            **generation,
            "batch_size": batch_size,
            "num_candidates": num_candidates,
            "eos_token_ids": eos_token_ids(policy, tokenizer),
            "policy": model_fingerprint(policy),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        sample = partial(
            _sample,
            prompts,
            policy,
            tokenizer,
            num_candidates,
            max_length,
            seed=seed,
            batch_size=batch_size,
            **generation,
        )
    store = SampleStore(output_dir)
    if store.finished(settings):
        pairs = store.pairs()
        made = "rankings" if pairing == RANKING else "pairs"
        logger.warning("Reusing the %d %s in %s, made with the same settings.", len(pairs), made, output_dir)
        return pairs
    if PartialState().num_processes > 1:
        raise ValueError(
            f"Sampling runs in one process, and this is one of {PartialState().num_processes}. Run "
            "`build_preference_dataset` or the trainer in a single process first; with "
            f"output_dir={str(output_dir)!r} every process then reuses it."
        )

    candidates = store.candidates()
    if candidates is None:
        candidates = prompts if sample is None else sample()
        store.begin(
            settings
        )  # not earlier: what fails before there is anything to keep may be set otherwise next time
        store.save_candidates(candidates)  # before the ranker can fail
    if "rewards" not in candidates.column_names:
        scored, completions = list(candidates["prompt"]), list(candidates["completions"])
        rewards = check_rewards(ranker.score(scored, completions), scored, completions, type(ranker).__name__)
        candidates = candidates.add_column("rewards", [row.tolist() for row in rewards])
        store.save_candidates(candidates)

    selected = select_and_pair(candidates, ranker, strategy, num_samples, beta, pairing, seed)
    statistics = selected.statistics
    store.finish(selected.pairs, statistics.as_dict())
    tqdm.write(f"{statistics.made.capitalize()} saved in {output_dir}\n{statistics}")
    if statistics.num_unfinished and statistics.num_unfinished > MANY_UNFINISHED * statistics.num_candidates:
        logger.warning(
            "%d of %d candidates were cut at `max_new_tokens`, yet training ends them with EOS too. Raise it.",
            statistics.num_unfinished,
            statistics.num_candidates,
        )
    if statistics.warning:
        logger.warning("%s", statistics.warning)
    try:
        plot_statistics(selected.rewards, selected.label_probabilities, store.folder / "statistics.png")
    except ImportError:
        logger.warning("No plot was drawn: install matplotlib, with `pip install 'prefopt-trl[plots]'`.")
    return store.pairs()


def _sample(
    dataset: Dataset,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_candidates: int,
    max_length: int | None,
    **sampling: Any,
) -> Dataset:
    """Candidates of each prompt: columns `completions` and `finished` (whether each ended by itself) are added."""
    prompts: list[Prompt] = list(dataset["prompt"])
    prompt_ids = tokenize_prompts(tokenizer, prompts)
    check_prompts_fit(prompt_ids, max_length)
    sampled = sample_candidates(policy, tokenizer, prompt_ids, num_candidates, **sampling)
    completions = [
        [wrap_completion(prompt, text) for text in candidates.texts]
        for prompt, candidates in zip(prompts, sampled, strict=True)
    ]
    finished = [candidates.finished for candidates in sampled]
    others = {name: list(dataset[name]) for name in dataset.column_names if name not in OWN_COLUMNS}
    return Dataset.from_dict({"prompt": prompts, **others, "completions": completions, "finished": finished})
