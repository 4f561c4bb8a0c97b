r"""RSO on HH-RLHF: an SFT policy, a pairwise ranker, then pairs sampled and rejected before training (RSO section 5).

From the Hub, with LLaMA-7B as the base model and the paper's optimiser, batch size and learning rate:

    python examples/hh_rlhf/rso.py --output_dir outputs/rso-7b --optim adafactor --learning_rate 1e-5 \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 16

Offline, with a local file and a model of 5M parameters made from scratch, in minutes on two cores:

    python examples/hh_rlhf/rso.py --data path/to/harmless-base/test.jsonl.gz --from_scratch --use_cpu --bf16 False \
        --output_dir outputs/rso-tiny --num_prompts 100 --max_new_tokens 48 --max_length 256 --max_steps 50 \
        --learning_rate 1e-4

The policy is first fine-tuned on the chosen completions and the ranker trained on the comparisons, into
`<output_dir>/sft` and `<output_dir>/ranker`, where a later run finds them; `--policy` and `--ranker` bring your own.
Sampling runs in one process: to train on several, run this once in one process with `--max_steps 1`, then launch it.
"""

import os
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer, TrlParser

from prefopt_trl import PairwiseRanker, RSOConfig, RSOTrainer, load_hh_rlhf
from prefopt_trl.data.tiny import tiny_llama, train_tokenizer
from prefopt_trl.rankers.pairwise import pairwise_ranker_dataset


@dataclass
class ScriptArguments:
    data: str = field(
        default="Anthropic/hh-rlhf", metadata={"help": "HH-RLHF: its id on the Hub, or a local folder or file."}
    )
    subset: str | None = field(
        default=None, metadata={"help": "One of HH-RLHF's four subsets, such as harmless-base; all by default."}
    )
    split: str = field(default="train", metadata={"help": "Split of the data."})
    base_model: str = field(
        default="huggyllama/llama-7b", metadata={"help": "Model that the policy and the ranker are fine-tuned from."}
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Make a model of 5M parameters instead of loading `base_model`."}
    )
    policy: str | None = field(default=None, metadata={"help": "SFT policy to start from, instead of training one."})
    ranker: str | None = field(default=None, metadata={"help": "Pairwise ranker, instead of training one."})
    num_prompts: int = field(default=10_000, metadata={"help": "Prompts to sample completions for."})
    sft_epochs: float = field(default=1.0, metadata={"help": "Epochs of the SFT policy and of the ranker."})
    sft_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of both; 1e-5, or 1e-3 from scratch, by default."}
    )


def make_base(script: ScriptArguments, comparisons: Dataset) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if script.from_scratch:
        tokenizer = train_tokenizer((row["prompt"] + row["chosen"] for row in comparisons), vocab_size=4096)
        return tiny_llama(tokenizer), tokenizer
    return AutoModelForCausalLM.from_pretrained(script.base_model), AutoTokenizer.from_pretrained(script.base_model)


def fine_tune(
    name: str, dataset: Dataset, max_length: int, script: ScriptArguments, args: RSOConfig, comparisons: Dataset
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


def main(script: ScriptArguments, args: RSOConfig) -> None:
    comparisons = load_hh_rlhf(script.data, script.subset, script.split)
    max_length = args.max_length or 1024
    chosen = comparisons.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    answers = pairwise_ranker_dataset(comparisons, seed=args.seed)
    policy = script.policy or fine_tune("sft", chosen, max_length, script, args, comparisons)
    ranker = script.ranker or fine_tune("ranker", answers, 2 * max_length, script, args, comparisons)

    # Prompts that leave room for a completion of max_new_tokens
    tokenizer = AutoTokenizer.from_pretrained(policy)
    prompts = comparisons.select_columns(["prompt"]).filter(
        lambda row: len(tokenizer(row["prompt"])["input_ids"]) + args.max_new_tokens <= max_length
    )
    prompts = prompts.select(range(min(script.num_prompts, len(prompts))))
    print(f"{len(comparisons):,} comparisons; sampling for {len(prompts):,} prompts that fit.")

    trainer = RSOTrainer(policy, args=args, train_dataset=prompts, ranker=PairwiseRanker(ranker))
    trainer.train()
    trainer.save_model()
    print(f"The trained policy is saved in {args.output_dir}, its pairs in {args.output_dir}/sampled/train.")
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    parser = TrlParser([ScriptArguments, RSOConfig])  # type: ignore[list-item]  # TRL's own examples pass classes too
    main(*parser.parse_args_and_config())
