r"""SLiC on HH-RLHF, without a reference model: on the comparisons, or on samples of the SFT policy (RSO eq. 1).

From the Hub, with LLaMA-7B as the base model, on the task of RSO section 5:

    python examples/hh_rlhf/slic.py --subset helpful --output_dir outputs/slic-7b --sample --delta 20 \
        --optim adafactor --learning_rate 1e-5 --per_device_train_batch_size 8 --gradient_accumulation_steps 16

Offline, with a local file and a model of 5M parameters made from scratch:

    python examples/hh_rlhf/slic.py --data path/to/harmless-base/test.jsonl.gz --from_scratch --use_cpu --bf16 False \
        --output_dir outputs/slic-tiny --num_prompts 100 --max_new_tokens 48 --max_length 256 --max_steps 50 \
        --learning_rate 1e-4

First the policy is fine-tuned on the chosen completions and saved in `<output_dir>/sft`, where a later run finds it.
With `--sample`, a ranker is trained too and labels samples (SLiC-sample-rank). Without it, this is SLiC-direct.
"""

from dataclasses import dataclass, field

from shared import (
    ScriptArguments,
    draw_comparisons,
    load_comparisons,
    make_adapter,
    make_policy,
    make_ranker,
    train_and_save,
)
from trl import TrlParser

from prefopt_trl import PairwiseRanker, SLiCConfig, SLiCTrainer


@dataclass
class SLiCScriptArguments(ScriptArguments):
    sample: bool = field(
        default=False,
        metadata={"help": "Sample completions of the SFT policy and let a ranker label them, as in SLiC-sample-rank."},
    )


def main(script: SLiCScriptArguments, args: SLiCConfig) -> None:
    adapter = make_adapter(script)
    comparisons = load_comparisons(script)
    policy = make_policy(script, args, comparisons)
    pairs = draw_comparisons(comparisons, policy, script, args)
    if not script.sample:
        train_and_save(SLiCTrainer(policy, args=args, train_dataset=pairs, peft_config=adapter))
        return
    ranker = PairwiseRanker(make_ranker(script, args, comparisons))
    prompts = pairs.select_columns(["prompt"])
    train_and_save(SLiCTrainer(policy, args=args, train_dataset=prompts, ranker=ranker, peft_config=adapter))


if __name__ == "__main__":
    parser = TrlParser([SLiCScriptArguments, SLiCConfig])  # type: ignore[list-item]  # TRL's own examples pass classes too
    main(*parser.parse_args_and_config())
