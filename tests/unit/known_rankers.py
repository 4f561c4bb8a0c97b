"""Rankers and comparisons whose rewards are known, and functions that rank."""

import numpy as np
from datasets import Dataset

from prefopt_trl import FunctionRanker
from prefopt_trl.rankers.base import sigmoid
from prefopt_trl.rankers.comparative import ComparativeRanker


def number(prompts, completions, **columns):
    """A completion is a number, its reward."""
    return [None if text == "none" else float(text) for text in completions]


def brevity(prompts, completions, **columns):
    return [-float(len(text)) for text in completions]


def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def pointwise():
    return FunctionRanker(number)


class Reader(ComparativeRanker):
    """Adds `bias` to the log-odds of the completion shown first."""

    def __init__(self, bias):
        self.bias, self.num_asked = bias, 0

    def both_orders(self, prompts, first, second, rows=None):
        self.num_asked += len(prompts)
        margins = np.array([float(a) - float(b) for a, b in zip(first, second, strict=True)])
        return np.stack([sigmoid(margins + self.bias), sigmoid(margins - self.bias)], axis=1)

    def settings(self):
        return {"temperature": self.temperature}


def comparisons(margins, prompts=None, lengths=None, **columns):
    """Comparisons with these reward differences, and characters of the chosen minus the rejected completion."""
    lengths = [0] * len(margins) if lengths is None else lengths
    given = {
        "prompt": [f"{prompt}?" for prompt in (range(len(margins)) if prompts is None else prompts)],
        "chosen": [repr(float(one)).ljust(40 + max(length, 0)) for one, length in zip(margins, lengths, strict=True)],
        "rejected": ["0.0".ljust(40 + max(-length, 0)) for length in lengths],
    }
    return Dataset.from_dict(given | columns)
