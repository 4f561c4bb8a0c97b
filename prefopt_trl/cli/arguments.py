"""The arguments of the commands that are not TRL's or a trainer's own."""

from dataclasses import dataclass, field
from typing import Any

from prefopt_trl.sampling.generation import check_sampling
from prefopt_trl.sampling.selection import check_selection
from prefopt_trl.trainers.base_config import PreferenceConfig

OF_TRAINERS = PreferenceConfig.__dataclass_fields__  # what is the same there has the same help


@dataclass(kw_only=True)
class DataArguments:
    """Where rows come from."""

    dataset_name: str = field(
        metadata={
            "help": "Dataset: its id on the Hub, a folder that `prefopt-trl sample` or `save_to_disk` wrote or of "
            "data files, or a file (.jsonl, .json, .jsonl.gz, .parquet). HH-RLHF transcripts are split into prompt "
            "and completions."
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
        metadata={
            "help": "Use so many rows only, drawn at random from all of the split: always the same ones (seed 0). By "
            "default all are used."
        },
    )


@dataclass(kw_only=True)
class TrainingData(DataArguments):
    """Rows to train on, and to evaluate on where `eval_strategy` says so."""

    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, where `eval_strategy` is not 'no'."}
    )


@dataclass(kw_only=True)
class RankerTemplate:
    """How a comparison is written for a pairwise ranker."""

    ranker_template: str = field(
        default="dialogue",
        metadata={
            "help": "How a comparison is written for a pairwise ranker, in the paper's formats. Use the one that it "
            "was trained with.",
            "choices": ["dialogue", "summary"],
        },
    )


@dataclass(kw_only=True)
class RankerData(TrainingData, RankerTemplate):
    """Pairs to train a ranker on."""


@dataclass(kw_only=True)
class RankerArguments(RankerTemplate):
    """Which ranker labels completions."""

    ranker: str | None = field(
        default=None,
        metadata={
            "help": "Ranker: folder or Hub id of a causal language model or encoder-decoder (a pairwise ranker, such "
            "as `prefopt-trl ranker` trains), of an adapter of one, or of a sequence classification model (a reward "
            "model); or `package.module.function`, a reward function as TRL's GRPOTrainer takes them."
        },
    )
    ranker_batch_size: int = field(
        default=32, metadata={"help": "Comparisons, or completions, that a ranker which is a model reads at a time."}
    )


@dataclass(kw_only=True)
class PreferenceArguments(TrainingData, RankerArguments):
    """What a trainer learns from."""

    only_prompts: bool = field(
        default=False,
        metadata={
            "help": "Take only the prompts of the dataset, so that completions are sampled for them and labelled by "
            "`ranker`."
        },
    )

    def __post_init__(self) -> None:
        if self.only_prompts and self.ranker is None:
            raise ValueError("`only_prompts` needs a `ranker` to label the completions sampled for them. Give one.")


@dataclass(kw_only=True)
class SampleConfig(DataArguments, RankerArguments):
    """Arguments of [`build_preference_dataset`]."""

    output_dir: str = field(metadata={"help": "Folder for the pairs, candidates, statistics and dataset card."})
    dataset_split: str = field(default="train", metadata={"help": "Split to take the prompts of."})
    strategy: str = field(default="rso", metadata=OF_TRAINERS["strategy"].metadata)
    num_candidates: int = field(default=64, metadata=OF_TRAINERS["num_candidates"].metadata)
    num_samples: int = field(default=8, metadata=OF_TRAINERS["num_samples"].metadata)
    pairing: str = field(default="first-round", metadata=OF_TRAINERS["pairing"].metadata)
    rejection_beta: float = field(default=0.5, metadata=OF_TRAINERS["rejection_beta"].metadata)
    max_new_tokens: int = field(default=256, metadata=OF_TRAINERS["max_new_tokens"].metadata)
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt and completion that training will take, in tokens. Prompts that leave no room for "
            "`max_new_tokens` are left out and counted."
        },
    )
    temperature: float = field(default=1.0, metadata=OF_TRAINERS["temperature"].metadata)
    top_p: float = field(default=1.0, metadata=OF_TRAINERS["top_p"].metadata)
    top_k: int = field(default=0, metadata=OF_TRAINERS["top_k"].metadata)
    generation_batch_size: int | None = field(default=None, metadata=OF_TRAINERS["generation_batch_size"].metadata)
    generation_memory_budget: float = field(default=4.0, metadata=OF_TRAINERS["generation_memory_budget"].metadata)
    share_prefix: bool = field(default=True, metadata=OF_TRAINERS["share_prefix"].metadata)
    keep_logps: bool = field(
        default=False,
        metadata={
            "help": "Write down the policy's log-probabilities of the pairs, for `prefopt-trl rso --reference_logps "
            "sampled`."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling, rejection and pairing, at least 0."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Load models that bring Python code with them."})
    hub_dataset_id: str | None = field(
        default=None, metadata={"help": "Once all is finished and saved, push it to this dataset of the Hub too."}
    )

    def __post_init__(self) -> None:
        if self.ranker is None:
            raise ValueError("`ranker` is missing, and sampled completions need one to be labelled. Give one.")
        if not self.rejection_beta >= 0:
            raise ValueError(f"`rejection_beta` must be at least 0, got {self.rejection_beta}. The paper uses 0.5.")
        check_selection(self.pairing, self.num_samples, self.rejection_beta, self.num_candidates)
        options: dict[str, Any] = self.generation_options()
        sizes = {name: options.pop(name) for name in ("batch_size", "memory_budget", "share_prefix")}
        check_sampling(self.num_candidates, options, **sizes)
        if self.seed < 0:
            raise ValueError(f"`seed` must be at least 0, got {self.seed}.")

    def generation_options(self: Any) -> dict[str, Any]:
        """As of the trainers' configurations, from fields of the same names."""
        return PreferenceConfig.generation_options(self)

    def selection_options(self: Any) -> dict[str, Any]:
        """As of the trainers' configurations, from fields of the same names, and `keep_logps`."""
        return {**PreferenceConfig.selection_options(self), "keep_logps": self.keep_logps}


@dataclass(kw_only=True)
class EvaluateConfig(DataArguments, RankerArguments):
    """Arguments of [`evaluate_policy`]."""

    output_dir: str = field(metadata={"help": "Folder for `evaluation.json` and `evaluation.md`."})
    reference: str = field(metadata={"help": "Policy to measure the KL from, the SFT policy in the papers."})
    dataset_split: str = field(
        default="test",
        metadata={"help": "Split with prompts and the completions to win against (`chosen` or `completion`)."},
    )
    max_new_tokens: int = field(default=128, metadata=OF_TRAINERS["max_new_tokens"].metadata)
    seed: int = field(default=0, metadata={"help": "Seed of the samples, at least 0."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Load models that bring Python code with them."})

    def __post_init__(self) -> None:
        if self.ranker is None:
            raise ValueError("`ranker` is missing, and samples need one to be rewarded. Give one.")
        if self.max_new_tokens < 1 or self.seed < 0:
            raise ValueError(
                f"`max_new_tokens`={self.max_new_tokens} and `seed`={self.seed} must be at least 1 and 0."
            )
