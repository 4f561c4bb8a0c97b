import copy
import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from prefopt_trl import SamplingOptions, losses
from prefopt_trl.generation.sampler import sample_completions
from prefopt_trl.rankers import FunctionRanker
from prefopt_trl.sampling.shards import shard_seed
from prefopt_trl.shared_prefix.scoring import completion_logps
from prefopt_trl.trainers.rso_config import RSOConfig
from prefopt_trl.trainers.rso_trainer import RSOTrainer
from tests.unit.known_rankers import brevity

PAIRS = {
    "prompt": ["The capital of France is", "Tell me how to bake bread.", "Why?", "The dog"],
    "chosen": [" Paris.", " Mix the flour and the water, then wait.", " Because it is so.", " sleeps"],
    "rejected": [" the quick brown fox.", " No.", " I will not say, whatever you ask.", " jumps over the lazy fox"],
}
PROMPTS = {"prompt": ["The capital of", "Tell me how", "The quick brown fox jumps over", "What is", "Mix", "The lazy"]}
# 6 candidates, 4 kept, so 2 pairs per prompt
SAMPLING = {"num_candidates": 6, "num_samples": 4, "max_new_tokens": 6, "generation_batch_size": 36}


@pytest.fixture
def pairs() -> Dataset:
    return Dataset.from_dict(PAIRS)


@pytest.fixture
def prompts() -> Dataset:
    return Dataset.from_dict(PROMPTS)


@pytest.fixture
def generate_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry per call of any model's `generate`."""
    calls: list[int] = []
    generate = LlamaForCausalLM.generate

    def counting(self, *args, **kwargs):
        calls.append(1)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", counting)
    return calls


def message_brevity(prompts, completions, **kwargs):
    return [-float(len(completion[0]["content"])) for completion in completions]


def config(output_dir: Path, **given) -> RSOConfig:
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **given,
    }
    return RSOConfig(str(output_dir), **settings)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("prefopt_trl")]


# The loss


