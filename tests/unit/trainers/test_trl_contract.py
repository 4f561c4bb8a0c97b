"""What `trainers/base.py` and `shared_prefix/forward.py` take for granted about TRL, beyond its documented names.

Where one of these fails after an upgrade, TRL has changed something private: the message says what, and where to mend
it.
"""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_state as fully_shard_state
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer, utils
from trl.trainer.dpo_trainer import DataCollatorForPreference

import prefopt_trl
from prefopt_trl.shared_prefix.attention import PrefixLayer
from prefopt_trl.shared_prefix.continuation import SegmentLayer
from prefopt_trl.shared_prefix.decoding import STATELESS, STATELESS_NAMES
from prefopt_trl.trainers.base import ATTRIBUTES, METHODS, PreferenceTrainer
from prefopt_trl.trainers.base import require as require_names
from prefopt_trl.trainers.base_config import REFERENCE_ARGUMENTS, TRL_LOSS_ARGUMENTS, PreferenceConfig

BASE = "prefopt_trl/trainers/base.py"
COMPLETIONS = "prefopt_trl/trainers/completions.py"
FORWARD = "prefopt_trl/shared_prefix/forward.py"
CONFIG = "prefopt_trl/trainers/rso_config.py"

PAIRS = {
    "prompt": ["The sky is", "Name a colour"],
    "chosen": [" blue today", ": red"],
    "rejected": [" green", ": seven of them"],
}
IDS = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 10, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
LABELS = torch.tensor([[-100, -100, 7, 8, 9], [-100, -100, 7, 10, -100]])
PER_TOKEN = {"log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask"}


def require(holds: bool, changed: str, where: str) -> None:
    """Fail with what changed in TRL and the file that relies on it."""
    if not holds:
        pytest.fail(f"TRL {trl.__version__} has changed: {changed}. Mend {where}.", pytrace=False)


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def make(trainer_class, model_dir, tmp_path, **given):
    own = ("precompute_ref_log_probs", "router_aux_loss_coef")
    settings = {name: given.pop(name) for name in own if name in given}
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, report_to="none", **settings)
    return trainer_class(model_dir, args=args, train_dataset=Dataset.from_dict(PAIRS), **given)


@pytest.mark.parametrize(
    ("function", "expected", "where"),
    [
        (
            DPOTrainer._prepare_dataset,
            ["self", "dataset", "processing_class", "args", "dataset_name"],
            f"PreferenceTrainer._prepare_dataset in {BASE}",
        ),
        (
            DPOTrainer._precompute_ref_logps,
            ["self", "dataset", "name", "batch_size"],
            f"PreferenceTrainer._precompute_ref_logps in {BASE}",
        ),
        (
            DPOTrainer.__init__,
            parameters(PreferenceTrainer.__init__)[:-1],  # all but `ranker`
            f"PreferenceTrainer.__init__ in {BASE}",
        ),
        (
            utils.create_model_from_path,
            ["model_id", "architecture", "kwargs"],
            f"load_policy in {BASE}",
        ),
        (utils.get_config_model_id, ["config"], f"PreferenceTrainer.__init__ in {BASE}"),
        (
            DPOTrainer.compute_loss,
            ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
            f"CompletionTrainer.compute_loss in {COMPLETIONS}",
        ),
        (utils.use_adapter, ["model", "adapter_name"], f"PreferenceTrainer._as_reference in {BASE}"),
        (
            DPOTrainer._set_signature_columns_if_needed,
            ["self"],
            f"PreferenceTrainer._set_signature_columns_if_needed in {BASE}",
        ),
        # Of transformers' Trainer
        (
            DPOTrainer.get_batch_samples,
            ["self", "epoch_iterator", "num_batches", "device"],
            f"PreferenceTrainer.get_batch_samples in {BASE}",
        ),
        (DPOTrainer._get_train_sampler, ["self", "train_dataset"], f"PreferenceTrainer in {BASE}"),
        (DPOTrainer._save_checkpoint, ["self", "model", "trial"], f"PreferenceTrainer in {BASE}"),
        (DPOTrainer._get_output_dir, ["self", "trial"], f"PreferenceTrainer in {BASE}"),
        (DPOTrainer._remove_unused_columns, ["self", "dataset", "description"], f"PreferenceTrainer in {BASE}"),
        (DPOTrainer._push_from_checkpoint, ["self", "checkpoint_folder"], "Published in trainers/publishing.py"),
        (DPOTrainer._finish_current_push, ["self"], "Published in trainers/publishing.py"),
        (DPOTrainer.save_model, ["self", "output_dir", "_internal_call"], "Published in trainers/publishing.py"),
        (
            DPOTrainer.create_model_card,
            ["self", "model_name", "dataset_name", "tags"],
            "Published in trainers/publishing.py",
        ),
    ],
)
def test_the_signatures_we_override_or_call(function, expected, where):
    found = parameters(function)
    require(found == expected, f"{function.__qualname__} takes {found}, was {expected}", where)


