"""The remote reward ranker: a reward model that vLLM serves at a URL."""

import json
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
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
# Neither credentials nor a query, which logs and errors would show
ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d+)?(/[\w./~%+:-]*)?/(classify|score)", re.ASCII)
ATTEMPTS, TIMEOUT = 7, 120.0  # seconds
BATCH_SIZE, CONCURRENCY = 16, 8  # completions in a request, and requests at a time


class RemoteRewardRanker(PointwiseRanker):
    """A reward model behind a URL: vLLM's `/classify`, which reads a text, or `/score`, which reads two.

    Eight requests of 16 completions run at a time. A request is repeated after 1, 2, 4, ... seconds while the server
    is busy, fails, or gives an answer that cannot be read. `REWARD_MODEL_API_KEY` in the environment is the key, which
    no error repeats.

    Args:
        url (`str`):
            Address such as `"http://localhost:8000/classify"`, without a query or credentials.
        model (`str`):
            Name of the served model, by which its rewards are recognized.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`] or `str`, *optional*):
            Tokenizer of the model, or its folder or Hub id. `/classify` needs it, and gets the tokens that a
            [`RewardModelRanker`] would give to the model. `/score` gets the prompt and the completion as text.
        template, temperature:
            As in [`RewardModelRanker`]. `/score` takes no template.
        label (`int`, *optional*):
            Index of the label whose log-odds are the reward, for a model with several.

    Raises:
        ValueError: if an argument is out of range, missing, or has no effect.

    Example:

    ```python
    ranker = RemoteRewardRanker("http://localhost:8000/classify", "my-reward-model", "path/to/my-reward-model")
    ```
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        *,
        template: str | RewardTemplate | None = None,
        temperature: float = 1.0,
        label: int | None = None,
    ) -> None:
        if not ADDRESS.fullmatch(url):
            raise ValueError(
                "`url` must be an address such as 'http://localhost:8000/classify', which ends in /classify or /score "
                f"and has no query and no key. Set {KEY} to the key."
            )
        is_score = url.endswith("/score")
        if is_score != (tokenizer is None) or (is_score and template is not None):
            raise ValueError("Give a `tokenizer` for /classify. For /score give none, and no `template`.")
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.texts = None if tokenizer is None else RewardText(tokenizer, template)
        self.url, self.served_model = url, model
        self.label, self.temperature = label, check_temperature(temperature)

    def rewards(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], columns: Columns | None = None
    ) -> list[np.ndarray]:
        """Return the rewards of each prompt's completions. Raise `ConnectionError` if the server gives none."""
        if not (rows := [(row, completion) for row, several in enumerate(completions) for completion in several]):
            return [np.empty(0) for _ in completions]
        inputs = [self._input(row, prompts[row], completion) for row, completion in rows]
        batches = [inputs[start : start + BATCH_SIZE] for start in range(0, len(inputs), BATCH_SIZE)]
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            outputs = np.concatenate(list(pool.map(self._ask, batches)))
        num_labels = outputs.shape[1]
        if self.label not in ([None] if num_labels == 1 else range(num_labels)):
            wanted = "None" if num_labels == 1 else f"0 to {num_labels - 1}"
            raise ValueError(f"`label` is {self.label}, and {self.url} returns {num_labels} outputs. Give {wanted}.")
        rewards = log_odds(torch.tensor(outputs), self.label).double().numpy()
        return np.split(rewards, np.cumsum([len(several) for several in completions], dtype=int))[:-1]

    def settings(self) -> Settings:
        """Return the name of the model, how it is asked, and what it is given; no address and no key."""
        texts = self.texts and {"tokenizer": tokenizer_fingerprint(self.texts.tokenizer), **self.texts.settings()}
        own = {"model": self.served_model, "label": self.label, "temperature": self.temperature}
        return {"class": type(self).__name__, **own, "texts": texts}

    def _input(self, row: int, prompt: Prompt, completion: Completion) -> Any:
        if self.texts is None:
            return prompt_text(prompt), completion_text(completion)
        return self.texts.token_ids(self.texts.write(row, prompt, completion), prompt)

    def _ask(self, batch: list[Any]) -> np.ndarray:
        """Return the outputs of the model, shape `(len(batch), num_labels)`."""
        name, inputs = "probs", {"input": tuple(batch)}
        if self.texts is None:
            queries, documents = zip(*batch, strict=True)
            name, inputs = "score", {"queries": queries, "documents": documents}
        # Without an activation, the outputs are logits
        body = json.dumps({"model": self.served_model, "use_activation": False, **inputs}).encode()
        key = os.environ.get(KEY, "").strip() or "no-key"
        if not re.fullmatch("[!-~]+", key):
            raise ValueError(f"{KEY} has a space, a line break or a character that is not ASCII. Set it to one key.")
        for attempt in range(ATTEMPTS):
            time.sleep(2**attempt // 2)
            request = Request(self.url, body, {"Content-Type": "application/json"})
            request.add_unredirected_header("Authorization", f"Bearer {key}")
            try:
                with urlopen(request, timeout=TIMEOUT) as answer:
                    rows = sorted(json.load(answer)["data"], key=lambda row: row["index"])
                outputs = np.array([row[name] for row in rows], dtype=float)
                if len(rows) == len(batch) and np.isfinite(outputs).all():
                    return outputs.reshape(len(batch), -1)
                problem = "it did not answer with a number for each text"
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}".replace(key, "***")  # the server may repeat the key
                if isinstance(error, HTTPError) and error.code != 429 and error.code < 500:
                    said = error.read(10_000).decode(errors="replace").replace(key, "***")[:300]
                    raise ValueError(f"{self.url} refused a request ({problem}): {said!r}") from None
        raise ConnectionError(f"{self.url} gave no rewards in {ATTEMPTS} attempts ({problem}). Check the server.")
