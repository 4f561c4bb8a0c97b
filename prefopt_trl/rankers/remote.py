"""The remote reward ranker: a reward model that vLLM or SGLang serves at a URL."""

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Completion, Prompt, completion_text, prompt_text
from prefopt_trl.rankers.base import Columns, PointwiseRanker
from prefopt_trl.rankers.inference import check_temperature, log_odds
from prefopt_trl.rankers.templates import RewardTemplate, RewardText
from prefopt_trl.runtime.settings import Settings, tokenizer_fingerprint

KEY = "REWARD_MODEL_API_KEY"  # the environment variable
NUMBERS = {"classify": "probs", "pooling": "data", "score": "score"}  # in the answers of vLLM's endpoints
ATTEMPTS, TIMEOUT = 7, 120.0  # seconds


class RemoteRewardRanker(PointwiseRanker):
    """A reward model behind a URL: vLLM's `/classify`, `/pooling` or `/score`, or SGLang's `/classify`.

    vLLM is asked for outputs before an activation, and SGLang's endpoint has none. A request is repeated after 1, 2,
    4, ... seconds while the server is busy, fails, or gives an answer that cannot be read. The environment variable
    `REWARD_MODEL_API_KEY` holds the server's key, if it needs one.

    Args:
        url (`str`):
            Address such as `"http://localhost:8000/classify"`. `/score` reads the prompt and the completion as two
            texts, the other endpoints as one.
        model (`str`):
            Name of the served model, by which its rewards are recognized.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], `str` or `Path`, *optional*):
            Tokenizer of the model, or its folder or Hub id. It writes and tokenizes texts as in [`RewardModelRanker`],
            and the server gets token ids. Without it, the server gets the text of a plain prompt and its completion.
        template, temperature:
            As in [`RewardModelRanker`]. A template needs a tokenizer.
        label (`int`, *optional*):
            Index of the label whose log-odds are the reward, for a model with several.
        server (`str`, *optional*, defaults to `"vllm"`):
            `"vllm"` or `"sglang"`.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of completions in one request.
        concurrency (`int`, *optional*, defaults to `8`):
            Number of requests at a time.

    Raises:
        ValueError: if an argument is out of range or has no effect.

    Example:

    ```python
    >>> ranker = RemoteRewardRanker("http://localhost:8000/classify", "my-reward-model", tokenizer)
    >>> ranker.score(["What is 2 + 2?"], [["It is 4.", "It is 5."]])
    [array([ 1.7, -0.4])]
    ```
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        *,
        template: str | RewardTemplate | None = None,
        temperature: float = 1.0,
        label: int | None = None,
        server: str = "vllm",
        batch_size: int = 16,
        concurrency: int = 8,
    ) -> None:
        parts = urlsplit(url)
        self.endpoint = parts.path.rpartition("/")[2]
        if (
            self.endpoint not in {"vllm": NUMBERS, "sglang": ["classify"]}.get(server, ())
            or parts.query
            or parts.username
        ):
            raise ValueError(
                f"`url` ends in {parts.path!r} and `server` is {server!r}. Give an address that ends in /classify, "
                f"/pooling or /score for 'vllm', or in /classify for 'sglang', and a key in {KEY} alone."
            )
        if batch_size < 1 or concurrency < 1:
            raise ValueError(f"`batch_size` is {batch_size}, `concurrency` is {concurrency}. Give 1 or more.")
        if template is not None and tokenizer is None:
            raise ValueError("`template` has no effect without the model's `tokenizer`. Give it.")
        if tokenizer is not None and self.endpoint == "score":
            raise ValueError("`tokenizer` has no effect at /score, which reads texts. Leave it out.")
        self.url, self.served_model, self.label, self.server = url, model, label, server
        if isinstance(tokenizer, str | Path):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.texts = None if tokenizer is None else RewardText(tokenizer, template)
        self.batch_size, self.concurrency, self.temperature = batch_size, concurrency, check_temperature(temperature)

    def rewards(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], columns: Columns | None = None
    ) -> list[np.ndarray]:
        """Return the rewards of each prompt's completions in float64.

        Raise `ConnectionError` if the server does not answer, and `ValueError` if it refuses a request or `label` does
        not fit its outputs.
        """
        rows = [(row, completion) for row, several in enumerate(completions) for completion in several]
        inputs = [self._input(row, prompts[row], completion) for row, completion in rows]
        batches = [inputs[start : start + self.batch_size] for start in range(0, len(inputs), self.batch_size)]
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            outputs = torch.tensor([output for batch in pool.map(self._ask, batches) for output in batch])
        finally:
            pool.shutdown(cancel_futures=True)
        num_labels = outputs.shape[-1]
        if rows and self.label not in ([None] if num_labels == 1 else range(num_labels)):
            said = f"`label` is {self.label}, and {self.url} returns {num_labels} outputs."
            raise ValueError(f"{said} Give the index of one of several, and none if there is one.")
        rewards = log_odds(outputs, self.label).double().numpy() if rows else np.empty(0)
        return np.split(rewards, np.cumsum([len(several) for several in completions], dtype=int))[:-1]

    def settings(self) -> Settings:
        """Return the name of the model, how it is asked, and what it is given; no address and no key."""
        settings: Settings = {"class": type(self).__name__, "model": self.served_model, "server": self.server}
        settings |= {"endpoint": self.endpoint, "label": self.label, "temperature": self.temperature}
        if self.texts is not None:
            settings |= {"tokenizer": tokenizer_fingerprint(self.texts.tokenizer), **self.texts.settings()}
        return settings

    def _input(self, row: int, prompt: Prompt, completion: Completion) -> Any:
        """Return what the server reads of a completion: two texts, token ids, or a text."""
        if self.endpoint == "score":
            return prompt_text(prompt), completion_text(completion)
        if self.texts is not None:
            return self.texts.token_ids(self.texts.write(row, prompt, completion), prompt)
        if not isinstance(prompt, str):
            raise ValueError(f"Prompt row {row} is a list of messages. Give the model's `tokenizer`.")
        return f"{prompt}{completion}"

    def _ask(self, batch: list[Any]) -> list[list[float]]:
        """Return the outputs of the model for each text, shape `(len(batch), num_labels)`."""
        if self.server == "sglang":
            asked: dict[str, Any] = {"text" if self.texts is None else "input_ids": batch}
        elif self.endpoint == "score":
            asked = dict(zip(("queries", "documents"), zip(*batch, strict=True), strict=True), use_activation=False)
        else:
            asked = {"input": batch, "use_activation": False}
        request = Request(self.url, json.dumps({"model": self.served_model, **asked}).encode())
        request.add_header("Content-Type", "application/json")
        if key := os.environ.get(KEY):
            request.add_header("Authorization", f"Bearer {key}")
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(min(2 ** (attempt - 1), 30))
            try:
                with urlopen(request, timeout=TIMEOUT) as answer:
                    return self._read(json.load(answer), len(batch))
            except HTTPError as error:
                problem = f"status {error.code} {error.reason}"
                if error.code != 429 and error.code < 500:
                    said = " ".join(error.read(300).decode(errors="replace").split())
                    raise ValueError(f"{self.url} refused a request ({problem}): {said}") from error
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise ConnectionError(f"{self.url} gave no rewards in {ATTEMPTS} attempts ({problem}). Check the server.")

    def _read(self, answer: Any, num_texts: int) -> list[list[float]]:
        """Return the outputs in an answer. A model that has some for each token gives those of the last."""
        if self.server == "sglang":
            found = [item["embedding"] for item in answer]
        else:
            found = [item[NUMBERS[self.endpoint]] for item in sorted(answer["data"], key=lambda item: item["index"])]
        outputs = np.array([np.atleast_2d(np.array(one, dtype=float))[-1] for one in found])
        if len(outputs) != num_texts or not np.isfinite(outputs).all():
            raise ValueError("the answer has no number for each text")
        return outputs.tolist()
