r"""RLHF on HH-RLHF, the papers' baseline: reinforcement learning against a ranker, with TRL's `GRPOTrainer`.

The papers compare with PPO; TRL ships GRPO today. The reward of a completion is the logit of its
probability of being preferred to the chosen one (RSO eq. 9). `--beta` weights the KL divergence from the SFT policy.

From the Hub, with LLaMA-7B as the base model:

    python examples/hh_rlhf/grpo.py --output_dir outputs/grpo-7b --lora --learning_rate 1e-5 --beta 0.04 \
        --num_generations 8 --per_device_train_batch_size 8 --gradient_accumulation_steps 16

Offline, with a local file and a model of 5M parameters made from scratch:

    python examples/hh_rlhf/grpo.py --data path/to/harmless-base/test.jsonl.gz --from_scratch --use_cpu --bf16 False \
        --output_dir outputs/grpo-tiny --num_prompts 100 --max_completion_length 48 --max_length 256 --max_steps 20 \
        --num_generations 4 --per_device_train_batch_size 8 --learning_rate 1e-4

The policy and the ranker are trained, and found by later runs, as in `rso.py`.
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
from trl import GRPOConfig, GRPOTrainer, TrlParser

from prefopt_trl import PairwiseRanker


@dataclass
class HHGRPOConfig(GRPOConfig):
    max_length: int = field(
        default=1024, metadata={"help": "Longest prompt and completion, in tokens; longer prompts are left out."}
    )

    @property
    def max_new_tokens(self) -> int | None:  # as the other examples call it
        return self.max_completion_length


def main(script: ScriptArguments, args: HHGRPOConfig) -> None:
    adapter = make_adapter(script)
    comparisons = load_comparisons(script)
    policy = make_policy(script, args, comparisons)
    ranker = PairwiseRanker(make_ranker(script, args, comparisons))
    pairs = draw_comparisons(comparisons, policy, script, args)
    # A baseline from the dataset is the same for all completions of a prompt, on whichever process they are sampled
    rewards = ranker.as_reward_func(baseline_column="chosen")
    train_and_save(GRPOTrainer(policy, reward_funcs=rewards, args=args, train_dataset=pairs, peft_config=adapter))


if __name__ == "__main__":
    parser = TrlParser([ScriptArguments, HHGRPOConfig])  # type: ignore[list-item]  # TRL's own examples pass classes too
    main(*parser.parse_args_and_config())