def naive_logps(model, tokenizer, prompt: str, completion: str) -> torch.Tensor:
    """Log-probability of a completion and EOS, in float64, from the logits of one row without padding."""
    num_prompt_tokens = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor(tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"])
    logits = model.double()(ids[None]).logits[0]
    places = range(num_prompt_tokens, len(ids))
    return sum(logits[place - 1].log_softmax(-1)[ids[place]] for place in places)


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize(
    ("loss_type", "equation"), [("sigmoid-norm", losses.sigmoid_norm), ("hinge-norm", losses.hinge_norm)]
)
def test_a_training_step_minimises_the_papers_equation(
    loss_type, equation, share_prefix, pairs, policy_dir, tiny_llama_dir, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (policy_dir, tiny_llama_dir))
    with torch.no_grad():
        logratios = torch.stack(
            [
                naive_logps(policy, tokenizer, row["prompt"], row[column])
                - naive_logps(reference, tokenizer, row["prompt"], row[column])
                for row in pairs
                for column in ("chosen", "rejected")
            ]
        ).view(4, 2)
    gamma = 0.1
    assert logratios.dtype == torch.float64 and (gamma * logratios.diff()).abs().max() > 0.5
    trainer = RSOTrainer(
        policy_dir,
        ref_model=AutoModelForCausalLM.from_pretrained(tiny_llama_dir),
        args=config(tmp_path, gamma=gamma, loss_type=loss_type, share_prefix=share_prefix),
        train_dataset=pairs,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(equation(logratios, gamma).mean().item(), abs=1e-5)
    assert log["rewards/chosen"] == pytest.approx(gamma * logratios[:, 0].mean().item(), abs=1e-5)
    assert log["rewards/rejected"] == pytest.approx(gamma * logratios[:, 1].mean().item(), abs=1e-5)
    assert log["rewards/accuracies"] == (logratios[:, 0] > logratios[:, 1]).double().mean().item()


# Prompts alone


def test_prompts_are_sampled_from_the_reference_policy_ranked_and_trained_on(prompts, policy_dir, tmp_path):
    trainer = RSOTrainer(
        policy_dir, args=config(tmp_path, seed=3, **SAMPLING), train_dataset=prompts, ranker=FunctionRanker(brevity)
    )
    folder = tmp_path / "sampled" / "train"
    candidates = Dataset.load_from_disk(str(folder / "candidates"))
    expected = sample_completions(
        AutoModelForCausalLM.from_pretrained(policy_dir),
        AutoTokenizer.from_pretrained(policy_dir),
        PROMPTS["prompt"],
        6,
        max_new_tokens=6,
        seed=shard_seed(3, 0),
        generation_batch_size=36,
    )
    assert candidates["completions"] == expected and candidates["prompt"] == PROMPTS["prompt"]
    kept = Dataset.load_from_disk(str(folder / "pairs"))
    assert [row["prompt"] for row in kept] == [prompt for prompt in PROMPTS["prompt"] for _ in range(2)]
    for row in kept:
        of_prompt = expected[PROMPTS["prompt"].index(row["prompt"])]
        assert row["chosen"] in of_prompt and row["rejected"] in of_prompt and row["chosen"] != row["rejected"]
        assert len(row["chosen"]) <= len(row["rejected"])
    assert json.loads((folder / "manifest.json").read_text())["finished"]
    assert trainer.train_dataset.num_rows == 12
    assert [row["prompt"] for row in trainer.train_dataset] == [row["prompt"] for row in kept]
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # policy = reference
    assert not torch.equal(before, trainer.model.lm_head.weight)


@pytest.mark.parametrize("how", ["object", "reference", "LoRA"])
def test_which_model_is_sampled(how, prompts, policy_dir, tiny_llama_dir, tmp_path):
    given = {"model": policy_dir}
    if how == "object":
        given = {"model": AutoModelForCausalLM.from_pretrained(policy_dir).train()}
    elif how == "reference":
        given["ref_model"] = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    elif how == "LoRA":
        given["peft_config"] = LoraConfig(target_modules=["q_proj"])
    trainer = RSOTrainer(
        **given, args=config(tmp_path, **SAMPLING), train_dataset=prompts, ranker=FunctionRanker(brevity)
    )
    sampled = sample_completions(
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir if how == "reference" else policy_dir),
        AutoTokenizer.from_pretrained(policy_dir),
        PROMPTS["prompt"],
        6,
        max_new_tokens=6,
        seed=shard_seed(42, 0),
        generation_batch_size=36,
    )
    assert Dataset.load_from_disk(str(tmp_path / "sampled" / "train" / "candidates"))["completions"] == sampled
    trainer.train()
    assert 0 < trainer.state.log_history[0]["loss"] < 2


def test_every_sampling_setting_arrives(prompts, policy_dir, tmp_path, monkeypatch):
    received = {}

    def record(dataset, policy, tokenizer, ranker, output_dir, options, **settings):
        received.update(settings, dataset=dataset, policy=policy, tokenizer=tokenizer, ranker=ranker)
        received.update(vars(SamplingOptions.of(options)), output_dir=output_dir)
        return Dataset.from_dict(PAIRS)

    monkeypatch.setattr("prefopt_trl.trainers.prepare.build_preference_dataset", record)
    given = {
        "strategy": "top-k",
        "num_candidates": 7,
        "num_samples": 5,
        "pairing": "all",
        "max_new_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 11,
        "max_length": 99,
        "seed": 5,
    }
    args = config(tmp_path, gamma=0.2, rejection_beta=1.5, generation_batch_size=3, **given)
    ranker, model = FunctionRanker(brevity), AutoModelForCausalLM.from_pretrained(policy_dir)
    RSOTrainer(model, args=args, train_dataset=prompts, ranker=ranker)
    assert (received.pop("dataset"), received.pop("policy"), received.pop("ranker")) == (prompts, model, ranker)
    assert received.pop("tokenizer").eos_token == "</s>"
    output_dir = str(tmp_path / "sampled" / "train")
    selecting = {"rejected_deviations": 2.0, "min_margin": None, "max_margin": None}
    selecting |= {"length_penalty": 0.0, "unfinished_penalty": 0.0}
    batches = {"generation_batch_size": 3, "generation_memory_budget": 4.0, "share_prefix": True}
    others = {"rejection_beta": 1.5, "keep_logps": False, "output_dir": output_dir}
    assert received == {**given, **selecting, **batches, **others}


def test_the_same_settings_reuse_the_samples_and_others_are_refused(prompts, policy_dir, tmp_path, generate_calls):
    def make(ranker=brevity, **given):
        settings = {**SAMPLING, **given}
        return RSOTrainer(
            policy_dir, args=config(tmp_path, **settings), train_dataset=prompts, ranker=FunctionRanker(ranker)
        )

    first = make()
    assert len(generate_calls) == 2  # a probe, and then all six prompts with six candidates
    again = make(gamma=0.5, learning_rate=1e-4, loss_type="hinge-norm")  # not settings of the samples
    assert len(generate_calls) == 2
    assert again.train_dataset["chosen_ids"] == first.train_dataset["chosen_ids"]
    assert again.train_dataset["rejected_ids"] == first.train_dataset["rejected_ids"]
    with pytest.raises(ValueError, match=r"num_candidates: 6 there, 5 now\n  rejection_beta: 0.5 there, 1.5 now"):
        make(rejection_beta=1.5, num_candidates=5)
    with pytest.raises(ValueError, match=r"other settings:\n  ranker.function: 'brevity:"):
        make(ranker=lambda prompts, completions, **kwargs: [0.0] * len(completions))
    assert len(generate_calls) == 2


def test_conversations_are_sampled_as_conversations(policy_dir, tmp_path):
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in ("Why?", "How?")]})
    trainer = RSOTrainer(
        policy_dir, args=config(tmp_path, **SAMPLING), train_dataset=prompts, ranker=FunctionRanker(message_brevity)
    )
    row = trainer.train_dataset[0]
    assert row["chosen"][0]["role"] == "assistant" and len(row["chosen"]) == 1
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_prompts_for_evaluation_are_sampled_too(pairs, prompts, policy_dir, tmp_path):
    trainer = RSOTrainer(
        policy_dir,
        args=config(tmp_path, **SAMPLING),
        train_dataset=pairs,
        eval_dataset=prompts,
        ranker=FunctionRanker(brevity),
    )
    assert trainer.train_dataset.num_rows == 4 and trainer.eval_dataset.num_rows == 12
    assert [path.name for path in (tmp_path / "sampled").iterdir()] == ["eval"]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_evaluation_sets_keep_their_names(pairs, prompts, policy_dir, tmp_path):
    trainer = RSOTrainer(
        policy_dir,
        args=config(tmp_path, **SAMPLING),
        train_dataset=prompts.select(range(3)),
        eval_dataset=DatasetDict({"train": prompts.select(range(2)), "given": pairs}),
        ranker=FunctionRanker(brevity),
    )
    assert trainer.train_dataset.num_rows == 6
    assert {name: split.num_rows for name, split in trainer.eval_dataset.items()} == {"train": 4, "given": 4}
    assert {path.name for path in (tmp_path / "sampled").iterdir()} == {"train", "eval_train"}


