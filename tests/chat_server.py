"""A server of chat completions on this machine, which answers as a test says and fails as a test says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


class Chat(ThreadingHTTPServer):
    """Answers each request with `answer(body)`: a text, a choice, or raw bytes after which the connection closes.

    `requests` has the bodies of all requests and `answered` those that were answered with a text or a choice.
    """

    def __init__(self, answer: Callable[[Body], str | Body | bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.failures: list[bytes] = []  # raw responses to the next requests
        self.requests: list[Body] = []
        self.answered: list[Body] = []
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Chat
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
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
    return body["messages"][-1]["content"]
