r"""RSO on HH-RLHF: an SFT policy, a pairwise ranker, then pairs sampled and rejected before training (RSO section 5).

From the Hub, with LLaMA-7B as the base model and the paper's task, optimizer, batch size and learning rate, on 10,000
prompts drawn at random:

    python examples/hh_rlhf/rso.py --subset helpful --output_dir outputs/rso-7b --optim adafactor \
        --learning_rate 1e-5 --per_device_train_batch_size 8 --gradient_accumulation_steps 16

Offline, with a local file and a model of 5M parameters made from scratch, in about ten minutes on two cores, most of
them for the ranker:

    python examples/hh_rlhf/rso.py --data path/to/harmless-base/test.jsonl.gz --from_scratch --use_cpu --bf16 False \
        --output_dir outputs/rso-tiny --num_prompts 100 --max_new_tokens 48 --max_length 256 --max_steps 50 \
        --per_device_train_batch_size 8 --learning_rate 1e-4 --sft_epochs 0.5 --generation_batch_size 256

First the policy is fine-tuned on the chosen completions and the ranker on the comparisons. They are saved in
`<output_dir>/sft` and `<output_dir>/ranker`, where a later run finds them; `--policy` and `--ranker` replace them by
yours. For several processes, first run this in one with `--max_steps 1`, which trains these two, then launch it.
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

from prefopt_trl import PairwiseRanker, RSOConfig, RSOTrainer


def main(script: ScriptArguments, args: RSOConfig) -> None:
    adapter = make_adapter(script)
    comparisons = load_comparisons(script)
    policy = make_policy(script, args, comparisons)
    ranker = PairwiseRanker(make_ranker(script, args, comparisons))
    prompts = draw_comparisons(comparisons, policy, script, args).select_columns(["prompt"])
    train_and_save(RSOTrainer(policy, args=args, train_dataset=prompts, ranker=ranker, peft_config=adapter))


if __name__ == "__main__":
    parser = TrlParser([ScriptArguments, RSOConfig])  # type: ignore[list-item]  # TRL's own examples pass classes too
    main(*parser.parse_args_and_config())
