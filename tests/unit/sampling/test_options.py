import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from prefopt_trl.generation.options import GenerationOptions, is_number
from prefopt_trl.sampling.options import SamplingOptions


def test_they_are_read_without_torch_and_trl() -> None:
    code = "import prefopt_trl.sampling.options, sys; sys.exit(bool({'numpy', 'torch', 'trl'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a whole number, at least 1, got 0"),
        ({"max_new_tokens": 2.0}, "`max_new_tokens` must be a whole number, at least 1, got 2.0"),
        ({"temperature": 0.0}, "`temperature` must be greater than 0 and finite, got 0.0. Algorithm 1 assumes 1."),
        ({"temperature": math.nan}, "`temperature` must be greater than 0 and finite, got nan"),
        ({"temperature": "1"}, "`temperature` must be a number, got '1'"),
        ({"top_p": 0.0}, "`top_p` must be a number in .0, 1., got 0.0"),
        ({"top_p": 1.01}, "`top_p` must be a number in .0, 1., got 1.01"),
        ({"top_p": math.nan}, "`top_p` must be a number in .0, 1., got nan"),
        ({"top_k": -1}, "`top_k` must be a whole number, at least 0, got -1"),
        ({"generation_batch_size": 0}, "`generation_batch_size` must be a whole number, at least 1, got 0"),
        ({"generation_batch_size": "8"}, "`generation_batch_size` must be a whole number, at least 1, got '8'"),
        ({"generation_batch_size": True}, "`generation_batch_size` must be a whole number, at least 1, got True"),
        ({"generation_memory_budget": 0.0}, "`generation_memory_budget` must be greater than 0 and finite, got 0.0"),
        ({"generation_memory_budget": math.inf}, "`generation_memory_budget` must be .* finite, got inf. It is in G"),
        ({"generation_memory_budget": "4GiB"}, "`generation_memory_budget` must be a number, got '4GiB'"),
        ({"share_prefix": "auto"}, "`share_prefix` must be True or False, got 'auto'"),
        ({"strategy": "best"}, "`strategy` must be one of rso, sft, top-k, got 'best'"),
        (
            {"pairing": "league"},
            "`pairing` must be one of first-round, .*, correct-wrong, ranking, best, got 'league'",
        ),
        ({"min_margin": math.nan}, "`min_margin` must be a finite number, got nan"),
        ({"min_margin": 2.0, "max_margin": 1.0}, "`min_margin`=2.0 is above `max_margin`=1.0. Swap them"),
        ({"max_margin": 1.0, "pairing": "ranking"}, "`max_margin` has no effect with pairing='ranking'. Leave it out"),
        ({"min_margin": 0.0, "pairing": "best"}, "`min_margin` has no effect with pairing='best'. Leave it out"),
        ({"rejected_deviations": 1.0}, "`rejected_deviations` has no effect with pairing='first-round'"),
        ({"length_penalty": -0.1}, "`length_penalty` must be at least 0 and finite, got -0.1. It is in nats per char"),
        (
            {"unfinished_penalty": 1.0, "pairing": "correct-wrong"},
            "`unfinished_penalty` changes rewards, and pairing=",
        ),
        ({"num_candidates": 8.0}, "`num_candidates` must be a whole number, at least 1, got 8.0"),
        ({"num_samples": 1}, "`num_samples` must be a whole number, at least 2, got 1"),
        ({"num_samples": 9, "num_candidates": 8}, "`num_samples`=9 completions cannot be kept out of .*=8"),
        ({"rejection_beta": -0.1}, "`rejection_beta` must be 'auto', or at least 0, got -0.1. The paper uses 0.5."),
        ({"rejection_beta": math.nan}, "`rejection_beta` must be 'auto', or at least 0, got nan"),
        ({"rejection_beta": "0.5"}, "`rejection_beta` must be 'auto', or at least 0, got '0.5'"),
    ],
)
def test_an_option_out_of_range_is_named(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**given)


def test_a_number_that_may_be_zero() -> None:
    is_number(SimpleNamespace(weight=0), "weight", "")
    with pytest.raises(ValueError, match="`weight` must be at least 0 and finite, got -1. Take 1."):
        is_number(SimpleNamespace(weight=-1), "weight", "Take 1.")


@pytest.mark.parametrize(("strategy", "beta"), [("rso", 0.7), ("sft", math.inf), ("top-k", 0.0)])
def test_each_strategy_is_algorithm_1_with_a_beta(strategy: str, beta: float) -> None:
    assert SamplingOptions(strategy=strategy, rejection_beta=0.7).effective_beta == beta


def test_options_of_others_with_changes() -> None:
    many = SamplingOptions(num_candidates=16, top_k=5, temperature=0.7)
    assert SamplingOptions.of(many, top_k=7) == SamplingOptions(num_candidates=16, top_k=7, temperature=0.7)
    assert GenerationOptions.of(many) == GenerationOptions(top_k=5, temperature=0.7)
    assert SamplingOptions.of() == SamplingOptions()
    with pytest.raises(ValueError, match="`top_k` must be"):
        SamplingOptions.of(many, top_k=-1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_candidate", "Did you mean `num_candidates`?"),
        ("beta", "Did you mean `rejection_beta`?"),
        ("batch_size", "Did you mean `generation_batch_size`?"),
        ("xyz", "The options are max_new_tokens, temperature, "),
    ],
)
def test_a_name_that_is_no_option_is_told_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(TypeError) as error:
        SamplingOptions.of(None, **{name: 1})
    assert f"`{name}` is not an option of SamplingOptions. {hint}" in str(error.value)
