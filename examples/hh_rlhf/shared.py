"""What the examples on HH-RLHF share: a base model, an SFT policy, a pairwise ranker, and prompts to sample for."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from prefopt_trl import load_hh_rlhf
from prefopt_trl.experiments.tiny import tiny_llama, train_tokenizer
from prefopt_trl.rankers.pairwise import pairwise_ranker_dataset


@dataclass
class ScriptArguments:
    data: str = field(
        default="Anthropic/hh-rlhf", metadata={"help": "HH-RLHF: its id on the Hub, or a local folder or file."}
    )
    subset: str | None = field(
        default=None,
        metadata={"help": "Subset of HH-RLHF, such as helpful-base, or helpful for all three such; all by default."},
    )
    split: str = field(default="train", metadata={"help": "Split of the data."})
    base_model: str = field(
        default="huggyllama/llama-7b", metadata={"help": "Model that the policy and the ranker are fine-tuned from."}
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Make a model of 5M parameters instead of loading `base_model`."}
    )
    policy: str | None = field(default=None, metadata={"help": "SFT policy, instead of training one."})
    ranker: str | None = field(default=None, metadata={"help": "Pairwise ranker, instead of training one."})
    num_prompts: int = field(
        default=10_000, metadata={"help": "Comparisons to draw, for their prompts or as rankings."}
    )
    lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter of the policy instead of its weights."})
    sft_epochs: float = field(default=1.0, metadata={"help": "Epochs of the SFT policy and of the ranker."})
    sft_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of both; 1e-5, or 1e-3 from scratch, by default."}
    )


def make_base(script: ScriptArguments, comparisons: Dataset) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if script.from_scratch:
        tokenizer = train_tokenizer((row["prompt"] + row["chosen"] for row in comparisons), vocab_size=4096)
        return tiny_llama(tokenizer), tokenizer
    model = AutoModelForCausalLM.from_pretrained(script.base_model, dtype=torch.float32)  # it may be saved in half
    return model, AutoTokenizer.from_pretrained(script.base_model)


def fine_tune(
    name: str, dataset: Dataset, max_length: int, script: ScriptArguments, args: Any, comparisons: Dataset
) -> str:
    """Fine-tune the base model; return its folder, which an earlier run may have left."""
    folder = os.path.join(str(args.output_dir), name)
    if os.path.exists(os.path.join(folder, "config.json")):
        print(f"Using {folder}, made by an earlier run.")
        return folder
    model, tokenizer = make_base(script, comparisons)
    # TRL would cut longer rows, and with them the end of a completion or the ranker's answer
    dataset = dataset.filter(lambda row: len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) < max_length)
    config = SFTConfig(
        folder,
        num_train_epochs=script.sft_epochs,
        learning_rate=script.sft_learning_rate or (1e-3 if script.from_scratch else 1e-5),
        per_device_train_batch_size=args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        max_length=max_length,
        warmup_steps=0.1,
        bf16=args.bf16,
        use_cpu=args.use_cpu,
        seed=args.seed,
        report_to=args.report_to,
        save_strategy="no",
        activation_checkpointing=not script.from_scratch,
    )
    trainer = SFTTrainer(model, args=config, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(folder)
    return folder


def load_comparisons(script: ScriptArguments) -> Dataset:
    """The comparisons of the split: `prompt`, `chosen`, `rejected`."""
    return load_hh_rlhf(script.data, script.subset, script.split)


def base_folder(script: ScriptArguments, args: Any, comparisons: Dataset) -> str:
    """Folder or id of the base model itself, which PRO starts from (PRO section 4.3)."""
    if not script.from_scratch:
        return script.base_model
    folder = os.path.join(str(args.output_dir), "base")
    for part in make_base(script, comparisons):
        part.save_pretrained(folder)
    return folder


def make_policy(script: ScriptArguments, args: Any, comparisons: Dataset) -> str:
    """Folder of the SFT policy: the base model fine-tuned on chosen completions."""
    chosen = comparisons.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    return script.policy or fine_tune("sft", chosen, args.max_length, script, args, comparisons)


def make_ranker(script: ScriptArguments, args: Any, comparisons: Dataset) -> str:
    """Folder of the pairwise ranker: the base model fine-tuned to say which completion of a comparison was chosen."""
    answers = pairwise_ranker_dataset(comparisons, seed=args.seed)
    return script.ranker or fine_tune("ranker", answers, 2 * args.max_length, script, args, comparisons)


def draw_comparisons(comparisons: Dataset, policy: str, script: ScriptArguments, args: Any) -> Dataset:
    """Draw `num_prompts` of the comparisons whose prompts leave room for a completion of `max_new_tokens`.

    They are drawn from all of them with the seed of the training, because the subsets come one after the other.
    """
    tokenizer = AutoTokenizer.from_pretrained(policy)
    fit = comparisons.filter(
        lambda row: len(tokenizer(row["prompt"])["input_ids"]) + args.max_new_tokens <= args.max_length
    )
    drawn = fit.shuffle(seed=args.seed).select(range(min(script.num_prompts, len(fit))))
    print(
        f"{len(comparisons):,} comparisons; {len(drawn):,} of the {len(fit):,} that fit, drawn with seed {args.seed}."
    )
    return drawn


def make_adapter(script: ScriptArguments) -> LoraConfig | None:
    return LoraConfig(task_type="CAUSAL_LM") if script.lora else None


def train_and_save(trainer: Any) -> None:
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    print(f"The trained policy is saved in {trainer.args.output_dir}.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
