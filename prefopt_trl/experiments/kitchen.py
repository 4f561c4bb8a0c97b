"""The controlled task: a small kitchen in which the true reward of any text is known.

A guest orders a dish, and a cook names the ingredients:

    Ada wants a warm, hearty soup. Take ginger, carrot and walnuts.

Each ingredient adds heat and richness, and so does the kind of dish. The *true reward* is 10, minus 2 for each unit of
distance from the taste ordered, minus 1 for each misplaced word. So seasoning raises the reward up to the taste
ordered and lowers it beyond.

Two cooks write the data, and both season too little. The house cook, who adds half of what is missing, writes the SFT
corpus. The comparisons show the dishes of another cook, who adds even less, varies more, prefers garden vegetables,
and sometimes repeats an ingredient or forgets a word. Preferences are drawn from the true rewards by the Bradley-Terry
model, so the labels are noisy, and the dish with more seasoning is usually preferred. A policy that extrapolates this
overshoots.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt_trl.experiments.tiny import tiny_llama, word_tokenizer

GUESTS = [
    "Ada", "Ben", "Cleo", "Dora", "Emil", "Finn", "Greta", "Hugo",
    "Ines", "Jonas", "Kira", "Leo", "Mina", "Nils", "Olga", "Pia",
]  # fmt: skip
OPENINGS = ["Take", "Use", "Mix", "Combine"]
PUNCTUATION = [",", "."]

# What a guest orders, and what the kinds of dish and the ingredients add: units of (heat, richness).
HEAT = {"mild": 1, "warm": 3, "hot": 5, "fiery": 7}
RICHNESS = {"light": 1, "hearty": 3, "rich": 5, "lavish": 7}
DISHES = {"salad": (0, 0), "soup": (0, 0), "stew": (0, 1), "pie": (0, 1), "curry": (1, 0), "ragout": (1, 1)}
INGREDIENTS = {
    "lettuce": (0, 0), "cucumber": (0, 0), "celery": (0, 0), "carrot": (0, 1), "pumpkin": (0, 1), "peas": (0, 1),
    "butter": (0, 2), "walnuts": (0, 2), "avocado": (0, 2), "cream": (0, 3), "cheddar": (0, 3), "radish": (1, 0),
    "ginger": (1, 0), "onion": (1, 0), "garlic": (1, 1), "pesto": (1, 2), "satay": (1, 3), "pepper": (2, 0),
    "mustard": (2, 0), "salsa": (2, 1), "kimchi": (2, 2), "chili": (3, 0), "wasabi": (3, 0), "harissa": (3, 1),
}  # fmt: skip
# Favorite ingredients of the cook of the comparisons.
GARDEN = ["lettuce", "cucumber", "celery", "carrot", "pumpkin", "peas", "radish", "onion"]

PERFECT_MARKS = 10.0
POINTS_PER_UNIT = 2.0
POINTS_PER_FAULT = 1.0
# Share of the comparisons' completions that lack a word or a punctuation mark.
SLIP_RATE = 0.1
# Only the first ingredients of a text count, and each further one is two misplaced words.
MAX_INGREDIENTS = 6

# The longest tidy completion has 14 tokens, EOS included; the rest shows whether a policy fails to stop.
MAX_NEW_TOKENS = 20

_ORDERS = [
    f"{guest} wants a {heat}, {richness} {dish}."
    for guest, heat, richness, dish in itertools.product(GUESTS, HEAT, RICHNESS, DISHES)
]
_ORDER = re.compile(rf"\w+ wants a ({'|'.join(HEAT)}), ({'|'.join(RICHNESS)}) ({'|'.join(DISHES)})\.")
_NAMES = list(INGREDIENTS)
_FLAVORS = np.array(list(INGREDIENTS.values()))
_FONDNESS = np.array([1.0 if name in GARDEN else 0.0 for name in INGREDIENTS])


def true_reward(prompts: Sequence[str], completions: Sequence[str], **kwargs: object) -> list[float]:
    """Return the true rewards of completions, with the signature of TRL's `reward_funcs`.

    The reward is `10 - 2 * distance - faults`. The distance is Euclidean, between the taste ordered and the (heat,
    richness) of the dish: the sum over its kind and its first six ingredients. The faults are the words and
    punctuation marks to insert, delete or replace to make the text a tidy sentence that names each of these
    ingredients once.

    Each prompt is an order of [`ControlledTask`], and each completion is any text. Raise `ValueError` for any other
    prompt, or if the lengths differ.

    >>> order = "Ada wants a warm, hearty soup."  # heat 3, richness 3
    >>> true_reward([order] * 3, [" Take pepper, garlic and walnuts.", " Take pepper and pesto.", " pepper, pesto"])
    [10.0, 8.0, 5.0]
    """
    return [_marks(missing, text) for missing, text in zip(_missing_flavors(prompts), completions, strict=True)]


def _missing_flavors(prompts: Sequence[str]) -> np.ndarray:
    """Return the (heat, richness) that the ingredients should add to each dish, shape (n, 2)."""
    missing = []
    for row, prompt in enumerate(prompts):
        order = _ORDER.fullmatch(prompt)
        if order is None:
            raise ValueError(
                f"Prompt {row} is {prompt!r}, not an order of the controlled task. Write it like {_ORDERS[0]!r}."
            )
        heat, richness, dish = order.groups()
        missing.append((HEAT[heat] - DISHES[dish][0], RICHNESS[richness] - DISHES[dish][1]))
    return np.array(missing)


def _marks(missing_flavor: np.ndarray, completion: str) -> float:
    words = re.findall(r"\w+|[^\w\s]", completion)
    ingredients = [word for word in words if word in INGREDIENTS][:MAX_INGREDIENTS]
    flavor = np.sum([INGREDIENTS[name] for name in ingredients], axis=0) if ingredients else np.zeros(2)
    distance = float(np.linalg.norm(flavor - missing_flavor))
    opening = words[0] if words and words[0] in OPENINGS else OPENINGS[0]
    faults = _edit_distance(words, _tidy_words(opening, list(dict.fromkeys(ingredients)) or ["<any ingredient>"]))
    return PERFECT_MARKS - POINTS_PER_UNIT * distance - POINTS_PER_FAULT * faults


def _tidy_words(opening: str, ingredients: Sequence[str]) -> list[str]:
    """Return `Take`, `ginger`, `,`, `garlic`, `and`, `cream`, `.`: the words and marks of a tidy sentence."""
    words = [opening, ingredients[0]]
    for separator, ingredient in zip([","] * (len(ingredients) - 2) + ["and"], ingredients[1:], strict=False):
        words += [separator, ingredient]
    return [*words, "."]


def _edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the fewest insertions, deletions and replacements that turn one list into the other (Levenshtein)."""
    costs = list(range(len(second) + 1))
    for row, word in enumerate(first, start=1):
        diagonal, costs[0] = costs[0], row
        for column, other in enumerate(second, start=1):
            diagonal, costs[column] = (
                costs[column],
                min(costs[column] + 1, costs[column - 1] + 1, diagonal + (word != other)),
            )
    return costs[-1]


