"""Samples against the law that they should follow."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from scipy.stats import chisquare

CHANCE = 1e-6  # of each chi-square test to fail on samples that do follow the law


def p_value(samples: Sequence[Hashable], law: Mapping[Hashable, float]) -> float:
    """Chi-square test of samples against their probabilities; rare outcomes share a cell, so that 5 or more are
    expected of each."""
    assert math.isclose(sum(law.values()), 1)
    if not set(samples) <= law.keys():
        return 0.0
    counts = Counter(samples)
    observed, expected = [0], [0.0]
    for outcome, probability in sorted(law.items(), key=lambda item: item[1]):
        if expected[-1] >= 5:
            observed.append(0)
            expected.append(0.0)
        observed[-1] += counts[outcome]
        expected[-1] += probability * len(samples)
    assert len(expected) > 1
    return chisquare(observed, expected).pvalue
