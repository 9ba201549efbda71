"""Download: one big file from the web, there in full or not at all, resumed where an earlier attempt was cut off."""

import hashlib
import http.client
import logging
import os
import re
import secrets
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO

from msn_eval.checkpoints.formats.read import sniff_container
from msn_eval.errors import CheckpointError, StoreError
from msn_eval.files.atomic import free_bytes, prepare_folder, sync_folder

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 512
_TIMEOUT_SECONDS = 30.0
_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)  # before each further try; one that gets further starts them anew
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_RANGE_REFUSED = 416

_Answer = http.client.HTTPResponse | urllib.error.HTTPError
_Show = Callable[[int, int | None], None]  # bytes so far, bytes in all


class _NetworkError(Exception):
    """What went wrong between us and the server; `download` makes of it the error that users see.

    reached: bytes held when it happened, -1 where no server was reached at all
    """

    def __init__(self, reason: str, *, reached: int = 0, again: bool = False) -> None:
        super().__init__(reason)
        self.reached, self.again = reached, again


@dataclass(frozen=True, kw_only=True)
class _Version:
    """The bytes that a server offers at an address: how many, and its mark of them (strong ETag, else Last-Modified)."""

    url: str
    size: int | None
    mark: str

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.url}\0{self.size}\0{self.mark}".encode()).hexdigest()[:16]

    @property
    def resumable(self) -> bool:
        return self.size is not None and self.mark != ""


def download(url: str, target: Path, *, sha256: str | None = None, advice: str) -> str:
    """Put the file at `url` under `target` and give the SHA-256 of its bytes in hex.

    sha256: what it must be, where that is known
    advice: for the error: what to fetch by hand and where to put it
    Raises CheckpointError naming the address when it cannot be had or is no checkpoint, UsageError for a folder that
    cannot be written, StoreError when the disk refuses.
    """
    start = time.monotonic()
    try:
        if not re.match("https?://", url):
            raise _NetworkError("only http and https addresses are fetched")
        prepare_folder(target.parent, option="weights")
        _log.info("downloading %s to %s", url, target)
        with _progress(target.name) as show:
            digest = _insist(url, target, sha256, show)
    except _NetworkError as error:
        raise CheckpointError(
            f"could not be downloaded: {error}", where=url, hint=advice, kept=_what_is_kept(target)
        ) from error
    except OSError as error:  # of the disk, since those of the network are network errors by now
        raise StoreError(
            f"could not be written: {error.strerror or error}",
            where=str(target),
            hint=f"Free space or choose another folder; {free_bytes(target.parent)}.",
            kept=_what_is_kept(target),
        ) from error
    _log.info("downloaded %s in %.0f s, SHA-256 %s", target, time.monotonic() - start, digest)
    return digest


def _insist(url: str, target: Path, sha256: str | None, show: _Show) -> str:
    """Try until it is done, or until several tries in a row got no further. An address never reached is not tried again."""
    furthest, idle = -1, 0
    while True:
        try:
            return _attempt(url, target, sha256, show)
        except _NetworkError as error:
            if error.reached > furthest:
                furthest, idle = error.reached, 0
            if not error.again or furthest < 0 or idle == len(_PAUSES_SECONDS):
                raise
            _log.info("%s: %s; trying again", url, error)
        time.sleep(_PAUSES_SECONDS[idle])
        idle += 1


