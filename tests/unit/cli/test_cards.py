"""What the commands write about their results: model cards."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from prefopt_trl.rankers import PairwiseRanker
from prefopt_trl.rankers.templates import TEMPLATES
from prefopt_trl.runtime.hub import PushError

REPO = "my-org/my-model"
LORA = ["--use_peft", "--lora_target_modules", "all-linear"]


def pushed(hub: Any) -> dict[str, bytes]:
    files = hub.files(REPO)
    assert {"README.md", "tokenizer.json"} <= files.keys()
    assert not [name for name in files if "checkpoint-" in name or "training_args" in name]  # which has the token
    assert "report.md" not in files
    return files


def test_an_sft_model_has_a_card_that_names_its_base_and_data(training, run_in_process, tiny_llama_dir):
    run_in_process("sft", [*training, "--output_dir", "outputs/sft"])
    assert Path("outputs/sft/report.md").read_text().startswith("# sft\n")
    card = ModelCard.load("outputs/sft/README.md")
    assert f"This model is `{Path(tiny_llama_dir).name}`, fine-tuned on `pairs.jsonl`." in card.text
    assert "# Model Card for sft" in card.text and "model='outputs/sft'" in card.text
    assert "None" not in card.text and tiny_llama_dir not in card.text
    assert card.data.get("datasets") is None and card.data.get("base_model") is None  # they are not on the Hub


def test_an_sft_model_is_pushed_with_its_card(hub, training, run_in_process, capsys):
    run_in_process("sft", [*training, "--output_dir", "sft", "--push_to_hub", "--hub_model_id", REPO])
    assert f"Pushed to {hub.url}/{REPO}.\n" in capsys.readouterr().out
    text = pushed(hub)["README.md"].decode()
    assert "fine-tuned on `pairs.jsonl`." in text and f'model="{REPO}"' in text and "None" not in text


@pytest.mark.parametrize("options", [[], LORA])
def test_a_ranker_has_a_card_that_makes_it(options, training, run_in_process, tiny_llama_dir):
    run_in_process("ranker", [*training, *options, "--ranker_template", "summary", "--output_dir", "ranker"])
    card = ModelCard.load("ranker/README.md")
    assert f"Its model was loaded from `{Path(tiny_llama_dir).name}`. It was trained on `pairs.jsonl`." in card.text
    assert "| `step of the saved weights` | `1` |" in card.text and '| `template` | `"summary"` |' in card.text
    assert {"prefopt-trl", "ranker"} <= set(card.data.tags)
    assert card.data.library_name == ("peft" if options else "transformers")
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(snippet, namespace)
    assert isinstance(namespace["ranker"], PairwiseRanker)
    assert namespace["ranker"].template is TEMPLATES["summary"]


def test_a_ranker_is_pushed_with_its_card(hub, training, run_in_process):
    own = ["--save_strategy", "steps", "--output_dir", "ranker"]  # a checkpoint has the card too
    run_in_process("ranker", [*training, *own, "--push_to_hub", "--hub_model_id", REPO])
    assert f"ranker = PairwiseRanker(\"{REPO}\", template='dialogue')" in pushed(hub)["README.md"].decode()
    assert Path("ranker/README.md").read_bytes() == pushed(hub)["README.md"]


@pytest.mark.parametrize("name", ["sft", "ranker", "rso"])
def test_a_token_that_may_not_write_is_refused_with_a_command(name, hub, training, run_in_process):
    hub.fail("POST /api/repos/create", 401, "Invalid credentials")
    with pytest.raises(PushError, match=f"leave out `push_to_hub`.*\n\n    hf upload {REPO} out --exclude '_.'"):
        run_in_process(name, [*training, "--output_dir", "out", "--push_to_hub", "--hub_model_id", REPO])
