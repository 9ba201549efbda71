"""Part: what has come so far of a file that is being downloaded, beside its target, for whoever goes on with it.

    .TARGET.VERSION.HOST.PID.RANDOM.part   a process is writing it, or was killed while it did
    .TARGET.VERSION.RANDOM.part            left in good order: synced, and nobody's

VERSION is a hash of all that tells one version of the remote file from another, so halves of two are never joined.
Correctness depends on no lock and on no guess about who is alive: a part only ever grows at its end, two writers of one
part would write the same bytes to the same places, and only the one that holds its name can put it under the final name.
"""

import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


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