def _house_cook(rng: np.random.Generator, prompts: Sequence[str]) -> list[str]:
    return [_sentence(words) for words in _cook(rng, prompts, share=0.5, wavering=1.0, most=4, attention=np.inf)]


def _other_cook(rng: np.random.Generator, prompts: Sequence[str]) -> list[str]:
    completions = []
    for words in _cook(rng, prompts, share=0.3, wavering=1.5, most=5, attention=3.0, liking=_FONDNESS):
        if rng.random() < SLIP_RATE:
            del words[rng.integers(len(words))]
        completions.append(_sentence(words))
    return completions


def _cook(
    rng: np.random.Generator,
    prompts: Sequence[str],
    share: float,
    wavering: float,
    most: int,
    attention: float,
    liking: np.ndarray | float = 0.0,
) -> list[list[str]]:
    """Cook a dish for each prompt, and return the words of each completion.

    The cook aims at `share` of the missing flavor, with noise of `wavering` units, in 2 to `most` ingredients. Each is
    likely to be close to an equal part of the flavor that is still missing. `liking` is added to the log-odds of each
    ingredient, and `attention` subtracted from those of ingredients already in the dish.
    """
    counts = rng.integers(2, most + 1, size=len(prompts))
    aims = share * _missing_flavors(prompts) + wavering * rng.standard_normal((len(prompts), 2))
    picks: list[np.ndarray] = []
    for position in range(most):
        part = aims / np.maximum(counts - position, 1)[:, None]
        log_odds = liking - ((_FLAVORS - part[:, None]) ** 2).sum(axis=-1) / 1.5
        for earlier in picks:
            log_odds[np.arange(len(prompts)), earlier] -= attention
        # Gumbel-max trick: a draw from the softmax of the log-odds.
        picks.append((log_odds + rng.gumbel(size=log_odds.shape)).argmax(axis=1))
        aims = aims - _FLAVORS[picks[-1]]
    openings = rng.choice(OPENINGS, size=len(prompts))
    return [
        _tidy_words(opening, [_NAMES[pick] for pick in row[:count]])
        for opening, row, count in zip(openings, np.stack(picks, axis=1), counts, strict=True)
    ]


