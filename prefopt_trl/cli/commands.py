"""The commands of `prefopt-trl`: what each is for, what it takes and what it runs. Nothing heavy is imported here."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

OWN = "prefopt_trl.cli.arguments."
MODEL = "trl.ModelConfig"


@dataclass(frozen=True)
class Command:
    """A command that takes the fields of dataclasses, from the command line and from `--config`."""

    summary: str
    module: str  # its function `run` takes an instance of each of the dataclasses
    takes: tuple[str, ...]
    launched: bool = True  # by `accelerate launch`, in one process or several

    def dataclasses(self) -> list[Any]:
        return [getattr(import_module(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in self.takes]

    def run(self, *arguments: Any) -> None:
        import_module(self.module).run(*arguments)


def _trainer(summary: str, config: str) -> Command:
    takes = (OWN + "PreferenceArguments", f"prefopt_trl.trainers.{config}", MODEL)
    return Command(summary, "prefopt_trl.cli.train", takes)


COMMANDS = {
    "sft": Command(
        "fine-tune a model on prompts and completions: the SFT policy",
        "prefopt_trl.cli.sft",
        (OWN + "TrainingData", "trl.SFTConfig", MODEL),
    ),
    "ranker": Command(
        "fine-tune a model to say which of two completions is preferred: the pairwise ranker",
        "prefopt_trl.cli.ranker",
        (OWN + "RankerData", "trl.SFTConfig", MODEL),
    ),
    "sample": Command(
        "sample completions of a policy, rank them, reject, and make preference pairs or rankings of them",
        "prefopt_trl.cli.sample",
        (OWN + "SampleConfig", MODEL),
    ),
    "rso": _trainer("train with RSO (or DPO, or another loss of TRL's) on pairs", "rso_config.RSOConfig"),
    "slic": _trainer("train with SLiC on pairs", "slic_config.SLiCConfig"),
    "pro": _trainer("train with PRO on rankings", "pro_config.PROConfig"),
    "listwise-dpo": _trainer("train with listwise DPO on rankings", "listwise_dpo_config.ListwiseDPOConfig"),
    "rrhf": _trainer("train with RRHF on rankings", "rrhf_config.RRHFConfig"),
    "evaluate": Command(
        "measure a policy's samples: the ranker's reward, win rate against targets, and KL from the reference",
        "prefopt_trl.cli.evaluate",
        (OWN + "EvaluateConfig", MODEL),
        launched=False,
    ),
}
