"""A server of chat completions on this machine, which answers as a test says and fails as a test says."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Body = dict[str, Any]
REPO_ROOT = Path(__file__).parents[1]


class Chat(ThreadingHTTPServer):
    """Answers each request with `answer(body)`: a text, a choice, or raw bytes after which the connection closes.

    `requests` has the bodies of all requests and `answered` those that were answered with a text or a choice. `pages`
    has what the server tells of itself, by path.
    """

    def __init__(self, answer: Callable[[Body], str | Body | bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.failures: list[bytes] = []  # raw responses to the next requests
        self.requests: list[Body] = []
        self.answered: list[Body] = []
        self.keys: set[str | None] = set()
        self.pages: dict[str, Body] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Chat
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path)
        self.wfile.write(response(404) if page is None else response(200, json.dumps(page)))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == ("/v1/completions" if "prompt" in body else "/v1/chat/completions")
        self.server.requests.append(body)
        self.server.keys.add(self.headers["Authorization"])
        answer = self.server.failures.pop(0) if self.server.failures else self.server.answer(body)
        if isinstance(answer, bytes):
            self.close_connection = True
            answer = answer.replace(b"X\r\n", b"X\r\nConnection: close\r\n", 1)
        else:
            choice = {"message": {"role": "assistant", "content": answer}} if isinstance(answer, str) else answer
            self.server.answered.append(body)
            answer = response(200, json.dumps({"choices": [choice]}))
        self.wfile.write(answer)

    def log_message(self, *args: object) -> None:
        pass


def response(status: int, body: str = "{}", headers: str = "", length: int | None = None) -> bytes:
    """Return a response as it is sent, with the length of its body or another one."""
    length = len(body.encode()) if length is None else length
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{headers}\r\n"
    return (head + body).encode()


@contextmanager
def serving(answer: Callable[[Body], str | Body | bytes]) -> Iterator[Chat]:
    with Chat(answer) as chat:
        thread = threading.Thread(target=chat.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield chat
        chat.shutdown()
        thread.join()


def question(body: Body) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


def killed_halfway(command: list[str], answer: Callable[[Body], str | Body | bytes], num_answers: int) -> list[str]:
    """Run a command with two threads against a server, given its address, and return the questions answered.

    The process is killed when it has saved so many answers and both threads wait for another.
    """
    killed, waiting = threading.Event(), threading.Semaphore(0)

    def hang(body: Body) -> str | Body | bytes:
        if len(chat.answered) < num_answers:
            return answer(body)
        waiting.release()
        killed.wait(300)
        return b""

    with serving(hang) as chat:
        process = subprocess.Popen([*command, chat.url], env=os.environ | {"PYTHONPATH": str(REPO_ROOT)})
        for _ in range(2):  # each thread asks its next question after it has saved the last answer
            assert waiting.acquire(timeout=900)
        process.kill()
        process.wait()
        killed.set()
        assert num_answers <= len(chat.answered) < num_answers + 2
        return list(map(question, chat.answered))
