"""`prefopt-trl ranker`: train a pairwise ranker, causal or encoder-decoder, to answer which completion was chosen."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, TrainingArguments
from trl import ModelConfig, SFTConfig, SFTTrainer

from prefopt_trl.cli.arguments import RankerData
from prefopt_trl.cli.data import load_comparisons, rows_that_fit
from prefopt_trl.cli.measured import RankerTrainer
from prefopt_trl.cli.training import prepare, train_and_save
from prefopt_trl.rankers.pairwise import PairwiseRanker, pairwise_ranker_dataset
from prefopt_trl.rankers.templates import ANSWER_CUE

# Fields of `SFTConfig` that apply to an encoder-decoder
OF_ENCODER_DECODERS = TrainingArguments.__dataclass_fields__.keys() | {
    "max_length",
    "model_init_kwargs",
    "pad_to_multiple_of",
    "trust_remote_code",
}


class CausalTrainer(RankerTrainer, SFTTrainer):
    """TRL's `SFTTrainer`: the answer follows the comparison."""

    ranker_class = PairwiseRanker


class EncoderDecoderTrainer(RankerTrainer):
    """transformers' `Trainer`: the encoder reads the comparison and the decoder answers, as in RSO's T5."""

    ranker_class = PairwiseRanker

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.create_model_card()  # as TRL's trainers do, for a push of the checkpoint
        super()._save_checkpoint(model, trial)


def run(own: RankerData, args: SFTConfig, model: ModelConfig, save_config: Callable[[], None]) -> None:
    """Train a ranker on preference pairs, and measure its accuracy on those of held-out prompts."""
    tokenizer, trained = prepare(args, model, task=None)
    loaded = trained["model"]
    in_decoder = not isinstance(loaded, str) and loaded.config.is_encoder_decoder
    trainer_class: type[RankerTrainer] = EncoderDecoderTrainer if in_decoder else CausalTrainer
    if in_decoder:
        for field in fields(SFTConfig):
            if field.name not in OF_ENCODER_DECODERS and getattr(args, field.name) != field.default:
                raise ValueError(f"`{field.name}` has no effect on an encoder-decoder. Leave it out.")
        multiple: Any = args.pad_to_multiple_of
        trained["data_collator"] = DataCollatorForSeq2Seq(tokenizer, loaded, pad_to_multiple_of=multiple)
    splits, pairs = load_comparisons(own, args), {}
    for name, rows in splits.items():
        if rows is None:
            continue
        answers = pairwise_ranker_dataset(rows, own.ranker_template, args.seed)
        if in_decoder:
            ids = tokenizer([text.removesuffix(ANSWER_CUE) for text in answers["prompt"]])["input_ids"]
            labels = tokenizer(answers["completion"][:])["input_ids"]
            answers, lengths = Dataset.from_dict({"input_ids": ids, "labels": labels}), list(map(len, ids))
        else:
            texts = [row["prompt"] + row["completion"] for row in answers]
            lengths = [len(ids) + 1 for ids in tokenizer(texts)["input_ids"]]  # and EOS
        longest = args.max_length or max(lengths)
        fitting = rows_that_fit(lengths, longest, "comparisons", "they exceed")  # a truncated row loses its answer
        splits[name], pairs[name] = answers.select(fitting), rows.select(fitting)
    given = {**trained, **splits}
    trainer = trainer_class(own, pairs.get("eval_dataset"), args=args, processing_class=tokenizer, **given)
    train_and_save(trainer, own, save_config, measure=trainer.report)
    trainer.create_model_card()
