"""What every trainer shares: TRL's `DPOTrainer` with prompts computed once. The only file that imports TRL's
private names."""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
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
from prefopt_trl.trainers.base_config import PreferenceConfig
from prefopt_trl.trainers.callbacks import LogPreferencesCallback, epoch_of, first_examples
from prefopt_trl.trainers.policy import (
    adding_reference_adapter,
    check_model,
    check_policy,
    copy_adapter,
    reference_for_trl,
)
from prefopt_trl.trainers.prepare import (
    Datasets,
    TrainingData,
    are_prompts,
    check_prompts,
    check_text,
    splits,
    with_completions,
    with_sampled_logps,
)
from prefopt_trl.trainers.publishing import Published, check_repository
from prefopt_trl.trainers.resuming import check_length, check_settings, save_settings, training_settings

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
    rows_per_example: int = 2  # of logits, where it learns from pairs
    train_sampler: Sampler | None = None  # the order of the training data, in place of that of transformers
    _has_reference_adapter: bool = False
    args: Any  # an instance of `config_class`
    model: Any
    data_collator: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: PreferenceConfig | None = None,
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
            raise ValueError("`train_dataset` is required.")  # as by TRL
        datasets = splits(train_dataset, eval_dataset)
        self._check_data(datasets, ranker)
        if args.push_to_hub:
            check_repository(args)
        load = partial(load_policy, model if ref_model is None else ref_model, args, quantization_config)
        made = with_completions(datasets, self.learns_from, load, tokenizer, ranker, args)
        uses_ranker = args.samples_while_training or made["train"] is not train_dataset
        self.training_data = TrainingData.of(made["train"], ranker if uses_ranker else None)
        self.reference_given = None if ref_model is None else get_config_model_id(ref_model.config)
        self._preferences_log = None
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
        needs_adapter = reference is None and isinstance(model, PeftModel)
        if needs_adapter and "ref" not in self.model.peft_config:
            raise ValueError(
                "This PEFT takes no second adapter with `target_parameters`, to be the reference model. Install "
                "peft>=0.20, or pass a `ref_model`."
            )
        if ref_model is None and args.precompute_ref_log_probs:
            self.ref_model = None  # as TRL lets go of one that it has loaded
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
        # `DPOTrainer.__init__` loads a second copy of the weights unless it is given a reference model. So a method
        # without one gives it an empty module, which is not kept. May go once `DPOTrainer` takes such losses.
        self._ref_model = model if self.has_reference else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as [`~transformers.Trainer`] does. With True, resume from the last checkpoint that is complete.

        Raises:
            ValueError: for a checkpoint that was trained with other settings, another adapter or other data, or longer
                than this run, naming them; if there is no whole one.
        """
        output_dir = self.args.output_dir
        checkpoint = last_checkpoint(output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if checkpoint:
            check_settings(checkpoint, self._settings())
            check_length(checkpoint, self.args)
        before = [] if checkpoint else checkpoints(output_dir)
        with interruptible(partial(what_is_trained, output_dir, before)):
            return super().train(checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.args.should_save:  # first, so that they are there when the checkpoint is pushed
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            save_settings(folder, self._settings())
        super()._save_checkpoint(model, trial)

    def _settings(self) -> Settings:
        """Return what a run must have in common with the one that it resumes."""
        dataset: Any = self.train_dataset
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset)
        return training_settings(self._name, self.args, self.model, dataset)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # It cuts what it gathers to the number of examples, and an example of ours or of TRL's has several rows of
        # logits. May go once `DPOTrainer` gathers both rows of a pair.
        self.gather_function = self._gather_rows
        return super().evaluation_loop(*args, **kwargs)

    def _gather_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Gather losses, one per example, or rows of logits, without those of examples that fill up the last batch."""
        if values.dim() == 1:
            return self.accelerator.gather_for_metrics(values)
        rows, state = self.accelerator.gather(values), self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        examples = torch.arange(len(rows) // self.rows_per_example, device=rows.device)
        is_own = examples.view(self.accelerator.num_processes, 1, -1) < state.remainder
        return rows[is_own.expand(-1, self.rows_per_example, -1).flatten()]  # of each process chosen rows first

    def get_train_dataloader(self) -> DataLoader:
        if not self.args.samples_while_training:
            return super().get_train_dataloader()
        # A dataloader makes a batch while the one before it is trained on: too early to sample from the policy
        collator, self.data_collator = self.data_collator, list
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of one step of the optimizer. What is sampled for them is sampled now."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.samples_while_training:
            batches = [self._prepare_inputs(self._sample(examples)) for examples in batches]
            if self._preferences_log is not None and batches:
                self._preferences_log.batch = batches[-1]
        return batches, num_items

    def _sample(self, examples: list[Row]) -> dict[str, torch.Tensor]:
        """Sample completions of the examples' prompts and collate them."""
        self.data_collator.epoch = epoch_of(self.state)
        if self.args.sampling_policy == "current":  # an engine may have wrapped it since the construction
            self.data_collator.policy = self.accelerator.unwrap_model(self.model)
        return self.data_collator(examples)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        return super()._get_train_sampler(train_dataset) if self.train_sampler is None else self.train_sampler

    def _check_data(self, datasets: Datasets, ranker: Ranker | None) -> None:
        """Refuse datasets and rankers before anything is sampled."""
        if ranker is not None:
            check_ranker(ranker)
        for name, dataset in datasets.items():
            if self.learns_from == "rankings":
                check_text(dataset, name)

    def _make_collator(self, tokenizer: PreTrainedTokenizerBase, ranker: Ranker | None) -> Any:
        """Return the collator in place of a user's own."""
        if self.args.sampling == "online":
            assert ranker is not None  # `with_completions` has refused it
            policy: Any = self.model
            context: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
            if self.args.sampling_policy == "reference" and self.ref_model is None:
                context = self._reference_adapter
            elif self.args.sampling_policy == "reference":
                policy = self.ref_model
            return DataCollatorForRejectionSampling(
                self.accelerator.unwrap_model(policy),
                tokenizer,
                ranker,
                while_sampling=context,
                seed=self.args.seed,
                **vars(SamplingOptions.of(self.args)),
                **collating_options(self.args),
            )
        if self.learns_from == "rankings":
            return DataCollatorForRanking(pad_token_id=tokenizer.pad_token_id, **collating_options(self.args))
        return self.data_collator  # TRL's

    def _set_up(self, tokenizer: PreTrainedTokenizerBase, ranker: Ranker | None) -> None:
        """Do what is left to do at the end of the construction."""

    def _reference_adapter(self) -> contextlib.AbstractContextManager[None]:
        """While entered, a PEFT model is the reference model: its adapter is off, or TRL's copy of it in its place."""
        model = self.accelerator.unwrap_model(self.model)
        return use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: Any,
        args: DPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        columns = columns_of(dataset, dataset_name)
        # With `sampling="online"`; a split for evaluation, which may be called "train" too, was sampled before
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
        missing = [column for column in ("chosen", "rejected") if column not in columns]
        if missing:
            raise ValueError(
                f"The {dataset_name} dataset has no column {' and no column '.join(map(repr, missing))}; it has "
                f"{columns}. Preference data have `prompt`, `chosen` and `rejected`, and data to be sampled have "
                "`prompt`, need a `ranker`, and are given to the trainer when it is made: rename yours with "
                "`dataset.rename_column(old, new)`."
            )
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
        columns: Any = self._signature_columns
        own = ["completion_ids", "rewards", "row", "target_prompt_ids", "target_ids"]
        own += ["prompt", "tools", "chat_template_kwargs"] if self.args.sampling == "online" else []
        columns += [column for column in own if column not in columns]

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.args.keep_logps:
            return with_sampled_logps(dataset, name, self.args.max_length)
        self._set_up_models()  # called by DPOTrainer.__init__, before ours ends
        if self.accelerator.num_processes > 1 and isinstance(dataset, Dataset) and not dataset.cache_files:
            # TRL's main process hands the values over in a file beside the dataset's own, and a dataset in memory has
            # none that the others see. May go once `DPOTrainer` tells them the file.
            folder = os.path.join(str(self.args.output_dir), "precomputed", name)
            if self.accelerator.is_main_process:
                dataset.save_to_disk(folder)
            self.accelerator.wait_for_everyone()
            dataset = Dataset.load_from_disk(folder)
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _record(self, metrics: dict[str, tuple[torch.Tensor, torch.Tensor]], attention_mask: torch.Tensor) -> None:
        """Log sums over counts, over all processes; the names, and so what is gathered, are the same on each."""
        mode = "train" if self.model.training else "eval"
        pairs = [torch.stack([part.detach().float() for part in pair]) for pair in metrics.values()]
        pairs.append(torch.stack([attention_mask.sum().float()] * 2))
        *gathered, num_tokens = self.accelerator.gather(torch.stack(pairs)[None]).sum(dim=0).tolist()
        for name, (total, count) in zip(metrics, gathered, strict=True):
            if count:  # there may be nothing to compare, such as rewards that are not all equal
                self._metrics[mode][name].append(total / count)
        if mode == "train":
            self._total_train_tokens += int(num_tokens[0]) // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def _set_up_models(self) -> None:
        """Complete TRL's copy of a trained adapter, once, and have the models compute each prompt once."""
        if self.has_reference and not self._has_reference_adapter and isinstance(self.model, PeftModel):
            self._has_reference_adapter = "ref" in self.model.peft_config
            if self._has_reference_adapter:
                copy_adapter(self.model)
                self.model.set_adapter("default")  # before 0.20 PEFT freezes it beside an adapter that is not trained
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
    """Return the options of TRL's `DataCollatorForPreference`, which all collators have, but for the pad token."""
    return {name: getattr(args, name) for name in ("max_length", "truncation_mode", "pad_to_multiple_of")}


def load_policy(policy: Any, args: Any, quantization_config: BitsAndBytesConfig | None) -> Any:
    """Return the policy before training, loaded if it is a path, on the training device: what RSO samples from."""
    if isinstance(policy, str):
        kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type != DistributedType.NO:
            kwargs["device_map"] = None  # not over the devices of all the processes, which each have a policy
        policy = create_model_from_path(policy, **kwargs)
    if getattr(policy, "hf_device_map", None) is None and not getattr(policy, "is_quantized", False):
        policy = policy.to(args.device)
    return policy
