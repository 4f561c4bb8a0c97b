"""The judge: a chat model that is asked in words which of two completions is better, or how good one is."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefopt_trl.data.formats import Completion, Prompt
from prefopt_trl.generation.chat_server import Answer, ChatServer, SavedAnswers, ServerError
from prefopt_trl.generation.options import GenerationOptions, is_number
from prefopt_trl.generation.sampler import sample_completions
from prefopt_trl.rankers.base import Columns, check_inputs, sigmoid
from prefopt_trl.rankers.comparative import ComparativeRanker
from prefopt_trl.rankers.inference import RankingModel
from prefopt_trl.rankers.judge_prompts import JudgePrompt
from prefopt_trl.rankers.templates import Texts
from prefopt_trl.runtime.cards import public_name
from prefopt_trl.runtime.settings import Settings, template_date

logger = logging.getLogger(__name__)

VOTES = 8  # as RSO's AutoSxS
LOG_PROBS = {"temperature": 0, "logprobs": True, "top_logprobs": 5}  # the most that every server takes
REFUSED = (400, 422)  # statuses by which servers refuse an argument


class JudgeRanker(ComparativeRanker):
    """A chat model as a judge, behind a URL or in this process (RSO's AutoSxS, DPO appendix C.2).

    With a prompt for pairs, P(first preferred) is the mean over both orders of the completions. With a prompt for
    ratings, the reward of a completion is its mean rating. Answers without a verdict in the form that the prompt asks
    for are left out, and one warning counts them. Where none is left, the result is NaN: no opinion.

    Args:
        model (`str`, `Path` or [`~transformers.PreTrainedModel`]):
            With `base_url`, the model's name at the server. Otherwise a chat model, or its folder or Hub id.
        base_url (`str`, *optional*):
            Address of an OpenAI-compatible server. The key is the environment's `OPENAI_API_KEY`.
        prompt (`str` or `Path`, *optional*, defaults to `"helpful"`):
            A built-in prompt (see `docs/judges.md`) or the path of a file in their format.
        votes (`int`, *optional*):
            Answers sampled for a comparison, half of them in each order, or for a rating. By default, P is read from
            the log-probabilities of one answer in each order, at temperature 0, if a server gives them and the prompt
            has two answers with different first letters. Other servers and prompts, and local models, have 8 votes.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            That of a local model, by default from its folder or Hub id.
        cache_dir (`str` or `Path`, *optional*):
            Folder where each answer is saved as it comes. No saved question is asked again.
        concurrency (`int`, *optional*, defaults to `8`):
            Requests to the server under way at a time.
        max_requests (`int`, *optional*):
            How often this ranker may ask the server, retries counted.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest answer, in tokens.
        sampling_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the votes.
        request_options (`dict`, *optional*):
            Further fields of each request, which the settings show. None removes a field, `seed` too.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the votes and of the baselines of `score`.

    Attributes:
        first_share, first_share_error (`float`):
            Order bias in the last call with two or more comparisons: the share of verdicts for the
            completion that was read first, with its standard error. Ties count as half, and 0.5 is no bias.

    Raises:
        ValueError: for an argument out of range or of the other kind of judge, and if `max_requests` is spent.
        ImportError: if the package openai is missing.
        ConnectionError: by `compare` and `score`, if the server refuses a request or fails in every attempt.

    Example:

    ```python
    >>> judge = JudgeRanker("my-model", base_url="http://localhost:8000/v1", cache_dir="outputs/judge")
    >>> judge.compare(["What is 2 + 2?"], ["It is 4."], ["It is 5."])
    array([1.])
    ```
    """

    may_abstain = True

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        base_url: str | None = None,
        prompt: str | Path = "helpful",
        votes: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        cache_dir: str | Path | None = None,
        concurrency: int = 8,
        max_requests: int | None = None,
        max_new_tokens: int = 256,
        sampling_temperature: float = 1.0,
        request_options: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.prompt = JudgePrompt.load(prompt)
        self.options = GenerationOptions(max_new_tokens=max_new_tokens, temperature=sampling_temperature)
        is_number(self.options, "temperature", "Votes are samples.", above_zero=True)
        self.request_options, self.seed = dict(request_options or {}), seed
        self.is_pair = self.draws_baselines = self.prompt.kind == "pair"
        if votes is not None and (type(votes) is not int or votes < 1 or (self.is_pair and votes % 2)):
            number = "an even number, as half of the votes are in each order" if self.is_pair else "a whole number"
            raise ValueError(f"`votes` must be {number}, at least {1 + self.is_pair}, got {votes!r}.")
        self.votes = votes
        if self.is_pair:  # a unanimous vote is no certainty
            self.smallest_probability = 0.5 / (1 + (votes or VOTES))
        self.saved = SavedAnswers(cache_dir)
        self.first_share = self.first_share_error = np.nan
        self.local: RankingModel | None = None
        if base_url is None:
            if max_requests is not None or request_options is not None:
                raise ValueError("`max_requests` and `request_options` are for a server. Give its `base_url`, too.")
            self.local = RankingModel(None, model, tokenizer, batch_size=1, max_length=None)
            self.model = self.local.model
        else:
            if not isinstance(model, str) or tokenizer is not None:
                raise ValueError("With `base_url`, `model` is a name at the server, and `tokenizer` is left out.")
            self.name, self.server = model, ChatServer(base_url, self.saved, concurrency, max_requests)

    def both_orders(
        self,
        prompts: Sequence[Prompt],
        first: Sequence[Completion],
        second: Sequence[Completion],
        rows: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Return P(first preferred) in both orders, as [`ComparativeRanker.both_orders`] describes.

        Equal texts give 0.5 without a question. Ratings have no order, so their columns are equal.
        """
        texts = [Texts.of(*row) for row in zip(prompts, first, second, strict=True)]
        differ = [row for row, one in enumerate(texts) if one.first != one.second]
        asked = [order for row in differ for order in (texts[row], texts[row].swapped())]
        of_first, of_second = self._ask_all(asked).reshape(-1, 2).T  # each where it is shown first
        both = np.full((len(texts), 2), 0.5)
        if not self.is_pair:
            both[differ] = sigmoid(of_first - of_second)[:, None]
            return both
        both[differ] = np.stack([of_first, 1 - of_second], axis=1)
        shares = (of_first + of_second) / 2
        shares = shares[~np.isnan(shares)]
        if len(shares) > 1:
            self.first_share, self.first_share_error = shares.mean(), shares.std(ddof=1) / len(shares) ** 0.5
            share = f"{self.first_share:.3f} +- {self.first_share_error:.3f}"
            logger.info(f"{share} of the judge's verdicts are for the completion that it read first (0.5 is no bias).")
        return both

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        baselines: Sequence[Completion] | None = None,
        columns: Columns | None = None,
    ) -> list[np.ndarray]:
        """Return the rewards of [`ComparativeRanker.score`], or mean ratings minus that of the baseline, if given."""
        if self.is_pair:
            return super().score(prompts, completions, baselines)
        check_inputs(prompts, completions=completions, baselines=baselines)
        if baselines is not None:
            rewards = self.score(prompts, completions)
            of_baselines = self.score(prompts, [[baseline] for baseline in baselines])
            return [row - baseline for row, baseline in zip(rewards, of_baselines, strict=True)]
        texts = [Texts.of(prompts[row], one, "") for row, several in enumerate(completions) for one in several]
        ends = np.cumsum([len(several) for several in completions], dtype=int)
        return np.split(self._ask_all(texts) / self.temperature, ends)[:-1]

    def verdicts(self, probabilities: np.ndarray) -> np.ndarray:
        """Return 1 for a win of the first completion, 0 for a loss and 0.5 for a tie; NaN stays NaN.

        Wins and losses depart from 0.5 by more than the prompt's margin, which is 0.35 for AutoSxS (RSO section 5).
        """
        departure = np.asarray(probabilities, dtype=float) - 0.5
        return np.where(np.abs(departure) > self.prompt.margin, departure > 0, 0.5 + 0 * departure)

    def settings(self) -> Settings:
        """Return the model's name or fingerprints, that of the prompt, and the options, without the server's address.

        The first call may ask the server whether it gives log-probabilities.
        """
        return {
            "class": type(self).__name__,
            "model": public_name(self.name) if self.local is None else self._fingerprints(self.local),
            "prompt": self.prompt.fingerprint,
            "votes": "log-probabilities" if self.reads_log_probs else self.votes or VOTES,
            "max_new_tokens": self.options.max_new_tokens,
            "sampling_temperature": self.options.temperature,
            "request_options": self.request_options,
            "seed": self.seed,
            "temperature": self.temperature,
        }

    @cached_property
    def reads_log_probs(self) -> bool:
        """Whether P is read from log-probabilities. The server is asked once, by a request of one token."""
        if self.votes is not None or not self.prompt.has_log_probs or self.local is not None:
            return False
        try:
            answers = self._answers(["Answer with the letter A or B."], 1, LOG_PROBS | {"max_tokens": 1})
            given = any(alternatives for _, alternatives in answers[0][0].tokens)
        except ServerError as error:
            if error.status not in REFUSED:
                raise
            logger.warning(f"{VOTES} votes are asked for, as log-probabilities are refused: {error}")
            return False
        read = "log-probabilities, one answer in each order" if given else f"{VOTES} votes, as it gives no log-probs"
        logger.info(f"The verdicts of the server are read from {read}.")
        if given:
            self.smallest_probability = ComparativeRanker.smallest_probability
        return given

    def _ask_all(self, questions: list[Texts]) -> np.ndarray:
        """Return the mean verdict on each question, for the completion shown first; NaN without any verdict."""
        texts = [self.prompt.fill(**one._asdict(), completion=one.first) for one in questions]
        votes = self.votes or VOTES
        if self.reads_log_probs:
            answers = self._answers(texts, 1, LOG_PROBS)
            values = [[self.prompt.read_tokens(answer.tokens) for answer in several] for several in answers]
        else:
            how = {"temperature": self.options.temperature}
            answers = self._answers(texts, votes // 2 if self.is_pair else votes, how)
            values = [[self.prompt.read(answer.text) for answer in several] for several in answers]
        read = [[value for value in several if value is not None] for several in values]
        means = np.array([np.mean(several) if several else np.nan for several in read])
        num_answers, num_read = sum(map(len, values)), sum(map(len, read))
        if num_read < num_answers:
            logger.warning(
                f"{num_answers - num_read} of {num_answers} answers of the judge have no verdict in the form that the "
                f"prompt asks for and were left out; {np.isnan(means).sum()} of {len(texts)} questions have no other "
                "answer. Raise `max_new_tokens` if answers are cut off, or take a larger judge."
            )
        return means

    def _answers(self, texts: list[str], num_answers: int, how: dict[str, Any]) -> list[list[Answer]]:
        """Return so many answers to each question."""
        model = self.name if self.local is None else self._fingerprints(self.local)
        options = {"model": model, "max_tokens": self.options.max_new_tokens, **how}
        votes = [1000 * self.seed + number for number in range(num_answers)]
        requests = [
            {
                **options,
                "seed": vote,
                **self.request_options,
                "messages": [{"role": "user", "content": text}],
                "vote": vote,
            }
            for text in texts
            for vote in votes
        ]
        if self.local is not None:
            return self._sample(self.local, requests, num_answers)
        answers = self.server.answers(requests)
        return [answers[start : start + num_answers] for start in range(0, len(answers), num_answers)]

    def _sample(self, local: RankingModel, requests: list[dict[str, Any]], number: int) -> list[list[Answer]]:
        """Return the local model's answers to each question, sampled together and apart from other questions.

        They depend on the question, the number of votes and the settings, and not on what is saved.
        """
        answers = []
        for start in tqdm(range(0, len(requests), number), desc="Judging", disable=None):
            keys = [self.saved.key(request | {"votes": number}) for request in requests[start : start + number]]
            if any(key not in self.saved for key in keys):
                prompts, seed = [requests[start]["messages"]], int(keys[0][:8], 16)
                (texts,) = sample_completions(local.model, local.tokenizer, prompts, number, self.options, seed=seed)
                for key, text in zip(keys, texts, strict=True):
                    self.saved.add(key, Answer(text, []))
            answers.append([self.saved[key] for key in keys])
        return answers

    @staticmethod
    def _fingerprints(local: RankingModel) -> Settings:
        return {**local.settings(), **template_date(local.tokenizer)}
