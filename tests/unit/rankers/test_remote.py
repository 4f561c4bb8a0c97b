"""The remote reward ranker, against a server on loopback that answers as vLLM does, or fails."""

import json
import math
import socket
import time
import traceback
from typing import Any

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from prefopt_trl import RemoteRewardRanker
from prefopt_trl.rankers import remote
from prefopt_trl.rankers.templates import RewardText

PROMPTS: list[Any] = ["What is 2 + 2?", [{"role": "user", "content": "Why?"}]]
COMPLETIONS = [[" It is 4.", " 5", " It is 5."], ["So.", ""]]


def reward(read: Any) -> float:
    """What the server's model says of token ids or of a pair of texts."""
    return math.sin(sum(map(ord, str(read))))


class RewardServer:
    def __init__(self, server: HTTPServer) -> None:
        self.requests: list[Request] = []
        self.failures: list[Response] = []  # which come first
        self.num_labels = 1
        server.expect_request("/classify").respond_with_handler(self.answer)
        server.expect_request("/score").respond_with_handler(self.answer)
        self.url = server.url_for("/classify")

    def answer(self, request: Request) -> Response:
        body = request.get_json()
        assert body["use_activation"] is False and body["model"] == "rm"
        self.requests.append(request)
        if self.failures:
            return self.failures.pop()
        if request.path == "/score":
            values = [{"score": reward(read)} for read in zip(body["queries"], body["documents"], strict=True)]
        else:
            values = [{"probs": [reward(read), *[0.0] * (self.num_labels - 1)]} for read in body["input"]]
        data = [{"index": place, **value} for place, value in enumerate(values)]
        return Response(json.dumps({"data": data[::-1]}))


@pytest.fixture
def served(server, monkeypatch):
    server.clear()
    monkeypatch.setattr(remote.time, "sleep", lambda seconds, wait=time.sleep: wait(min(seconds, 0.05)))
    yield RewardServer(server)
    server.clear()


@pytest.mark.parametrize(("template", "batch_size"), [(None, 1), (None, 2), ("oasst", 16)])
def test_classify_gets_the_tokens_of_a_reward_model(
    served, tiny_llama_dir, tokenizer, monkeypatch, template, batch_size
):
    monkeypatch.setattr(remote, "BATCH_SIZE", batch_size)
    ranker = RemoteRewardRanker(served.url, "rm", tiny_llama_dir, template=template)
    rewards = ranker.score(PROMPTS, COMPLETIONS)
    texts = RewardText(tokenizer, template)
    expected = [
        [reward(texts.token_ids(texts.write(0, prompt, completion), prompt)) for completion in row]
        for prompt, row in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    for found, of_prompt in zip(rewards, expected, strict=True):
        assert found == pytest.approx(of_prompt, abs=1e-6)
    assert len(served.requests) == math.ceil(5 / batch_size)
    assert ranker.score([], []) == []


def test_score_reads_two_texts(served):
    rewards = RemoteRewardRanker(served.url.replace("/classify", "/score"), "rm").score(PROMPTS[:1], COMPLETIONS[:1])
    assert rewards[0] == pytest.approx([reward((PROMPTS[0], text)) for text in COMPLETIONS[0]], abs=1e-6)


def test_the_reward_of_a_label_is_its_log_odds(served, tokenizer):
    def ask(**given: Any) -> float:
        return RemoteRewardRanker(served.url, "rm", tokenizer, **given).score(["Why?"], [[" So."]])[0].item()

    expected = ask()
    served.num_labels = 3
    assert ask(label=0, temperature=2) == pytest.approx((expected - math.log(2)) / 2, abs=1e-6)
    for label in (None, 3):
        with pytest.raises(ValueError, match=f"`label` is {label}, and .*/classify returns 3 outputs. Give 0 to 2"):
            ask(label=label)


GARBAGE = {
    "429": Response("no", status=429),
    "500": Response("no", status=500),
    "html": Response("<html>"),
    "empty": Response("{}"),
    "nan": Response('{"data": [{"index": 0, "probs": [NaN]}]}'),
    "none": Response('{"data": []}'),
    "half": Response('{"data": [{"index": 0, "pro', headers={"Content-Length": "100"}),
}


@pytest.mark.parametrize("failure", GARBAGE.values(), ids=GARBAGE)
def test_a_failure_that_passes_is_survived_and_one_that_lasts_ends_in_one_sentence(served, tokenizer, failure):
    ranker = RemoteRewardRanker(served.url, "rm", tokenizer)
    (expected,) = ranker.score(["Why?"], [[" So."]])
    served.failures = [failure, failure]
    assert ranker.score(["Why?"], [[" So."]])[0] == expected
    assert len(served.requests) == 4
    served.failures = [failure] * 7
    with pytest.raises(ConnectionError, match=r"/classify gave no rewards in 7 attempts \(.*\)\. Check .*") as said:
        ranker.score(["Why?"], [[" So."]])
    assert "\n" not in str(said.value) and len(served.requests) == 11


def test_a_server_that_says_nothing_or_is_not_there_ends_in_one_sentence(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ranker = RemoteRewardRanker(f"http://127.0.0.1:{silent.getsockname()[1]}/score", "rm")
        with pytest.raises(ConnectionError, match="gave no rewards in 7 attempts .*time"):
            ranker.score(["Why?"], [[" So."]])
    with pytest.raises(ConnectionError, match="gave no rewards in 7 attempts .*refused"):
        ranker.score(["Why?"], [[" So."]])


def test_a_refused_request_is_not_repeated(served, tokenizer):
    served.failures = [Response("too\nlong", status=400)]
    with pytest.raises(ValueError, match=r"refused a request \(HTTPError: .* 400: BAD REQUEST\): 'too\\nlong'"):
        RemoteRewardRanker(served.url, "rm", tokenizer).score(["Why?"], [[" So."]])
    assert len(served.requests) == 1


def test_the_key_is_sent_and_nowhere_written(served, tokenizer, monkeypatch):
    monkeypatch.setenv("REWARD_MODEL_API_KEY", " secret\n")
    ranker = RemoteRewardRanker(served.url, "rm", tokenizer)
    ranker.score(["Why?"], [[" So."]])
    assert served.requests[0].headers["Authorization"] == "Bearer secret"
    assert "secret" not in repr(ranker.settings()) + repr(vars(ranker)) and served.url not in repr(ranker.settings())


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (Response("No: Bearer secret" + "." * 300 + "secret", status=401), r"refused .*: 'No: Bearer \*\*\*\.*'$"),
        (Response("No", status="401 not secret"), r"refused .*HTTPError: HTTP Error 401: not \*\*\*\): 'No'"),
        (Response('{"data": [{"index": 0, "probs": ["secret"]}]}'), r"gave no rewards .*to float: '\*\*\*'"),
    ],
)
def test_what_the_server_says_is_repeated_without_the_key(served, tokenizer, monkeypatch, failure, message):
    monkeypatch.setenv("REWARD_MODEL_API_KEY", "secret")
    served.failures = [failure] * 7
    with pytest.raises((ValueError, ConnectionError), match=message) as said:
        RemoteRewardRanker(served.url, "rm", tokenizer).score(["Why?"], [[" So."]])
    assert "secret" not in "".join(traceback.format_exception(said.value)).replace(__file__, "")


