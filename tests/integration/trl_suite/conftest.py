"""Finds TRL's own tests, which its PyPI package leaves out; test_trl_suite.py says how to get them."""

import os
from importlib.metadata import version
from pathlib import Path

import pytest

TRL_TESTS = Path(os.environ.get("TRL_TESTS", Path(__file__).parents[4] / "trl" / "tests"))
TESTS_ARE_MISSING = not (TRL_TESTS / "test_dpo_trainer.py").is_file()
REMEDY = (
    f"{TRL_TESTS} has no test_dpo_trainer.py. `git clone --depth 1 --branch v{version('trl')} "
    "https://github.com/huggingface/trl ../trl`, or set TRL_TESTS to the `tests` folder of a checkout."
)
left_out: list[pytest.Item] = []


@pytest.hookimpl(trylast=True)  # after -m, so that only a run which asks for these tests hears that they are missing
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if TESTS_ARE_MISSING and not os.environ.get("CI"):
        left_out.extend(item for item in items if "trl_tests" in getattr(item, "fixturenames", ()))
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_report_collectionfinish() -> str | None:
    return f"Left out are TRL's own tests: {REMEDY}" if left_out else None


@pytest.fixture
def trl_tests() -> Path:
    """The `tests` folder of a TRL checkout, which CI must have."""
    if TESTS_ARE_MISSING:
        pytest.fail(REMEDY, pytrace=False)
    return TRL_TESTS.resolve()
