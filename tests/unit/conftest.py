"""A Hub for the tests of what is pushed: a server on this machine, and the libraries pointed at it."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from pytest_httpserver import HTTPServer
from transformers.utils import hub as transformers_hub

from tests.hub_server import TOKEN, Hub


@pytest.fixture(scope="session")
def server() -> Iterator[HTTPServer]:
    with HTTPServer(threaded=True) as server:
        yield server


@pytest.fixture
def hub(server: HTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub whose user is logged in. Large files go there by LFS, and a lost connection is retried at once."""
    hub = Hub(server)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets-cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)  # of the functions `huggingface_hub` exports
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # made for another address
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    huggingface_hub.close_session()
    yield hub
    huggingface_hub.close_session()
    server.clear()