def test_the_metadata_of_a_model_card():
    for name in ("_tag_names", "_name", "_paper"):
        require(hasattr(DPOTrainer, name), f"DPOTrainer has no `{name}`", f"RSOTrainer's, and its use in {BASE}")
    found = set(DPOTrainer._paper)
    require(found == {"title", "id", "citation"}, f"`_paper` has the keys {found}", "RSOTrainer._paper")


def test_what_the_constructor_calls_and_sets(tiny_llama_dir, tmp_path):
    calls = []

    class Recorder(DPOTrainer):
        def _prepare_dataset(self, *args, **kwargs):
            calls.append(("prepare", args[-1], kwargs))
            return super()._prepare_dataset(*args, **kwargs)

        def _precompute_ref_logps(self, *args, **kwargs):
            fused = hasattr(self.model.forward, "__wrapped__")
            calls.append(("precompute", args[1], kwargs, fused, self.ref_model))
            return super()._precompute_ref_logps(*args, **kwargs)

    eval_dataset = {"other": Dataset.from_dict(PAIRS)}
    trainer = make(Recorder, tiny_llama_dir, tmp_path, eval_dataset=eval_dataset, precompute_ref_log_probs=True)
    expected = [
        ("prepare", "train", {}),
        ("prepare", "other", {}),
        ("precompute", "train", {}, True, None),
        ("precompute", "other", {}, True, None),
    ]
    require(
        calls == expected,
        f"DPOTrainer.__init__ prepares and precomputes by {calls}, was {expected}: each split is prepared, then the "
        "LM head fused, then the reference log-probs computed with the policy itself",
        f"_prepare_dataset, _precompute_ref_logps and _share_prefixes in {BASE}",
    )
    for name in ("model", "ref_model", "args", "accelerator"):
        require(hasattr(trainer, name), f"DPOTrainer has no `{name}`", f"_share_prefixes in {BASE}")


def test_both_models_have_the_fused_head_once_constructed(tiny_llama_dir, tmp_path):
    trainer = make(DPOTrainer, tiny_llama_dir, tmp_path)
    for name in ("model", "ref_model"):
        model = trainer.accelerator.unwrap_model(getattr(trainer, name))
        require(
            "forward" in vars(model),
            f"DPOTrainer's `{name}` has no forward of its own, where add_fused_lm_head put one",
            f"_share_prefixes in {BASE} and {FORWARD}",
        )
    trainer = make(DPOTrainer, tiny_llama_dir, tmp_path, peft_config=LoraConfig(target_modules=["q_proj"]))
    require(
        "forward" in vars(trainer.model.get_base_model()) and trainer.ref_model is None,
        "under PEFT the fused LM head is not on the base model, or there is a second reference model",
        f"_share_prefixes in {BASE}",
    )


