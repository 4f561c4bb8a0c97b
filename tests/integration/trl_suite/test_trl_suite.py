"""TRL's own `tests/test_dpo_trainer.py`, run with `RSOTrainer` in the place of `DPOTrainer`.

TRL's PyPI package leaves its tests out. From the root of this repository, get those of the installed version and run:

    git clone --depth 1 --branch v1.16.0 https://github.com/huggingface/trl ../trl
    make test-slow PYTEST_ARGS="tests/integration/trl_suite"

or set TRL_TESTS to the `tests` folder of another checkout. They load models and datasets from the Hub by name.
`transformers` and `datasets` take a name for a folder where there is one, so the tests run, offline, in a folder with
a tiny stand-in for each name.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import trl
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from prefopt_trl.experiments.tiny import train_tokenizer

pytestmark = pytest.mark.slow

FEWEST_PASSED = 80  # with DPOTrainer; fewer would mean that the stand-ins do not do

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 4, "ssm_state_size": 16}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "tiny-Cohere2ForCausalLM": {"model_type": "cohere2"},
    "tiny-Glm4MoeForCausalLM": {"model_type": "glm4_moe", "n_routed_experts": 4, **EXPERTS},
    "tiny-GptOssForCausalLM": {"model_type": "gpt_oss", "num_local_experts": 4, **EXPERTS},
    "tiny-Lfm2ForCausalLM": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
    "tiny-Lfm2ForCausalLM-2.5": {"model_type": "lfm2", "layer_types": ["full_attention", "conv"]},
    "tiny-NemotronHForCausalLM-nano": {
        "model_type": "nemotron_h",
        "layers_block_type": ["mamba", "attention", "moe"],
        "n_routed_experts": 4,
        **EXPERTS,
        **MAMBA,
    },
    "tiny-Olmo3ForCausalLM": {"model_type": "olmo3"},
    "tiny-Qwen2ForCausalLM-2.5": {"model_type": "qwen2"},
    "tiny-Qwen3MoeForCausalLM": {"model_type": "qwen3_moe", "num_experts": 4, **EXPERTS},
    "tiny-RemoteForCausalLM": {"model_type": "llama"},
}
REMOTE_CODE = """\
from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""
REMOTE_CONFIG = {
    "model_type": "remote",
    "architectures": ["RemoteForCausalLM"],
    "auto_map": {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"},
}

IMAGE_TOKENS = {"image_token": "<image>", "boi_token": "<image_start>", "eoi_token": "<image_end>"}
CHAT_TEMPLATE = """\
{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}\
{% if message.content is string %}{{ message.content }}\
{% else %}{% for part in message.content or [] %}\
{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}{% endif %}\
{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}\
{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# prompt, chosen, rejected
PAIRS = [
    ("The kettle sings before", " the water boils.", " the cook is asleep in his chair."),
    ("A short letter is", " kinder than a long one.", " longer than a book."),
    ("Whoever sows in spring", " reaps in autumn.", " reaps nothing at all."),
    ("Two eyes see", " more than one does.", " less than none."),
    ("The bridge was built", " stone by stone.", " in one breath."),
    ("Rain on the roof", " sends me to sleep.", " is made of wool."),
]


def tokenizer() -> PreTrainedTokenizerFast:
    bytes_and_merges = train_tokenizer((text for pair in PAIRS for text in pair), vocab_size=300)
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_and_merges.backend_tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens={**IMAGE_TOKENS, "turn_token": "<|im_start|>"},
        chat_template=CHAT_TEMPLATE,
    )


def save_language_models(hub: Path, tokenizer: PreTrainedTokenizerFast, sizes: dict[str, Any]) -> None:
    for name, settings in LANGUAGE_MODELS.items():
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**sizes, **settings})).save_pretrained(hub / name)
        tokenizer.save_pretrained(hub / name)
    remote = hub / "tiny-RemoteForCausalLM"
    (remote / "remote.py").write_text(REMOTE_CODE)
    config = json.loads((remote / "config.json").read_text())
    (remote / "config.json").write_text(json.dumps({**config, **REMOTE_CONFIG}))


def save_vision_models(hub: Path, tokenizer: PreTrainedTokenizerFast, sizes: dict[str, Any]) -> None:
    """Those whose processors need no torchvision. An image, or a part of one, is 2 x 2 patches."""
    patches = {**sizes, "image_size": 28, "patch_size": 14}
    llama, gemma = {**sizes, "model_type": "llama"}, {**sizes, "model_type": "gemma3_text"}
    clip = {**patches, "model_type": "clip_vision_model"}
    siglip = {**patches, "model_type": "siglip_vision_model", "vision_use_head": False}
    grid = [[28, 56], [56, 28]]
    llava = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    crop = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    models = {
        "tiny-LlavaForConditionalGeneration": (
            {"model_type": "llava", "text_config": llama, "vision_config": clip},
            LlavaProcessor(CLIPImageProcessorPil(**crop), tokenizer, **llava),
        ),
        "tiny-LlavaNextForConditionalGeneration": (
            {"model_type": "llava_next", "text_config": llama, "vision_config": clip, "image_grid_pinpoints": grid},
            LlavaNextProcessor(LlavaNextImageProcessorPil(**crop, image_grid_pinpoints=grid), tokenizer, **llava),
        ),
        "tiny-Gemma3ForConditionalGeneration": (
            {"model_type": "gemma3", "text_config": gemma, "vision_config": siglip, "mm_tokens_per_image": 4},
            Gemma3Processor(Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, image_seq_length=4),
        ),
    }
    for name, (settings, processor) in models.items():
        config = AutoConfig.for_model(**settings, image_token_index=tokenizer.image_token_id)
        AutoModelForImageTextToText.from_config(config).save_pretrained(hub / name)
        processor.chat_template = CHAT_TEMPLATE.replace("<image>", processor.image_token)
        processor.save_pretrained(hub / name)


def save_datasets(hub: Path) -> None:
    def message(role: str, content: str | None, **kwargs: Any) -> dict[str, Any]:
        return {"role": role, "content": content, **kwargs}

    standard = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in PAIRS]
    conversational = [
        {
            "prompt": [message("user", row["prompt"])],
            "chosen": [message("assistant", row["chosen"])],
            "rejected": [message("assistant", row["rejected"])],
        }
        for row in standard
    ]

    def implicit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]

    def call(city: str) -> list[dict[str, Any]]:
        function = {"name": "forecast", "arguments": {"city": city}}
        return [message("assistant", None, tool_calls=[{"type": "function", "function": function}])]

    tool = {"type": "function", "function": {"name": "forecast", "description": "The weather of a city."}}
    datasets = {
        "zen": {
            "standard_preference": standard,
            "conversational_preference": conversational,
            "standard_implicit_prompt_preference": implicit(standard),
            "conversational_implicit_prompt_preference": implicit(conversational),
        },
        "zen-image": {
            "conversational_preference": [
                {**row, "image": Image.new("RGB", (28, 28), (40 * index, 0, 0))}
                for index, row in enumerate(conversational)
            ]
        },
        "harmony": {
            "preference": [{**row, "chat_template_kwargs": {"reasoning_effort": "low"}} for row in conversational]
        },
        "toolcall": {
            "preference": [
                {**row, "chosen": call("Oslo"), "rejected": call("Rome"), "tools": json.dumps([tool])}
                for row in conversational
            ]
        },
    }
    for name, configs in datasets.items():
        for config, rows in configs.items():
            Dataset.from_list(rows * 3).to_parquet(hub / name / config / "train.parquet")
            Dataset.from_list(rows[:2]).to_parquet(hub / name / config / "test.parquet")
        listed = "\n".join(f"- config_name: {config}\n  data_dir: {config}" for config in configs)
        (hub / name / "README.md").write_text(f"---\nconfigs:\n{listed}\n---\n")


@pytest.fixture
def working_dir(tmp_path: Path) -> Path:
    """A folder in which the Hub's names are those of stand-ins."""
    made = tokenizer()
    token_ids = {f"{name}_token_id": getattr(made, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    # The class of Qwen2's tokenizer adds a token of its own
    sizes = {**SIZES, **token_ids, "vocab_size": len(made) + 1}
    torch.manual_seed(0)
    for save in (save_language_models, save_vision_models):
        save(tmp_path / "trl-internal-testing", made, sizes)
    save_datasets(tmp_path / "trl-internal-testing")
    return tmp_path


def run_suite(trl_tests: Path, working_dir: Path, name: str, *arguments: str) -> dict[str, str]:
    """Run the tests and return what became of each: "passed", or why it failed or was skipped."""
    report = working_dir / f"{name}.xml"
    search_path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", trl_tests / "test_dpo_trainer.py", *arguments),
            "--import-mode=importlib",  # so that the checkout's `trl` does not come before the installed one
            *("-p", "no:cacheprovider", f"--basetemp={working_dir / name}", f"--junitxml={report}"),
        ],
        cwd=working_dir,
        env={**os.environ, "HF_HOME": str(working_dir / "cache"), "PYTHONPATH": os.pathsep.join(search_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode in (0, 1), run.stdout + run.stderr  # 1: some tests failed
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        problems = [f"{problem.get('message')}\n{problem.text}" for problem in case if "message" in problem.attrib]
        outcomes[f"{case.attrib['classname'].split('.')[-1]}::{case.attrib['name']}"] = "".join(problems) or "passed"
    return outcomes


def test_what_passes_with_dpo_trainer_passes_with_rso_trainer(trl_tests, working_dir, capsys):
    with_dpo = run_suite(trl_tests, working_dir, "DPOTrainer")
    with_rso = run_suite(trl_tests, working_dir, "RSOTrainer", "-p", "rso_for_dpo")
    assert with_rso.keys() == with_dpo.keys()
    passed = {test for test, outcome in with_dpo.items() if outcome == "passed"}
    lost = {test: with_rso[test] for test in passed if with_rso[test] != "passed"}
    neither = [test for test in with_dpo if with_dpo[test] != "passed" and with_rso[test] != "passed"]

    versions = f"{(trl_tests.parent / 'VERSION').read_text().strip()}, run with TRL {trl.__version__}"
    with capsys.disabled():
        print(f"\n{len(with_dpo)} tests of TRL {versions}. {len(passed)} pass with DPOTrainer, and of these")
        print(f"{len(passed) - len(lost)} with RSOTrainer.")
        print(f"{len(neither)} pass with neither:")
        for test in neither:
            print(f"  {test}: {with_dpo[test].splitlines()[0]}")

    assert len(passed) >= FEWEST_PASSED
    assert not lost, "\n".join(lost.values())
