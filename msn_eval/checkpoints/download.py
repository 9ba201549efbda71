"""Download of one large file: complete under its final name or absent, resumed where an earlier attempt stopped."""

import glob
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msn_eval.checkpoints.formats.read import sniff_container
from msn_eval.errors import CheckpointError, StoreError
from msn_eval.files.atomic import describe_free_space, prepare_folder, sync_folder

_log = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 30.0
_LOCK_SECONDS = 7200.0
_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)  # before each retry; an attempt that receives new bytes starts them again


def download(url: str, target: Path, *, hint: str) -> str:
    """Download `url` to `target`, unless that file exists already, and return its SHA-256 in hex.

    The bytes go to a partial file beside `target`, which the next call or process resumes. The lock only saves traffic:
    without it, two processes write the same bytes at the same offsets of the same partial file. `hint` is for the error.

    Raises CheckpointError when the download fails or is not a checkpoint, UsageError when the folder cannot be written,
    StoreError when the disk refuses.
    """
    import filelock
    from huggingface_hub.utils import httpx

    prepare_folder(target.parent, option="weights")
    try:
        with filelock.FileLock(target.with_name(f".{target.name}.lock"), timeout=_LOCK_SECONDS):
            return _download_with_retries(url, target)
    except (ValueError, httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        received = _received_bytes(target)
        kept = f"{received:,} bytes are kept; the same command resumes the download." if received else ""
        response = getattr(error, "response", None)
        if isinstance(error, OSError) and response is None:
            hint = f"Free space or choose another folder; {describe_free_space(target.parent)}."
            what = f"Cannot write the download: {error.strerror or error}"
            raise StoreError(what, where=str(target), hint=hint, kept=kept) from error
        reason = str(error) if response is None else f"HTTP {response.status_code} {response.reason_phrase}"
        raise CheckpointError(f"Download failed: {reason}", where=url, hint=hint, kept=kept) from error


def _download_with_retries(url: str, target: Path) -> str:
    from huggingface_hub.utils import httpx

    failures, most = 0, 0
    while not target.is_file():
        _log.info("downloading %s to %s", url, target)
        try:
            return _attempt(url, target)
        except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError, FileNotFoundError) as error:
            if (received := _received_bytes(target)) > most:
                failures, most = 0, received
            if failures == len(_PAUSES_SECONDS) or (isinstance(error, httpx.ConnectError) and most == 0):
                raise
            _log.info("%s: %s; trying again", url, error)
        time.sleep(_PAUSES_SECONDS[failures])
        failures += 1
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _attempt(url: str, target: Path) -> str:
    """Download the missing bytes, give the file its final name and return its SHA-256."""
    with _open(url, {}) as response:
        response.raise_for_status()
        size, validator = int(response.headers.get("Content-Length", -1)), _validator(response)
        if size < 0:
            raise ValueError("the server does not state the file size, so a lost connection cannot be detected")
        # The name contains the version, so that bytes of two versions are never joined.
        version = hashlib.sha256(f"{url}\0{size}\0{validator or secrets.token_hex()}".encode()).hexdigest()[:16]
        part = target.with_name(f".{target.name}.{version}.part")
        offset = part.stat().st_size if part.is_file() else 0
        # A power cut may have torn a file that was written before this start of the machine.
        if not 0 < offset <= size or part.stat().st_mtime < time.time() - time.monotonic():
            part.touch()  # a file that is missing later was just published by another process
            return _complete(part, target, size, 0, response.iter_bytes())
    if offset == size:
        return _complete(part, target, size, size, ())
    with _open(url, {"Range": f"bytes={offset}-", "If-Range": validator}) as response:
        is_rest = response.headers.get("Content-Range") == f"bytes {offset}-{size - 1}/{size}"
        if is_rest and _validator(response) in ("", validator):
            return _complete(part, target, size, offset, response.iter_bytes())
    part.unlink(missing_ok=True)  # the file has changed, or the server ignores ranges
    return _attempt(url, target)


@contextmanager
def _open(url: str, headers: dict[str, str]) -> Iterator[Any]:
    """Request a URL, again while the server is busy."""
    from huggingface_hub.utils import http_stream_backoff

    headers |= {"Accept-Encoding": "identity"}
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=_TIMEOUT_SECONDS, follow_redirects=True, retry_on_exceptions=()
    ) as response:
        # No hashes are published: TLS is the only protection.
        if url.startswith("https:") and any(step.url.scheme != "https" for step in (*response.history, response)):
            raise ValueError(f"redirected from https to {response.url}")
        yield response


def _validator(response: Any) -> str:
    """Return what identifies a version of the file: the strong ETag, else Last-Modified, else an empty string."""
    tag: str = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")


def _complete(part: Path, target: Path, size: int, offset: int, rest: Iterable[bytes]) -> str:
    """Write the bytes from `offset` on, give the file its final name and return its SHA-256."""
    from tqdm.auto import tqdm  # a notebook has its own form

    disabled = None if _log.isEnabledFor(logging.WARNING) else True  # None: where stderr is not a terminal
    bar = tqdm(desc=part.name, total=size, initial=offset, unit="B", unit_scale=True, disable=disabled)
    with bar, part.open("r+b") as file:
        digest = hashlib.sha256()
        while file.tell() < offset:
            digest.update(file.read(min(1 << 20, offset - file.tell())))
        for chunk in rest:
            digest.update(chunk)
            bar.update(file.write(chunk))
        file.truncate()
        file.seek(0)
        container = sniff_container(file.read(512))
        os.fsync(file.fileno())
    if problem := container[0] if isinstance(container, tuple) else "":
        part.unlink()
        raise ValueError(f"the response ({size:,} bytes) is not a checkpoint: {problem}")
    part.replace(target)
    sync_folder(target.parent)
    for leftover in _list_parts(target):
        leftover.unlink(missing_ok=True)
    _log.info("downloaded %s, SHA-256 %s", target, digest.hexdigest())
    return digest.hexdigest()


def _list_parts(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 16}.part"))


def _received_bytes(target: Path) -> int:
    return max((part.stat().st_size for part in _list_parts(target)), default=0)