def test_a_key_that_cannot_be_sent_is_refused_before_a_request(served, tokenizer, monkeypatch):
    for key in ("sec\nret", "sec ret", "secr\u00e9t"):
        monkeypatch.setenv("REWARD_MODEL_API_KEY", key)
        with pytest.raises(ValueError, match="REWARD_MODEL_API_KEY has a space, a line break or") as said:
            RemoteRewardRanker(served.url, "rm", tokenizer).score(["Why?"], [[" So."]])
        assert "sec" not in str(said.value)
    assert not served.requests


def test_a_redirect_does_not_get_the_key(served, server, tokenizer, monkeypatch):
    monkeypatch.setenv("REWARD_MODEL_API_KEY", "secret")
    login: list[Request] = []
    server.expect_request("/login").respond_with_handler(lambda request: login.append(request) or Response("<html>"))
    served.failures = [Response(status=302, headers={"Location": server.url_for("/login")})]
    RemoteRewardRanker(served.url, "rm", tokenizer).score(["Why?"], [[" So."]])
    assert "Authorization" not in login[0].headers
    assert [request.headers["Authorization"] for request in served.requests] == ["Bearer secret"] * 2


@pytest.mark.parametrize("host", ["localhost", "my-host.org:8000", "127.0.0.1:8000/v1", "[::1]:8000/models/a%20b~1/"])
def test_an_address_may_have_a_port_and_a_path(host):
    assert RemoteRewardRanker(f"http://{host}/score", "rm").url == f"http://{host}/score"


@pytest.mark.parametrize(
    "url",
    [
        "http://host/score?key=SECRET",
        "http://host/score?key=SECRET/score",
        "http://host/score#SECRET/score",
        "http://user:SECRET@host/score",
        "http://user:SECRET%40host/score",
        "http://host\n/SECRET/score",
        "http://host/SECRET a/score",
        "host:80/SECRET/score",
        "file://host/SECRET/score",
    ],
)
def test_an_address_with_a_query_or_credentials_is_refused_without_repeating_it(url):
    with pytest.raises(ValueError, match="`url` must be an address .*Set REWARD_MODEL_API_KEY to the key") as said:
        RemoteRewardRanker(url, "rm")
    assert "SECRET" not in str(said.value)


@pytest.mark.parametrize(
    ("url", "given", "message"),
    [
        ("http://host/v1/embeddings", {}, "`url` must be an address .*which ends in /classify or /score"),
        ("http://host/classify", {}, "Give a `tokenizer` for /classify"),
        ("http://host/score", {"tokenizer": "my-model"}, "For /score give none"),
        ("http://host/score", {"template": "oasst"}, "and no `template`"),
        ("http://host/score", {"temperature": -1}, "`temperature` is -1"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(url, given, message):
    with pytest.raises(ValueError, match=message):
        RemoteRewardRanker(url, "rm", **given)
