"""Hub library: questions to huggingface_hub, none of whose own errors gets out."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from msn_eval.errors import CheckpointError, StoreError

OFFLINE_VARIABLES = ("MSN_EVAL_OFFLINE", "HF_HUB_OFFLINE")
_NO_ACCESS = {401, 403}
_BUSY = {408, 429}
_SERVER_ERROR = 500
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOTDIR}
_Given = TypeVar("_Given")


class UnreachableError(Exception):
    """The hub gave no usable answer, in words; what the cache holds may do."""


def offline_variable() -> str | None:
    """Give the first environment variable that forbids the network, or None."""
    wanted = ("1", "on", "yes", "true")
    return next((name for name in OFFLINE_VARIABLES if os.environ.get(name, "").lower() in wanted), None)


def ask_hub(ask: Callable[[], _Given], where: str, cache: Path) -> _Given:
    """Give what `ask`, a call of the library, gives.

    where: the repository, for errors
    cache: the folder that the library writes to, for errors
    Raises CheckpointError for what the hub refuses, StoreError for what the disk does, UnreachableError for the rest.
    """
    from huggingface_hub import errors

    try:
        return ask()
    except errors.LocalEntryNotFoundError as error:  # its word for a connection that failed on the way
        raise UnreachableError(_short(error.__cause__ or error)) from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"is no name of a repository: {_short(error)}", where=where, hint="Correct it."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in _BUSY or status >= _SERVER_ERROR:
            raise UnreachableError(f"HTTP {status}") from error
        what, hint = _refusal(status, type(error).__name__)
        raise CheckpointError(what, where=where, hint=hint) from error
    except Exception as error:  # its web client was requests, httpx and httpx2, whose errors have no common base
        if isinstance(error, OSError) and error.errno in _DISK:
            raise StoreError(
                f"cannot be written: {error.strerror}",
                where=str(cache),
                hint="Free space, or name another folder: $HF_HUB_CACHE.",
            ) from error
        raise UnreachableError(_short(error)) from error


def _refusal(status: int, kind: str) -> tuple[str, str]:
    """Say what the hub refused, and what to do about it."""
    if status in _NO_ACCESS or kind == "GatedRepoError":
        return (
            f"the hub gives no access (HTTP {status}): the repository is gated or private, or there is none of this name",
            "Accept its conditions on its page where it has some, and set $HF_TOKEN to a token that may read it (or run "
            "`hf auth login`).",
        )
    if kind == "RevisionNotFoundError":
        return "the repository has no such branch, tag or commit", "Take one that its page lists, or none."
    if kind == "RepositoryNotFoundError":
        return "the hub has no repository of this name", "Correct it; a folder of your own is given by its path."
    return f"the hub refuses it (HTTP {status}, {kind})", "Look at its page on the hub; $HF_ENDPOINT names another hub."


def _short(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{': ' if text else ''}{text[:160]}"
