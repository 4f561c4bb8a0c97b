"""The function ranker: rewards from a Python function, in the signature of TRL's `reward_funcs`."""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence, Set, Sized
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, cast

from prefopt_trl.data.formats import Completion, Prompt, wrap_completion
from prefopt_trl.rankers.base import Columns, PointwiseRanker, check_rewards
from prefopt_trl.runtime.settings import Settings, function_fingerprint


class FunctionRanker(PointwiseRanker):
    """A Python function that gives each completion its reward, such as those of TRL's `GRPOTrainer`.

    `compare` and `score` are those of [`PointwiseRanker`].

    Args:
        function (`Callable`):
            Called as `function(prompts=[...], completions=[...], **columns)`, with the prompt and the other columns of
            its row repeated for each of its completions. It returns a list with one number per completion, or None
            for one on which it has no opinion, which is then left out. It may be `async`. Completions have the format
            of their prompt: text, or a list of messages. A function without `**kwargs` gets the columns that it names.
        version (`str`, *optional*):
            Name of what the function computes, by which sampled datasets are reused (see [`settings`]). By default
            the function is identified by its source and closure. Set a version if the function reads globals, calls
            other functions or holds a model, and change it whenever the rewards change.

    Raises:
        TypeError: if the function takes no `prompts` or no `completions`.

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

    reads_columns = True
    may_abstain = True

    def __init__(self, function: Callable[..., Any], version: str | None = None) -> None:
        parameters = inspect.signature(function).parameters.values()
        self.named = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
        required = {one.name for one in parameters if one.name in self.named and one.default is one.empty}
        self.required_columns = required - {"prompts", "completions"}
        self.takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
        if not self.takes_all and not {"prompts", "completions"} <= self.named:
            raise TypeError(
                "`function` cannot be called as function(prompts=..., completions=...): it takes "
                f"{', '.join(sorted(self.named)) or 'nothing by name'}. Name its arguments as TRL does."
            )
        self.function, self.version = function, version

    def rewards(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], columns: Columns | None = None
    ) -> list[list[float | None]]:
        """Call the function once for all completions, and return the rewards of each prompt.

        Raise `ValueError` if the function needs a column that is not given, or does not return None or a finite number
        for each completion.
        """
        columns = columns or {}
        self.check_columns(columns)
        for name, column in columns.items():
            if len(column) != len(prompts):
                raise ValueError(f"The column `{name}` has {len(column)} values for {len(prompts)} prompts.")
        rows = [row for row, several in enumerate(completions) for _ in several]
        flat = [completion for several in completions for completion in several]
        given = {name: column for name, column in columns.items() if self.takes_all or name in self.named}
        rewards = self.function(
            prompts=[prompts[row] for row in rows],
            completions=[wrap_completion(prompts[row], one) for row, one in zip(rows, flat, strict=True)],
            **{name: [column[row] for row in rows] for name, column in given.items()},
        )
        if inspect.isawaitable(rewards):
            rewards = _awaited(rewards)
        is_list = isinstance(rewards, Sized) and not isinstance(rewards, Mapping | Set | str)  # or array, or tensor
        if not is_list or len(rewards) != len(flat):
            found = f"{len(rewards)} rewards" if is_list else f"{rewards!r:.60}"
            raise ValueError(
                f"The function of FunctionRanker returned {found}, {len(flat)} rewards were expected. Return a list "
                "with one per completion, in the same order."
            )
        in_order = iter(cast(Sequence[float | None], rewards))
        of_prompts = [list(islice(in_order, len(several))) for several in completions]
        numbers = [[0.0 if reward is None else reward for reward in of_prompt] for of_prompt in of_prompts]
        # Here, because NaN is no opinion from here on
        check_rewards(numbers, prompts, completions, "The function of FunctionRanker")
        return of_prompts

    def settings(self) -> Settings:
        """Return the ranker's version, or the function's name and a fingerprint of its source."""
        function = function_fingerprint(self.function) if self.version is None else self.version
        return {"class": type(self).__name__, "function": function, "temperature": self.temperature}


def _awaited(rewards: Any) -> Any:
    """Run a coroutine in a thread of its own, because a notebook runs an event loop in this one."""

    async def wait() -> Any:
        return await rewards

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, wait()).result()
