r"""Listwise DPO on HH-RLHF: samples kept by statistical rejection sampling, then ranked (DPO eq. 20).

From the Hub, with LLaMA-7B as the base model and LoRA, so that there is one copy of the weights:

    python examples/hh_rlhf/listwise_dpo.py --output_dir outputs/listwise-dpo-7b --lora --learning_rate 1e-4 \
        --num_candidates 64 --num_samples 4 --per_device_train_batch_size 4 --gradient_accumulation_steps 16

Offline, with a local file and a model of 5M parameters made from scratch:

    python examples/hh_rlhf/listwise_dpo.py --data path/to/harmless-base/test.jsonl.gz --from_scratch --use_cpu \
        --bf16 False --num_candidates 16 \
        --output_dir outputs/listwise_dpo-tiny --num_prompts 100 --max_new_tokens 48 --max_length 256 --max_steps 50 \
        --learning_rate 1e-4
"""

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

from prefopt_trl import ListwiseDPOConfig, ListwiseDPOTrainer, PairwiseRanker


def main(script: ScriptArguments, args: ListwiseDPOConfig) -> None:
    adapter = make_adapter(script)
    comparisons = load_comparisons(script)
    policy = make_policy(script, args, comparisons)
    ranker = PairwiseRanker(make_ranker(script, args, comparisons))
    prompts = draw_comparisons(comparisons, policy, script, args).select_columns(["prompt"])
    train_and_save(ListwiseDPOTrainer(policy, args=args, train_dataset=prompts, ranker=ranker, peft_config=adapter))


if __name__ == "__main__":
    parser = TrlParser([ScriptArguments, ListwiseDPOConfig])  # type: ignore[list-item]  # TRL's own examples pass classes too
    main(*parser.parse_args_and_config())
