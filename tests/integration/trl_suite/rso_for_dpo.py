"""A pytest plugin (`-p rso_for_dpo`): tests that were written for `DPOTrainer` run with `RSOTrainer`."""

import pytest

from prefopt_trl import RSOConfig, RSOTrainer


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    for module in {item.module for item in items}:
        assert module.DPOTrainer.__name__ == "DPOTrainer" and module.DPOConfig.__name__ == "DPOConfig"
        module.DPOTrainer, module.DPOConfig = RSOTrainer, RSOConfig