def test_a_ranker_without_use_is_said(pairs, policy_dir, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        RSOTrainer(policy_dir, args=config(tmp_path, gamma=0.05), train_dataset=pairs, ranker=FunctionRanker(brevity))
    assert messages(caplog) == [
        "`ranker` is not used: the datasets already have ranked completions. To have them scored, remove the column "
        "`rewards`, or give pairs to a trainer on rankings."
    ]


# Bad input


@pytest.mark.parametrize(
    ("datasets", "names"),
    [
        ({"train_dataset": Dataset.from_dict(PROMPTS)}, "train"),
        (
            {"train_dataset": Dataset.from_dict(PAIRS), "eval_dataset": {"a": Dataset.from_dict(PROMPTS)}},
            "eval_a",
        ),
    ],
)
def test_prompts_without_a_ranker_are_refused(datasets, names, policy_dir, tmp_path):
    with pytest.raises(ValueError, match=f"The {names} dataset has prompts but no .* Pass a `ranker`"):
        RSOTrainer(policy_dir, args=config(tmp_path), **datasets)


@pytest.mark.parametrize("columns", [{"prompt": []}, {"prompt": [], "chosen": [], "rejected": []}, {}])
def test_an_empty_dataset_is_refused(columns, policy_dir, tmp_path):
    with pytest.raises(ValueError, match="The train dataset is empty"):
        RSOTrainer(
            policy_dir,
            args=config(tmp_path),
            train_dataset=Dataset.from_dict(columns),
            ranker=FunctionRanker(brevity),
        )


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        (["rejected"], "no column 'rejected'; it has ['prompt', 'chosen']"),
        (["chosen"], "no column 'chosen'; it has ['prompt', 'rejected']"),
        (["prompt", "chosen"], "no column 'chosen'; it has ['rejected']"),
    ],
)
def test_missing_columns_are_named(removed, expected, pairs, policy_dir, tmp_path):
    with pytest.raises(ValueError) as error:
        RSOTrainer(policy_dir, args=config(tmp_path), train_dataset=pairs.remove_columns(removed))
    assert f"The train dataset has {expected}" in str(error.value) and "rename_column" in str(error.value)


