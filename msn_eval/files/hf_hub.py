"""The Hugging Face hub: whether it may be used, and the errors of its library as errors of this package."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from msn_eval.errors import MsnEvalError, StoreError

OFFLINE_VARIABLES = ("MSN_EVAL_OFFLINE", "HF_HUB_OFFLINE")


class UnreachableError(Exception):
    """The hub gives no usable answer, with the reason. The cache may be enough."""


def offline_variable() -> str | None:
    """Return the first environment variable that forbids network access, or None."""
    return next(
        (name for name in OFFLINE_VARIABLES if os.environ.get(name, "").lower() in ("1", "on", "yes", "true")), None
    )


@contextmanager
def translate_hub_errors(where: str, error_type: type[MsnEvalError]) -> Iterator[None]:
    """Translate what huggingface_hub raises inside the block.

    Args:
        where: The repository, for errors.
        error_type: Of the errors for what the hub refuses.

    Raises:
        error_type: The hub refuses.
        StoreError: The disk refuses.
        UnreachableError: Everything else.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        raise UnreachableError(first_line(error.__cause__ or error)) from error
    except MsnEvalError:
        raise
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        hint = "Correct the name or the revision, or choose one that its page on the hub lists."
        raise error_type(f"Not on the hub: {first_line(error)}", where=where, hint=hint) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500:
            raise UnreachableError(f"HTTP {status}") from error
        raise error_type(
            f"The hub refuses access (HTTP {status}): there is no repository of this name, or it is gated or private",
            where=where,
            hint="Check the name. For a gated or private repository, accept the conditions on its page, if any, and set "
            "$HF_TOKEN to a token that may read it (or run `hf auth login`).",
        ) from error
    except Exception as error:  # those of the web client, which has changed between versions
        if isinstance(error, OSError) and error.errno is not None:
            hint = "Free space, or choose another folder: $HF_HUB_CACHE."
            what = f"Cannot write the cache: {error.strerror}"
            raise StoreError(what, where=constants.HF_HUB_CACHE, hint=hint) from error
        raise UnreachableError(first_line(error)) from error


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its text that is not empty, shortened."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{': ' if text else ''}{text[:160]}"
