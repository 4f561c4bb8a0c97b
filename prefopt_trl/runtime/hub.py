"""The way to the Hub: everything is whole on disk before the first byte leaves it, and a failure costs one command."""

import logging
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

logger = logging.getLogger(__name__)

# Pushes in the background wait for each other, so that a repository is never written by two
_ONE_BY_ONE = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push-to-hub")

LOGIN = "Log in with `hf auth login`, with a token that may write there."
SERVER_ERROR = 500


class PushError(RuntimeError):
    """Something was not pushed to the Hub; the message says why, where its local copy is and how to push it later."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    write_card: Callable[[str], None] | None = None,
    *,
    commit_message: str,
    repo_type: str = "model",
    path_in_repo: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    delete: Sequence[str] = (),
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a folder to a repository on the Hub, which is made where there is none, and return its address.

    Call it in one process. A push that failed halfway is repeated in the same way: what is there already is not sent
    again. `write_card(repo_id)` writes the folder's README.md: before anything is sent, and once more where the
    repository turns out to be called otherwise. `include` (by default everything) and `exclude` are patterns of the
    files to send, `delete` of those to remove from the repository where the folder does not have them.

    Raise `PushError` if anything fails, with the reason and the command that repeats the push.
    """
    if write_card is not None:
        write_card(repo_id)
    logger.warning("Saved in %s. Pushing it to %s.", folder, repo_id)
    try:
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        if write_card is not None and repo.repo_id != repo_id:
            write_card(repo.repo_id)
        api.upload_folder(
            repo_id=repo.repo_id,
            repo_type=repo_type,
            folder_path=folder,
            path_in_repo=path_in_repo,
            allow_patterns=list(include) or None,
            ignore_patterns=list(exclude),
            delete_patterns=list(delete) or None,
            revision=revision,
            commit_message=commit_message,
        )
    except Exception as error:  # whatever the Hub, the network, the login or the disk raise
        logger.debug("The push failed", exc_info=True)
        command = _command(repo_id, folder, path_in_repo, repo_type, private, revision, include, exclude, delete)
        raise PushError(
            f"{folder} was not pushed to {repo_id}: {_reason(error)}\n"
            f"Nothing is lost: the complete local copy is in {folder}. Push it later with\n\n"
            f"    {command}\n"
        ) from None  # the reason says it, in one line for a hundred
    logger.warning("Pushed to %s.", repo)
    return str(repo)


def _command(
    repo_id: str,
    folder: str | Path,
    path_in_repo: str | None,
    repo_type: str,
    private: bool | None,
    revision: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    delete: Sequence[str],
) -> str:
    """What does the same in a shell as [`push_folder`]."""
    command = ["hf", "upload", repo_id, str(folder), *([path_in_repo] if path_in_repo else [])]
    command += ["--repo-type", repo_type] if repo_type != "model" else []
    command += ["--private"] if private else []
    command += ["--revision", revision] if revision else []
    for option, patterns in {"--include": include, "--exclude": exclude, "--delete": delete}.items():
        command += [word for pattern in patterns for word in (option, pattern)]
    return shlex.join(command)


def push_in_background(*args: Any, commit_message: str, **kwargs: Any) -> Future[str]:
    """[`push_folder`] in a thread, after those that were asked for before. A failure is logged as a warning, too."""

    def warn_of_failure(push: Future[str]) -> None:
        if error := push.exception():
            logger.warning("The push %r failed, and the run goes on. %s", commit_message, error)

    push = _ONE_BY_ONE.submit(push_folder, *args, commit_message=commit_message, **kwargs)
    push.add_done_callback(warn_of_failure)
    return push


def reserve_repository(
    repo_id: str,
    folder: str | Path,
    *,
    exclude: Sequence[str] = (),
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Make the repository of a model where there is none, see that it may be written to, and return its whole name.

    Raise `PushError`, with the command that pushes the folder later, if it can be neither made nor written to.
    """
    try:
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.auth_check(repo.repo_id, write=True)  # a repository that was there already is found without it
    except Exception as error:
        raise PushError(
            f"Nothing could be pushed to {repo_id} later: {_reason(error)}\n"
            "Nothing was sampled or trained yet. Mend it, or leave out `push_to_hub`, and after training call "
            "`trainer.push_to_hub()` or run\n\n"
            f"    {_command(repo_id, folder, None, 'model', private, revision, (), exclude, ())}\n"
        ) from None
    return repo.repo_id


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised for."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    """What failed in plain words, what the other side said, and what to do about it."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            said = cause.server_message or str(cause).strip().split("\n")[0]
            return _refusal(cause.response.status_code, said)
        if isinstance(cause, LocalTokenNotFoundError):
            return f"there is no access token. {LOGIN}"
        if isinstance(cause, OfflineModeIsEnabled):
            return "offline mode is on. Unset `HF_HUB_OFFLINE`."
        # Xet, which large files go through, tells a refusal as a lost connection
        if isinstance(cause, ConnectionError) and (found := re.search(r"HTTP status \w+ error \((\d{3})", str(cause))):
            return _refusal(int(found[1]), f"{_line(cause)}; where the token may write, storage may be full")
        # Of httpx, which has another name in each version of huggingface_hub
        if isinstance(cause, ConnectionError) or "TransportError" in [base.__name__ for base in type(cause).__mro__]:
            return f"the connection to the Hub was lost, or none could be made ({_line(cause)})."
    return f"{_line(error)}."


def _refusal(status: int, said: str) -> str:
    answer = f"({status}: {said.rstrip('.')})"
    # What the Hub says to those whose storage is full: 403, as to those who may not write
    full = status == 403 and re.search(r"storage (limit|patterns|quota)|quota", said, re.IGNORECASE)
    if full or status in (402, 413, 507):
        return f"the Hub has no room for it {answer}. Make room there, or push to where there is some."
    if status in (401, 403):
        return f"the Hub refused the access token {answer}. {LOGIN}"
    if status == 429:
        return f"the Hub asks to wait, after too many requests {answer}."
    if status >= SERVER_ERROR:
        return f"the Hub has trouble of its own {answer}."
    return f"the Hub refused it {answer}."


def _line(error: BaseException) -> str:
    """An error on one line, without its end."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".: ")
