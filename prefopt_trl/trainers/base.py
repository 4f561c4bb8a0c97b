"""What every trainer shares: TRL's `DPOTrainer` with prompts computed once. The only file that imports TRL's
private names."""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader, Sampler
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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils

from prefopt_trl.data.collators import DataCollatorForRanking
from prefopt_trl.data.formats import Row, columns_of, normalize_pairs
from prefopt_trl.data.rankings import pairs_to_rankings, tokenize_rankings
from prefopt_trl.data.tokenization import (
    WithoutAppendedTokens,
    check_tokens,
    num_appended_tokens,
    warn_of_full_prompts,
)
from prefopt_trl.rankers.base import Ranker, check_ranker
from prefopt_trl.runtime.processes import checkpoints, interruptible, last_checkpoint, what_is_trained
from prefopt_trl.runtime.settings import Settings
from prefopt_trl.sampling.collator import DataCollatorForRejectionSampling
from prefopt_trl.sampling.options import SamplingOptions
from prefopt_trl.shared_prefix.forward import add_shared_prefix
from prefopt_trl.trainers import resuming
from prefopt_trl.trainers.base_config import PreferenceConfig
from prefopt_trl.trainers.callbacks import LogPreferencesCallback, epoch_of, first_examples
from prefopt_trl.trainers.policy import (
    adding_reference_adapter,
    check_model,
    check_policy,
    copy_adapter,
    init_kwargs,
    reference_for_trl,
)
from prefopt_trl.trainers.prepare import (
    Data,
    Datasets,
    TrainingData,
    are_prompts,
    check_pairs,
    check_prompts,
    check_text,
    splits,
    with_completions,
    with_sampled_logps,
)
from prefopt_trl.trainers.publishing import Published, check_repository

# TRL's private names; the contract test says what each must do
TESTED = "trl 1.15 to 1.16 with transformers 5.17 to 5.24"
FUNCTIONS = "create_model_from_path get_config_model_id use_adapter"  # of `trl.trainer.utils`
METHODS = (  # of `DPOTrainer`, overridden or called
    "_finish_current_push _get_output_dir _get_train_sampler _precompute_ref_logps _prepare_dataset "
    "_prepare_inputs _push_from_checkpoint _remove_unused_columns _save_checkpoint _set_signature_columns_if_needed"
)
# Of a trainer once it is constructed
ATTRIBUTES = "_metrics _signature_columns _total_train_tokens _tp_size aux_loss_enabled ref_model router_aux_loss_coef"


def require(owner: object, names: str) -> list[Any]:
    """Return the attributes of `owner` with these names, separated by spaces.

    Raises:
        ImportError: naming the attributes that are missing and the versions that work.
    """
    if missing := [name for name in names.split() if not hasattr(owner, name)]:
        raise ImportError(
            f"trl {version('trl')} with transformers {version('transformers')} has no {', '.join(missing)}, which "
            f"the trainers need. These work: {TESTED}. Install them, or a newer prefopt-trl."
        )
    return [getattr(owner, name) for name in names.split()]


Trial = Any  # of a hyperparameter search: `optuna.Trial`, which is not a dependency, or a dict

create_model_from_path, get_config_model_id, use_adapter = require(utils, FUNCTIONS)
require(DPOTrainer, METHODS)


