"""The remote reward ranker, against a server on loopback that answers as vLLM and SGLang do, or fails."""

import json
import math
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest
from pytest_httpserver import HTTPServer
from transformers import AutoTokenizer
from werkzeug import Request, Response

from prefopt_trl import RemoteRewardRanker
from prefopt_trl.rankers import remote

PROMPTS = ["What is 2 + 2?", "Why?"]
COMPLETIONS = [[" It is 4.", " 5", " It is 5."], [" So.", ""]]


def reward(text: Any) -> float:
    """What the server's model says of a text, of token ids, or of a pair of texts."""
    return math.sin(sum(map(ord, "|".join(text) if isinstance(text, tuple) else str(text))))


class RewardServer:
    def __init__(self, server: HTTPServer) -> None:
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.failures: list[Any] = []  # responses that come first
        self.num_labels, self.delay, self.lock = 1, 0.0, threading.Lock()
        server.expect_request("/classify").respond_with_handler(self.answer)
        server.expect_request("/pooling").respond_with_handler(self.answer)
        server.expect_request("/score").respond_with_handler(self.answer)
        self.url = server.url_for("/").rstrip("/")

    def answer(self, request: Request) -> Response:
        body = request.get_json()
        with self.lock:
            self.requests.append((request.path, body, dict(request.headers)))
            failure = self.failures.pop(0) if self.failures else None
        time.sleep(self.delay)
        if failure is not None:
            return failure
        if "text" in body or "input_ids" in body:  # SGLang
            texts = body.get("text") or body["input_ids"]
            return Response(json.dumps([{"embedding": self.outputs(text), "meta_info": {}} for text in texts]))
        assert body["use_activation"] is False and body["model"] == "rm"
        if request.path == "/score":
            texts = list(zip(body["queries"], body["documents"], strict=True))
            data = [{"index": place, "object": "score", "score": reward(text)} for place, text in enumerate(texts)]
        elif request.path == "/pooling":  # a reward for each token
            data = [{"index": place, "data": [[9.0], self.outputs(one)]} for place, one in enumerate(body["input"])]
        else:
            data = [{"index": place, "probs": self.outputs(one)} for place, one in enumerate(body["input"])]
        return Response(json.dumps({"object": "list", "data": data[::-1]}))

    def outputs(self, text: Any) -> list[float]:
        return [reward(text), *[0.0] * (self.num_labels - 1)]


@pytest.fixture
def served(server, monkeypatch):
    server.clear()
    monkeypatch.setattr(remote.time, "sleep", lambda seconds, wait=time.sleep: wait(min(seconds, 0.05)))
    yield RewardServer(server)
    server.clear()


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize(
    ("endpoint", "kind"), [("classify", "vllm"), ("pooling", "vllm"), ("score", "vllm"), ("classify", "sglang")]
)
def test_rewards_are_those_of_the_server_in_order(served, endpoint, kind, batch_size):
    ranker = RemoteRewardRanker(f"{served.url}/{endpoint}", "rm", server=kind, batch_size=batch_size, concurrency=4)
    rewards = ranker.score(PROMPTS, COMPLETIONS)
    texts = [(prompt, text) for prompt, row in zip(PROMPTS, COMPLETIONS, strict=True) for text in row]
    expected = [reward(text if endpoint == "score" else "".join(text)) for text in texts]
    assert [len(row) for row in rewards] == [3, 2]
    assert np.concatenate(rewards) == pytest.approx(expected, abs=1e-6)
    assert len(served.requests) == math.ceil(5 / batch_size)
    assert ranker.score([], []) == []


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_with_a_tokenizer_the_server_gets_the_tokens_of_a_reward_model_ranker(served, tiny_llama_dir, kind):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    for template, text in [
        (None, "<s><|user|>Why?</s><|assistant|>So.</s>"),
        ("oasst", "<|prompter|>Why?</s><|assistant|>So.</s>"),
    ]:
        given = tokenizer if template is None else tiny_llama_dir
        ranker = RemoteRewardRanker(f"{served.url}/classify", "rm", given, template=template, server=kind)
        (found,) = ranker.score([[{"role": "user", "content": "Why?"}]], [["So."]])[0]
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert found == pytest.approx(reward(ids), abs=1e-6)


def test_the_reward_of_a_label_is_its_log_odds(served):
    served.num_labels = 3
    ranker = RemoteRewardRanker(f"{served.url}/classify", "rm", label=0, temperature=2)
    (found,) = ranker.score(["Why?"], [[" So."]])[0]
    assert found == pytest.approx((reward("Why? So.") - math.log(2)) / 2, abs=1e-6)
    for label in (None, 3):
        with pytest.raises(
            ValueError, match=f"`label` is {label}, and http.*classify returns 3 outputs. Give the index of one"
        ):
            RemoteRewardRanker(f"{served.url}/classify", "rm", label=label).score(["Why?"], [[" So."]])


