import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from prefopt_trl.rankers import PairwiseRanker, RewardModelRanker
from prefopt_trl.runtime.hub import PushError
from tests.hub_server import Hub

PROMPTS, FIRST, SECOND = ["What is 2 + 2?", "Why?"], ["It is 4.", "No."], ["It is 5.", "Because."]


def make(kind: str, model_dir: str) -> PairwiseRanker | RewardModelRanker:
    """A ranker whose weights are of no other folder."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    reward_model = kind.startswith("reward")
    auto_class = AutoModelForSequenceClassification if reward_model else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto_class.from_pretrained(model_dir, **({"num_labels": 1} if reward_model else {}))
    if kind.endswith("adapter"):
        config = LoraConfig(task_type="SEQ_CLS" if reward_model else "CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and (parameter.requires_grad or not kind.endswith("adapter")):
            parameter.data.normal_(0, 0.5 if "lora" in name else 0.3)
    if reward_model:
        return RewardModelRanker(model, tokenizer, max_length=100, temperature=2)
    return PairwiseRanker(model, tokenizer, template="summary", max_length=100, temperature=0.5)


def made_by(card: str) -> Any:
    """The ranker that the snippet of a card makes."""
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(snippet, namespace)
    return namespace["ranker"]


@pytest.mark.parametrize("kind", ["pairwise", "pairwise adapter", "reward model", "reward adapter"])
def test_a_pushed_ranker_is_made_again_by_its_card(hub: Hub, tiny_llama_dir: str, tmp_path: Path, kind: str) -> None:
    ranker, folder = make(kind, tiny_llama_dir), tmp_path / "ranker"
    assert ranker.push_to_hub("my-org/my-ranker", save_directory=folder, private=True) == f"{hub.url}/my-org/my-ranker"
    pushed = hub.files("my-org/my-ranker")
    assert pushed == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert ("adapter_model.safetensors" if "adapter" in kind else "model.safetensors") in pushed

    again = made_by(pushed["README.md"].decode())
    assert type(again) is type(ranker)
    expected = ranker.compare(PROMPTS, FIRST, SECOND)
    np.testing.assert_allclose(again.compare(PROMPTS, FIRST, SECOND), expected, rtol=1e-6)
    assert abs(expected - 0.5).max() > 1e-3
    assert (again.ranking_model.max_length, again.temperature) == (100, ranker.temperature)

    card = ModelCard(pushed["README.md"].decode())
    assert card.data.library_name == ("peft" if "adapter" in kind else "transformers")
    assert {"prefopt-trl", "ranker"} <= set(card.data.tags)
    assert card.data.base_model is None  # it is a folder of this machine
    assert "| `max_length` | `100` |" in card.text


def test_a_template_of_ones_own_is_asked_for(tiny_llama_dir: str, tmp_path: Path) -> None:
    ranker = PairwiseRanker(tiny_llama_dir, template=lambda prompt, first, second: f"{prompt}{first}{second}\n")
    ranker.save_pretrained(tmp_path)
    assert "template=your_template" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_push_that_fails_leaves_a_ranker_that_loads(hub: Hub, tiny_llama_dir: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    ranker = make("pairwise", tiny_llama_dir)
    hub.fail("PUT /lfs/", None)
    with pytest.raises(PushError, match="my-ranker was not pushed to my-org/my-ranker: RemoteProtocolError"):
        ranker.push_to_hub("my-org/my-ranker")
    ranker.save_pretrained("saved")  # whose card names the folder
    by_card = made_by(Path("saved", "README.md").read_text(encoding="utf-8"))
    for again in (PairwiseRanker("my-ranker", template="summary", max_length=100, temperature=0.5), by_card):
        assert again.settings() == ranker.settings()

    hub.failures.clear()
    ranker.push_to_hub("my-org/my-ranker")
    assert hub.files("my-org/my-ranker") == {path.name: path.read_bytes() for path in Path("my-ranker").iterdir()}
