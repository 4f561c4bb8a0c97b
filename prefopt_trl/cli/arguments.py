"""The arguments of the commands that are not TRL's or a trainer's own."""

from dataclasses import dataclass, field

from prefopt_trl.sampling.options import MAX_NEW_TOKENS, SamplingOptions, is_whole


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
            "help": "Take only the prompts of the dataset, so that completions are sampled for them and labeled by "
            "`ranker`."
        },
    )

    def __post_init__(self) -> None:
        if self.only_prompts and self.ranker is None:
            raise ValueError("`only_prompts` needs a `ranker` to label the completions sampled for them. Give one.")


@dataclass(kw_only=True)
class InferenceArguments(DataArguments, RankerArguments):
    """What the commands that train nothing share: they load a policy themselves, and need a ranker."""

    seed: int = field(default=0, metadata={"help": "Seed of everything that is drawn, at least 0."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Load models that bring Python code with them."})

    def __post_init__(self) -> None:
        if self.ranker is None:
            raise ValueError("`ranker` is missing, and samples need one to be rewarded. Give one.")
        is_whole(self, "seed", 0)


@dataclass(kw_only=True)
class SampleConfig(InferenceArguments, SamplingOptions):
    """Arguments of [`build_preference_dataset`]."""

    output_dir: str = field(metadata={"help": "Folder for the pairs, candidates, statistics and dataset card."})
    dataset_split: str = field(default="train", metadata={"help": "Split to take the prompts of."})
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt and completion that training will take, in tokens. Prompts that leave no room for "
            "`max_new_tokens` are left out and counted."
        },
    )
    keep_logps: bool = field(
        default=False,
        metadata={
            "help": "Write down the policy's log-probabilities of the pairs, for `prefopt-trl rso --reference_logps "
            "sampled`."
        },
    )
    hub_dataset_id: str | None = field(
        default=None, metadata={"help": "Once all is finished and saved, push it to this dataset of the Hub too."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        SamplingOptions.__post_init__(self)


@dataclass(kw_only=True)
class EvaluateConfig(InferenceArguments):
    """Arguments of [`evaluate_policy`]."""

    output_dir: str = field(metadata={"help": "Folder for `evaluation.json` and `evaluation.md`."})
    reference: str = field(metadata={"help": "Policy to measure the KL from, the SFT policy in the papers."})
    dataset_split: str = field(
        default="test",
        metadata={"help": "Split with prompts and the completions to win against (`chosen` or `completion`)."},
    )
    max_new_tokens: int = field(default=128, metadata=MAX_NEW_TOKENS)

    def __post_init__(self) -> None:
        super().__post_init__()
        is_whole(self, "max_new_tokens", 1)
