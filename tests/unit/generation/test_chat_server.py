"""The client of OpenAI-compatible servers: what it survives, what it saves, what it spends, what it never shows."""

import json
import logging
import sys
import threading
import traceback

import openai
import pytest

from prefopt_trl.generation import chat_server
from prefopt_trl.generation.chat_server import Answer, ChatServer, SavedAnswers, ServerError
from tests.chat_server import killed_halfway, question, response, serving

KEY = "sk-secret-of-the-tests"

SURVIVED = {
    "too many": response(429),
    "broken": response(500, '{"error": "out of memory"}'),
    "overloaded": response(503, "<html>"),
    "half a body": response(200, '{"choices": [{"mess', length=200),
    "half a head": b"HTTP/1.1 20",
    "nothing": b"",
}
FINAL = {
    "refused": response(400, "no such model"),
    "no key": response(401),
    "no JSON": response(200, "<html>busy</html>"),
    "no UTF-8": response(200, "").replace(b"Length: 0", b"Length: 2") + b"\xff\xfe",
    "no object": response(200, "[1, 2]"),
    "null": response(200, "null"),
    "no choice": response(200, '{"choices": []}'),
    "no message": response(200, '{"choices": [{"text": "A"}]}'),
    "no text": response(200, '{"choices": [{"message": {"content": [1]}}]}'),
    "bad log-probs": response(200, '{"choices": [{"message": {"content": "A"}, "logprobs": {"content": [1]}}]}'),
}


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client of openai would have slept before its retries."""
    slept: list[float] = []
    monkeypatch.setattr(openai._base_client.time, "sleep", slept.append)
    monkeypatch.setattr(chat_server, "NUM_RETRIES", 2)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return slept


def asking(*texts, seed=0):
    return [{"model": "m", "messages": [{"role": "user", "content": text}], "seed": seed} for text in texts]


def client(url, folder=None, concurrency=4, max_requests=None):
    return ChatServer(url, SavedAnswers(folder), concurrency, max_requests)


def echo(body):
    return "re: " + question(body)


@pytest.mark.parametrize(
    ("failure", "attempts"),
    [(failure, 3) for failure in SURVIVED.values()] + [(failure, 1) for failure in FINAL.values()],
    ids=[*SURVIVED, *FINAL],
)
def test_a_failure_is_survived_or_ends_in_one_sentence(failure, attempts, tmp_path):
    with serving(echo) as chat:
        server = client(chat.url, tmp_path, concurrency=1)
        chat.failures = [failure] * (attempts - 1)
        assert server.answers(asking("one", "two")) == [Answer("re: one", []), Answer("re: two", [])]
        assert list(map(question, chat.requests)) == ["one"] * attempts + ["two"]
        chat.failures = [failure] * 9
        with pytest.raises(ServerError) as error:
            server.answers(asking("one", "three", "four"))
        assert len(chat.failures) == 9 - attempts  # none was sent for the last question
        assert error.value.__cause__ is error.value.__context__ is None
    said = str(error.value)
    assert said.startswith(f"The server at {chat.url} ") and "\n" not in said
    assert said.endswith(f"; 2 answers are saved in {tmp_path}, and the same call continues from them.")


def test_after_an_error_the_other_threads_retry_no_more(monkeypatch):
    refused = threading.Event()
    monkeypatch.setattr(
        openai._base_client.time, "sleep", lambda seconds: refused.wait(10) and threading.Event().wait(0.2)
    )

    def answer(body):
        if question(body) == "two":
            refused.set()
            return FINAL["refused"]
        return SURVIVED["broken"]

    with serving(answer) as chat:
        with pytest.raises(
            ServerError, match=r"answered status 400 \(no such model\); without a `cache_dir`"
        ) as error:
            client(chat.url).answers(asking("one", "two"))
        assert error.value.status == 400
        assert sorted(map(question, chat.requests)) == ["one", "two"]


def test_a_server_that_does_not_answer_in_time_is_asked_again_and_retry_after_is_obeyed(waits, monkeypatch):
    monkeypatch.setattr(chat_server, "TIMEOUT", 1.0)
    released = threading.Event()

    def slow_at_first(body):
        return echo(body) if len(chat.requests) > 2 else str(released.wait(10))

    with serving(slow_at_first) as chat:
        chat.failures = [response(429, headers="Retry-After: 7\r\n")]
        server = client(chat.url)
        assert server.answers(asking("one")) == [Answer("re: one", [])]
        assert waits[0] == 7 and len(waits) == 2
        released.set()
    with pytest.raises(ServerError, match=r"did not answer \(.*refused.*\); without a `cache"):
        client(chat.url).answers(asking("one"))


def test_the_budget_counts_each_attempt_and_what_is_answered_stays(tmp_path):
    with serving(echo) as chat:
        chat.failures = [SURVIVED["broken"]]
        server = client(chat.url, tmp_path, concurrency=1, max_requests=3)
        with pytest.raises(
            ValueError, match=r"`max_requests`=3 is spent; 2 answers are saved in .*continues from them"
        ):
            server.answers(asking("one", "two", "three"))
        assert list(map(question, chat.requests)) == ["one", "one", "two"]
        assert server.answers(asking("two")) == [Answer("re: two", [])]  # costs nothing
        assert len(client(chat.url, tmp_path).answers(asking("one", "two", "three"))) == 3
        assert len(chat.requests) == 4


def test_requests_are_under_way_together_and_equal_ones_are_sent_once():
    together = threading.Barrier(4, timeout=30)

    def wait(body):
        together.wait()
        return echo(body)

    with serving(wait) as chat:
        texts = ["a", "b", "c", "d"] * 3
        answers = client(chat.url).answers(asking(*texts))
        assert [answer.text for answer in answers] == [f"re: {text}" for text in texts]
        assert len(chat.requests) == 4


def test_ctrl_c_leaves_what_is_not_sent_and_keeps_what_is_answered(monkeypatch, tmp_path):
    def interrupt(self, n=1):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_server.tqdm, "update", interrupt)
    with serving(echo) as chat:
        with pytest.raises(KeyboardInterrupt):
            client(chat.url, tmp_path, concurrency=2).answers(asking(*map(str, range(500))))
        assert len(chat.requests) < 250
        saved = SavedAnswers(tmp_path)
        assert sum(saved.key(request) in saved for request in chat_requests(chat)) == len(chat.requests)


def chat_requests(chat):
    return asking(*map(question, chat.requests))


KILLED = """
import sys
from prefopt_trl.generation.chat_server import ChatServer, SavedAnswers