class PreferenceTrainer(Published, DPOTrainer):
    """[`~trl.DPOTrainer`] whose models compute each prompt once, and which can sample what it learns from.

    Subclasses set `config_class` and the metadata of their model card (`_tag_names`, `_name`, `_paper`). The arguments
    are those of [`~trl.DPOTrainer`], and `ranker`.
    """

    config_class: type[PreferenceConfig]
    learns_from: str = "pairs"  # or "rankings"
    has_reference: bool = True  # where False, no second model is loaded or held
    has_own_loss: bool = False  # in place of TRL's losses on pairs
    rows_per_example: int = 2  # of logits, for pairs
    train_sampler: Sampler | None = None  # by default transformers chooses
    _reference_is_copied: bool = False
    args: Any  # an instance of `config_class`
    model: Any
    data_collator: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: PreferenceConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Data | None = None,
        eval_dataset: Data | DatasetDict | IterableDatasetDict | dict[str, Data] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        ranker: Ranker | None = None,
    ) -> None:
        check_policy(model, ref_model, peft_config, self.has_reference)
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = self.config_class(f"{model_id.split('/')[-1]}-{self._name}")
        elif not isinstance(args, self.config_class):
            raise TypeError(
                f"`args` must be {self.config_class.__name__}, got {type(args).__name__}. "
                "It takes the arguments of `DPOConfig` and a few more."
            )
        if processing_class is None:
            revision = init_kwargs(args).get("revision") if isinstance(model, str) else None
            processing_class = AutoProcessor.from_pretrained(
                model_id, revision=revision, trust_remote_code=args.trust_remote_code
            )
        tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
        if tokenizer.eos_token is None:
            raise ValueError(
                "`processing_class` has no EOS token, so completions could never learn to end. Set "
                "`tokenizer.eos_token` (and `tokenizer.pad_token`) to tokens of its vocabulary."
            )
        check_model(model, tokenizer, args)
        self.args = args  # the hooks below read it

        if ref_model is not None and not self.has_reference:
            raise ValueError(f"`ref_model` has no effect: {self._name} has no reference model. Leave it out.")
        if args.sampling == "online" and data_collator is not None:
            raise ValueError("`sampling='online'` collates batches itself. Leave `data_collator` out.")
        if compute_metrics is not None and self.learns_from == "rankings" and args.world_size > 1:
            raise ValueError(
                "`compute_metrics` gathers the logits of all rows, and rankings of different lengths have different "
                "numbers of rows on each process. Evaluate in one process, or leave it out."
            )
        if train_dataset is None:
            raise ValueError("`train_dataset` is required.")  # as in TRL
        datasets = splits(train_dataset, eval_dataset)
        self._check_data(datasets, ranker)
        if args.push_to_hub:
            check_repository(args)
        load = partial(load_policy, model if ref_model is None else ref_model, args, quantization_config)
        made = with_completions(datasets, self.learns_from, load, tokenizer, ranker, args)
        uses_ranker = args.samples_while_training or made["train"] is not train_dataset
        self.training_data = TrainingData.of(made["train"], ranker if uses_ranker else None)
        self.reference_given = None if ref_model is None else get_config_model_id(ref_model.config)
        self._preferences_log: LogPreferencesCallback | None = None
        if args.log_completions:
            examples = None if args.samples_while_training else first_examples(made["train"])
            self._preferences_log = LogPreferencesCallback(self, examples)
        reference: Any = torch.nn.Module()
        if self.has_reference:
            reference = reference_for_trl(model, ref_model, peft_config, args)
        with adding_reference_adapter(model):
            super().__init__(
                model=model,
                ref_model=reference,
                args=args,
                data_collator=data_collator,
                train_dataset=made["train"],
                eval_dataset={name: made[f"eval_{name}"] for name in eval_dataset}
                if isinstance(eval_dataset, dict)
                else made.get("eval"),
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        if reference is None and isinstance(model, PeftModel) and "ref" not in self.model.peft_config:
            raise ValueError(
                "This PEFT takes no second adapter with `target_parameters`, to be the reference model. Install "
                "peft>=0.20, or pass a `ref_model`."
            )
        if ref_model is None and args.precompute_ref_log_probs:
            self.ref_model = None  # as in TRL, which drops one that it has loaded
        require(self, ATTRIBUTES)
        self._set_up_models()
        if args.sampling == "online" or data_collator is None:
            self.data_collator = self._make_collator(tokenizer, ranker)
        self._set_up(tokenizer, ranker)
        if self._preferences_log is not None:
            self.add_callback(self._preferences_log)

    @property
    def ref_model(self) -> PreTrainedModel | None:
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: PreTrainedModel | None) -> None:
        # `DPOTrainer.__init__` loads a second copy of the weights unless it is given a reference model. A method
        # without a reference passes an empty module, which is dropped here. Remove once `DPOTrainer` has such losses.
        self._ref_model = model if self.has_reference else None

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Trial | None = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as [`~transformers.Trainer`] does. With True, resume from the last checkpoint that is complete.

        Raises:
            ValueError: for a checkpoint that was trained with other settings, another adapter or other data (64 rows
                are compared), or longer than this run, naming what differs; if no checkpoint is complete.
        """
        output_dir = self.args.output_dir
        checkpoint = last_checkpoint(output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if checkpoint:
            resuming.check_settings(checkpoint, self._settings())
            resuming.check_length(checkpoint, self.args)
            resuming.load_trained_adapter(checkpoint, self.model)
        with interruptible(partial(what_is_trained, output_dir, [] if checkpoint else checkpoints(output_dir))):
            return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Trial | None) -> None:
        if self.args.should_save:  # before the checkpoint is pushed
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            resuming.save_settings(folder, self._settings())
        super()._save_checkpoint(model, trial)

    def _settings(self) -> Settings:
        """Return the settings that a resumed run must share with the interrupted one."""
        dataset = self.train_dataset
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset)
        return resuming.training_settings(self._name, self.args, self.model, dataset, self.training_data.ranker)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        # transformers truncates what it gathers to the number of examples, but an example has several rows of logits.
        # Remove once `DPOTrainer` gathers both rows of a pair.
        self.gather_function = self._gather_rows
        return super().evaluation_loop(*args, **kwargs)

    def _gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Gather losses, one per example, or rows of logits, without the examples that pad the last batch."""
        if values.dim() == 1:
            return self.accelerator.gather_for_metrics(values)
        rows, state = self.accelerator.gather(values), self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        examples = torch.arange(len(rows) // self.rows_per_example, device=rows.device)
        is_kept = examples.view(self.accelerator.num_processes, 1, -1) < state.remainder
        return rows[is_kept.expand(-1, self.rows_per_example, -1).flatten()]  # each process has chosen rows first

    def get_train_dataloader(self) -> DataLoader:
        if not self.args.samples_while_training:
            return super().get_train_dataloader()
        # A dataloader prepares a batch before the previous step has ended: too early to sample from the policy
        collator, self.data_collator = self.data_collator, list
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """Return the batches of one step of the optimizer, with completions sampled from the current policy."""
        if self.state.global_step >= self.state.max_steps:  # resumed at its end: transformers trains on
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.samples_while_training:
            batches = [self._prepare_inputs(self._sample(examples)) for examples in batches]
            if self._preferences_log is not None and batches:
                self._preferences_log.batch = batches[-1]
        return batches, num_items

    def _sample(self, examples: list[Row]) -> dict[str, torch.Tensor]:
        """Sample completions of the examples' prompts and collate them."""
        self.data_collator.epoch = epoch_of(self.state)
        if self.args.sampling_policy == "current":  # DeepSpeed or FSDP may have wrapped it since `__init__`
            self.data_collator.policy = self.accelerator.unwrap_model(self.model)
        return self.data_collator(examples)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        return super()._get_train_sampler(train_dataset) if self.train_sampler is None else self.train_sampler

    def _check_data(self, datasets: Datasets, ranker: Ranker | None) -> None:
        """Refuse datasets and rankers before anything is sampled."""
        if ranker is not None:
            check_ranker(ranker)
        for name, dataset in datasets.items():
            if self.learns_from == "rankings":
                check_text(dataset, name)

    def _make_collator(self, tokenizer: PreTrainedTokenizerBase, ranker: Ranker | None) -> DataCollator:
        """Return the collator to use if the user passes none."""
        if self.args.sampling == "online":
            assert ranker is not None  # `with_completions` has refused it
            is_current = self.args.sampling_policy == "current"
            return DataCollatorForRejectionSampling(
                self.accelerator.unwrap_model(self.model if is_current else self.ref_model or self.model),
                tokenizer,
                ranker,
                while_sampling=contextlib.nullcontext if is_current else self._as_reference,
                seed=self.args.seed,
                **vars(SamplingOptions.of(self.args)),
                **collating_options(self.args),
            )
        if self.learns_from == "rankings":
            return DataCollatorForRanking(pad_token_id=tokenizer.pad_token_id, **collating_options(self.args))
        return self.data_collator  # TRL's

    def _set_up(self, tokenizer: PreTrainedTokenizerBase, ranker: Ranker | None) -> None:
        """Finish the construction of a subclass."""

    def _as_reference(self) -> contextlib.AbstractContextManager[None]:
        """Within, a PEFT model without `ref_model` is the reference: its adapter is off, or replaced by TRL's copy."""
        if self.ref_model is not None:
            return contextlib.nullcontext()
        model = self.accelerator.unwrap_model(self.model)
        return use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)

    def _prepare_dataset(self, dataset: Data, processing_class: Any, args: DPOConfig, dataset_name: str) -> Data:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        columns = columns_of(dataset, dataset_name)
        # With `sampling="online"`. Evaluation splits, one of which may be named "train" too, are sampled before.
        if dataset_name == "train" and are_prompts(columns, self.learns_from):
            return check_prompts(dataset, tokenizer, args.max_length)
        if self.learns_from == "rankings":
            are_pairs = {"chosen", "rejected"} <= set(columns) and "completions" not in columns
            return tokenize_rankings(
                pairs_to_rankings(dataset, f"the {dataset_name} dataset") if are_pairs else dataset,
                tokenizer,
                dataset_name,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                num_proc=args.dataset_num_proc,
            )
        check_pairs(dataset, dataset_name, columns, self.args.label_columns)
        dataset = normalize_pairs(dataset, f"the {dataset_name} dataset")
        if isinstance(processing_class, PreTrainedTokenizerBase) and num_appended_tokens(processing_class):
            processing_class = WithoutAppendedTokens(processing_class)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset):
            warn_of_full_prompts(len(dataset), len(prepared), dataset_name, args.max_length)
            check_tokens(prepared, columns, dataset_name)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns  # set by the call above
        own = ["completion_ids", "rewards", "row", "target_prompt_ids", "target_ids", *self.args.label_columns]
        own += self.train_dataset.column_names if self.args.sampling == "online" else []  # type: ignore[union-attr]
        columns += [column for column in own if column not in columns]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.args.keep_logps:
            return with_sampled_logps(dataset, name, self.args.max_length)
        self._set_up_models()  # `DPOTrainer.__init__` precomputes before it is done in ours
        if self.accelerator.num_processes > 1 and isinstance(dataset, Dataset) and not dataset.cache_files:
            # TRL's main process writes the values beside the dataset's file, and a dataset in memory has none. Remove
            # once `DPOTrainer` broadcasts the path. https://github.com/huggingface/trl/issues/6291
            folder = os.path.join(str(self.args.output_dir), "precomputed", name)
            if self.accelerator.is_main_process:
                dataset.save_to_disk(folder)
            self.accelerator.wait_for_everyone()
            dataset = Dataset.load_from_disk(folder)
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _record(self, metrics: dict[str, tuple[torch.Tensor, torch.Tensor]], attention_mask: torch.Tensor) -> None:
        """Log sums divided by counts, over all processes. The names must be the same on each process."""
        mode = "train" if self.model.training else "eval"
        pairs = [torch.stack([part.detach().float() for part in pair]) for pair in metrics.values()]
        pairs.append(torch.stack([attention_mask.sum().float()] * 2))
        *gathered, num_tokens = self.accelerator.gather(torch.stack(pairs)[None]).sum(dim=0).tolist()
        for name, (total, count) in zip(metrics, gathered, strict=True):
            if count:  # 0 if all rewards are equal, for example
                self._metrics[mode][name].append(total / count)
        if mode == "train":
            self._total_train_tokens += int(num_tokens[0]) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _set_up_models(self) -> None:
        """Complete TRL's copy of a trained adapter, once, and have the models compute each prompt once."""
        has_copy = isinstance(self.model, PeftModel) and "ref" in self.model.peft_config
        if self.has_reference and has_copy and not self._reference_is_copied:
            self._reference_is_copied = True  # `evaluate` of other data comes here too, when the adapter is trained
            copy_adapter(self.model)
            self.model.set_adapter("default")  # PEFT before 0.20 freezes it when a frozen adapter is added
        for wrapped in (self.model, self.ref_model):
            if wrapped is not None and (self.args.share_prefix or self.has_own_loss):
                model: Any = self.accelerator.unwrap_model(wrapped)
                if isinstance(model, PeftModel):
                    model = model.get_base_model()
                if hasattr(model.get_output_embeddings(), "token_adapter") and not self.has_own_loss:
                    raise ValueError(
                        "`trainable_token_indices` trains rows of the LM head, as the embeddings are tied, and TRL's "
                        "fused head does not read them. Train the whole head, with `modules_to_save=['lm_head']`."
                    )
                add_shared_prefix(model)


def collating_options(args: PreferenceConfig) -> dict[str, Any]:
    """Return the options that all collators share with TRL's `DataCollatorForPreference`, without the pad token."""
    return {name: getattr(args, name) for name in ("max_length", "truncation_mode", "pad_to_multiple_of")}


def load_policy(
    policy: Any, args: PreferenceConfig, quantization_config: BitsAndBytesConfig | None
) -> PreTrainedModel:
    """Return the policy before training, which RSO samples from, on the training device; load it if it is a path."""
    if isinstance(policy, str):
        kwargs = {"trust_remote_code": args.trust_remote_code, **init_kwargs(args)}
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type != DistributedType.NO:
            kwargs["device_map"] = None  # each process loads the policy onto its own device
        policy = create_model_from_path(policy, **kwargs)
    is_placed = getattr(policy, "hf_device_map", None) is not None or getattr(policy, "is_quantized", False)
    return policy if is_placed else policy.to(args.device)
