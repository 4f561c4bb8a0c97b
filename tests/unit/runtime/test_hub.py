import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from prefopt_trl.runtime.hub import PushError, push_folder, push_in_background, upload_command
from tests.hub_server import Hub, contents, said

REPO = "my-org/my-model"
CARD = "---\nlibrary_name: transformers\n---\n\nA model.\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two large files of different content, a small one and a card, and a checkpoint that is not to be pushed."""
    folder = tmp_path / "my outputs"
    (folder / "checkpoint-1").mkdir(parents=True)
    for number in (1, 2):
        (folder / f"model-{number}.safetensors").write_bytes(bytes([number]) * 20_000 + bytes(range(256)))
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text(CARD)
    (folder / "checkpoint-1" / "optimizer.pt").write_bytes(b"state" * 5000)
    return folder


def belonging(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if not name.startswith("checkpoint-")}


def push(folder: Path, **given: Any) -> str:
    return push_folder(folder, REPO, ignore_patterns=["checkpoint-*"], commit_message="Upload", **given)


def run_command(message: str, hub: Hub) -> None:
    """Run the command that an error ends with, as a user would in a shell."""
    (line,) = re.findall(r"^    (hf .*)$", message, flags=re.MULTILINE)
    hf, *arguments = shlex.split(line)
    command = [str(Path(sys.executable).with_name(hf)), *arguments]
    ended = subprocess.run(command, env=hub.environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


# What arrives


@pytest.mark.parametrize("xet", [False, True])
def test_the_repository_has_the_files_of_the_folder(hub: Hub, folder: Path, xet: bool, monkeypatch: Any) -> None:
    if xet:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        hub.lfs_from = 100_000  # Xet's own storage is not part of the server: all is in the commit
    assert push(folder) == f"{hub.url}/{REPO}"
    assert hub.files(REPO) == belonging(folder)


def test_the_card_is_written_before_the_first_byte_leaves(hub: Hub, folder: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    written: list[tuple[str, list[str]]] = []

    def write_card(repo_id: str) -> None:
        written.append((repo_id, list(hub.requests)))
        (folder / "README.md").write_text(CARD + repo_id)

    hub.fail("POST /api/repos/create", 500)
    with pytest.raises(PushError):
        push_folder(folder, "my-model", write_card, commit_message="Upload")
    assert said(caplog) == [f"Saved in {folder}. Pushing it to my-model."]
    assert written == [("my-model", [])]

    hub.failures.clear()
    push_folder(folder, "my-model", write_card, commit_message="Upload")
    assert [repo_id for repo_id, _ in written[1:]] == ["my-model", "someone/my-model"]  # whose it is, says the Hub
    assert hub.files("someone/my-model")["README.md"] == (CARD + "someone/my-model").encode()
    assert said(caplog)[-1] == f"Pushed to {hub.url}/someone/my-model."


@pytest.mark.parametrize("private", [None, True, False])
def test_privacy_is_the_callers(hub: Hub, folder: Path, private: bool | None) -> None:
    push(folder, private=private)
    assert hub.private == {REPO: bool(private)}


# What fails

FULL = "Private repository storage limit reached, please upgrade your plan."
CHECK = "Check that your token may write there (`hf auth login`) and that the storage is not full."
FAILURES = {
    "refused token": (
        ("POST /api/repos/create", 401, "Invalid credentials in Authorization header"),
        f"the Hub answered 401: Invalid credentials in Authorization header. {CHECK}\n",
    ),
    "token that reads only": (
        ("POST .*/preupload/", 403, "You do not have write access"),
        f"the Hub answered 403: You do not have write access. {CHECK}\n",
    ),
    "full": (("POST .*/batch", 403, FULL), f"the Hub answered 403: {FULL} {CHECK}\n"),
    "too large": (("PUT /lfs/", 413, "Too large"), f"the Hub answered 413: Too large. {CHECK}\n"),
    "lost connection": (("PUT /lfs/", None), "RemoteProtocolError: Server disconnected without sending a response.\n"),
    "lost at the end": (("POST .*/commit/", None), "RemoteProtocolError: Server disconnected without sending"),
    "broken": (("PUT /lfs/", 500, "Internal error"), "the Hub answered 500: Internal error.\n"),
    "too many requests": (("POST .*/commit/", 429, "Slow\tdown"), "the Hub answered 429: Slow down.\n"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_clear_error_and_the_same_push_completes_later(hub: Hub, folder: Path, name: str) -> None:
    failing, reason = FAILURES[name]
    before = contents(folder)
    hub.fail(*failing)
    with pytest.raises(PushError) as error:
        push(folder)
    message = str(error.value)
    assert message.startswith(f"{folder} was not pushed to {REPO}: {reason}")
    assert f"{folder} holds the complete local copy. Push it later with\n" in message
    assert f"\n    hf upload {REPO} '{folder}' --exclude 'checkpoint-*'\n" in message
    assert contents(folder) == before
    assert not hub.repos.get(("model", REPO))  # all or nothing

    hub.failures.clear()
    push(folder)
    assert hub.files(REPO) == belonging(folder)


@pytest.mark.parametrize("by_command", [False, True])
def test_what_went_through_before_the_failure_is_not_sent_again(hub: Hub, folder: Path, by_command: bool) -> None:
    hub.fail("PUT /lfs/", 413, "Too large", after=1)
    with pytest.raises(PushError) as error:
        push(folder, private=True)
    assert len(hub.objects) == 1
    hub.failures.clear()
    hub.requests.clear()
    run_command(str(error.value), hub) if by_command else push(folder, private=True)
    assert len([line for line in hub.requests if line.startswith("PUT")]) == 1
    assert hub.files(REPO) == belonging(folder)
    assert hub.private == {REPO: True}


def test_the_command_has_every_option_of_the_push(hub: Hub, folder: Path) -> None:
    hub.repos["dataset", REPO] = {"data/old.bin": b"old", "data/config.json": b"old", "kept.txt": b"kept"}
    hub.fail("POST .*/commit/", 422, "No")
    given = {"repo_type": "dataset", "path_in_repo": "data", "revision": "main"}
    with pytest.raises(PushError) as error:
        push(folder, allow_patterns=["*.json", "*.pt"], delete_patterns=["*"], **given)
    hub.failures.clear()
    run_command(str(error.value), hub)
    assert hub.files(REPO, "dataset") == {"data/config.json": b"{}", "kept.txt": b"kept"}
    assert upload_command("a b", REPO, private=True, revision=None) == f"hf upload {REPO} 'a b' --private"


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("HF_HUB_OFFLINE", True, "OfflineModeIsEnabled: .* please unset the `HF_HUB_OFFLINE`"),
        ("ENDPOINT", "http://127.0.0.1:9", "Connect\\w*Error: .*Connection refused"),
        (
            "HF_HUB_DISABLE_XET",
            False,
            "ConnectionError: .* error \\(403 Forbidden\\).* and that the storage is not full",
        ),
    ],
)
def test_no_way_to_the_hub(hub: Hub, folder: Path, monkeypatch: Any, setting: str, value: Any, reason: str) -> None:
    hub.fail("GET .*/xet-write-token/", 403, FULL)  # Xet, which large files go through, tells it as a lost connection
    monkeypatch.setattr(constants, setting, value)
    with pytest.raises(PushError, match=f"(?i)was not pushed to {REPO}: {reason}"):
        push(folder)


def test_a_name_that_cannot_be(hub: Hub, folder: Path) -> None:
    with pytest.raises(PushError, match="was not pushed to no/such/name: .*Repo id must be"):
        push_folder(folder, "no/such/name", commit_message="Upload")


def test_a_push_in_the_background_logs_its_failure(hub: Hub, folder: Path, caplog: Any) -> None:
    hub.fail("POST .*/commit/", 507, "Insufficient storage", times=1)
    pushes = [push_in_background(folder, REPO, commit_message="Upload") for _ in range(2)]
    assert isinstance(pushes[0].exception(timeout=20), PushError)
    assert pushes[1].result(timeout=20) == f"{hub.url}/{REPO}"
    (told,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert told.getMessage().startswith("A push in the background failed, and the run continues.")
    assert str(pushes[0].exception()) in told.getMessage()
    assert hub.files(REPO) == contents(folder)
