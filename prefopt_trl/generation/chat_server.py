"""The client of an OpenAI-compatible server: requests at a time, answers saved by content, retries and a budget."""

import hashlib
import json
import logging
import os
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import time
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from prefopt_trl.generation.options import is_whole

logger = logging.getLogger(__name__)

NUM_ATTEMPTS = 8  # at a request, over some two minutes
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; doubled from attempt to attempt
TIMEOUT, TIMEOUT_OF_CONNECTION = 600.0, 10.0  # seconds
PASSING = {408, 409, 429}  # statuses that are worth another attempt, beside those from 500
EXCERPT = 300  # characters of a server's answer that an error shows

# The body of a chat completion: "model", "messages", "seed", "temperature" and so on
Request: TypeAlias = dict[str, Any]


class Answer(NamedTuple):
    """The text of an answer, and with `logprobs` its tokens, each with likely alternatives and their log-probs."""

    text: str
    tokens: list[tuple[str, dict[str, float]]]


class ServerError(ConnectionError):
    """A request that the server does not answer, in one sentence; `status` is that of HTTP, if there is one."""

    status: int | None = None


class SavedAnswers(dict[str, Answer]):
    """Answers by the content of their request, in memory and, with a folder, in its files `answers-*.jsonl`.

    The content is the model's name, the messages, the sampling options and the seed. The address of the server is not
    part of it: a server that is started again on another port is asked nothing twice. Each process appends to its own
    file and reads all of them at the start, except lines that a killed process has left unfinished.
    """

    def __init__(self, folder: str | Path | None) -> None:
        super().__init__()
        self.folder, self._lock = folder, threading.Lock()
        if folder is None:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(folder).glob("answers-*.jsonl")):
            for line in path.read_bytes().splitlines():
                with suppress(ValueError, TypeError):
                    key, text, tokens = json.loads(line)
                    self[key] = Answer(text, [(token, among) for token, among in tokens])
        own = Path(folder, f"answers-{os.environ.get('RANK', '0')}.jsonl")
        self._file = own.open("ab", buffering=0)  # so that each line is one write
        if own.stat().st_size:
            self._file.write(b"\n")  # after an unfinished line

    @staticmethod
    def key(request: Request) -> str:
        return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()

    def add(self, key: str, answer: Answer) -> None:
        with self._lock:
            self[key] = answer
            if self.folder is not None:
                self._file.write(json.dumps([key, *answer]).encode() + b"\n")

    def __str__(self) -> str:
        if self.folder is None:
            return f"without a `cache_dir`, the {len(self)} answers so far end with this process"
        return f"{len(self)} answers are saved in {self.folder}, and the same call continues from them"


class _Failure(NamedTuple):
    what: str
    is_passing: bool = True
    wait: float = 0.0  # seconds that the server asks for
    status: int | None = None


