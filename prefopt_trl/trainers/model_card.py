"""The model card of a trained policy: method, data, hyperparameters, reference model, and how to load it."""

import json
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import ProcessorMixin

from prefopt_trl.runtime.cards import code, name, public_name, settings_table, table
from prefopt_trl.runtime.weights import gathered
from prefopt_trl.sampling.card import counts_table, how_sampled, read_sampled
from prefopt_trl.trainers.base_config import PreferenceConfig, RankingConfig
from prefopt_trl.trainers.resuming import as_written

# Beside those of the method itself
HYPERPARAMETERS = [
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "num_train_epochs",
    "max_length",
    "seed",
    "bf16",
    "fp16",
]
# What bitsandbytes' configuration has beside the settings of the other precision
OF_8_BIT = ("_", "load_in_8bit", "llm_int8_", "bnb_4bit_quant_storage")
OF_4_BIT = ("_", "load_in_4bit", "bnb_4bit_")
LIBRARIES = ["prefopt-trl", "trl", "transformers", "peft", "torch", "datasets", "tokenizers"]

TRL_CITATION = """@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
             Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""


@dataclass(frozen=True)
class TrainingData:
    """Where the training data of a run came from.

    Attributes:
        folder (`str` or `None`):
            Where [`build_preference_dataset`] has saved them.
        ranker (`dict` or `None`):
            Settings of the ranker that scored them, or that scores samples during training, where no folder has them.
    """

    folder: str | None = None
    ranker: dict[str, Any] | None = None

    @classmethod
    def of(cls, dataset: Any, ranker: Any) -> "TrainingData":
        """Read off its files where a dataset was saved; else take the ranker's settings. Call it on all processes."""
        folder = None
        for file in dataset.cache_files[:1] if isinstance(dataset, Dataset) else []:
            pairs = Path(file["filename"]).parent
            folder = str(pairs.parent) if pairs.name == "pairs" and read_sampled(pairs.parent) else None
        if folder is not None or ranker is None:
            return cls(folder)
        with gathered(ranker.model):
            return cls(None, ranker.settings())


def model_card(
    trainer: Any, trl_card: ModelCard, model_name: str, repo_id: str, dataset_name: str | None
) -> ModelCard:
    """Write the card of a trainer's model, with its metadata in YAML first.

    Texts of others are shown as code: names of models and datasets and settings are not read as Markdown. Of the card
    that TRL writes, the tags, the base model and the links to the trackers of the run are kept. `repo_id` is what the
    model is loaded from: its repository, or its folder. Of a local `dataset_name` the last part alone is told.
    """
    paper, model = trainer._paper, trainer.accelerator.unwrap_model(trainer.model)
    data = ModelCardData(
        base_model=trl_card.data.get("base_model"),
        datasets=None if dataset_name is None or Path(dataset_name).exists() else dataset_name,
        library_name="peft" if isinstance(model, PeftModel) else "transformers",
        model_name=model_name,
        tags=trl_card.data.get("tags"),
    )
    base_model = public_name(model.config.name_or_path)
    link = f"https://huggingface.co/papers/{paper['id']}"
    trackers = "\n".join(line for line in trl_card.text.splitlines() if line.startswith("[<img "))
    text = f"""# {code(model_name)}

{f"{name(base_model)}, trained" if base_model else "A model trained"} with {trainer._name} \
([{paper["title"]}]({link})) by prefopt-trl, on [TRL](https://github.com/huggingface/trl).

## Use

```python
{_use(trainer, model, repo_id)}
```

## Training data

{_training_data(trainer, dataset_name)}

## Hyperparameters

{trackers}

{settings_table(_hyperparameters(trainer, model))}

## Reference model

{_reference_model(trainer, model)}

## Framework versions

{table(["library", "version"], [[library, version(library)] for library in LIBRARIES])}

## Citation

{trainer._name}:

```bibtex
{paper["citation"]}
```

TRL:

```bibtex
{TRL_CITATION}
```
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _use(trainer: Any, model: Any, repo_id: str) -> str:
    """A snippet that loads the model and generates."""
    processor = trainer.processing_class
    reads_images = isinstance(processor, ProcessorMixin)
    auto_processor = "AutoProcessor" if reads_images else "AutoTokenizer"
    auto_model = "AutoModelForImageTextToText" if reads_images else "AutoModelForCausalLM"
    imports = f"from transformers import {auto_model}, {auto_processor}"
    load = f"{auto_model}.from_pretrained({repo_id!r})"
    if isinstance(model, PeftModel):
        imports = f"from peft import PeftModel\n{imports}"
        load = f"PeftModel.from_pretrained({auto_model}.from_pretrained({model.config.name_or_path!r}), {repo_id!r})"
    chat = getattr(processor, "chat_template", None) is not None
    prompt = '[{"role": "user", "content": "What is the sky?"}]' if chat else '"The sky is"'
    encode = (
        f"processor.apply_chat_template({prompt}, add_generation_prompt=True, tokenize=True, return_dict=True,"
        ' return_tensors="pt")'
        if chat
        else f'processor({prompt}, return_tensors="pt")'
    )
    return f"""{imports}

