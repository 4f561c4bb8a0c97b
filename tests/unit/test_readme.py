"""What the README shows exists."""

import ast
import re
from pathlib import Path

import pytest

import prefopt_trl

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", PYTHON)
def test_python_blocks_parse_and_their_imports_exist(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = __import__(node.module, fromlist=["*"])
            assert all(hasattr(module, name.name) for name in node.names)


def test_there_are_python_blocks():
    assert len(PYTHON) >= 3


def test_public_names_exist_and_are_the_documented_ones():
    for name in prefopt_trl.__all__:
        assert getattr(prefopt_trl, name) is not None
    assert dir(prefopt_trl) == sorted(prefopt_trl.__all__)


def test_files_and_make_targets_exist():
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
