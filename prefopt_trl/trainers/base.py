"""What every trainer shares: TRL's `DPOTrainer` with prompts computed once. The only file that touches TRL's private
names."""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from transformers import (
    AutoProcessor,
    BitsAndBytesConfig,
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import create_model_from_path, get_config_model_id

from prefopt_trl.rankers.base import Ranker
from prefopt_trl.shared_prefix.forward import add_shared_prefix

logger = logging.getLogger(__name__)


class PreferenceTrainer(DPOTrainer):
    """[`~trl.DPOTrainer`] whose models compute each prompt once, and which can sample its pairs before training.

    Subclasses set `config_class`, the metadata of their model card (`_tag_names`, `_name`, `_paper`), and
    [`sample_pairs`], which makes pairs from prompts. The arguments are those of [`~trl.DPOTrainer`], and `ranker`.
    """

    config_class: type[DPOConfig]
    args: Any  # an instance of `config_class`

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        ranker: Ranker | None = None,
    ) -> None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = self.config_class(f"{model_id.split('/')[-1]}-{self._name}")
        elif not isinstance(args, self.config_class):
            raise TypeError(
                f"`args` must be an {self.config_class.__name__}, got {type(args).__name__}. "
                "It takes the same arguments and a few more."
            )
        if processing_class is None:
            init_kwargs: Any = (args.model_init_kwargs if isinstance(model, str) else None) or {}
            processing_class = AutoProcessor.from_pretrained(
                model_id, revision=init_kwargs.get("revision"), trust_remote_code=args.trust_remote_code
            )
        tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
        if tokenizer.eos_token is None:
            raise ValueError(
                "`processing_class` has no EOS token, so completions could never learn to end. Set "
                "`tokenizer.eos_token` (and `tokenizer.pad_token`) to tokens of its vocabulary."
            )

        splits: dict[str, Any] = {"train": train_dataset}
        if isinstance(eval_dataset, dict):
            splits |= {f"eval_{name}": dataset for name, dataset in eval_dataset.items()}
        else:
            splits["eval"] = eval_dataset
        to_sample = [name for name, dataset in splits.items() if dataset is not None and _is_prompts(dataset, name)]
        if to_sample and ranker is None:
            raise ValueError(
                f"The {' and '.join(to_sample)} dataset has prompts but no `chosen` and `rejected` completions. Pass "
                "a `ranker` so that pairs can be sampled, or a dataset of pairs."
            )
        if to_sample and ranker is not None:
            policy = self._reference_policy(model, ref_model, args, quantization_config)
            for name in to_sample:
                output_dir = os.path.join(str(args.output_dir), "sampled", name)
                splits[name] = self.sample_pairs(splits[name], policy, tokenizer, ranker, args, output_dir)
            del policy
            train_dataset = splits.pop("train")
            if isinstance(eval_dataset, dict):
                eval_dataset = {name.removeprefix("eval_"): dataset for name, dataset in splits.items()}
            else:
                eval_dataset = splits["eval"]
        elif ranker is not None and train_dataset is not None and "chosen" in _columns(train_dataset, "train"):
            logger.warning("`ranker` is not used: the datasets already have `chosen` and `rejected` completions.")

        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._share_prefixes()

    def sample_pairs(
        self,
        dataset: Dataset,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ranker: Ranker,
        args: Any,
        output_dir: str,
    ) -> Dataset:
        """Pairs sampled for the prompts of `dataset`; runs before training, and before the trainer's own set-up."""
        raise ValueError(f"{type(self).__name__} needs a dataset with `chosen` and `rejected` completions.")

    @staticmethod
    def _reference_policy(model: Any, ref_model: Any, args: Any, quantization_config: Any) -> Any:
        """The policy before training, on the training device: what RSO samples from."""
        policy = ref_model if ref_model is not None else model
        if isinstance(policy, str):
            kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
            if quantization_config is not None:
                kwargs["quantization_config"] = quantization_config
            policy = create_model_from_path(policy, **kwargs)
        if getattr(policy, "hf_device_map", None) is None and not getattr(policy, "is_quantized", False):
            policy = policy.to(args.device)
        return policy

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: DPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        columns = _columns(dataset, dataset_name)
        missing = [column for column in ("chosen", "rejected") if column not in columns]
        if missing:
            raise ValueError(
                f"The {dataset_name} dataset has no column {' and no column '.join(map(repr, missing))}; it has "
                f"{columns}. Preference data have `prompt`, `chosen` and `rejected`, and data to be "
                "sampled have `prompt` and need a `ranker`: rename yours with `dataset.rename_column(old, new)`."
            )
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset) and len(prepared) < len(dataset):
            message = (
                f"{len(dataset) - len(prepared)} of {len(dataset)} rows of the {dataset_name} dataset have a prompt "
                f"that fills `max_length`={args.max_length} and leaves no room for a completion"
            )
            if len(prepared) == 0:
                raise ValueError(f"{message}. Raise `max_length` or shorten the prompts.")
            logger.warning("%s; they are left out, as TRL does. Raise `max_length` to keep them.", message)
        return prepared

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self._share_prefixes()  # called by DPOTrainer.__init__, before ours ends
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _share_prefixes(self) -> None:
        if not self.args.share_prefix:
            return
        for wrapped in (self.model, self.ref_model):
            if wrapped is not None:
                model: Any = self.accelerator.unwrap_model(wrapped)
                if isinstance(model, PeftModel):
                    model = model.get_base_model()
                add_shared_prefix(model)


def _columns(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    """Names of the columns of a dataset with at least one row; a stream may know them from its rows only."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"The {name} dataset must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`. Of several "
            'splits pass one, such as `dataset["train"]`; a list of prompts becomes one with '
            '`Dataset.from_dict({"prompt": prompts})`.'
        )
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError(f"The {name} dataset is empty. Give it at least one row.")
    return list(first_row)


def _is_prompts(dataset: Dataset | IterableDataset, name: str) -> bool:
    """Whether a dataset is to be sampled: it has prompts, and no completions."""
    columns = _columns(dataset, name)
    if "prompt" not in columns or "chosen" in columns or "rejected" in columns:
        return False
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The {name} dataset is an `IterableDataset` of prompts, and sampling needs to know how many there are. "
            "Pass a `Dataset`, such as `Dataset.from_list(list(dataset.take(1000)))`, or stream pairs."
        )
    return True
