"""What the tests of all trainers share: rankings, one step of a trainer, and the same step written out by hand."""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from trl import DPOConfig

WORDS = ["blue", "green and yellow", "wet", "seven of them", "a very long completion, it seems", "bb", "no", "dddd"]


@pytest.fixture(scope="module", autouse=True)
def _fast_collection() -> Iterator[None]:
    """Each training collects garbage, which takes longer than the training unless the libraries are left out."""
    gc.freeze()
    yield
    gc.unfreeze()


def with_large_weights(model: Any, seed: int = 0) -> Any:
    """A model whose log-probabilities a wrong mask or position moves by whole nats."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def save_with_large_weights(model_dir: str, folder: Path, seed: int = 0) -> str:
    with_large_weights(AutoModelForCausalLM.from_pretrained(model_dir), seed).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def policy_dir(tiny_llama_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_with_large_weights(tiny_llama_dir, tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def rankings() -> Dataset:
    """Prompts with 2 to 8 completions, worst or best anywhere, ties among them; one has equal rewards only."""
    return Dataset.from_dict(
        {
            "prompt": ["The capital of France is", "Why?", "Mix", "The quick brown", "Tell me", "A", "The dog"],
            "completions": [[" " + WORDS[(3 * row + place) % 8] for place in range(row + 2)] for row in range(7)],
            "rewards": [
                [0.5, 1.25],
                [0.0, 1.0, 0.0],
                [0.75, 0.75, 0.75, 0.75],
                [-1.0, 2.0, 0.5, 2.0, 0.25],
                [0.125, -0.5, 3.0, 0.375, -0.25, 1.0],
                [1.0, 0.0, 1.0, 0.0, 1.0, 0.5, -2.0],
                [2.0, 1.75, 1.5, 1.25, 1.0, 0.5, 0.25, 0.0],
            ],
        }
    )


def best_first(row: dict[str, Any]) -> list[tuple[str, float]]:
    """Completions with their rewards; equal rewards keep their order."""
    ranked = zip(row["completions"], row["rewards"], strict=True)
    return sorted(ranked, key=lambda ranked: -ranked[1])


@dataclass
class ByHand:
    """A model in float64, run on one completion at a time."""

    folder: str
    logits: list[torch.Tensor] = field(default_factory=list)  # of the completion's tokens, one entry per completion

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float64)

    def logps(self, prompt: Any, completion: Any) -> torch.Tensor:
        """Log-probability of each token of a completion, EOS the last of them."""
        num_prompt_tokens = len(self.tokenizer(prompt)["input_ids"])
        ids = torch.tensor(self.tokenizer(prompt + completion + self.tokenizer.eos_token)["input_ids"])
        logits = self.model(ids[None]).logits[0, num_prompt_tokens - 1 : -1]
        self.logits.append(logits.detach())
        return logits.log_softmax(-1)[range(len(logits)), ids[num_prompt_tokens:]]

    def ranked(self, row: dict[str, Any]) -> list[tuple[torch.Tensor, float]]:
        """The log-probabilities of a ranking's completions and their rewards, best first."""
        return [(self.logps(row["prompt"], completion), reward) for completion, reward in best_first(row)]

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        parameters = dict(self.model.named_parameters())
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.fixture
def by_hand(policy_dir: str) -> ByHand:
    return ByHand(policy_dir)


@dataclass
class Step:
    """What a trainer logged, the gradients it had, and how many rows its policy was given."""

    trainer: Trainer
    log: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    num_rows: int = 0

    def assert_is(self, loss: torch.Tensor, gradients: dict[str, torch.Tensor]) -> None:
        """Require this loss and these gradients of every parameter."""
        assert loss.dtype == torch.float64
        assert self.log["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
        assert self.gradients.keys() == gradients.keys()
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        assert largest > 0.01
        for name, gradient in self.gradients.items():
            torch.testing.assert_close(gradient.double(), gradients[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


class _Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.gradients = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }


def make_config(config_class: type[DPOConfig], output_dir: Path | str, **given: Any) -> DPOConfig:
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 7,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **given,
    }
    return config_class(str(output_dir), **settings)


TRAINER_ARGUMENTS = ("model", "ref_model", "eval_dataset", "peft_config", "compute_metrics", "ranker", "callbacks")


@pytest.fixture
def make(policy_dir: str, tmp_path: Path) -> Callable[..., Trainer]:
    """Make a trainer with the policy; further arguments are the trainer's or its config's."""

    def make(trainer_class: Any, train_dataset: Any, **given: Any) -> Trainer:
        arguments = {name: given.pop(name) for name in TRAINER_ARGUMENTS if name in given}
        config_class = getattr(trainer_class, "config_class", DPOConfig)
        args = make_config(config_class, given.pop("output_dir", tmp_path), **given)
        return trainer_class(**{"model": policy_dir, **arguments}, args=args, train_dataset=train_dataset)

    return make


@pytest.fixture
def one_step(make: Callable[..., Trainer]) -> Callable[..., Step]:
    """Train one step of a trainer: by default, all of the data in one batch."""

    def run(trainer_class: Any, train_dataset: Any, **given: Any) -> Step:
        recorder, shapes = _Recorder(), []
        trainer = make(trainer_class, train_dataset, **given)
        trainer.add_callback(recorder)
        embeddings = trainer.model.get_input_embeddings()
        hook = embeddings.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
        trainer.train()
        hook.remove()
        return Step(trainer, trainer.state.log_history[0], recorder.gradients, max(shapes, key=math.prod)[0])

    return run


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DPOConfig]:
    """Make a config of any class for this machine."""
    return lambda config_class, **given: make_config(config_class, tmp_path, **given)
