"""The commands that take dataclasses. A training method is a row of `METHODS` in `prefopt_trl.trainers`."""

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from prefopt_trl.cli.arguments import (
    EvaluateConfig,
    EvaluateRankerConfig,
    PreferenceArguments,
    RankerData,
    ReproduceConfig,
    RewardModelData,
    RoundsArguments,
    SampleConfig,
    SideBySideMakeConfig,
    SideBySideScoreConfig,
    SupervisedArguments,
)
from prefopt_trl.trainers import METHODS


class Command(NamedTuple):
    """A row of [`COMMANDS`]."""

    summary: str
    own: type  # dataclass of the arguments beside those of TRL's configurations
    launched: bool = True  # by `accelerate launch`, in one process or several
    takes_model: bool = True  # TRL's `ModelConfig`


COMMANDS = {
    "sft": Command("fine-tune a model on prompts and completions: the SFT policy", SupervisedArguments),
    "ranker": Command("fine-tune a model to say which of two completions is preferred: a pairwise ranker", RankerData),
    "reward-model": Command("fine-tune a model to reward the preferred completion: Bradley-Terry", RewardModelData),
    "sample": Command("sample completions, rank and reject them, and make preference pairs or rankings", SampleConfig),
    **{name: Command(method.summary, PreferenceArguments) for name, method in METHODS.items()},
    **{
        f"rounds {name}": Command(
            "train a method (rso, slic, ...) in rounds: sample the policy as it then is, train, judge, again",
            RoundsArguments,
        )
        for name in METHODS
    },
    "evaluate": Command(
        "compare policies by their samples: win rates and rewards of judges, KL, lengths, with standard errors",
        EvaluateConfig,
    ),
    "evaluate-ranker": Command(
        "measure a ranker on comparisons that people have made, and calibrate it",
        EvaluateRankerConfig,
        launched=False,
        takes_model=False,
    ),
    "reproduce": Command(
        "run the papers' experiments, tables and figures, in a small world or with a model",
        ReproduceConfig,
        False,
        False,
    ),
    "side-by-side make": Command("write pages on which people compare policies", SideBySideMakeConfig, False, False),
    "side-by-side score": Command("score what people answered on such pages", SideBySideScoreConfig, False, False),
}


def load(name: str) -> ModuleType:
    """Import the module of a command, whose `run` takes an instance of each dataclass and what saves them."""
    return import_module(
        "prefopt_trl.cli.train" if name in METHODS else f"prefopt_trl.cli.{name.split()[0].replace('-', '_')}"
    )