GARBAGE = [
    Response("no", status=429),
    Response("no", status=500),
    Response("no", status=503),
    Response("<html>"),
    Response("{}"),
    Response("[]"),
    Response('{"data": [{"index": 0, "probs": [NaN]}]}'),
    Response('{"data": [{"index": 0, "probs": ["much"]}]}'),
    Response('{"data": []}'),
    Response('{"data": [{"index": 0, "pro', headers={"Content-Length": "100"}),  # half a body
]


@pytest.mark.parametrize("failure", GARBAGE, ids=lambda failure: f"{failure.status_code}-{failure.get_data()[:12]}")
def test_a_failure_that_passes_is_survived_and_one_that_lasts_ends_in_one_sentence(served, failure):
    ranker = RemoteRewardRanker(f"{served.url}/classify", "rm")
    served.failures = [failure, failure]
    assert ranker.score(["Why?"], [[" So."]])[0] == pytest.approx(reward("Why? So."), abs=1e-6)
    assert len(served.requests) == 3
    served.failures = [failure] * 99
    with pytest.raises(
        ConnectionError, match=r"/classify gave no rewards in 7 attempts \(.*\)\. Check the server"
    ) as said:
        ranker.score(["Why?"], [[" So."]])
    assert "\n" not in str(said.value) and len(served.requests) == 10


def test_a_server_that_says_nothing_or_is_not_there_ends_in_one_sentence(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/classify"
        with pytest.raises(ConnectionError, match="gave no rewards in 7 attempts .*time"):
            RemoteRewardRanker(url, "rm").score(["Why?"], [[" So."]])
    with pytest.raises(ConnectionError, match="gave no rewards in 7 attempts .*refused"):
        RemoteRewardRanker(url, "rm").score(["Why?"], [[" So."]])


def test_a_refused_request_is_not_repeated(served):
    served.failures = [Response("the prompt is too long", status=400)]
    with pytest.raises(ValueError, match=r"refused a request \(status 400 BAD REQUEST\): the prompt is too long"):
        RemoteRewardRanker(f"{served.url}/classify", "rm").score(["Why?"], [[" So."]])
    assert len(served.requests) == 1


def test_requests_run_at_the_same_time(served):
    served.delay = 0.05  # of the server
    ranker = RemoteRewardRanker(f"{served.url}/classify", "rm", batch_size=1, concurrency=16)
    start = time.perf_counter()
    ranker.score(["Why?"], [[f" {number}" for number in range(64)]])
    assert time.perf_counter() - start < 64 * 0.05 / 4  # 0.2 seconds on an idle machine


def test_the_key_is_sent_and_nowhere_written(served, monkeypatch):
    monkeypatch.setenv("REWARD_MODEL_API_KEY", "secret")
    ranker = RemoteRewardRanker(f"{served.url}/classify", "rm")
    ranker.score(["Why?"], [[" So."]])
    assert served.requests[0][2]["Authorization"] == "Bearer secret"
    assert "secret" not in repr(ranker.settings()) + repr(vars(ranker)) and served.url not in repr(ranker.settings())


@pytest.mark.parametrize(
    ("url", "given", "message"),
    [
        ("http://host/v1/embeddings", {}, "`url` ends in '/v1/embeddings' and `server` is 'vllm'. Give an address"),
        ("http://host/score", {"server": "sglang"}, "`url` ends in '/score' and `server` is 'sglang'"),
        ("http://host/classify", {"server": "tgi"}, "`server` is 'tgi'"),
        ("http://host/classify?key=secret", {}, "a key in REWARD_MODEL_API_KEY alone"),
        ("http://host/classify", {"concurrency": 0}, "`concurrency` is 0. Give 1 or more"),
        ("http://host/classify", {"template": "oasst"}, "`template` has no effect without the model's `tokenizer`"),
        ("http://host/score", {"tokenizer": object()}, "`tokenizer` has no effect at /score"),
        ("http://host/classify", {"temperature": -1}, "`temperature` is -1"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(url, given, message):
    with pytest.raises(ValueError, match=message):
        RemoteRewardRanker(url, "rm", **given)


def test_messages_need_a_tokenizer():
    ranker = RemoteRewardRanker("http://host/classify", "rm")
    with pytest.raises(ValueError, match="Prompt row 0 is a list of messages. Give the model's `tokenizer`"):
        ranker.score([[{"role": "user", "content": "Why?"}]], [["So."]])
