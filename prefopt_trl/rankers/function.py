"""The function ranker: rewards from a Python function, in the signature of TRL's `reward_funcs`."""

import inspect
from collections.abc import Callable, Sequence, Sized
from itertools import islice

from prefopt_trl.data.formats import Completion, Prompt, wrap_completion
from prefopt_trl.rankers.base import PointwiseRanker
from prefopt_trl.runtime.settings import Settings, function_fingerprint


class FunctionRanker(PointwiseRanker):
    """A Python function that gives each completion its reward, such as those of TRL's `GRPOTrainer`.

    `compare` and `score` are those of [`PointwiseRanker`].

    Args:
        function (`Callable`):
            Called as `function(prompts=[...], completions=[...])`, with the prompt repeated for each of its
            completions. It returns a list with one number per completion. Completions have the format of their prompt:
            text, or a list of messages. Other columns of a dataset are not passed.
        version (`str`, *optional*):
            Name of what the function computes, by which sampled datasets are reused (see [`settings`]). By default
            the function is identified by its source and closure. Set a version if the function reads globals, calls
            other functions or holds a model, and change it whenever the rewards change.

    Raises:
        TypeError: if the function cannot be called with these two arguments, or is a coroutine function.

    Example:

    ```python
    >>> def brevity(prompts, completions, **kwargs):
    ...     return [-len(completion) for completion in completions]
    >>> FunctionRanker(brevity).score(["What is 2 + 2?"], [["4", "It is 4."]])
    [array([-1., -8.])]
    ```

    A conversational completion is a list of messages, whose `len` is 1. Read its text:

    ```python
    >>> def conversational_brevity(prompts, completions, **kwargs):
    ...     return [-len(completion[-1]["content"]) for completion in completions]
    >>> FunctionRanker(conversational_brevity).score([[{"role": "user", "content": "2 + 2?"}]], [["4", "It is 4."]])
    [array([-1., -8.])]
    ```
    """

    def __init__(self, function: Callable[..., Sequence[float]], version: str | None = None) -> None:
        if inspect.iscoroutinefunction(function):
            raise TypeError("`function` is a coroutine function. Wrap it in a plain one that runs it to completion.")
        try:
            inspect.signature(function).bind(prompts=[], completions=[])
        except TypeError as error:
            raise TypeError(
                f"`function` cannot be called as function(prompts=..., completions=...): {error}. No other "
                "arguments are passed: bind them, for example with `functools.partial`."
            ) from error
        self.function, self.version = function, version

    def rewards(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[float]]:
        """Call the function once for all completions, and return the rewards of each prompt.

        Raise `ValueError` if the function does not return one number per completion.
        """
        rows = list(zip(prompts, completions, strict=True))
        pairs = [(prompt, completion) for prompt, row_completions in rows for completion in row_completions]
        rewards = self.function(
            prompts=[prompt for prompt, _ in pairs],
            completions=[wrap_completion(prompt, completion) for prompt, completion in pairs],
        )
        if not isinstance(rewards, Sized) or len(rewards) != len(pairs):
            found = f"{len(rewards)} rewards" if isinstance(rewards, Sized) else repr(rewards)
            raise ValueError(
                f"The function of FunctionRanker returned {found}, {len(pairs)} rewards were expected. Return a list "
                "with one per completion, in the same order."
            )
        in_order = iter(rewards)
        return [list(islice(in_order, len(row_completions))) for row_completions in completions]

    def settings(self) -> Settings:
        """Return the ranker's version, or the function's name and a fingerprint of its source."""
        function = function_fingerprint(self.function) if self.version is None else self.version
        return {"class": type(self).__name__, "function": function}
