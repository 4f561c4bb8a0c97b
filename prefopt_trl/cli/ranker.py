"""`prefopt-trl ranker`: a pairwise ranker, trained by TRL's SFTTrainer to answer which completion was chosen."""

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, SFTTrainer

from prefopt_trl.cli.arguments import RankerData
from prefopt_trl.cli.models import model_to_train
from prefopt_trl.cli.train import load_splits, save_arguments, train_and_save
from prefopt_trl.rankers.pairwise import pairwise_ranker_dataset


def run(own: RankerData, args: SFTConfig, model: ModelConfig) -> None:
    """Train a ranker on preference pairs."""
    save_arguments(own, args, model)
    trained = model_to_train(model, args)
    splits = load_splits(own, args)
    for name, pairs in splits.items():
        if pairs is not None:
            answers = pairwise_ranker_dataset(pairs, own.ranker_template, args.seed)
            splits[name] = comparisons_that_fit(answers, trained["processing_class"], args.max_length)
    train_and_save(SFTTrainer(args=args, **splits, **trained), own)


def comparisons_that_fit(answers: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """The rows that are not cut, as a cut row has no answer left to learn; how many are is printed.

    Raises:
        ValueError: if every row would be cut.
    """
    if max_length is None:
        return answers
    texts = [prompt + answer for prompt, answer in zip(answers["prompt"], answers["completion"], strict=True)]
    lengths = map(len, tokenizer(texts)["input_ids"])
    fitting = [row for row, length in enumerate(lengths) if length < max_length]  # EOS comes after the answer
    if not fitting:
        raise ValueError(f"Every comparison exceeds `max_length`={max_length} tokens. Raise it.")
    if len(fitting) < len(answers):
        PartialState().print(
            f"{len(answers) - len(fitting):,} of {len(answers):,} comparisons are left out: they exceed `max_length`="
            f"{max_length} tokens."
        )
    return answers.select(fitting)
