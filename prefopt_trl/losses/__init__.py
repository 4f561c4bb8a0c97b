"""The papers' losses as pure functions of log-probabilities: one function per equation, one value per prompt."""

from prefopt_trl.losses.listwise import lipo_lambda, plackett_luce, pro, pro_terms, rrhf
from prefopt_trl.losses.pairwise import hinge, hinge_norm, sigmoid_norm, slic, unlikelihood, with_labels

__all__ = [
    "hinge",
    "hinge_norm",
    "lipo_lambda",
    "plackett_luce",
    "pro",
    "pro_terms",
    "rrhf",
    "sigmoid_norm",
    "slic",
    "unlikelihood",
    "with_labels",
]