@pytest.fixture
def fused_model(tiny_llama_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    return model


@pytest.mark.parametrize("shifted", [False, True])
def test_the_fused_head_returns_per_token_values_and_a_loss(fused_model, shifted):
    labels = {"shift_labels": LABELS} if shifted else {"labels": LABELS}
    try:
        outputs = fused_model(input_ids=IDS, attention_mask=MASK, use_cache=False, fused_lm_head=True, **labels)
    except TypeError as error:
        require(False, f"the fused forward does not take these arguments ({error})", f"add_shared_prefix in {FORWARD}")
    found = set(outputs.keys())
    require(
        found == PER_TOKEN | {"loss"},
        f"the fused forward returns {found}, was {PER_TOKEN | {'loss'}}: all but `loss` are unpacked per token",
        f"the last line of add_shared_prefix in {FORWARD}",
    )
    shape = (2, 5) if shifted else (2, 4)
    for name in PER_TOKEN:
        require(
            outputs[name].shape == shape,
            f"`{name}` of the fused forward has shape {tuple(outputs[name].shape)}, was {shape} with {list(labels)}",
            f"add_shared_prefix in {FORWARD}",
        )
    asked = (LABELS if shifted else LABELS[:, 1:]) != -100
    require(
        all(not outputs[name][~asked].any() for name in PER_TOKEN),
        "the fused forward has values other than zero where the label is -100",
        "PackedBatch.unpack in prefopt_trl/shared_prefix/packing.py",
    )


def test_shifted_labels_are_scored_where_they_stand(fused_model):
    logits = AutoModelForCausalLM.from_pretrained(fused_model.name_or_path)(input_ids=IDS).logits
    shift_labels = torch.tensor([[-100, 7, 8, 9, 11], [12, 7, 10, -100, -100]])
    outputs = fused_model(input_ids=IDS, attention_mask=MASK, shift_labels=shift_labels, fused_lm_head=True)
    expected = logits.log_softmax(-1).gather(2, shift_labels.clamp(min=0)[:, :, None]).squeeze(2)
    require(
        torch.allclose(outputs.log_probs, expected.masked_fill(shift_labels == -100, 0), atol=1e-5),
        "`shift_labels[i, t]` is not what position t is scored on",
        f"add_shared_prefix in {FORWARD}",
    )


def test_without_the_switch_the_forward_is_the_models_own(fused_model):
    plain = AutoModelForCausalLM.from_pretrained(fused_model.name_or_path)
    found, expected = fused_model(input_ids=IDS, labels=LABELS), plain(input_ids=IDS, labels=LABELS)
    require(
        torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss),
        "a model with the fused LM head no longer runs its own forward without `fused_lm_head=True`",
        f"add_shared_prefix in {FORWARD}",
    )


def test_the_batch_has_chosen_rows_then_rejected_rows_padded_on_the_right():
    collator = DataCollatorForPreference(pad_token_id=0)
    batch = collator(
        [
            {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
            {"prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
        ]
    )
    found = {name: rows.tolist() for name, rows in batch.items()}
    expected = {
        "input_ids": [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]],
        "completion_mask": [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]],
    }
    require(
        found == expected,
        f"DataCollatorForPreference makes {found}, was {expected}",
        "pair_groups in prefopt_trl/shared_prefix/packing.py and _can_share in prefopt_trl/shared_prefix/forward.py",
    )


@pytest.mark.parametrize("fine_tuning", ["full", "LoRA"])
@pytest.mark.parametrize("precompute", [False, True])
def test_the_models_are_called_with_these_arguments_alone(
    fine_tuning, precompute, tiny_llama_dir, tmp_path, monkeypatch
):
    calls = []

    def recording(model, *args, **kwargs):
        add_fused_lm_head(model, *args, **kwargs)
        forward = model.forward

        def record(*args, **kwargs):
            calls.append((len(args), {name for name, value in kwargs.items() if value is not None}))
            return forward(*args, **kwargs)

        model.forward = record

    add_fused_lm_head = utils.add_fused_lm_head
    monkeypatch.setattr("trl.trainer.dpo_trainer.add_fused_lm_head", recording)
    peft_config = LoraConfig(target_modules=["q_proj"]) if fine_tuning == "LoRA" else None
    trainer = make(DPOTrainer, tiny_llama_dir, tmp_path, precompute_ref_log_probs=precompute, peft_config=peft_config)
    trainer.train()
    expected = (0, {"input_ids", "attention_mask", "use_cache", "labels", "fused_lm_head"})
    require(
        len(calls) == 2 and all(call == expected for call in calls),
        f"in one step DPOTrainer calls its models with {calls} (positional arguments, names), was twice {expected}",
        f"ROWS and SETTINGS in {FORWARD}, without which no prompt is shared",
    )