def test_missing_columns_of_evaluation_data_are_named(pairs, policy_dir, tmp_path):
    other = pairs.rename_column("chosen", "better")
    with pytest.raises(ValueError, match="The mine dataset has no column 'chosen'"):
        RSOTrainer(policy_dir, args=config(tmp_path), train_dataset=pairs, eval_dataset={"mine": other})
    trainer = RSOTrainer(policy_dir, args=config(tmp_path), train_dataset=pairs)
    with pytest.raises(ValueError, match="The eval dataset has no column 'chosen'"):
        trainer.evaluate(other)


def test_the_prompt_may_be_implicit_as_in_trl(pairs, policy_dir, tmp_path):
    def whole(row):
        return {column: row["prompt"] + row[column] for column in ("chosen", "rejected")}

    trainer = RSOTrainer(policy_dir, args=config(tmp_path), train_dataset=pairs.map(whole, remove_columns=["prompt"]))
    assert len(trainer.train_dataset[0]["prompt_ids"]) > 1


@pytest.mark.parametrize("wrong", [PAIRS, DatasetDict({"train": Dataset.from_dict(PAIRS)})])
def test_what_is_no_dataset_is_refused(wrong, policy_dir, tmp_path):
    with pytest.raises(TypeError, match="The train dataset must be a `Dataset` or `IterableDataset`, got"):
        RSOTrainer(policy_dir, args=config(tmp_path), train_dataset=wrong)


