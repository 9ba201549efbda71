"""Download of one large file: complete under its final name or absent, resumed where an earlier attempt stopped."""

import glob
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.checkpoints.formats.read import sniff_container
from msn_eval.errors import CheckpointError, StoreError
from msn_eval.files.atomic import describe_free_space, prepare_folder, sync_folder

if TYPE_CHECKING:
    from huggingface_hub.utils import httpx

_log = logging.getLogger(__name__)
_TIMEOUT_SECONDS = 30.0
_LOCK_SECONDS = 7200.0
_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)  # before each retry; an attempt that receives new bytes starts them again


class _RefusedError(Exception):
    """A response that cannot become the file, with the reason."""


def download(url: str, target: Path, *, sha256: str | None = None, hint: str) -> str:
    """Download `url` to `target`, unless that file exists already, and return its SHA-256 in hex.

    The bytes go to a partial file beside `target`, which the next call or process resumes. The lock only saves traffic:
    without it, two processes write the same bytes at the same offsets of the same partial file.

    Args:
        sha256: The expected hash, where it is known.
        hint: For the error: what to download manually and where to put it.

    Raises:
        CheckpointError: The download fails, or what arrives is not a checkpoint or has another hash.
        UsageError: The folder cannot be written.
        StoreError: The disk refuses.
    """
    import filelock
    from huggingface_hub.utils import httpx

    prepare_folder(target.parent, option="weights")
    try:
        with filelock.FileLock(target.with_name(f".{target.name}.lock"), timeout=_LOCK_SECONDS):
            return _sha256(target) if target.is_file() else _download_with_retries(url, target, sha256)
    except (_RefusedError, httpx.HTTPError, httpx.InvalidURL) as error:
        response = getattr(error, "response", None)
        reason = str(error) if response is None else f"HTTP {response.status_code} {response.reason_phrase}"
        raise CheckpointError(f"Download failed: {reason}", where=url, hint=hint, kept=_kept(target)) from error
    except OSError as error:
        hint = f"Free space or choose another folder; {describe_free_space(target.parent)}."
        what = f"Cannot write the download: {error.strerror or error}"
        raise StoreError(what, where=str(target), hint=hint, kept=_kept(target)) from error


def _download_with_retries(url: str, target: Path, sha256: str | None) -> str:
    from huggingface_hub.utils import httpx

    _log.info("downloading %s to %s", url, target)
    start, failures, most = time.monotonic(), 0, 0
    while True:
        try:
            digest = _attempt(url, target, sha256)
            _log.info("downloaded %s in %.0f s, SHA-256 %s", target, time.monotonic() - start, digest)
            return digest
        except FileNotFoundError:
            if not target.is_file():  # else another process, on a file system without locks, was faster
                raise
            return _sha256(target)
        except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError) as error:
            received = _received_bytes(target)
            failures, most = (failures, most) if received <= most else (0, received)
            is_offline = isinstance(error, httpx.ConnectError) and most == 0
            if is_offline or failures == len(_PAUSES_SECONDS):
                raise
            _log.info("%s: %s; trying again", url, error)
        time.sleep(_PAUSES_SECONDS[failures])
        failures += 1


def _attempt(url: str, target: Path, sha256: str | None) -> str:
    """Download the missing bytes, give the file its final name and return its SHA-256."""
    with _open(url, {}) as response:
        if response.is_error:
            raise _RefusedError(f"HTTP {response.status_code} {response.reason_phrase}")
        size, validator = int(response.headers.get("Content-Length", -1)), _validator(response)
        if size < 0 and sha256 is None:
            raise _RefusedError("the server does not state the file size, so a lost connection cannot be detected")
        # The name contains the version, so that bytes of two versions are never joined.
        version = f"{url}\0{size}\0{validator}" if size >= 0 and validator else secrets.token_hex()
        part = target.with_name(f".{target.name}.{hashlib.sha256(version.encode()).hexdigest()[:16]}.part")
        offset = _resumable_bytes(part)
        if not 0 < offset <= size:
            offset = size
            _receive(response, part, 0)
    if offset < size:
        with _open(url, {"Range": f"bytes={offset}-", "If-Range": validator}) as response:
            is_rest = response.headers.get("Content-Range") == f"bytes {offset}-{size - 1}/{size}"
            if not is_rest or _validator(response) not in ("", validator):
                part.unlink(missing_ok=True)  # the file has changed, or the server ignores ranges
                return _attempt(url, target, sha256)
            _receive(response, part, offset)
    return _publish(part, target, sha256)


@contextmanager
def _open(url: str, headers: dict[str, str]) -> Iterator["httpx.Response"]:
    """Request a URL, again while the server is busy."""
    from huggingface_hub.utils import http_stream_backoff

    headers |= {"Accept-Encoding": "identity"}
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=_TIMEOUT_SECONDS, follow_redirects=True, retry_on_exceptions=()
    ) as response:
        # Where no hash is known, TLS is the only protection.
        if url.startswith("https:") and any(step.url.scheme != "https" for step in (*response.history, response)):
            raise _RefusedError(f"redirected from https to {response.url}")
        yield response


def _validator(response: "httpx.Response") -> str:
    """Return what identifies a version of the file: the strong ETag, else Last-Modified, else an empty string."""
    tag: str = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")


def _resumable_bytes(part: Path) -> int:
    """Return the size of a partial file, or 0 where there is none or a power cut may have torn it."""
    with suppress(FileNotFoundError):
        status = part.stat()
        return status.st_size if status.st_mtime > time.time() - time.monotonic() else 0
    return 0


def _receive(response: "httpx.Response", part: Path, offset: int) -> None:
    """Write the body of a response to a partial file from `offset` on, with a progress bar on a terminal."""
    from tqdm import tqdm

    if offset == 0:  # a file that is missing otherwise was just published by another process
        part.touch()
    total = offset + int(response.headers.get("Content-Length", 0))
    with (
        part.open("r+b") as file,
        tqdm(desc=part.name, total=total, initial=offset, unit="B", unit_scale=True, disable=None) as bar,
    ):
        file.seek(offset)
        for chunk in response.iter_bytes():
            bar.update(file.write(chunk))
        file.truncate()


def _publish(part: Path, target: Path, sha256: str | None) -> str:
    with part.open("r+b") as file:
        container = sniff_container(file.read(512))
        os.fsync(file.fileno())
    digest, problem = _sha256(part), ""
    if isinstance(container, tuple):
        problem = f"is not a checkpoint: {container[0]}"
    elif sha256 is not None and digest != sha256.lower():
        problem = f"has SHA-256 {digest} instead of {sha256}"
    if problem:
        size = part.stat().st_size
        part.unlink()
        raise _RefusedError(f"the response ({size:,} bytes) {problem}")
    part.replace(target)
    sync_folder(target.parent)
    for leftover in _parts(target):
        leftover.unlink(missing_ok=True)
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parts(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 16}.part"))


def _received_bytes(target: Path) -> int:
    return max((part.stat().st_size for part in _parts(target)), default=0)


def _kept(target: Path) -> str:
    received = _received_bytes(target)
    return f"{received:,} bytes are kept; the same command resumes the download." if received else ""