def test_the_names_of_the_losses():
    field = {field.name: field for field in dataclasses.fields(DPOConfig)}["loss_type"]
    require(
        all(f"'{name}'" in field.metadata["help"] for name in ("sigmoid", "hinge", "sigmoid_norm")),
        "DPOConfig.loss_type no longer names 'sigmoid', 'hinge' and 'sigmoid_norm'",
        f"LOSS_NAMES in {CONFIG}, or the warning of RSOConfig about 'sigmoid_norm'",
    )


# What `CompletionTrainer` and the trainers without a reference model rely on

COMPLETION_TRAINER = f"CompletionTrainer in {COMPLETIONS}"


def test_an_empty_reference_model_is_only_assigned(tiny_llama_dir, tmp_path, monkeypatch):
    loaded, load = [], utils.create_model_from_path

    def recording(*args, **kwargs):
        loaded.append(args)
        return load(*args, **kwargs)

    class WithoutReference(DPOTrainer):
        ref_model = property(lambda self: None, lambda self, model: None)

    monkeypatch.setattr(dpo_trainer, "create_model_from_path", recording)
    try:
        make(WithoutReference, tiny_llama_dir, tmp_path, ref_model=torch.nn.Module())
    except (AttributeError, TypeError) as error:
        require(
            False,
            f"DPOTrainer.__init__ reads the `ref_model` it is given, beside setting `self.ref_model` ({error})",
            f"PreferenceTrainer.ref_model in {BASE}, by which SLiC, PRO and RRHF hold one model",
        )
    require(
        len(loaded) == 1,
        f"DPOTrainer.__init__ loads {len(loaded)} models with a `ref_model`, was the policy alone",
        f"PreferenceTrainer.__init__ in {BASE}, without which SLiC, PRO and RRHF hold two models",
    )


def test_where_the_metrics_are_kept(tiny_llama_dir, tmp_path):
    trainer = make(DPOTrainer, tiny_llama_dir, tmp_path)
    for name, expected in (("_metrics", {"train": {}, "eval": {}}), ("_total_train_tokens", 0), ("_tp_size", 1)):
        found = getattr(trainer, name, None)
        require(found == expected, f"`{name}` begins as {found}, was {expected}", f"_record in {BASE}")
    logged = []
    trainer.log = lambda logs, start_time=None: logged.append(logs) or DPOTrainer.log(trainer, logs, start_time)
    for mode, training in (("train", True), ("eval", False)):
        trainer.model.train(training)
        trainer._metrics[mode]["loss/ranking"] += [1.0, 4.0]
        trainer._metrics[mode]["num_tokens"] = [7]
        trainer.log({})
    expected = [{"loss/ranking": 2.5, "num_tokens": 7.0}, {"eval_loss/ranking": 2.5, "eval_num_tokens": 7.0}]
    found = [{name: value for name, value in logs.items() if "ranking" in name or "tokens" in name} for logs in logged]
    require(found == expected, f"what is in `_metrics` is logged as {found}, was {expected}", f"_record in {BASE}")
    require(
        all(not metrics for metrics in trainer._metrics.values()),
        "`log` no longer empties `_metrics`",
        f"_record in {BASE}",
    )


def test_the_tokens_of_training_are_counted(tiny_llama_dir, tmp_path):
    trainer = make(DPOTrainer, tiny_llama_dir, tmp_path)
    trainer.train()
    rows = [trainer.data_collator([row])["attention_mask"].sum().item() for row in trainer.train_dataset]
    require(
        trainer._total_train_tokens == sum(rows),
        f"`_total_train_tokens` is {trainer._total_train_tokens} after a step on {sum(rows)} tokens",
        f"_record in {BASE}",
    )


def mixtral(tokenizer_dir):
    config = LlamaConfig.from_pretrained(tokenizer_dir)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
            router_aux_loss_coef=0.25,
            sliding_window=None,
        )
    )