def test_no_dataset_is_refused_as_in_trl(policy_dir, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        RSOTrainer(policy_dir, args=config(tmp_path))


def test_a_tokenizer_without_eos_is_refused(pairs, policy_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`processing_class` has no EOS token.*Set `tokenizer.eos_token`"):
        RSOTrainer(policy_dir, args=config(tmp_path), train_dataset=pairs, processing_class=tokenizer)


def test_a_tokenizer_without_pad_pads_with_eos_as_in_trl(pairs, policy_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    tokenizer.pad_token = None
    logs = []
    for trainer_class, config_class in ((DPOTrainer, DPOConfig), (RSOTrainer, RSOConfig)):
        args = config_class(**{**init_arguments(config(tmp_path, beta=0.1)), "loss_type": ["sigmoid"]})
        trainer = trainer_class(policy_dir, args=args, train_dataset=pairs, processing_class=tokenizer)
        assert tokenizer.pad_token == tokenizer.eos_token
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[1]["logps/chosen"] == pytest.approx(logs[0]["logps/chosen"], rel=1e-6)


def init_arguments(args: RSOConfig) -> dict:
    """Arguments of a DPOConfig with the same values."""
    names = inspect.signature(DPOConfig).parameters
    return {name: value for name, value in vars(args).items() if name in names}


def test_a_sampled_prompt_that_fills_max_length_is_named(prompts, policy_dir, tmp_path):
    with pytest.raises(ValueError, match=r"The prompt of row 2 has \d+ tokens and fills `max_length`=12 \(1 of 6"):
        RSOTrainer(
            policy_dir,
            args=config(tmp_path, max_length=12, **SAMPLING),
            train_dataset=prompts,
            ranker=FunctionRanker(brevity),
        )


def test_pairs_whose_prompt_fills_max_length_are_left_out_and_counted(pairs, policy_dir, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PAIRS["prompt"]]
    max_length = sorted(lengths)[2]  # the two longest prompts fill it
    fits = [length < max_length for length in lengths]
    assert sum(fits) == 2
    with caplog.at_level(logging.WARNING, logger="prefopt_trl"):
        args = config(tmp_path, max_length=max_length, gamma=0.05)
        trainer = RSOTrainer(policy_dir, args=args, train_dataset=pairs)
    assert trainer.train_dataset["prompt"] == [text for text, fit in zip(PAIRS["prompt"], fits, strict=True) if fit]
    assert len(messages(caplog)) == 1
    expected = (
        f"2 of 4 rows of the train dataset have a prompt that fills `max_length`={max_length} and leaves no room"
    )
    assert messages(caplog)[0].startswith(expected)
    with pytest.raises(ValueError, match="4 of 4 rows of the train dataset .* Raise `max_length` or shorten"):
        RSOTrainer(policy_dir, args=config(tmp_path, max_length=min(lengths)), train_dataset=pairs)


def test_trls_own_config_is_refused(pairs, policy_dir, tmp_path):
    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="`args` must be RSOConfig, got DPOConfig. It takes the arg"):
        RSOTrainer(policy_dir, args=args, train_dataset=pairs)


def test_a_stream_of_prompts_is_refused(prompts, policy_dir, tmp_path):
    with pytest.raises(ValueError, match="The train dataset is an `IterableDataset` of prompts.*Pass a `Dataset`"):
        RSOTrainer(
            policy_dir,
            args=config(tmp_path),
            train_dataset=prompts.to_iterable_dataset(),
            ranker=FunctionRanker(brevity),
        )


# A drop-in for DPOTrainer


def test_the_arguments_begin_with_those_of_trl():
    trls = list(inspect.signature(DPOTrainer.__init__).parameters.values())
    ours = list(inspect.signature(RSOTrainer.__init__).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(trls)]] == [(p.name, p.kind, p.default) for p in trls]
    assert [(p.name, p.default) for p in ours[len(trls) :]] == [("ranker", None)]


def test_a_config_is_made_when_none_is_given(pairs, policy_dir, tmp_path, monkeypatch):
    def on_cpu(output_dir: str) -> RSOConfig:  # TRL's default bf16=True needs this where there is no accelerator
        return RSOConfig(output_dir, use_cpu=True)

    monkeypatch.setattr(RSOTrainer, "config_class", staticmethod(on_cpu))
    monkeypatch.chdir(tmp_path)
    trainer = RSOTrainer(policy_dir, train_dataset=pairs)
    assert isinstance(trainer.args, RSOConfig) and trainer.beta == 0.05
    assert trainer.args.output_dir == f"{Path(policy_dir).name}-RSO"


@pytest.mark.parametrize("columns_are_known", [True, False])
def test_a_stream_of_pairs_trains_as_in_trl(columns_are_known, pairs, policy_dir, tmp_path):
    def stream():
        return (
            pairs.to_iterable_dataset()
            if columns_are_known
            else IterableDataset.from_generator(lambda: iter(pairs.to_list()))
        )

    logs = []
    for trainer_class, config_class in ((DPOTrainer, DPOConfig), (RSOTrainer, RSOConfig)):
        settings = init_arguments(config(tmp_path, max_steps=2, per_device_train_batch_size=2, beta=0.1))
        trainer = trainer_class(policy_dir, args=config_class(**settings), train_dataset=stream())
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(logs[0]) == 2 and logs[1] == pytest.approx(logs[0], abs=1e-4)


def test_a_model_object_trains_like_its_path(pairs, policy_dir, tmp_path):
    logs = []
    for model in (policy_dir, AutoModelForCausalLM.from_pretrained(policy_dir)):
        trainer = RSOTrainer(model, args=config(tmp_path, max_steps=3), train_dataset=pairs)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == logs[1] and logs[0][0] > logs[0][-1]


@pytest.mark.parametrize("fine_tuning", ["full", "LoRA"])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_patched_model_generates_and_saves_like_any_other(fine_tuning, bf16, pairs, policy_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(policy_dir)
    batch = tokenizer(PAIRS["prompt"], return_tensors="pt", padding=True, padding_side="right")
    prompt = tokenizer("The dog", return_tensors="pt")
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad():
        untouched = AutoModelForCausalLM.from_pretrained(policy_dir)
        expected, expected_tokens = untouched(**batch).logits, untouched.generate(**prompt, **greedy)

    peft_config = LoraConfig(target_modules=["q_proj", "v_proj"]) if fine_tuning == "LoRA" else None
    trainer = RSOTrainer(
        policy_dir,
        args=config(tmp_path, max_steps=3, learning_rate=1e-2, bf16=bf16),
        train_dataset=pairs,
        peft_config=peft_config,
    )
    model = trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model.generate(**prompt, **greedy), expected_tokens)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    reloaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "saved")).eval()
    completion_mask = batch["attention_mask"].clone()
    completion_mask[:, :2] = 0
    with torch.no_grad():
        assert not torch.allclose(reloaded(**batch).logits, expected, atol=0.1)  # it has learnt something
        assert torch.equal(trained(**batch).logits, reloaded(**batch).logits)
        assert torch.equal(trained.generate(**prompt, **greedy), reloaded.generate(**prompt, **greedy))
        logps = [completion_logps(m, **batch, completion_mask=completion_mask)[0] for m in (trained, reloaded)]
    torch.testing.assert_close(logps[0], logps[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_pairs", [4, 3])
def test_compute_metrics_gets_both_rows_of_every_pair(num_pairs, pairs, policy_dir, tmp_path):
    """TRL's own loses rows of the last batch, which is cut to the number of its pairs."""
    received = {}
    for trainer_class, config_class in ((DPOTrainer, DPOConfig), (RSOTrainer, RSOConfig)):
        trainer = trainer_class(
            policy_dir,
            args=config_class(**init_arguments(config(tmp_path, beta=0.1, per_device_eval_batch_size=2))),
            train_dataset=pairs,
            eval_dataset=pairs.select(range(num_pairs)),
            compute_metrics=lambda prediction, name=trainer_class: (
                received.update({name: prediction}) or {"seen": 1.0}
            ),
        )
        received[trainer_class, "loss"] = trainer.evaluate()["eval_loss"]
    ours, theirs = received[RSOTrainer], received[DPOTrainer]
    assert len(ours.predictions) == len(ours.label_ids) == 2 * num_pairs
    assert len(theirs.predictions) == 2 * num_pairs - num_pairs % 2
    torch.testing.assert_close(ours.predictions[: len(theirs.predictions)], theirs.predictions)
    assert received[RSOTrainer, "loss"] == pytest.approx(received[DPOTrainer, "loss"], abs=1e-6)


def test_the_model_card_is_rsos(pairs, policy_dir, tmp_path):
    trainer = RSOTrainer(policy_dir, args=config(tmp_path, save_strategy="steps", save_steps=1), train_dataset=pairs)
    trainer.train()
    card = (tmp_path / "README.md").read_text()
    assert "https://huggingface.co/papers/2309.06657" in card and "trained with RSO" in card
    assert "Statistical Rejection Sampling Improves Preference Optimization" in card
    header = card.split("---")[1]
    assert all(f"- {tag}\n" in header for tag in ("trl", "prefopt-trl", "rso", "dpo"))
    assert set(trainer.model.model_tags) == {"trl", "prefopt-trl", "rso", "dpo"}
    citation = card.split("```bibtex")[1].split("```")[0]
    authors = "Tianqi Liu and Yao Zhao and Rishabh Joshi and Misha Khalman and Mohammad Saleh and Peter J. Liu and"
    assert authors in " ".join(citation.split()) and "Jialu Liu},\n" in citation and "year      = 2024,\n" in citation


def test_a_second_round_may_take_a_copy_of_the_first_as_its_reference(policy_dir, pairs, tmp_path):
    losses_of = {}
    for trainer_class, config_class in ((DPOTrainer, DPOConfig), (RSOTrainer, RSOConfig)):
        common = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "beta": 0.1}
        args = config_class(
            str(tmp_path / trainer_class.__name__), max_steps=2, learning_rate=1e-2, logging_steps=1, seed=0, **common
        )
        first = trainer_class(policy_dir, args=args, train_dataset=pairs)
        first.train()
        reference = copy.deepcopy(first.model)
        second = trainer_class(policy_dir, ref_model=reference, args=args, train_dataset=pairs)
        second.train()
        losses_of[trainer_class] = [row["loss"] for row in second.state.log_history if "loss" in row]
    assert losses_of[RSOTrainer] == pytest.approx(losses_of[DPOTrainer], abs=1e-4)
    assert abs(losses_of[RSOTrainer][0] - 0.6931) > 1e-2  # the reference is not the policy
