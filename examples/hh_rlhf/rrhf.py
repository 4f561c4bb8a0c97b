r"""RRHF on HH-RLHF: samples of the SFT policy, ranked, without a reference model (RSO section 1).

From the Hub, with LLaMA-7B as the base model; `--lora` trains an adapter:

    python examples/hh_rlhf/rrhf.py --output_dir outputs/rrhf-7b --num_candidates 4 --num_samples 4 \
        --learning_rate 2e-5 --per_device_train_batch_size 2 --gradient_accumulation_steps 16

Offline, with a local file and a model of 5M parameters made from scratch:

    python examples/hh_rlhf/rrhf.py --data path/to/harmless-base/test.jsonl.gz --from_scratch --use_cpu --bf16 False \
        --num_candidates 4 \
        --output_dir outputs/rrhf-tiny --num_prompts 100 --max_new_tokens 48 --max_length 256 --max_steps 50 \
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

from prefopt_trl import PairwiseRanker, RRHFConfig, RRHFTrainer


def main(script: ScriptArguments, args: RRHFConfig) -> None:
    adapter = make_adapter(script)
    comparisons = load_comparisons(script)
    policy = make_policy(script, args, comparisons)
    ranker = PairwiseRanker(make_ranker(script, args, comparisons))
    prompts = draw_comparisons(comparisons, policy, script, args).select_columns(["prompt"])
    train_and_save(RRHFTrainer(policy, args=args, train_dataset=prompts, ranker=ranker, peft_config=adapter))


if __name__ == "__main__":
    parser = TrlParser([ScriptArguments, RRHFConfig])  # type: ignore[list-item]  # TRL's own examples pass classes too
    main(*parser.parse_args_and_config())
