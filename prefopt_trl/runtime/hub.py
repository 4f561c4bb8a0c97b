"""Push a folder to the Hub; if that fails, say why and print the `hf upload` command that retries it."""

import logging
import re
import shlex
from collections.abc import Callable
from concurrent.futures import Future
from copy import deepcopy
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, run_as_future
from huggingface_hub.errors import HfHubHTTPError

logger = logging.getLogger(__name__)

# Arguments of `HfApi.upload_folder`, as options of `hf upload`
OPTIONS = {
    "repo_type": "--repo-type",
    "revision": "--revision",
    "allow_patterns": "--include",
    "ignore_patterns": "--exclude",
    "delete_patterns": "--delete",
}


class PushError(RuntimeError):
    """A push to the Hub that failed. The message gives the reason, the local copy and the command that retries it."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    write_card: Callable[[str], None] | None = None,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | None = None,
    **upload: Any,
) -> str:
    """Upload a folder to a repository on the Hub and return its address. Call it in one process.

    A missing repository is created. A retry does not send again the files that have arrived.

    Args:
        folder (`str` or `Path`):
            Folder, complete but for its card.
        repo_id (`str`):
            Repository; without a namespace, the user's.
        write_card (`Callable`, *optional*):
            Function of the repository's id that writes the folder's README.md. It is called before the Hub is, and
            again if the Hub returns an id with another namespace.
        commit_message (`str`):
            First line of the commit.
        private (`bool`, *optional*):
            Whether a repository created here is private. By default the Hub decides.
        token (`str`, *optional*):
            Access token. By default the one you are logged in with.
        upload:
            `path_in_repo` and the arguments in `OPTIONS`, as [`~huggingface_hub.HfApi.upload_folder`] takes them.

    Raises:
        PushError: if anything fails after the card was written.
    """
    if write_card is not None:
        write_card(repo_id)
    logger.info("Saved in %s. Pushing it to %s.", folder, repo_id)
    try:
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, repo_type=upload.get("repo_type"), private=private, exist_ok=True)
        if write_card is not None and repo.repo_id != repo_id:
            write_card(repo.repo_id)
        own = deepcopy(upload)  # `upload_folder` appends to the lists of patterns
        api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=commit_message, **own)
    except Exception as error:  # whatever the Hub, the network, the login or the disk raise
        raise PushError(
            f"{folder} was not pushed to {repo_id}: {reason_of(error)}\n"
            f"Nothing is lost: {folder} holds the complete local copy. Push it later with\n\n"
            f"    {upload_command(folder, repo_id, private=private, **upload)}\n"
        ) from None  # the message has the relevant line of a long traceback
    logger.info("Pushed to %s.", repo)
    return str(repo)


def push_in_background(folder: str | Path, repo_id: str, *args: Any, **kwargs: Any) -> Future[str]:
    """Run [`push_folder`] after earlier background pushes, and log its failure as a warning."""

    def log_failure(push: Future[str]) -> None:
        if error := push.exception():
            logger.warning("A push in the background failed, and the run continues. %s", error)

    push = run_as_future(push_folder, folder, repo_id, *args, **kwargs)
    push.add_done_callback(log_failure)
    return push


def upload_command(
    folder: str | Path, repo_id: str, *, private: bool | None = None, path_in_repo: str | None = None, **upload: Any
) -> str:
    """Return the shell command that does the same as [`push_folder`]."""
    words = ["hf", "upload", repo_id, str(folder), *([path_in_repo] if path_in_repo else [])]
    words += ["--private"] if private else []
    for name, given in upload.items():
        for value in [given] if isinstance(given, str) else given or []:
            words += [OPTIONS[name], value]
    return shlex.join(words)


def reason_of(error: BaseException) -> str:
    """Return on one line why the Hub could not be used, with a remedy if the token or the storage may be the cause."""
    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__  # huggingface_hub wraps the error of a file's upload
    if isinstance(error, HfHubHTTPError):
        what, said = f"the Hub answered {error.response.status_code}", error.server_message or str(error)
    else:
        what, said = type(error).__name__, str(error)
    reason = f"{what}: {' '.join(said.split()).rstrip('.')}."
    if re.search(r"(answered |\()(401|402|403|413|507)\b|LocalTokenNotFound", reason):
        reason += " Check that your token may write there (`hf auth login`) and that the storage is not full."
    return reason