@pytest.mark.parametrize(("given", "coefficient"), [({}, 0.25), ({"router_aux_loss_coef": 0.0}, 0.0)])
def test_the_auxiliary_loss_of_experts(given, coefficient, tiny_llama_dir, tmp_path):
    mixtral(tiny_llama_dir).save_pretrained(tmp_path / "mixtral")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")
    tokenizer = {"processing_class": dpo_trainer.AutoProcessor.from_pretrained(tiny_llama_dir)}
    trainer = make(DPOTrainer, model, tmp_path, **tokenizer, **given)
    found = (trainer.aux_loss_enabled, trainer.router_aux_loss_coef)
    expected = (coefficient > 0, coefficient)
    require(
        found == expected,
        f"`aux_loss_enabled` and `router_aux_loss_coef` are {found} for {given}, were {expected}",
        f"CompletionTrainer.compute_loss in {COMPLETIONS}",
    )
    outputs = trainer.model(
        input_ids=IDS,
        attention_mask=MASK,
        labels=LABELS,
        output_router_logits=True,
        fused_lm_head=True,
    )
    require(
        getattr(outputs, "aux_loss", None) is not None and outputs.aux_loss.dim() == 0,
        "with `output_router_logits=True` the fused forward has no scalar `aux_loss`",
        f"CompletionTrainer.compute_loss in {COMPLETIONS}",
    )


def test_a_dense_model_has_no_auxiliary_loss(tiny_llama_dir, tmp_path):
    trainer = make(DPOTrainer, tiny_llama_dir, tmp_path)
    require(trainer.aux_loss_enabled is False, "`aux_loss_enabled` is not False for a LLaMA", COMPLETION_TRAINER)


