"""A real OpenAI-compatible server, `transformers serve` with SmolLM2-135M-Instruct, samples candidates."""

import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from datasets import load_from_disk

from prefopt_trl import FunctionRanker, GenerationOptions, OpenAIGenerator, build_preference_dataset
from prefopt_trl.generation.generators import Request
from tests.chat_server import killed_halfway, response, serving

pytestmark = pytest.mark.real

QUESTIONS = [[{"role": "user", "content": f"Write one sentence about {number} dogs."}] for number in range(20)]
SAMPLE = "import sys; from tests.real.test_generators import sample; sample(*sys.argv[1:])"


def length(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [len(completion[0]["content"]) / 20 for completion in completions]


def sample(output_dir: str, model: str, base_url: str) -> None:
    generator = OpenAIGenerator(model, base_url, concurrency=2)
    how = {"num_candidates": 8, "num_samples": 4, "max_new_tokens": 8}
    build_preference_dataset(QUESTIONS, None, None, FunctionRanker(length), output_dir, generator=generator, **how)


def test_a_killed_client_resumes_from_its_shards(server: str, smollm2_dir: Path, tmp_path: Path) -> None:
    def forward(body: dict[str, Any]) -> Any:
        answer = httpx.post(f"{server}/chat/completions", json=body, timeout=300)
        return answer.json()["choices"][0] if answer.is_success else response(answer.status_code, answer.text)

    folder = tmp_path / "pairs"
    killed_halfway([sys.executable, "-c", SAMPLE, str(folder), str(smollm2_dir)], forward, 80)
    kept = {path.name: path.read_bytes() for path in (folder / "shards").glob("*.candidates.jsonl")}
    assert len(kept) == 2  # of 5, each of 4 prompts
    with serving(forward) as chat:
        sample(str(folder), str(smollm2_dir), chat.url)
        assert len(chat.answered) == 160 - 2 * 32
    candidates = load_from_disk(str(folder / "candidates"))
    assert candidates["prompt"][:] == QUESTIONS and set(map(len, candidates["completions"])) == {8}
    texts = [completion[0]["content"] for row in candidates["completions"] for completion in row]
    assert len(set(texts)) > 150 and all(texts)
    assert not any(map(any, candidates["finished"]))  # a sentence has more than 8 tokens


def test_the_server_draws_from_the_whole_distribution(server: str, smollm2_dir: Path, smollm2: tuple) -> None:
    model, tokenizer = smollm2
    ids = tokenizer.apply_chat_template(QUESTIONS[0], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likely = model(ids).logits[0, -1].div(5).softmax(-1).topk(50)
    assert likely.values.sum() ** 40 < 1e-6  # the chance that all of 40 samples are among them
    generator = OpenAIGenerator(str(smollm2_dir), server)
    options = GenerationOptions(max_new_tokens=1, temperature=5.0)
    (drawn,) = generator.generate(Request(QUESTIONS[:1], [{}], 40, options, seed=0))
    assert not set(drawn.texts) <= set(tokenizer.batch_decode(likely.indices[:, None]))
    options = GenerationOptions(max_new_tokens=60, temperature=0.1)
    chat = [{"role": "user", "content": "What is 2 + 2? Answer with a number."}]
    (answers,) = generator.generate(Request([chat], [{}], 3, options, seed=0))
    assert any(answers.finished) and any("4" in text for text in answers.texts)
    (continued,) = generator.generate(Request(["1, 2, 3, 4, 5,"], [{}], 3, options, seed=0))
    assert any(text.startswith(" 6") for text in continued.texts)