def _sentence(words: Sequence[str]) -> str:
    return "".join(word if word in PUNCTUATION else f" {word}" for word in words)


@dataclass(frozen=True)
class ControlledTask:
    """The datasets of the controlled task, generated on demand from a seed.

    The arguments are the number of rows of each dataset and the random seed. The training and evaluation prompts of
    policies are all different, out of 1,536 orders. The evaluation prompts occur in no other dataset.

    >>> ControlledTask().comparisons[1]  # doctest: +NORMALIZE_WHITESPACE
    {'prompt': 'Hugo wants a hot, hearty curry.', 'chosen': ' Mix pesto, cucumber, celery, onion and pumpkin.',
     'rejected': ' Use cucumber, pumpkin, radish and peas.'}
    """

    num_sft: int = 12000
    num_prompts: int = 400
    num_eval_prompts: int = 256
    num_comparisons: int = 40000
    seed: int = 0

    @cached_property
    def sft_dataset(self) -> Dataset:
        """Prompts, some repeated, and the house cook's completions: `prompt`, `completion`."""
        rng = self._rng(1)
        prompts = self._draw_prompts(rng, self.num_sft)
        return Dataset.from_dict({"prompt": prompts, "completion": _house_cook(rng, prompts)})

    @cached_property
    def eval_dataset(self) -> Dataset:
        """Prompts to evaluate on and the house cook's completions, the SFT targets: `prompt`, `completion`."""
        prompts = self._shuffled_orders[: self.num_eval_prompts]
        return Dataset.from_dict({"prompt": prompts, "completion": _house_cook(self._rng(2), prompts)})

    @cached_property
    def comparisons(self) -> Dataset:
        """Pairs of the other cook's completions with noisy labels: `prompt`, `chosen`, `rejected`."""
        rng = self._rng(3)
        prompts = self._draw_prompts(rng, self.num_comparisons)
        first, second = _other_cook(rng, prompts), _other_cook(rng, prompts)
        advantage = np.subtract(true_reward(prompts, first), true_reward(prompts, second))
        first_is_chosen = rng.random(len(prompts)) < 1 / (1 + np.exp(-advantage))
        return Dataset.from_dict(
            {
                "prompt": prompts,
                "chosen": np.where(first_is_chosen, first, second).tolist(),
                "rejected": np.where(first_is_chosen, second, first).tolist(),
            }
        )

    @cached_property
    def answers(self) -> Dataset:
        """The prompts to train policies on, and answers to them: two of the cook of the comparisons, and one each of
        a poor, a fair (the house cook) and a good cook: `prompt`, `first`, `second`, `poor`, `fair`, `good`."""
        rng, prompts = self._rng(4), self._train_orders[: self.num_prompts]
        answers = {name: _other_cook(rng, prompts) for name in ("first", "second")}
        for name, share in {"poor": 0.1, "fair": 0.5, "good": 0.9}.items():
            cooked = _cook(rng, prompts, share, wavering=1.0, most=4, attention=np.inf)
            answers[name] = [_sentence(words) for words in cooked]
        return Dataset.from_dict({"prompt": prompts, **answers})

    def tokenizer(self, extra_words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
        """Make a [`word_tokenizer`] with one token for each word and punctuation mark of the task.

        `extra_words`, such as the parts of a ranker's template with their spaces, are one token each too.
        """
        words = [*GUESTS, "wants", "a", "and", *HEAT, *RICHNESS, *DISHES, *OPENINGS, *INGREDIENTS]
        # Also without the space: any word may start a text, after a policy's slip or a template's separator
        return word_tokenizer([*words, *(f" {word}" for word in words), *PUNCTUATION, *extra_words])

    def policy_model(self, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
        """Make a tiny LLaMA for this task, as a policy or as a ranker, with weights from `seed`."""
        sizes = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "max_position_embeddings": 128}
        return tiny_llama(tokenizer, **sizes, seed=seed)

    @cached_property
    def _shuffled_orders(self) -> list[str]:
        return [_ORDERS[index] for index in self._rng(0).permutation(len(_ORDERS))]

    @property
    def _train_orders(self) -> list[str]:
        return self._shuffled_orders[self.num_eval_prompts :]

    def _draw_prompts(self, rng: np.random.Generator, size: int) -> list[str]:
        orders = self._train_orders
        return [orders[index] for index in rng.integers(len(orders), size=size)]

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])
