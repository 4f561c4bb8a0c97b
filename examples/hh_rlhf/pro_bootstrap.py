r"""PRO with self-bootstrapping on HH-RLHF: the policy's own samples join the rankings as it trains (PRO Algorithm 1).

As in the paper, PRO starts from the base model, without SFT, and uses all four subsets (section 4.3). The paper gives
no number of parts, so it is ours. A pairwise ranker scores the completions. Of about 160,000 comparisons 10,000 are
drawn; `--num_prompts` takes more. From the Hub, with LLaMA-7B and the paper's hyperparameters:

    python examples/hh_rlhf/pro_bootstrap.py --output_dir outputs/pro-bootstrap-7b --bootstrap_parts 10 \
        --max_length 512 --max_new_tokens 128 --num_train_epochs 2 --learning_rate 5e-6 \
        --per_device_train_batch_size 2 --gradient_accumulation_steps 56

Offline, with a local file and a model of 5M parameters made from scratch:

    python examples/hh_rlhf/pro_bootstrap.py --data path/to/harmless-base/test.jsonl.gz --from_scratch --use_cpu \
        --bf16 False --bootstrap_parts 5 \
        --output_dir outputs/pro_bootstrap-tiny --num_prompts 100 --max_new_tokens 48 --max_length 256 --max_steps 50 \
        --learning_rate 1e-4

Samples are saved in `<output_dir>/bootstrap`. To continue after an interruption, run it again with
`--resume_from_checkpoint <output_dir>/checkpoint-500`.
"""

from shared import (
    ScriptArguments,
    base_folder,
    draw_comparisons,
    load_comparisons,
    make_adapter,
    make_ranker,
    train_and_save,
)
from trl import TrlParser

from prefopt_trl import PairwiseRanker, PROConfig, PROTrainer


def main(script: ScriptArguments, args: PROConfig) -> None:
    args.bootstrap_parts = args.bootstrap_parts or 10
    adapter = make_adapter(script)
    comparisons = load_comparisons(script)
    base = base_folder(script, args, comparisons)
    ranker = PairwiseRanker(make_ranker(script, args, comparisons))
    pairs = draw_comparisons(comparisons, base, script, args)
    train_and_save(PROTrainer(base, args=args, train_dataset=pairs, ranker=ranker, peft_config=adapter))


if __name__ == "__main__":
    parser = TrlParser([ScriptArguments, PROConfig])  # type: ignore[list-item]  # TRL's own examples pass classes too
    main(*parser.parse_args_and_config())
