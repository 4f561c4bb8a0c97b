"""The client of an OpenAI-compatible server: requests at a time, answers saved by content, and a budget."""

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from prefopt_trl.generation.options import is_whole

NUM_RETRIES = 12  # of a request, by the client of openai; over about a minute if attempts fail at once
TIMEOUT = 300  # seconds that an attempt waits for its answer, which is long if the server is busy or the judge thinks


class Answer(NamedTuple):
    """The text of an answer, and with `logprobs` its tokens, each with likely alternatives and their log-probs."""

    text: str
    tokens: list[tuple[str, dict[str, float]]]
    finish_reason: str | None = None  # "stop" at its end, "length" at `max_tokens`


class ServerError(ConnectionError):
    """A request that the server does not answer, in one sentence; `status` is that of HTTP, if there is one."""

    status: int | None = None


class SavedAnswers(dict[str, Answer]):
    """Answers by the content of their request, in memory and, with a folder, in its file `answers.jsonl`.

    The address of the server is not part of the content. Several processes may append to the file, because each line
    is one write. A line that a killed process has left unfinished is skipped.
    """

    def __init__(self, folder: str | Path | None) -> None:
        super().__init__()
        self.folder = folder
        if folder is None:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder, "answers.jsonl")
        self._file = path.open("ab", buffering=0)
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, TypeError):
                key, text, tokens, *reason = json.loads(line)
                self[key] = Answer(text, [(token, among) for token, among in tokens], *reason)

    @staticmethod
    def key(request: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def add(self, key: str, answer: Answer) -> None:
        self[key] = answer
        if self.folder is not None:
            self._file.write(b"\n" + json.dumps([key, *answer]).encode())  # the line before may be unfinished

    def __str__(self) -> str:
        if self.folder is None:
            return f"without a `cache_dir`, the {len(self)} answers so far end with this process"
        return f"{len(self)} answers are saved in {self.folder}, and the same call continues from them"


class ChatServer:
    """A server of OpenAI's completions, with `concurrency` requests under way at a time.

    Requests with `messages` are for chat completions, and those with a `prompt` for completions of plain text.

    The client of openai retries after connection errors, timeouts and the statuses 408, 409, 429 and 500 and above.
    Each attempt counts towards `max_requests`. A server that takes requests and never answers fails after 13
    attempts of 5 minutes. The key is the environment's `OPENAI_API_KEY`, if it is set.

    Raises:
        ImportError: if the package openai is missing.
        ValueError: if an argument is out of range, the address has credentials or the key cannot be sent.
    """

    def __init__(self, base_url: str, saved: SavedAnswers, concurrency: int, max_requests: int | None) -> None:
        address = urlsplit(base_url)
        has_key = "@" in address.netloc or bool(address.query)  # which logs and errors would show
        if address.scheme not in ("http", "https") or not address.hostname or has_key:
            raise ValueError("Give a `base_url` such as 'http://localhost:8000/v1', and a key as OPENAI_API_KEY.")
        self.base_url, self.saved, self.concurrency, self.max_requests = base_url, saved, concurrency, max_requests
        is_whole(self, "concurrency", 1)
        if max_requests is not None:
            is_whole(self, "max_requests", 1)
        try:
            import openai
        except ImportError as error:
            raise ImportError("A server is asked with openai: `pip install 'prefopt-trl[judge]'`.") from error
        self._key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key"
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError("OPENAI_API_KEY has a character that no header can have, such as a line break.")
        timeout = openai.Timeout(TIMEOUT, connect=5)
        self._client = openai.OpenAI(
            base_url=base_url, api_key=self._key_of_attempt, max_retries=NUM_RETRIES, timeout=timeout
        )
        self._num_attempts, self._is_stopped, self._lock = 0, False, threading.Lock()

    def answers(self, requests: Sequence[dict[str, Any]]) -> list[Answer]:
        """Return the answer to each request, in their order. Equal requests are sent once.

        Fields that are None, and `vote`, tell requests apart but are not sent.
        After an error or Ctrl-C, no more are sent, and answers under way are still saved.

        Raises:
            ServerError: if the server refuses a request, fails in every attempt or returns no chat completion.
            ValueError: if `max_requests` is spent.
        """
        keys = [self.saved.key(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.saved}
        self._is_stopped = False
        progress = tqdm(total=len(missing), desc="Asking the server", unit="answer", disable=None, delay=2)
        with progress, ThreadPoolExecutor(self.concurrency) as threads:
            asked = [threads.submit(self._ask, key, request) for key, request in missing.items()]
            try:
                for done in as_completed(asked):
                    with suppress(CancelledError):  # stopped by another request, whose error comes next
                        done.result()
                    progress.update()
            finally:
                self._is_stopped = True
                threads.shutdown(wait=False, cancel_futures=True)  # leaving the block waits
        return [self.saved[key] for key in keys]

    def describe(self, model: str) -> dict[str, str]:
        """Return `owned_by` of the model, and the server's `version`, if it tells them; raise `ServerError`."""
        address = self.base_url.rstrip("/")
        models = self._get(f"{address}/models").get("data") or []
        owner = next((one.get("owned_by") for one in models if one.get("id") == model), None)
        version = self._get(f"{address.removesuffix('/v1')}/version").get("version")
        return {name: value for name, value in (("owned_by", owner), ("version", version)) if value}

    def _get(self, address: str) -> dict[str, Any]:
        """Return the JSON object at an address of the server, or an empty one."""
        import openai

        self._is_stopped = False
        try:
            found: Any = self._client.get(address, cast_to=object)
        except openai.APIConnectionError as failure:
            said = f"The server at {self.base_url} did not answer ({failure.__cause__})"
            raise ServerError(f"{said}: is it running, and is the address right?") from None
        except (openai.APIStatusError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _key_of_attempt(self) -> str:
        """Return the key, and count the attempt: the client calls this before each."""
        with self._lock:
            if self._is_stopped:
                raise CancelledError
            if self._num_attempts == self.max_requests:
                raise ValueError(f"`max_requests`={self.max_requests} is spent; {self.saved}.")
            self._num_attempts += 1
        return self._key

    def _ask(self, key: str, request: dict[str, Any]) -> None:
        """Save the answer to a request."""
        import openai

        status = None
        sent = {name: value for name, value in request.items() if value is not None and name != "vote"}
        endpoint: Any = self._client.completions if "prompt" in sent else self._client.chat.completions
        what = {name: sent[name] for name in ("model", "prompt", "messages") if name in sent}
        try:
            response = endpoint.with_raw_response.create(**what, stream=False, extra_body=sent)
        except openai.APIStatusError as failure:
            status = failure.status_code
            problem = f"answered status {status} ({failure.response.text})"
        except openai.APIConnectionError as failure:  # or a timeout
            problem = f"did not answer ({failure.__cause__})"
        else:
            if (answer := _read(response.content, "prompt" in sent)) is not None:
                return self.saved.add(key, answer)
            problem = f"answered no completion ({response.text})"
        for key in (self._key, json.dumps(self._key)[1:-1]):  # which the server may repeat
            problem = problem.replace(key, "***")
        problem = shorten(problem, 300, placeholder="...")
        self._is_stopped = True
        error = ServerError(f"The server at {self.base_url} {problem}; {self.saved}.")
        error.status = status
        raise error


def _read(content: bytes, is_plain: bool) -> Answer | None:
    """Return the answer in the body of a response, or None if it is not a completion of plain text, or of a chat."""
    try:
        choice = json.loads(content)["choices"][0]
        text = choice["text"] if is_plain else choice["message"]["content"] or ""
        tokens = [
            (one["token"], {other["token"]: float(other["logprob"]) for other in one["top_logprobs"]})
            for one in (choice.get("logprobs") or {}).get("content") or []
        ]
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return Answer(text, tokens, choice.get("finish_reason")) if isinstance(text, str) else None
