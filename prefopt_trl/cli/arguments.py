"""Arguments of the commands beside those of TRL's and the trainers' configurations."""

import re
from dataclasses import dataclass, field, fields

from prefopt_trl.generation.options import GenerationOptions, is_one_of, is_whole
from prefopt_trl.rounds.options import RoundsOptions
from prefopt_trl.sampling.options import SamplingOptions

RANKER = {
    "help": "Ranker: folder or Hub id of a causal language model or encoder-decoder (a pairwise ranker, such as "
    "`prefopt-trl ranker` trains), of its adapter, or of a sequence classification model (a reward model); a "
    "reward function with the signature of TRL's `reward_funcs`, as `module:function` or `path/to/file.py:function`; "
    "or a YAML file with the `class` of any ranker, such as JudgeRanker, and its arguments."
}
NUM_JUDGED = {"help": "Prompts that are sampled and judged, at most."}
RANKER_BATCH_SIZE = {"help": "Comparisons or completions per batch of a ranker model."}


@dataclass(kw_only=True)
class DataArguments:
    """Which rows to read."""

    dataset_name: str = field(
        metadata={
            "help": "Dataset: Hub id, folder written by `prefopt-trl sample` or `save_to_disk`, folder of data files, "
            "or file (.jsonl, .json, .jsonl.gz, .parquet). HH-RLHF transcripts are split into prompt and completions."
        }
    )
    dataset_config: str | None = field(
        default=None,
        metadata={
            "help": "Configuration of the dataset, such as 'candidates' of a sampled one, or a subset of HH-RLHF, "
            "such as 'harmless-base'."
        },
    )
    num_rows: int | None = field(
        default=None,
        metadata={"help": "Number of rows to draw at random from the split, with seed 0. By default all are used."},
    )


@dataclass(kw_only=True)
class TrainingData(DataArguments):
    """Rows to train and evaluate on."""

    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, unless `eval_strategy` is 'no'."}
    )


@dataclass(kw_only=True)
class SupervisedArguments(TrainingData):
    """Which completions to train on."""

    chain_of_hindsight: bool = field(
        default=False,
        metadata={"help": "Train on both completions of a pair, labeled, in one text (Chain of Hindsight)."},
    )


@dataclass(kw_only=True)
class RankerTemplate:
    """How a comparison is written for a pairwise ranker."""

    ranker_template: str = field(
        default="dialogue",
        metadata={
            "help": "Format of a comparison for a pairwise ranker: the paper's 'dialogue' or 'summary', or 'rlhflow' "
            "for the pair-preference models of RLHFlow. Use the one that it was trained with.",
            "choices": ["dialogue", "summary", "rlhflow"],
        },
    )


@dataclass(kw_only=True)
class RewardModelData(TrainingData):
    """Comparisons to train a ranker on, and those of other prompts to measure its accuracy on."""

    dataset_test_split: str | None = field(  # type: ignore[assignment]  # None where the other commands have "test"
        default=None,
        metadata={
            "help": "Split to measure the accuracy on, without the prompts that are trained on, instead of `held_out`."
        },
    )
    held_out: float = field(
        default=0.05,
        metadata={
            "help": "Share of the prompts to hold out of the training split and measure the accuracy on. They are "
            "chosen by their SHA-256, so every run holds out the same."
        },
    )

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"`held_out` must be a share of the prompts, such as 0.05, got {self.held_out}.")
        if self.dataset_test_split is not None and self.held_out != RewardModelData.held_out:
            raise ValueError("`held_out` has no effect with `dataset_test_split`. Leave one of them out.")


@dataclass(kw_only=True)
class RankerData(RewardModelData, RankerTemplate):
    """As [`RewardModelData`], and how a comparison is written."""


@dataclass(kw_only=True)
class RankerArguments(RankerTemplate):
    """Which ranker labels completions."""

    ranker: str | None = field(default=None, metadata=RANKER)
    ranker_batch_size: int = field(default=32, metadata=RANKER_BATCH_SIZE)


@dataclass(kw_only=True)
class PreferenceArguments(TrainingData, RankerArguments):
    """Which preferences to train on."""

    only_prompts: bool = field(
        default=False,
        metadata={
            "help": "Use only the prompts of the dataset. Completions are sampled for them and labeled by `ranker`."
        },
    )
    judge: str | None = field(
        default=None,
        metadata={
            "help": "Ranker that judges fresh samples for prompts of the test split at each evaluation, as `ranker` "
            "names one. The checkpoint that it likes best is kept with --metric_for_best_model eval_reward "
            "--load_best_model_at_end --save_total_limit 1 (RSO section 5)."
        },
    )
    against: str = field(
        default="start",
        metadata={
            "help": "Opponent of the samples that are judged: 'start', 'reference', a column of completions, or a "
            "model."
        },
    )
    num_judged: int = field(default=256, metadata=NUM_JUDGED)

    def __post_init__(self) -> None:
        is_whole(self, "num_judged", 2)
        for option in ("against", "num_judged"):
            if self.judge is None and getattr(self, option) != getattr(PreferenceArguments, option):
                raise ValueError(f"`{option}` has no effect without `judge`. Give one, or leave it out.")
        if self.only_prompts and self.ranker is None:
            raise ValueError("`only_prompts` needs a `ranker` to label the completions sampled for them. Give one.")


