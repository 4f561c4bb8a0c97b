"""SmolLM2-135M-Instruct: sampling, RSO with LoRA on a real reward, save and reload, rankings, a pairwise ranker."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from prefopt_trl import (
    FunctionRanker,
    ListwiseDPOTrainer,
    PairwiseRanker,
    PROTrainer,
    RSOConfig,
    RSOTrainer,
    decode_shared_prefix,
    losses,
    sample_completions,
)
from prefopt_trl.rankers.pairwise import pairwise_ranker_dataset
from tests.real.conftest import load

pytestmark = pytest.mark.real

ON_CPU: Any = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
SIXTEEN_STEPS: Any = {"max_steps": 16, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1}
LORA: Any = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
GREEDY: Any = {"num_completions": 2, "max_new_tokens": 32, "top_k": 1}
PLAIN = ["The capital of France is", "def fibonacci(n):\n    ", "Once upon a time, by the sea,", "1, 1, 2, 3, 5, 8,"]
PLAIN += ["Hi", "Dear Sir,\n\n", "Zwei Dinge sind unendlich:", "日本の首都は", "🦙🦙 means"]
PLAIN += ["Q: How many legs has a spider?\nA:"]


def messages(*contents: str) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)]


ASKED = ["Give three tips for health.", "What is 2 + 2?", "Why is the sky blue?", "Write a haiku.", "Say: 🦙\n"]
CHAT = [*map(messages, [*ASKED, " A  b ", "Was ist ein Baum?", "Sort: pear, apple, fig."])]
CHAT += [messages("Hi!", "Hello! What can I do?", "A joke!"), [{"role": "system", "content": "Be brief."}, *CHAT[0]]]


def text_of(tokenizer: Any, prompt: Any) -> str:
    is_text = isinstance(prompt, str)
    return prompt if is_text else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("prompts", [PLAIN, CHAT], ids=["plain", "chat"])
def test_greedy_sampling_is_generate(smollm2: Any, prompts: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = smollm2
    texts = [text_of(tokenizer, prompt) for prompt in prompts]

    def generated(texts: list[str], **given: Any) -> list[list[int]]:
        inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=32, **given)[:, inputs["input_ids"].shape[1] :]
        return [row + [tokenizer.pad_token_id] * (32 - len(row)) for row in ids.tolist()]

    expected = [row for text in texts for row in generated([text])]  # one by one, without padding
    shared = generated(texts, custom_generate=decode_shared_prefix, num_completions=2)
    assert shared == [row for row in expected for _ in range(2)]

    decoded = [[tokenizer.decode(row, skip_special_tokens=True)] * 2 for row in expected]
    assert sample_completions(model, tokenizer, prompts, **GREEDY) == decoded
    assert "Prompts are not shared" not in caplog.text


def sentiments(texts: list[str]) -> list[float]:
    """VADER's compound sentiment of each text, in [-1, 1]."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def reviews(subjects: str) -> list[str]:
    starts = ["It was", "I think", "The first thing"]
    return [f"My review of the {subject}: {start}" for subject in subjects.split() for start in starts]


