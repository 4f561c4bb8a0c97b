"""The inputs of a pairwise ranker (RSO section 2): one text that holds a prompt and two completions."""

from collections.abc import Callable

Template = Callable[[str, str, str], str]

ANSWERS = ("A", "B")

# The paper's T5 answers in its decoder, so its input ends with the second completion. A causal model needs to be told
# where the answer starts. The newline keeps it a token of its own: tokenizers do not join a letter to a line break.
ANSWER_CUE = " [ANSWER]\n"


def dialogue(prompt_text: str, first_text: str, second_text: str) -> str:
    """Write a comparison of two replies in a conversation (RSO section 2, AI assistant tasks).

    The answer cue at the end is a deviation from the paper, whose T5 needs none.

    Args:
        prompt_text (`str`):
            Conversation up to the reply.
        first_text (`str`):
            Completion that answer "A" prefers.
        second_text (`str`):
            Completion that answer "B" prefers.

    Returns:
        `str`: text whose next token is "A" or "B".

    Example:

    ```python
    >>> dialogue("Human: Hi!", "Hello.", "Go away.")
    '[CONTEXT] Human: Hi! [RESPONSE A] Hello. [RESPONSE B] Go away. [ANSWER]\\n'
    ```
    """
    return f"[CONTEXT] {prompt_text} [RESPONSE A] {first_text} [RESPONSE B] {second_text}{ANSWER_CUE}"


def summary(prompt_text: str, first_text: str, second_text: str) -> str:
    """Write a comparison of two summaries of a document (RSO section 2, summarisation), as [`dialogue`] does.

    Args:
        prompt_text (`str`):
            Document.
        first_text (`str`):
            Summary that answer "A" prefers.
        second_text (`str`):
            Summary that answer "B" prefers.

    Returns:
        `str`: text whose next token is "A" or "B".
    """
    return f"[CONTEXT] {prompt_text} [SUMMARY A] {first_text} [SUMMARY B] {second_text}{ANSWER_CUE}"


TEMPLATES: dict[str, Template] = {"dialogue": dialogue, "summary": summary}


def resolve_template(template: str | Template) -> Template:
    """Turn the name of a template into its function.

    Args:
        template (`str` or `Callable`):
            `"dialogue"`, `"summary"`, or a function `(prompt_text, first_text, second_text) -> str` of your own, which
            is returned as it is.

    Returns:
        `Callable`: function `(prompt_text, first_text, second_text) -> str`.

    Raises:
        ValueError: if the name is unknown.
    """
    if callable(template):
        return template
    if template not in TEMPLATES:
        raise ValueError(
            f"`template` is {template!r}. Give one of {', '.join(map(repr, TEMPLATES))}, or a function "
            "`(prompt_text, first_text, second_text) -> str`."
        )
    return TEMPLATES[template]
