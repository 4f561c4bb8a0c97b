"""Generators of candidates: one contract, the law of samples, and what a server must be asked and may do."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from datasets import Dataset, load_from_disk

import prefopt_trl
from prefopt_trl import (
    ContinuousBatchingGenerator,
    FunctionRanker,
    GenerationOptions,
    Generator,
    OpenAIGenerator,
    SharedPrefixGenerator,
    build_preference_dataset,
)
from prefopt_trl.generation import chat_server, generators
from prefopt_trl.generation.chat_server import ServerError
from prefopt_trl.generation.generators import Request
from prefopt_trl.generation.sampler import Candidates
from prefopt_trl.sampling.logps import row_logps
from tests.chat_server import question, response, serving
from tests.unit.generation.test_sampler import EOS, TURN, letter_tokenizer, next_token_law, random_model
from tests.unit.laws import CHANCE, p_value
from tests.unit.shared_prefix import families

PLAIN = ["The dog", "A cat", "Why?", "No"]
CHATS = [[{"role": "user", "content": text}] for text in PLAIN]
HOW = {"num_candidates": 4, "num_samples": 2, "max_new_tokens": 3, "generation_memory_budget": 0.01}


def mean_code(prompts: list, completions: list, **columns: object) -> list[float]:
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [float(np.mean(list(text.encode()) or [0])) / 50 for text in texts]


RANKER = FunctionRanker(mean_code)


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai._base_client.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(chat_server, "NUM_RETRIES", 2)


def says(body: dict[str, Any]) -> dict[str, Any]:
    """A completion that its seed decides; every third one is cut."""
    text, reason = f" {body['seed']}"[: 1 + body["max_tokens"]], "length" if body["seed"] % 3 == 0 else "stop"
    said = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
    return {**said, "finish_reason": reason}


def build(output_dir: Path, generator: Generator, prompts: list = PLAIN, tokenizer: Any = None, **how: Any) -> Dataset:
    return build_preference_dataset(prompts, None, tokenizer, RANKER, output_dir, generator=generator, **HOW, **how)


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())["settings"]


# The contract


@pytest.mark.parametrize("prompts", [PLAIN, CHATS], ids=["plain", "conversational"])
@pytest.mark.parametrize("kind", ["shared", "continuous", "server"])
def test_a_dataset_is_made_by_any_generator(kind: str, prompts: list, sampler, tmp_path: Path) -> None:
    with serving(says) as chat:
        generator: Generator = {
            "shared": SharedPrefixGenerator(*sampler),
            "continuous": ContinuousBatchingGenerator(*sampler),
            "server": OpenAIGenerator("m", chat.url),
        }[kind]
        pairs = build(tmp_path, generator, prompts)
        calls = len(chat.requests)
        assert build(tmp_path, generator, prompts).to_dict() == pairs.to_dict() and len(chat.requests) == calls
    candidates = load_from_disk(str(tmp_path / "candidates"))
    assert candidates["prompt"][:] == prompts and 0 < len(pairs) <= 4
    assert [*map(len, candidates["completions"]), *map(len, candidates["finished"])] == [4] * 8
    assert isinstance(candidates["completions"][0][0], str) == isinstance(prompts[0], str)
    assert (tmp_path / "README.md").exists() and (tmp_path / "statistics.json").exists()
    settings = settings_of(tmp_path)
    assert ("policy" in settings) == (kind != "server") and ("generator" in settings) == (kind != "shared")


def test_the_default_generator_writes_what_policy_and_tokenizer_write(sampler, tmp_path: Path) -> None:
    more = {"generation_kwargs": {"min_p": 0.01}}
    build_preference_dataset(PLAIN, *sampler, RANKER, tmp_path / "default", keep_logps=True, **HOW, **more)
    build(tmp_path / "given", SharedPrefixGenerator(*sampler, **more), keep_logps=True)
    for name in ("manifest.json", "candidates/data-00000-of-00001.arrow", "pairs/data-00000-of-00001.arrow"):
        assert (tmp_path / "given" / name).read_bytes() == (tmp_path / "default" / name).read_bytes()


class Stingy(Generator):
    """Returns one completion too few of the second prompt of each call, or leaves this prompt out."""

    def __init__(self, leaves_out: bool) -> None:
        self.leaves_out = leaves_out

    def generate(self, request):
        made = [Candidates([f" {number}" for number in range(4 - row)], [True] * (4 - row)) for row in range(2)]
        return made[:1] if self.leaves_out else made

    def settings(self, options):
        return {}

    def prompts_at_once(self, longest, num_completions, options):
        return 2


@pytest.mark.parametrize(("leaves_out", "found"), [(False, 3), (True, 0)])
def test_too_few_completions_are_refused_with_the_row(leaves_out: bool, found: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`generator` returned {found} of 4 completions of row 1 of `prompts`"):
        build(tmp_path, Stingy(leaves_out))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": True, "tokenizer": True}, "`generator` takes the place of `policy`"),
        ({"tokenizer": True, "kind": "local"}, "and of `tokenizer` if it has one"),
        ({"generation_kwargs": {"min_p": 0.1}}, "`generator` takes the place of `policy` and `generation_kwargs`"),
        ({"keep_logps": True}, "`keep_logps` needs the log-probabilities of the policy's tokens"),
        ({"prompts": [{"prompt": "a", "completions": ["b", "c"]}]}, "`generator` has nothing to sample"),
        ({"max_length": 4}, "`max_length` is in tokens, and needs `tokenizer`"),
        ({"max_length": 4, "tokenizer": True}, "The prompt of row 1 has 5 tokens and fills `max_length`=4"),
        ({"prompts": [{"prompt": CHATS[0], "tools": [{"name": "f"}]}]}, "`prompts` have `tools`"),
    ],
    ids=str,
)
def test_what_a_generator_cannot_do_is_refused(given: dict, message: str, sampler, tmp_path: Path) -> None:
    prompts, kind = given.pop("prompts", PLAIN), given.pop("kind", "server")
    model, tokenizer = (
        one if given.pop(name, False) else None for name, one in zip(("policy", "tokenizer"), sampler, strict=True)
    )
    if isinstance(prompts[0], dict):
        prompts = Dataset.from_list(prompts)
    with serving(says) as chat, pytest.raises(ValueError, match=message):
        generator = OpenAIGenerator("m", chat.url) if kind == "server" else SharedPrefixGenerator(*sampler)
        given["generator"] = generator
        build_preference_dataset(prompts, model, tokenizer, RANKER, tmp_path, **HOW, **given)


# Continuous batching


def narrowed(law: list[float], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """The next-token law that sampling with these options has."""
    law = [p ** (1 / temperature) for p in law]
    law = [p / sum(law) if p in sorted(law)[-top_k:] else 0.0 for p in law]
    law = [p / sum(law) for p in law]
    kept = [p if sum(other for other in law if other > p) < top_p else 0.0 for p in law]
    return [p / sum(kept) for p in kept]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"generation_batch_size": 7}], ids=str
)
def test_generate_batch_has_the_law_of_the_policy(options: dict) -> None:
    """Chi-square over all tokens of a completion: each of the 10 tests fails with a chance of 1e-6."""
    model, tokenizer, prompts = random_model(), letter_tokenizer(), ["abcgh", "d", "d"]
    narrow = {name: value for name, value in options.items() if name != "generation_batch_size"}
    how = GenerationOptions(max_new_tokens=2, generation_memory_budget=1.0, **options)
    request = Request(prompts, [{}] * 3, 1000, how, seed=3, keep_logps=True)
    drawn = ContinuousBatchingGenerator(model, tokenizer).generate(request)
    assert [len(row.texts) for row in drawn] == [1000] * 3 and model.training
    assert drawn[1].texts != drawn[2].texts
    for prompt, row in zip(prompts, drawn, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        law = {}
        for first, p in enumerate(narrowed(next_token_law(model, ids), **narrow)):
            then = [1.0] if first == EOS else narrowed(next_token_law(model, [*ids, first]), **narrow)
            law |= {(first, second)[: len(then)]: p * q for second, q in enumerate(then) if p * q}
        assert p_value([tuple(one.ids) for one in row.sampled], law) > CHANCE
        assert row.finished == [one.ids[-1] == EOS for one in row.sampled]
        if narrow:
            assert {one.logp for one in row.sampled} == {None}
        else:
            logps = row_logps(model, [(ids, one.ids) for one in row.sampled[:20]])
            np.testing.assert_allclose([one.logp for one in row.sampled[:20]], logps, atol=1e-5)


def test_generate_batch_ends_at_each_eos_and_keeps_log_probabilities_of_pairs(sampler, tmp_path: Path) -> None:
    model, tokenizer = random_model(), letter_tokenizer()
    model.generation_config.eos_token_id = [EOS, TURN]
    how = GenerationOptions(max_new_tokens=20, generation_memory_budget=1.0)
    request = Request(["ab"], [{}], 200, how, seed=0, keep_logps=True)
    (row,) = ContinuousBatchingGenerator(model, tokenizer).generate(request)
    ends = {one.ids[-1] for one, finished in zip(row.sampled, row.finished, strict=True) if finished}
    assert ends == {EOS, TURN} and not any({EOS, TURN} & set(one.ids[:-1]) for one in row.sampled)
    pairs = build(tmp_path, ContinuousBatchingGenerator(*sampler), keep_logps=True)
    assert all(logp < 0 for logp in [*pairs["ref_chosen_logps"], *pairs["ref_rejected_logps"]])


@pytest.mark.parametrize("family", ["bloom", "gpt_neo, local", "mamba"])
def test_a_model_that_generate_batch_computes_otherwise_is_refused(family: str) -> None:
    generator = ContinuousBatchingGenerator(families.build(families.NOT_SHARING[family][0]), letter_tokenizer())
    with pytest.raises(ValueError, match=f"(?s)cannot sample this model: .*{family[:5]}.* Use SharedPrefixGenerator"):
        generator.generate(Request(["ab"], [{}], 2, GenerationOptions(max_new_tokens=2), seed=0))


# Servers


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({}, {"temperature": 1.0, "top_p": 1.0, "top_k": -1}),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5}),
    ],
)
@pytest.mark.parametrize("takes_top_k", [True, False])
def test_each_request_has_every_option_of_sampling_and_a_seed(
    takes_top_k: bool, given: dict, sent: dict, tmp_path: Path
) -> None:
    def answer(body: dict[str, Any]) -> Any:
        refused = "top_k" in body and not takes_top_k  # as `transformers serve` does
        return response(422, "Unexpected fields in the request: {'min_p', 'top_k'}") if refused else says(body)

    options = {"request_options": {"stop": ["\n\n"], "min_p": None}} if takes_top_k else {}
    rows = [{"prompt": prompt, "chat_template_kwargs": {"enable_thinking": False}} for prompt in CHATS]
    with serving(answer) as chat:
        chat.pages = {"/v1/models": {"data": [{"id": "m", "owned_by": "me"}]}, "/version": {"version": "0.1"}}
        build(tmp_path, OpenAIGenerator("m", chat.url, **options), Dataset.from_list(rows), **given)
        requests = chat.answered
    assert len(requests) == len({body["seed"] for body in requests}) == 16
    if not takes_top_k:
        own = {"do_sample": True, "top_k": given.get("top_k", 0), "min_p": 0.0, "repetition_penalty": 1.0}
        assert [json.loads(body.pop("generation_config")) for body in requests] == [own] * 16
        sent = {name: value for name, value in sent.items() if name != "top_k"}
    else:
        sent = {**sent, "repetition_penalty": 1.0, "stop": ["\n\n"]}
    sent |= {"model": "m", "max_tokens": 3, "stream": False, "chat_template_kwargs": {"enable_thinking": False}}
    assert all(body | sent == body and body.keys() - sent.keys() == {"messages", "seed"} for body in requests)
    told = {"class": "OpenAIGenerator", "model": "m", "owned_by": "me", "version": "0.1"}
    assert settings_of(tmp_path)["generator"] == {**told, "request_options": options.get("request_options", {})}
    assert chat.url not in (tmp_path / "manifest.json").read_text()


def test_a_server_that_dies_costs_the_shard_under_way_and_the_same_call_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generators, "REQUESTS", 4)  # with a connection, a prompt per shard
    count = itertools.count()
    lost = r"The server at .* did not answer .*; 2 completions of the shard under way are lost"
    dying = serving(lambda body: says(body) if next(count) < 10 else b"")
    with dying as chat, pytest.raises(ServerError, match=lost) as died:
        build(tmp_path / "pairs", OpenAIGenerator("m", chat.url, concurrency=1))
    saved = f"Interrupted: 2 of 4 shards are saved in {tmp_path / 'pairs'}; the same call resumes from there."
    assert saved in died.value.__notes__
    with serving(says) as chat:
        build(tmp_path / "pairs", OpenAIGenerator("m", chat.url, concurrency=1))
        assert sorted(map(question, chat.answered)) == sorted(PLAIN[2:] * 4)
        build(tmp_path / "undisturbed", OpenAIGenerator("m", chat.url, concurrency=1))
    for name in ("candidates", "pairs"):
        one, other = (load_from_disk(str(tmp_path / folder / name)) for folder in ("pairs", "undisturbed"))
        assert one.to_dict() == other.to_dict()


def test_public_names() -> None:
    names = ("Generator", "SharedPrefixGenerator", "ContinuousBatchingGenerator", "OpenAIGenerator")
    assert all(issubclass(getattr(prefopt_trl, name), Generator) for name in names)