def test_rso_with_lora_raises_a_real_reward_and_is_saved(smollm2: Any, smollm2_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    prompts = reviews("film hotel restaurant book phone lecture concert museum")
    options: Any = {"num_candidates": 16, "max_new_tokens": 16, "per_device_train_batch_size": 8, "seed": 0}
    trainer = RSOTrainer(
        str(smollm2_dir),
        args=RSOConfig(str(tmp_path / "rso"), **options, **SIXTEEN_STEPS, **ON_CPU),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        ranker=FunctionRanker(lambda prompts, completions: [5 * one for one in sentiments(completions)], version="1"),
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged[0] == pytest.approx(math.log(2), abs=1e-6)
    assert np.mean(logged[-4:]) < 0.55  # the second epoch

    def rewards(model: Any) -> np.ndarray:
        unseen = reviews("airline garden train bicycle bakery game school lake")
        sampled = sample_completions(model, tokenizer, unseen, 8, max_new_tokens=16, seed=1)
        return np.array([np.mean(sentiments(texts)) for texts in sampled])

    # Measured: 0.41 with a standard error of 0.04, so draws alone take it below 0.2 once in 10^7 runs
    gains = rewards(trainer.model) - rewards(model)
    assert gains.mean() > max(0.2, 5 * gains.std(ddof=1) / math.sqrt(len(gains)))

    expected = sample_completions(trainer.model, tokenizer, CHAT, **GREEDY)
    assert expected != sample_completions(model, tokenizer, CHAT, **GREEDY)
    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert [text_of(saved, prompt) for prompt in CHAT] == [text_of(tokenizer, prompt) for prompt in CHAT]
    assert sample_completions(reloaded, saved, CHAT, **GREEDY) == expected
    reloaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert sample_completions(merged, saved, CHAT, **GREEDY) == expected


RANKINGS: list[tuple[Any, list[str], list[float]]] = [  # best first
    (CHAT[1], ["2 + 2 = 4.", "It is five."], [1.0, -1.0]),
    (CHAT[2], ["Air scatters blue light most.", "Because.", "It reflects the sea, I believe. 🌊"], [1.5, 0.5, 0.0]),
    (CHAT[8], ["Why did the chicken cross the road?", "No.", "Joke", "I cannot."], [2.0, 1.0, 0.75, -1.0]),
]


def reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def scaled(model: Any) -> Any:
    """The model with its last norm scaled, so that log-probabilities differ by whole nats."""
    model.model.norm.weight.data *= 1.2
    return model


@pytest.fixture(scope="module")
def logps(smollm2_dir: Path) -> list[list[list[torch.Tensor]]]:
    """Log-probabilities of the tokens of each completion in float64, one row each, under the model and as scaled."""
    model, tokenizer = load(smollm2_dir, dtype=torch.float64)

    def of_tokens(prompt: Any, text: str) -> torch.Tensor:
        start = len(tokenizer(text_of(tokenizer, prompt))["input_ids"])
        ids = tokenizer.apply_chat_template(prompt + reply(text), return_dict=True)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        return logits.log_softmax(-1)[range(len(logits)), ids[start:]]

    policy = [[of_tokens(prompt, text) for text in texts] for prompt, texts, _ in RANKINGS]
    scaled(model)
    return [policy, [[of_tokens(prompt, text) for text in texts] for prompt, texts, _ in RANKINGS]]


@pytest.mark.parametrize("share_prefix", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("method", ["PRO", "listwise DPO", "listwise DPO from its reference"])
def test_losses_on_rankings(logps, smollm2_dir, method, share_prefix, tmp_path, caplog) -> None:
    trainer_class: Any = PROTrainer if method == "PRO" else ListwiseDPOTrainer
    given: Any = {"ref_model": scaled(load(smollm2_dir)[0])} if method == "listwise DPO" else {}
    policy, _ = logps
    expected = [torch.tensor([math.log(math.factorial(len(row)))]) for row in policy]  # from its reference
    if method == "PRO":
        for place, (row, (_, _, rewards)) in enumerate(zip(policy, RANKINGS, strict=True)):
            means = torch.stack([tokens.mean() for tokens in row])[None]
            sft = -0.05 * (len(row) - 1) ** 2 * row[0].sum()
            expected[place] = losses.pro(means, torch.tensor([rewards])) + sft
    elif method == "listwise DPO":
        sums = [[torch.stack([tokens.sum() for tokens in row])[None] for row in model] for model in logps]
        expected = [losses.plackett_luce(row - ref_row, 0.1) for row, ref_row in zip(*sums, strict=True)]
    options: Any = {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "per_device_train_batch_size": 3}
    completions = [[reply(text) for text in reversed(texts)] for _, texts, _ in RANKINGS]
    columns = {"prompt": [row[0] for row in RANKINGS], "rewards": [row[2][::-1] for row in RANKINGS]}
    trainer = trainer_class(
        str(smollm2_dir),
        args=trainer_class.config_class(str(tmp_path), share_prefix=share_prefix, **options, **ON_CPU),
        train_dataset=Dataset.from_dict({**columns, "completions": completions}),
        **given,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    assert "Prompts are not shared" not in caplog.text


def test_a_pairwise_ranker_prefers_what_its_pairs_prefer(smollm2_dir: Path, tmp_path: Path) -> None:
    subjects = ["gardens", "good books", "the weather", "my cat", "swimming", "rice", "old maps", "the moon"]
    kind = ["I would love to help you with {}!", "That sounds wonderful, tell me more about {}."] * 4
    rude = ["Nobody cares about {}, go away."] * 4 + ["What a stupid thing to say about {}."] * 4
    prompts = [f"Let us talk about {subject}." for subject in subjects]
    chosen, rejected = ([*map(str.format, texts, subjects)] for texts in (kind, rude))
    pairs = Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    trainer = SFTTrainer(
        str(smollm2_dir),
        args=SFTConfig(str(tmp_path), **SIXTEEN_STEPS, **ON_CPU),
        train_dataset=concatenate_datasets([pairwise_ranker_dataset(pairs, seed=seed) for seed in range(4)]),
        peft_config=LoraConfig(**LORA),
    )
    trainer.train()
    tokenizer: Any = trainer.processing_class
    ranker = PairwiseRanker(trainer.model, tokenizer)
    probabilities = ranker.compare(prompts, chosen, rejected)
    assert probabilities.min() > 0.5
    np.testing.assert_allclose(probabilities + ranker.compare(prompts, rejected, chosen), 1, atol=1e-6)

    answers = []  # both orders of one pair, by hand
    for first, second in [(chosen[0], rejected[0]), (rejected[0], chosen[0])]:
        text = f"[CONTEXT] {prompts[0]} [RESPONSE A] {first} [RESPONSE B] {second} [ANSWER]\n"
        with torch.no_grad():
            logits = trainer.model(**tokenizer(text, return_tensors="pt")).logits[0, -1].double()
        answers.append(logits[tokenizer.convert_tokens_to_ids(["A", "B"])].softmax(0)[0].item())
    assert probabilities[0] == pytest.approx((answers[0] + 1 - answers[1]) / 2, abs=1e-5)