def _attempt(url: str, target: Path, sha256: str | None, show: _Show) -> str:
    with _ask(url, {}) as whole:
        version = _version(url, whole)
        if version.size is None and sha256 is None:
            raise _NetworkError("the server does not say how long the file is, so its end looks like a lost connection")
        with claim_part(target, version.key, resumable=version.resumable) as part:
            have = part.stat().st_size
            if have == 0:
                _receive(whole, part, version, show)
                return _publish(part, target, sha256)
            whole.close()
            if have == version.size:
                return _publish(part, target, sha256)
            with _ask(url, {"Range": f"bytes={have}-", "If-Range": version.mark}, reached=have) as rest:
                if _goes_on(rest, version, have):
                    _receive(rest, part, version, show)
                    return _publish(part, target, sha256)
            part.unlink()
    return _attempt(url, target, sha256, show)  # from the start, now that the part that led nowhere is gone


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects on the web alone, and never from https to http: no hash may be known, and then TLS is all."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in ("http", "https") or (req.type == "https" and scheme == "http"):
            raise urllib.error.HTTPError(newurl, code, f"redirection from {req.type} to {scheme} refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _ask(url: str, headers: dict[str, str], *, reached: int = 0) -> _Answer:
    """Open an address. Gives the answer that a range is refused as it is; raises _NetworkError where nothing is to be read."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "msn-eval"} | headers)
        opened = urllib.request.build_opener(_WebRedirects).open(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == _RANGE_REFUSED and "Range" in headers:
            return error
        error.close()
        reason = f"HTTP {error.code} {error.reason}"
        raise _NetworkError(reason, reached=reached, again=error.code in _TRY_AGAIN) from error
    except urllib.error.URLError as error:  # before any answer: no such name, no route, refused, no trust
        raise _NetworkError(f"{error.reason}", reached=-1, again=True) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise _NetworkError(f"not an address: {error}") from error
    except (http.client.HTTPException, OSError) as error:
        raise _NetworkError(f"{error or type(error).__name__}", reached=reached, again=True) from error
    assert isinstance(opened, http.client.HTTPResponse)
    return opened


def _version(url: str, answer: _Answer) -> _Version:
    size = str(answer.headers["Content-Length"] or "")
    return _Version(url=url, size=int(size) if re.fullmatch("[0-9]+", size) else None, mark=_mark(answer.headers))


def _mark(headers: Message) -> str:
    tag = str(headers["ETag"] or "")
    return tag if tag and not tag.startswith("W/") else str(headers["Last-Modified"] or "")


def _goes_on(rest: _Answer, version: _Version, have: int) -> bool:
    """Tell whether an answer is the rest of this version; there are servers that pass over If-Range, or Range."""
    found = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+)", str(rest.headers["Content-Range"] or ""))
    if rest.status != http.client.PARTIAL_CONTENT or found is None:
        return False
    return (int(found[1]), int(found[2])) == (have, version.size) and _mark(rest.headers) in ("", version.mark)


def _receive(answer: _Answer, part: Path, version: _Version, show: _Show) -> None:
    """Write a body to the end of a part. Raises _NetworkError when the connection ends before the body does."""
    with part.open("r+b") as file:
        reached = file.seek(0, os.SEEK_END)
        while chunk := _read(answer, reached):
            file.write(chunk)
            reached += len(chunk)
            show(reached, version.size)
    if version.size is not None and reached != version.size:
        raise _NetworkError(
            f"the connection ended after {reached:,} of {version.size:,} bytes", reached=reached, again=True
        )


def _read(answer: _Answer, reached: int) -> bytes:
    assert isinstance(answer, http.client.HTTPResponse)
    try:
        return answer.read1(_CHUNK_BYTES)
    except (http.client.HTTPException, OSError) as error:
        reason = f"the connection failed after {reached:,} bytes: {error or type(error).__name__}"
        raise _NetworkError(reason, reached=reached, again=True) from error


def _publish(part: Path, target: Path, sha256: str | None) -> str:
    """Give a complete part its final name. Raises _NetworkError, and deletes it, when it is not what was wanted."""
    with part.open("r+b") as file:
        container = sniff_container(file.read(_HEAD_BYTES))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        os.fsync(file.fileno())
    wrong = ""
    if isinstance(container, tuple):
        wrong = f"what came ({size:,} bytes) is no checkpoint: {container[0]}"
    elif sha256 is not None and digest != sha256.lower():
        wrong = f"{size:,} bytes came with SHA-256 {digest} instead of {sha256}"
    if wrong:
        part.unlink()
        raise _NetworkError(wrong)
    part.replace(target)
    sync_folder(target.parent)
    sweep_parts(target)
    return digest


def _what_is_kept(target: Path) -> str:
    held = max((part.bytes for part in find_parts(target)), default=0)
    return f"{held:,} bytes that came before are kept; the same command goes on from there." if held else ""


@contextmanager
def _progress(name: str) -> Iterator[_Show]:
    """Draw a bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, size: None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(name), total=None)
        yield lambda done, size: bar.update(task, completed=done, total=size)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part on disk.

    version: 16 hex digits
    host:    of the process that writes or wrote it, None where it was left in good order
    pid:     of that process
    bytes:   how many there were when it was looked at
    """

    path: Path
    version: str
    host: str | None
    pid: int
    bytes: int
    changed: float

    @property
    def is_abandoned(self) -> bool:
        """Whether it was left in good order or by a dead process of this host."""
        if self.host is None:
            return True
        if os.name != "posix" or self.host != socket.gethostname():  # on Windows, signal 0 is Ctrl-C
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (OverflowError, OSError):
            return False
        return False

    @property
    def is_sound(self) -> bool:
        """Whether all of it reached the disk: it was synced, or the machine was not restarted since."""
        return self.host is None or self.changed > time.time() - time.monotonic()


def find_parts(target: Path) -> list[Part]:
    """Give the parts of a target, the longest first."""
    shape = re.compile(re.escape(f".{target.name}.") + r"([0-9a-f]{16})(?:\.(.+)\.([0-9]+))?\.[0-9a-f]{8}\.part")
    found = []
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        named = shape.fullmatch(path.name)
        if named is None:
            continue
        try:
            status = path.stat()
        except FileNotFoundError:  # adopted or finished in this moment
            continue
        found.append(
            Part(
                path=path,
                version=named[1],
                host=named[2],
                pid=int(named[3] or 0),
                bytes=status.st_size,
                changed=status.st_mtime,
            )
        )
    return sorted(found, key=lambda part: part.bytes, reverse=True)


@contextmanager
def claim_part(target: Path, version: str, *, resumable: bool) -> Iterator[Path]:
    """Hold a part of a version: the longest that was abandoned, or an empty one.

    resumable: whether another process may go on with it; where not, it is deleted on failure
    """
    stem = f".{target.name}.{version}"
    held = target.with_name(f"{stem}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.part")
    if not (resumable and _adopt(held, target, version)):
        held.touch(exist_ok=False)
    try:
        yield held
    except BaseException:  # an interrupt, too, leaves it in good order
        _release(held, held.with_name(f"{stem}.{secrets.token_hex(4)}.part"), resumable=resumable)
        raise


def sweep_parts(target: Path) -> None:
    """Delete what nobody goes on with, once the target is there; in a folder that cannot be written it stays."""
    with suppress(OSError):
        for part in find_parts(target):
            if part.is_abandoned:
                part.path.unlink(missing_ok=True)


def _adopt(held: Path, target: Path, version: str) -> bool:
    for part in find_parts(target):
        if part.version == version and part.is_abandoned and part.is_sound:
            try:
                part.path.rename(held)
            except FileNotFoundError:  # another process was faster
                continue
            return True
    return False


def _release(held: Path, name: Path, *, resumable: bool) -> None:
    try:
        with held.open("r+b") as file:
            length = file.seek(0, os.SEEK_END)
            os.fsync(file.fileno())
        if resumable and length:
            held.rename(name)
        else:
            held.unlink()
    except OSError:  # gone, or the disk gave out: what cannot be synced is not worth going on from
        held.unlink(missing_ok=True)
