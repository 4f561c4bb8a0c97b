"""What rankers read: a comparison (RSO section 2), or a prompt and one completion."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from prefopt_trl.data.formats import (
    ASSISTANT_TURN,
    Completion,
    Message,
    Prompt,
    completion_text,
    prompt_text,
    wrap_completion,
)
from prefopt_trl.data.hh_rlhf import ROLES
from prefopt_trl.data.tokenization import num_appended_tokens
from prefopt_trl.runtime.settings import Settings, function_fingerprint, template_date

Template = Callable[[str, str, str], str]
RewardTemplate = Callable[[Prompt, Completion], str]

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


def rlhflow(prompt_text: str, first_text: str, second_text: str) -> str:
    """Write the message that RLHFlow's pair-preference models read (`pair-pm` of RLHF-Reward-Modeling).

    [`PairwiseRanker`] puts it into the tokenizer's chat template, after which the next token is "A" or "B".
    """
    turns = conversation(prompt_text, "")[:-1]
    context = "".join(f"\n<turn> {turn['role']}\n {turn['content']}" for turn in turns)
    return f"[CONTEXT] \n{context}\n [RESPONSE A] {first_text} [RESPONSE B] {second_text} \n"


TEMPLATES: dict[str, Template] = {"dialogue": dialogue, "summary": summary, "rlhflow": rlhflow}


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


# OpenAssistant's message format v2, in which each turn ends with EOS
OASST = (
    "{% set turns = {'system': '<|system|>', 'user': '<|prompter|>', 'assistant': '<|assistant|>'} %}"
    "{% for message in messages %}{{ turns[message['role']] + message['content'] + eos_token }}{% endfor %}"
)


def conversation(prompt: Prompt, completion: Completion) -> list[Message]:
    """Return a prompt and its completion as messages.

    Plain text is split into the turns of an HH-RLHF transcript. Any other prompt is one turn of the user.
    """
    if not isinstance(prompt, str):
        return [*prompt, *cast(list[Message], wrap_completion(prompt, completion))]
    end = "" if prompt.rstrip().endswith(ASSISTANT_TURN.strip()) else ASSISTANT_TURN
    beginning, *turns = re.split(r"(?:^|\n\n)(System|Human|Assistant):", f"{prompt}{end}{completion}")
    names, texts = ["Human", *turns[::2]], [beginning, *turns[1::2]]
    messages = [{"role": ROLES[name], "content": text.strip()} for name, text in zip(names, texts, strict=True)]
    return messages if messages[0]["content"] else messages[1:]


def cut_prompt(
    token_ids: list[int], prompt_length: int, tokenizer: PreTrainedTokenizerBase, max_length: int, row: int
) -> list[int]:
    """Remove the beginning of a prompt, after a leading special token, so that `max_length` tokens are left.

    Raise `ValueError` if the completion alone is too long.
    """
    num_dropped = len(token_ids) - max_length
    num_kept = 1 if token_ids[0] in tokenizer.all_special_ids else 0
    if num_kept + num_dropped > prompt_length:
        raise ValueError(
            f"Prompt row {row}: even without the prompt, a completion exceeds `max_length` ({max_length} tokens). "
            "Raise `max_length`, or drop the row or the completion."
        )
    return token_ids[:num_kept] + token_ids[num_kept + num_dropped :]


class RewardText:
    """The way to write a prompt and a completion for a reward model, and to tokenize them.

    `template` is that of [`RewardModelRanker`]. Raise `ValueError` if it is neither known nor a file.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | Path | RewardTemplate | None) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.chat_template: str | None = None  # the tokenizer's
        if template == "oasst":
            self.chat_template = OASST
        elif isinstance(template, str | Path):
            if not Path(template).is_file():
                raise ValueError(f"`template` is {str(template)!r}. Give 'oasst', a Jinja file, or a function.")
            self.chat_template = Path(template).read_text(encoding="utf-8")

    def write(self, row: int, prompt: Prompt, completion: Completion) -> str:
        """Return the text of a completion. Raise `ValueError` for messages without a chat template."""
        if callable(self.template):
            return self.template(prompt, wrap_completion(prompt, completion))
        if self.template is None and isinstance(prompt, str):
            text, eos_token = completion_text(completion), self.tokenizer.eos_token or ""
            return prompt + (text if text.endswith(eos_token) else text + eos_token)
        if not (self.chat_template or self.tokenizer.chat_template):
            raise ValueError(
                f"Prompt row {row} is a list of messages, but the tokenizer has no chat template. Set "
                "`tokenizer.chat_template` to the one the model was trained with, or give plain text."
            )
        messages = conversation(prompt, completion)
        return str(self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, tokenize=False))

    def token_ids(self, text: str, prompt: Prompt) -> list[int]:
        """Tokenize the text of a completion of the prompt."""
        # A chat template writes the special tokens itself
        is_chat = self.chat_template is not None or (self.template is None and not isinstance(prompt, str))
        token_ids = self.tokenizer(text, add_special_tokens=not is_chat, verbose=False)["input_ids"]
        twice = [self.tokenizer.eos_token_id] * 2
        ends_twice = not is_chat and num_appended_tokens(self.tokenizer) and token_ids[-2:] == twice
        return token_ids[:-1] if ends_twice else token_ids

    def settings(self) -> Settings:
        """Return what tells this template from another."""
        if callable(self.template):
            return {"template": function_fingerprint(self.template)}
        digest = self.chat_template and hashlib.sha256(self.chat_template.encode()).hexdigest()
        return {"template": digest, **template_date(self.tokenizer, self.chat_template)}
