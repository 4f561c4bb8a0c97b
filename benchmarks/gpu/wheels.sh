#!/usr/bin/env bash
# Fetch the wheels that run.py needs beside torch, transformers, accelerate and peft into the ignored folder wheels/, for
# a machine with Python 3.12 that reaches no registry. The versions are those of constraints.txt; some 2 MB, no binaries.
set -euo pipefail
cd "$(dirname "$0")"
rm -rf wheels
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "${PYTHON_VERSION:-3.12}" --constraint ../../constraints.txt --dest wheels \
    trl datasets dill multiprocess
ls -sh wheels
