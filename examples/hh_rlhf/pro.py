r"""PRO on HH-RLHF: rankings of both completions of a comparison and two of another model (PRO section 4.1).

As in the paper, PRO starts from the base model, without SFT, and uses all four subsets (section 4.3). Unlike in the
paper, the other model is an SFT policy of the same base instead of Alpaca or ChatGPT, a pairwise ranker scores the
completions instead of a reward model, and 10,000 of about 160,000 comparisons are drawn; `--num_prompts` takes more.
From the Hub, with LLaMA-7B and the paper's hyperparameters:

    python examples/hh_rlhf/pro.py --output_dir outputs/pro-7b --max_length 512 --max_new_tokens 128 \
        --num_train_epochs 2 --learning_rate 5e-6 --per_device_train_batch_size 2 --gradient_accumulation_steps 56

Offline, with a local file and a model of 5M parameters made from scratch:

    python examples/hh_rlhf/pro.py --data path/to/harmless-base/test.jsonl.gz --from_scratch --use_cpu --bf16 False \
        --output_dir outputs/pro-tiny --num_prompts 100 --max_new_tokens 48 --max_length 256 --max_steps 50 \
        --learning_rate 1e-4
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from shared import (
    ScriptArguments,
    base_folder,
    draw_comparisons,
    load_comparisons,
    make_adapter,
    make_policy,
    make_ranker,
    train_and_save,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from prefopt_trl import PairwiseRanker, PROConfig, PROTrainer, sample_completions


@dataclass
class PROScriptArguments(ScriptArguments):
    num_sampled: int = field(default=2, metadata={"help": "Completions of the SFT policy added to each comparison."})


def main(script: PROScriptArguments, args: PROConfig) -> None:
    adapter = make_adapter(script)
    comparisons = load_comparisons(script)
    policy = make_policy(script, args, comparisons)
    ranker = PairwiseRanker(make_ranker(script, args, comparisons))

    pairs = draw_comparisons(comparisons, policy, script, args)
    model: Any = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    sampled = sample_completions(
        model.to(args.device),
        AutoTokenizer.from_pretrained(policy),
        list(pairs["prompt"]),
        script.num_sampled,
        args,
        seed=args.seed,
    )
    del model
    completions = [[row["chosen"], row["rejected"], *texts] for row, texts in zip(pairs, sampled, strict=True)]
    rankings = pairs.select_columns(["prompt"]).add_column("completions", completions)
    # Without a column `rewards`, the ranker scores the completions first
    base = base_folder(script, args, comparisons)
    train_and_save(PROTrainer(base, args=args, train_dataset=rankings, ranker=ranker, peft_config=adapter))


if __name__ == "__main__":
    parser = TrlParser([PROScriptArguments, PROConfig])  # type: ignore[list-item]  # TRL's own examples pass classes too
    main(*parser.parse_args_and_config())
