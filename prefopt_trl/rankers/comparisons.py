"""One comparison of two completions, as the texts that a template is given and as the tokens that a model reads."""

from typing import NamedTuple

from prefopt_trl.data.formats import Completion, Prompt, completion_text, prompt_text


class Texts(NamedTuple):
    """What a template is given: without the white space around it, so that the plain and the conversational form of a
    comparison are the same to the model."""

    prompt: str
    first: str
    second: str

    @classmethod
    def of(cls, prompt: Prompt, first: Completion, second: Completion) -> "Texts":
        return cls(prompt_text(prompt).strip(), completion_text(first).strip(), completion_text(second).strip())

    def swapped(self) -> "Texts":
        return Texts(self.prompt, self.second, self.first)


class Tokens(NamedTuple):
    """What the model reads, and the tokens that would answer "A" and "B" next."""

    context: list[int]
    answers: tuple[int, int]


def split_answers(with_a: list[int], with_b: list[int], where: str) -> Tokens:
    """Split one text, tokenised with the answer "A" and with "B" at its end, into what both share and the answers.

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