@dataclass(kw_only=True)
class RoundsArguments(TrainingData, RankerArguments, RoundsOptions):
    """Arguments of [`train_in_rounds`]."""

    ranker: str = field(metadata=RANKER)
    judges: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rankers that judge samples for prompts of the test split after each round, each as "
            "[NAME=]RANKER; the first decides which round is the best. By default `ranker`, which the policy has "
            "learned to please."
        },
    )
    num_judged: int = field(default=256, metadata=NUM_JUDGED)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_whole(self, "num_judged", 2)


@dataclass(kw_only=True)
class InferenceArguments(DataArguments):
    """Arguments of the commands that sample policies."""

    seed: int = field(default=0, metadata={"help": "Random seed, at least 0."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow models with Python code from the Hub."})

    def __post_init__(self) -> None:
        is_whole(self, "seed", 0)


@dataclass(kw_only=True)
class SampleConfig(InferenceArguments, RankerArguments, SamplingOptions):
    """Arguments of [`build_preference_dataset`]."""

    ranker: str = field(metadata=RANKER)
    output_dir: str = field(metadata={"help": "Folder for the pairs, candidates, statistics and dataset card."})
    dataset_split: str = field(default="train", metadata={"help": "Split with the prompts."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "`max_length` of the training to come, in tokens. Prompts that leave no room for `max_new_tokens` "
            "are left out and counted."
        },
    )
    keep_logps: bool = field(
        default=False,
        metadata={"help": "Save the policy's log-probabilities of the pairs, for `rso --reference_logps sampled`."},
    )
    rescore: bool = field(
        default=False,
        metadata={"help": "Score candidates that have `rewards` already with `ranker`, as after a change of it."},
    )
    shard: str | None = field(
        default=None,
        metadata={
            "help": "Make part i of n, as 'i/n' from 1/n to n/n, for jobs without a common start, such as a Slurm "
            "array's. The same command without it assembles the dataset afterwards."
        },
    )
    given: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns with one completion each that are candidates, too, or the only ones without a model. "
            "NAME=FILE.jsonl adds such a column from a file as `policies` of `prefopt-trl evaluate` takes it."
        },
    )
    generator: str = field(
        default="shared-prefix",
        metadata={
            "help": "What samples: 'shared-prefix', 'continuous' (`generate_batch` of transformers), or the URL of an "
            "OpenAI-compatible server, where `model_name_or_path` is the model's name."
        },
    )
    hub_dataset_id: str | None = field(
        default=None, metadata={"help": "Push the finished dataset to this dataset repository on the Hub."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        SamplingOptions.__post_init__(self)
        if self.shard is not None and not (re.fullmatch(r"\d+/\d+", self.shard) and 1 <= self.job[0] <= self.job[1]):
            raise ValueError(f"`shard` must be a part such as 3/8, from 1/8 to 8/8, got {self.shard!r}.")
        if "://" not in self.generator:
            is_one_of(self, "generator", ["shared-prefix", "continuous", "the URL of a server"])

    @property
    def job(self) -> tuple[int, int]:
        """The part of the shards that this run makes, and how many parts there are."""
        part, _, parts = (self.shard or "1/1").partition("/")
        return int(part), int(parts)


@dataclass(kw_only=True)
class EvaluateConfig(InferenceArguments, RankerTemplate, GenerationOptions):
    """Arguments of [`evaluate_policy`]."""

    output_dir: str = field(metadata={"help": "Folder for the numbers, the plot and every completion and verdict."})
    judges: list[str] = field(
        metadata={"help": "One or several rankers that judge, each as [NAME=]RANKER. " + RANKER["help"]}
    )
    policies: list[str] | None = field(
        default=None,
        metadata={
            "help": "Policies beside `model_name_or_path`, each as [NAME=]POLICY: a folder or Hub id of a model or "
            "adapter; a .jsonl or .json file with `prompt` and `completion` or `completions`, or of AlpacaEval; "
            "FILE:NAME for one of several policies in it, such as `samples.jsonl:sft` of another evaluation; "
            "`column:COLUMN` of the dataset; or `best-of-N:POLICY`, the best of N completions by the first judge."
        },
    )
    reference: str | None = field(
        default=None,
        metadata={"help": "Policy to measure the KL from: the name of one, or a model, which is evaluated too."},
    )
    against: str | None = field(
        default=None,
        metadata={
            "help": "Opponent of all policies: one of them, 'reference', or a column of completions. By default the "
            "column `chosen` or `completion`, if there is one, and otherwise the reference."
        },
    )
    dataset_split: str = field(default="test", metadata={"help": "Split with the prompts."})
    num_completions: int = field(default=1, metadata={"help": "Completions sampled per prompt."})
    stop_strings: list[str] | None = field(
        default=None,
        metadata={"help": "Texts that end a completion and are removed, in bash like $'\\n\\nHuman:'."},
    )
    ranker_batch_size: int = field(default=32, metadata=RANKER_BATCH_SIZE)

    def __post_init__(self) -> None:
        super().__post_init__()
        GenerationOptions.__post_init__(self)
        is_whole(self, "num_completions", 1)


@dataclass(kw_only=True)
class EvaluateRankerConfig(DataArguments, RankerArguments):
    """Arguments of [`evaluate_ranker`]."""

    ranker: str = field(metadata=RANKER)
    output_dir: str = field(metadata={"help": "Folder for `ranker_quality.json`, `.md` and `.png`."})
    dataset_split: str = field(default="test", metadata={"help": "Split with the comparisons."})
    calibrate: bool = field(
        default=False,
        metadata={
            "help": "Also fit the ranker's temperature, and write it to `calibration.json` and `ranker.yaml`, which "
            "`ranker` takes."
        },
    )
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU."})


@dataclass(kw_only=True)
class ReproduceConfig(RankerArguments):
    """Which experiments to run. What follows `world` is for `"real"`."""

    tables: list[str] | None = field(
        default=None, metadata={"help": "Tables and figures, such as rso-table-1. By default all of the world."}
    )
    num_seeds: int = field(default=5, metadata={"help": "Seeds, each of which has data and models of its own."})
    first_seed: int = field(default=0, metadata={"help": "The first seed; another one replicates what was found."})
    output_dir: str = field(default="outputs/reproduce", metadata={"help": "Folder for policies and tables."})
    results_dir: str | None = field(default=None, metadata={"help": "Another folder for the tables."})
    num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes. By default one for each core, or one for a real model or on an accelerator."},
    )
    world: str = field(
        default="kitchen",
        metadata={
            "help": "The small task whose true reward is known, or a model of yours.",
            "choices": ["kitchen", "real"],
        },
    )
    model_name_or_path: str = field(default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "SFT policy."})
    ranker: str = field(default="prefopt_trl.experiments.worlds:sentiment", metadata=RANKER)
    dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts, with or without pairs. By default beginnings of reviews."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split with the prompts, such as 'train[:500]'."})
    num_judged: int = field(default=64, metadata={"help": "Prompts to report on; half as many choose checkpoints."})
    max_steps: int = field(default=40, metadata={"help": "Optimizer steps of a policy."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate of the LoRA adapters."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Rows per step."})
    num_candidates: int = field(default=64, metadata={"help": "Samples of each prompt, of which 8 are kept."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest sample, in tokens."})
    max_length: int = field(default=512, metadata={"help": "Longest prompt and completion in training, in tokens."})

    def __post_init__(self) -> None:
        is_one_of(self, "world", ["kitchen", "real"])
        least = {"num_seeds": 1, "first_seed": 0, "num_judged": 4, "max_steps": 1, "num_candidates": 9}
        for name, at_least in least.items():
            is_whole(self, name, at_least)
        if self.num_workers is not None:
            is_whole(self, "num_workers", 1)
        shared = ("world", "tables", "num_seeds", "first_seed", "output_dir", "results_dir", "num_workers")
        others = [
            one.name for one in fields(self) if one.name not in shared and getattr(self, one.name) != one.default
        ]
        if others and self.world == "kitchen":
            raise ValueError(f"`{others[0]}` has no effect without `--world real`. Add it, or leave it out.")
        if self.dataset_name is None and "dataset_split" in others:
            raise ValueError("`dataset_split` has no effect without `dataset_name`. Leave it out.")


@dataclass(kw_only=True)
class SideBySideMakeConfig:
    """Arguments of [`make_pages`]."""

    samples: list[str] = field(metadata={"help": "Files of samples (.jsonl), as `prefopt-trl evaluate` writes them."})
    output_dir: str = field(metadata={"help": "Folder for the raters' `pages`, and `key.json`, which stays with you."})
    policies: list[str] | None = field(default=None, metadata={"help": "Two or three of `samples`. By default all."})
    num_raters: int = field(default=3, metadata={"help": "Number of raters, with a page each."})
    raters_per_task: int = field(default=3, metadata={"help": "Number of raters for each prompt."})
    num_tasks: int | None = field(default=None, metadata={"help": "Number of prompts to draw. By default all."})
    seed: int = field(default=0, metadata={"help": "Random seed of draws and orders."})


@dataclass(kw_only=True)
class SideBySideScoreConfig:
    """Arguments of [`score_answers`]."""

    study: str = field(metadata={"help": "Folder that `prefopt-trl side-by-side make` wrote, with `key.json`."})
    answers: list[str] = field(metadata={"help": "Files that the pages saved, one of each rater."})
    output_dir: str = field(metadata={"help": "Folder for `side_by_side.json` and `side_by_side.md`."})
