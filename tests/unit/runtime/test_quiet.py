"""What others say at every start is left out, and nothing else is."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import prefopt_trl
from prefopt_trl.runtime.quiet import ON_IMPORT, quiet_libraries

SCRIPT = """
from prefopt_trl import RSOConfig, RSOTrainer
RSOConfig("out", gamma=0.05, use_cpu=True, bf16=False, pad_token="<pad>")
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


@pytest.mark.parametrize(("name", "message"), ON_IMPORT.items())
def test_one_message_of_a_logger_is_left_out(name, message):
    quiet_libraries()
    records = [logging.makeLogRecord({"name": name, "msg": said}) for said in (f"{message}, and more", "Other")]
    assert [bool(logging.getLogger(name).filter(record)) for record in records] == [False, True]


def test_a_process_that_a_command_spawns_is_quiet_too():
    """It imports the command's module, and does not call it."""
    script = "import logging, prefopt_trl.cli.main; print(len(logging.getLogger('DeepSpeed').filters))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "1\n"
