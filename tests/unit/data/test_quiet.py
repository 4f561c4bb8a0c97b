"""What others say at every start is left out, and nothing else is."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import prefopt_trl
from prefopt_trl.data.quiet import quiet_libraries

SCRIPT = """
from prefopt_trl import RSOConfig, RSOTrainer
RSOConfig("out", use_cpu=True, bf16=False, pad_token="<pad>")
"""


def test_a_script_is_told_what_its_user_can_mend(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(prefopt_trl.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    said = [line for line in run.stderr.splitlines() if not line.startswith("  ")]
    assert ["FutureWarning: `pad_token` is deprecated" in line for line in said] == [True]


def test_a_filter_of_the_user_comes_first():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_libraries()
        with pytest.raises(FutureWarning):
            warnings.warn("`gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU"),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community"),
    ],
)
def test_one_message_of_a_logger_is_left_out(name, message, caplog, monkeypatch):
    quiet_libraries()
    logger = logging.getLogger(name)
    monkeypatch.setattr(logger, "propagate", True)
    logger.warning("%s, and more", message)
    logger.warning("Something else")
    assert {record.getMessage() for record in caplog.records if record.name == name} == {"Something else"}