def test_adapters_are_switched_off_and_back(tiny_llama_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        expected = base(IDS).logits
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    model.add_adapter("ref", config)
    with torch.no_grad():
        adapted = model(IDS).logits
        with utils.use_adapter(model, adapter_name=None):
            off = model(IDS).logits
        with utils.use_adapter(model, adapter_name="ref"):
            other, active = model(IDS).logits, model.active_adapter
        back = model(IDS).logits
    holds = torch.equal(off, expected) and torch.equal(back, adapted) and active == "ref"
    require(
        holds and not torch.allclose(other, adapted) and not torch.allclose(off, adapted),
        "use_adapter(model, adapter_name) no longer switches adapters off (None) or to the one named, and back",
        f"PreferenceTrainer._as_reference in {BASE}",
    )


def test_a_pretrained_adapter_is_copied_under_the_name_ref(tiny_llama_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    trainer = make(DPOTrainer, model, tmp_path)
    found = list(trainer.model.peft_config)
    require(
        found == ["default", "ref"],
        f"the adapters of a PEFT model are {found} once constructed, were ['default', 'ref']",
        f"PreferenceTrainer.__init__ and _as_reference in {BASE}",
    )


def test_the_columns_that_are_kept(tiny_llama_dir, tmp_path):
    trainer = make(DPOTrainer, tiny_llama_dir, tmp_path)
    trainer._signature_columns = None
    trainer._set_signature_columns_if_needed()
    found = trainer._signature_columns
    expected = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
    require(
        found == expected and isinstance(found, list),
        f"`_signature_columns` is {found}, was {expected}, a list",
        f"PreferenceTrainer._set_signature_columns_if_needed in {BASE}",
    )
    trainer._signature_columns += ["completion_ids"]
    trainer._set_signature_columns_if_needed()
    require(
        trainer._signature_columns.count("completion_ids") == 1 and len(trainer._signature_columns) == 6,
        "`_set_signature_columns_if_needed` no longer leaves columns that are set as they are",
        f"PreferenceTrainer._set_signature_columns_if_needed in {BASE}",
    )


ARGUMENTS = "prefopt_trl/trainers/base_config.py"
# Arguments of DPOConfig's own that mean the same in every trainer
IN_ALL_TRAINERS = {
    "activation_offloading",
    "bf16",
    "dataset_num_proc",
    "disable_dropout",
    "gradient_checkpointing",
    "learning_rate",
    "logging_steps",
    "max_length",
    "model_init_kwargs",
    "pad_to_multiple_of",
    "pad_token",
    "padding_free",
    "router_aux_loss_coef",
    "truncation_mode",
    "trust_remote_code",
}


def test_every_argument_of_trls_config_is_known_to_have_an_effect_or_none():
    own = {name for name in DPOConfig.__annotations__ if not name.startswith("_")}
    known = IN_ALL_TRAINERS | set(TRL_LOSS_ARGUMENTS) | set(REFERENCE_ARGUMENTS) | {"loss_type"}
    require(
        own <= known,
        f"DPOConfig has the arguments {sorted(own - known)}, which may have no effect in the trainers with losses of "
        "their own",
        f"the lists in {ARGUMENTS}, or IN_ALL_TRAINERS in this file",
    )
    gone = {*TRL_LOSS_ARGUMENTS, *REFERENCE_ARGUMENTS} - {field.name for field in dataclasses.fields(PreferenceConfig)}
    require(not gone, f"DPOConfig has no longer the arguments {sorted(gone)}", f"the lists in {ARGUMENTS}")


def test_a_missing_pad_token_is_set(tiny_llama_dir, tokenizer, tmp_path):
    tokenizer.pad_token = None
    make(DPOTrainer, tiny_llama_dir, tmp_path, processing_class=tokenizer)
    require(
        tokenizer.pad_token == tokenizer.eos_token,
        f"a tokenizer without a pad token is left with {tokenizer.pad_token!r}, was EOS",
        f"_make_collator in {BASE}",
    )


# What is used of the libraries below TRL


def imports_of_submodules() -> list[tuple[str, str, str]]:
    """Module, name and file of all that the package imports from below the top of these libraries."""
    found = set()
    for file in Path(prefopt_trl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and re.match(
                r"(trl|transformers|accelerate|peft|datasets)\.", node.module
            ):
                found |= {(node.module, name.name, "/".join(file.parts[-2:])) for name in node.names}
    return sorted(found)


@pytest.mark.parametrize(("module", "name", "file"), imports_of_submodules())
def test_what_is_imported_from_submodules_is_there(module, name, file):
    require(hasattr(importlib.import_module(module), name), f"`{module}` has no `{name}`", f"prefopt_trl/{file}")


def test_what_sharing_needs_of_transformers():
    where = "prefopt_trl/shared_prefix"
    missing = set(STATELESS_NAMES.split()) - {part.__name__ for part in STATELESS}
    require(not missing, f"transformers has no {missing}", f"STATELESS_NAMES in {where}/decoding.py")
    for layer in (PrefixLayer, SegmentLayer):
        left = layer.__abstractmethods__
        require(not left, f"layers of a cache have further methods, {set(left)}", f"{layer.__name__} in {where}")
    config = LlamaConfig(attn_implementation="sdpa")
    names = (config._attn_implementation_internal, config._attn_implementation)
    require(names == ("sdpa", "sdpa"), f"a config holds its attention as {names}", f"attend_to_prefix in {where}")
    require(transformers.MambaForCausalLM._is_stateful, "Mamba has no `_is_stateful`", f"support.py in {where}")


def test_what_is_used_of_other_objects():
    state = getattr(fully_shard_state, "FSDPState", None)
    holds = hasattr(FSDPModule, "_get_fsdp_state") and hasattr(state, "_lazy_init")
    require(holds, "FSDP2 has no `_get_fsdp_state()._lazy_init()`", "prefopt_trl/runtime/processes.py")


def test_a_missing_name_is_one_sentence_with_the_versions_that_work():
    require_names(DPOTrainer, METHODS)
    match = rf"^trl {trl.__version__} with .* has no _metrics, _tp_size, which .* These work: trl 1.15 to 1.16 with"
    with pytest.raises(ImportError, match=match):
        require_names(DPOTrainer, "_prepare_dataset _metrics _tp_size")


def test_the_constructor_sets_what_is_read_later(tiny_llama_dir, tmp_path):
    require_names(make(DPOTrainer, tiny_llama_dir, tmp_path), ATTRIBUTES)