model = {load}
processor = {auto_processor}.from_pretrained({repo_id!r})
inputs = {encode}
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))"""


def _training_data(trainer: Any, dataset_name: str | None) -> str:
    """Where the data came from, how they were sampled, and the ranker."""
    data, args = trainer.training_data, trainer.args
    sampled = read_sampled(data.folder) if data.folder else None
    named = f"Dataset: {code(public_name(dataset_name))}.\n\n" if dataset_name else ""
    ranker = None
    if sampled:
        settings, statistics = sampled
        warning = f"> **Warning:** {statistics.warning}\n\n" if statistics.warning else ""
        options = {key: value for key, value in settings.items() if key != "ranker"}
        text = f"Sampled before training. {how_sampled(*sampled)}\n\n{warning}{counts_table(statistics)}\n\n"
        text += f"### Sampling\n\n{settings_table(options)}"
        ranker = settings.get("ranker")
    elif args.sampling == "online":
        options = {**args.selection_options(), **args.generation_options()}
        text = "Prompts, whose completions were sampled from the reference model during training.\n\n### Sampling\n\n"
        text += settings_table(options)
    elif data.ranker is not None:
        text = "Completions that were given, scored by the ranker."
    else:
        text = f"{'Preference pairs' if trainer.learns_from == 'pairs' else 'Rankings'} that were given."
    ranker = data.ranker if ranker is None else ranker
    return named + text + (f"\n\n### Ranker\n\n{settings_table(ranker)}" if ranker else "")


def _hyperparameters(trainer: Any, model: Any) -> dict[str, Any]:
    args = trainer.args
    methods = takewhile(lambda config: config not in (PreferenceConfig, RankingConfig), type(args).__mro__)
    sampling = {"strategy", "num_samples", "pairing", "sampling_temperature"}
    own = {field for config in methods for field in vars(config).get("__annotations__", {})} - sampling
    chosen = {field: getattr(args, field) for field in [*sorted(own), *HYPERPARAMETERS]}
    shown = {field: as_written(trainer._name, field, value) for field, value in chosen.items() if value is not None}
    shown["batch size, over all processes"] = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    )
    shown["steps"] = trainer.state.global_step
    if isinstance(model, PeftModel):
        config = {**model.peft_config["default"].to_dict(), "target_modules": _target_modules(model)}
        names = ["peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save"]
        shown["adapter"] = {field: config[field] for field in names if config.get(field) is not None}
    if (quantization := getattr(model.config, "quantization_config", None)) is not None:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        unused = OF_8_BIT if settings.get("load_in_4bit") else OF_4_BIT
        shown["quantisation"] = {key: value for key, value in settings.items() if not key.startswith(unused)}
    return json.loads(json.dumps(shown, default=_plain))


def _target_modules(model: PeftModel) -> Any:
    """What PEFT writes down; "all-linear", which it spells out layer by layer, by the last parts of the names."""
    asked: Any = model.peft_config["default"].to_dict().get("target_modules")
    if not asked or isinstance(asked, str):
        return asked
    parts = {module.rpartition(".")[2] for module in asked}
    modules = [module for module, _ in model.get_base_model().named_modules() if module.rpartition(".")[2] in parts]
    return parts if len(modules) == len(asked) else asked


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _reference_model(trainer: Any, model: Any) -> str:
    if not trainer.has_reference:
        return f"None: {trainer._name} needs none."
    if getattr(trainer.args, "reference_logps", "computed") == "sampled":
        return "The policy that was sampled: its log-probabilities were written down then."
    if trainer.args.sync_ref_model:
        return "A copy of the model that followed it during training (`sync_ref_model`)."
    if trainer.reference_given:
        return f"A model of its own: {name(public_name(trainer.reference_given))}."
    if isinstance(model, PeftModel):
        if "ref" in model.peft_config:
            return "The base model with a frozen copy of the adapter as it was before training."
        return "The base model, without the adapter."
    return "A copy of the model as it was before training."
