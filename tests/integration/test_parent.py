"""Processes of a command do not outlive it."""

import os
import signal
import subprocess
import sys
import time

import pytest

CHILD = (
    "import time\nfrom prefopt_trl.cli.run import end_with_parent\n"
    "end_with_parent()\nprint(__import__('os').getpid(), flush=True)\ntime.sleep(60)"
)
PARENT = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {CHILD!r}])\ntime.sleep(60)"


@pytest.mark.slow
def test_a_process_ends_with_the_launcher_that_was_killed():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)  # it is there
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("The process is still there.")
