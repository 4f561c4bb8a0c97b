"""The inputs of a pairwise ranker (RSO section 2): one text that holds a prompt and two completions."""

from collections.abc import Callable
from typing import NamedTuple

from prefopt_trl.data.formats import Completion, Prompt, completion_text, prompt_text

Template = Callable[[str, str, str], str]

ANSWERS = ("A", "B")

# The paper's T5 answers in its decoder, so its input ends with the second completion. A causal model needs a cue where
# the answer starts. The newline makes the answer a separate token: tokenizers do not join a letter to a line break.
ANSWER_CUE = " [ANSWER]\n"


def dialogue(prompt_text: str, first_text: str, second_text: str) -> str:
    """Write a comparison of two replies in a conversation (RSO section 2, AI assistant tasks).

    The answer cue at the end is a deviation from the paper, whose T5 needs none. The next token is "A" if the first
    reply is preferred, or "B".

    >>> dialogue("Human: Hi!", "Hello.", "Go away.")
    '[CONTEXT] Human: Hi! [RESPONSE A] Hello. [RESPONSE B] Go away. [ANSWER]\\n'
    """
    return f"[CONTEXT] {prompt_text} [RESPONSE A] {first_text} [RESPONSE B] {second_text}{ANSWER_CUE}"


def summary(prompt_text: str, first_text: str, second_text: str) -> str:
    """Write a comparison of two summaries of a document (RSO section 2, summarization), as [`dialogue`] does."""
    return f"[CONTEXT] {prompt_text} [SUMMARY A] {first_text} [SUMMARY B] {second_text}{ANSWER_CUE}"


TEMPLATES: dict[str, Template] = {"dialogue": dialogue, "summary": summary}


def resolve_template(template: str | Template) -> Template:
    """Return the function of a template's name, or a function of the user's unchanged; refuse an unknown name."""
    if callable(template):
        return template
    if template not in TEMPLATES:
        raise ValueError(
            f"`template` is {template!r}. Give one of {', '.join(map(repr, TEMPLATES))}, or a function "
            "`(prompt_text, first_text, second_text) -> str`."
        )
    return TEMPLATES[template]


class Texts(NamedTuple):
    """The arguments of a template, stripped so that a plain and a conversational comparison are the same text."""

    prompt: str
    first: str
    second: str

    @classmethod
    def of(cls, prompt: Prompt, first: Completion, second: Completion) -> "Texts":
        return cls(prompt_text(prompt).strip(), completion_text(first).strip(), completion_text(second).strip())

    def swapped(self) -> "Texts":
        return Texts(self.prompt, self.second, self.first)


class Tokens(NamedTuple):
    """The tokens that the model reads, and the tokens of the answers "A" and "B"."""

    context: list[int]
    answers: tuple[int, int]


def split_answers(with_a: list[int], with_b: list[int], where: str) -> Tokens:
    """Split a text, tokenized with the answer "A" and with "B" at its end, into what both share and the answers.

    Raises:
        ValueError: beginning with `where`, if the answers are not one token each, at the same place.
    """
    answer = len(with_a) - 1
    while answer > 0 and with_a[answer:] == with_b[answer:]:  # what the tokenizer appends, such as EOS
        answer -= 1
    differ_once = with_a[:answer] == with_b[:answer] and with_a[answer + 1 :] == with_b[answer + 1 :]
    if not differ_once or with_a[answer] == with_b[answer]:
        raise ValueError(
            f"{where}: the tokenizer does not write the answers A and B as one token each, after the same tokens. End "
            "the `template` where a letter starts a new token, as after a line break, or use another tokenizer."
        )
    return Tokens(with_a[:answer], (with_a[answer], with_b[answer]))