requests = [{"model": "m", "messages": [{"role": "user", "content": str(i)}], "seed": 0} for i in range(40)]
ChatServer(sys.argv[2], SavedAnswers(sys.argv[1]), 2, None).answers(requests)
"""


def test_a_killed_process_is_answered_no_question_twice(tmp_path):
    before = killed_halfway([sys.executable, "-c", KILLED, str(tmp_path)], echo, 20)
    with serving(echo) as again:  # at another port
        assert len(client(again.url, tmp_path).answers(asking(*map(str, range(40))))) == 40
    assert sorted(before + list(map(question, again.answered)), key=int) == list(map(str, range(40)))


def test_saved_answers_of_all_processes_are_read_and_unfinished_lines_are_not(tmp_path):
    one, two, three = map(SavedAnswers.key, asking("one", "two", "three"))
    first, second = SavedAnswers(tmp_path), SavedAnswers(tmp_path)
    first.add(one, Answer("1\n\u2028é", [("1", {"1": -0.25, "2": -2.0})]))
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write(f'\n["{two}", "cut o')
    second.add(three, Answer("3", [], "length"))
    assert SavedAnswers(tmp_path) == {**first, **second}


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"seed": 1}, {"temperature": 0.5}, {"messages": [{"role": "system", "content": "one"}]}]
)
def test_another_content_is_another_question(change):
    (request,) = asking("one")
    assert SavedAnswers.key(request | change) != SavedAnswers.key(request)


@pytest.mark.parametrize("key", [KEY, 'sk-secret"\\of the tests'])
def test_the_key_is_sent_and_shown_nowhere(key, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", f" {key}\n")

    with serving(echo) as chat:
        server = client(chat.url, tmp_path)
        server.answers(asking("one"))
        assert chat.keys == {f"Bearer {key}"}
        said = [repr(server), repr(server.saved)]
        repeated = json.dumps({"error": f"no access with {key}"})
        chat.failures += [response(401, f"no access with {key}"), response(401, repeated), response(200, repeated)]
        for _ in range(3):
            with pytest.raises(ServerError) as error:
                server.answers(asking("two"))
            said.append("".join(traceback.format_exception(error.value)))
        assert all("***" in text for text in said[2:])
    said += [path.read_text() for path in tmp_path.iterdir()]
    assert "sk-s" not in "".join([*said, caplog.text])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *[({"url": url}, "Give a `base_url` such as") for url in (f"http://me:{KEY}@h/v1", f"http://h/v1?key={KEY}")],
        *[({"url": url}, "Give a `base_url` such as") for url in ("localhost:8000", "", "http://")],
        ({"concurrency": 0}, "`concurrency` must be a whole number, at least 1, got 0"),
        ({"max_requests": 0.5}, "`max_requests` must be a whole number, at least 1, got 0.5"),
    ],
)
def test_arguments_out_of_range_and_addresses_with_credentials(given, message):
    with pytest.raises(ValueError, match=message) as error:
        client(**{"url": "http://localhost/v1", **given})
    assert KEY not in str(error.value)


@pytest.mark.parametrize("key", [f"{KEY}\n{KEY}", f"{KEY}\u2019"])
def test_a_key_that_no_header_can_have_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY has a character that no header can have") as error:
        client("http://localhost/v1")
    assert "sk-s" not in "".join(traceback.format_exception(error.value))


def test_without_openai_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'prefopt-trl\[judge\]'"):
        client("http://localhost/v1")


def test_log_probs_and_further_fields_travel():
    top = [{"token": "A", "logprob": -0.1, "bytes": [65]}, {"token": " B", "logprob": -3}]
    logprobs = {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": top}]}
    with serving(lambda body: {"message": {"content": "A"}, "logprobs": logprobs}) as chat:
        (request,) = asking("one")
        (answer,) = client(chat.url).answers([request | {"logprobs": True, "top_k": 3}])
    assert answer == Answer("A", [("A", {"A": -0.1, " B": -3.0})])
    assert json.loads(json.dumps(chat.requests)) == [request | {"logprobs": True, "top_k": 3, "stream": False}]