class ChatServer:
    """A server of OpenAI's chat completions, with `concurrency` requests under way at a time.

    A request is sent again, after a wait that doubles, if the server cannot be reached, breaks off, gives no answer in
    time or no chat completion, or answers status 408, 409, 429 or 500 and above. `Retry-After` is obeyed. Each attempt
    counts towards `max_requests`. The key is the environment's `OPENAI_API_KEY`; a server without a key needs none.

    Raises:
        ImportError: if the package openai is missing.
        ValueError: if an argument is out of range, or the address has credentials.
    """

    def __init__(self, base_url: str, saved: SavedAnswers, concurrency: int, max_requests: int | None) -> None:
        address = urlsplit(base_url)
        if address.username or address.password or address.query:  # which logs and errors would show
            raise ValueError("`base_url` has credentials or a query. Leave them out and set OPENAI_API_KEY.")
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"`base_url` is {base_url!r}. Give an address such as 'http://localhost:8000/v1'.")
        self.base_url, self.saved, self.concurrency, self.max_requests = base_url, saved, concurrency, max_requests
        is_whole(self, "concurrency", 1)
        if max_requests is not None:
            is_whole(self, "max_requests", 1)
        try:
            import openai
        except ImportError as error:
            raise ImportError("A server is asked with openai: `pip install 'prefopt-trl[judge]'`.") from error
        self.num_requests = 0
        self._lock = threading.Lock()
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "no-key",
            max_retries=0,  # those here count towards the budget
            timeout=openai.Timeout(TIMEOUT, connect=TIMEOUT_OF_CONNECTION),
        )

    def answers(self, requests: Sequence[Request], description: str) -> list[Answer]:
        """Return the answer to each request, in their order. `description` labels the progress bar.

        Equal requests are sent once. After an error or Ctrl-C, no more are sent, and answers under way are still
        saved.

        Raises:
            ServerError: if the server refuses a request, or does not answer it in the last attempt.
            ValueError: if `max_requests` is spent.
        """
        keys = [self.saved.key(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.saved}
        stopped = threading.Event()
        progress = tqdm(total=len(missing), desc=description, unit="answer", disable=None, delay=2)
        with progress, ThreadPoolExecutor(self.concurrency) as threads:
            asked = [threads.submit(self._ask, key, request, stopped) for key, request in missing.items()]
            try:
                for done in as_completed(asked):
                    done.result()
                    progress.update()
            finally:
                stopped.set()
                threads.shutdown(wait=False, cancel_futures=True)  # leaving the block waits
        return [self.saved[key] for key in keys]

    def _ask(self, key: str, request: Request, stopped: threading.Event) -> None:
        """Save the answer to a request, unless `stopped` is set; set it if there is no answer."""
        for attempt in range(1, NUM_ATTEMPTS + 1):
            with self._lock:
                if stopped.is_set():
                    return
                if self.num_requests == self.max_requests:
                    stopped.set()
                    raise ValueError(f"`max_requests`={self.max_requests} is spent; {self.saved}.")
                self.num_requests += 1
            answer = self._send(request)
            if isinstance(answer, Answer):
                return self.saved.add(key, answer)
            if attempt == NUM_ATTEMPTS or not answer.is_passing:
                stopped.set()
                times = f" {attempt} times in a row" if attempt > 1 else ""
                error = ServerError(f"The server at {self.base_url} {answer.what}{times}; {self.saved}.")
                error.status = answer.status
                raise error
            wait = max(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1), answer.wait)
            logger.info("The server %s. Asking again in %.1f seconds.", answer.what, wait)
            stopped.wait(wait)

    def _send(self, request: Request) -> Answer | _Failure:
        import openai

        further = {name: value for name, value in request.items() if name not in ("model", "messages")}
        completions = self._client.chat.completions.with_raw_response
        try:
            response = completions.create(
                model=request["model"], messages=request["messages"], stream=False, extra_body=further
            )
        except openai.APIStatusError as error:
            is_passing = error.status_code in PASSING or error.status_code >= 500
            what = f"answered status {error.status_code} ({self._excerpt(error.response.text)})"
            wait = _retry_after(error.response.headers.get("retry-after", ""))
            return _Failure(what, is_passing, wait, error.status_code)
        except openai.APITimeoutError:
            return _Failure("gave no answer in time")
        except openai.APIConnectionError as error:
            return _Failure(f"was not reached or broke off ({self._excerpt(str(error.__cause__))})")
        return _read(response.content) or _Failure(f"gave no chat completion ({self._excerpt(response.text)})")

    def _excerpt(self, text: str) -> str:
        """Quote the beginning of a server's answer, which may repeat the key, on one line."""
        text = " ".join(text.replace(self._client.api_key, "***").split())
        return repr(text if len(text) <= EXCERPT else text[:EXCERPT] + "...")


def _read(content: bytes) -> Answer | None:
    """Return the answer in the body of a response, or None if it is not a chat completion."""
    try:
        choice = json.loads(content)["choices"][0]
        text = choice["message"]["content"] or ""
        tokens = [
            (one["token"], {other["token"]: float(other["logprob"]) for other in one["top_logprobs"]})
            for one in (choice.get("logprobs") or {}).get("content") or []
        ]
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return Answer(text, tokens) if isinstance(text, str) else None


def _retry_after(value: str) -> float:
    """Return the seconds, at most an hour, of a header `Retry-After`, which is a number or a date."""
    with suppress(ValueError):
        return min(float(value), 3600.0)
    with suppress(ValueError):
        return min(parsedate_to_datetime(value).timestamp() - time(), 3600.0)
    return 0.0
