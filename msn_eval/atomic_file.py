"""Files that are there in full or not at all, whenever the process is killed."""

import errno
import os
import secrets
import socket
import time
from pathlib import Path

from msn_eval.errors import StoreError, UsageError

_SUFFIX = ".tmp"
_STALE_SECONDS = 24 * 3600


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`: a unique temporary file beside it, fsync, rename, fsync of the folder.

    Raises StoreError when the disk refuses; `path` then is as it was before.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"could not write {len(content):,} bytes: {error.strerror or error}",
            where=str(path),
            remedy=f"Free space or choose another folder; {_free_bytes(path.parent)}.",
            kept="Files written before are untouched; the same command goes on from there.",
        ) from error


def prepare_folder(folder: Path, *, option: str) -> None:
    """Make `folder`, prove that it can be written, and sweep out what killed processes left there.

    Raises UsageError naming `option` when it cannot be used.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}"
        try:
            with probe.open("xb") as file:
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot be written: {error.strerror or error}", where=str(folder), remedy=f"Give another {option} folder."
        ) from error
    for left in folder.glob(f".*{_SUFFIX}"):
        if _is_abandoned(left):
            left.unlink(missing_ok=True)


def _is_abandoned(temporary: Path) -> bool:
    """Tell whether a day-old temporary file belongs to a dead process of this host."""
    try:
        name, pid, _ = temporary.name.removesuffix(_SUFFIX).rsplit(".", 2)
        if not name.endswith(f".{socket.gethostname()}") or time.time() - temporary.stat().st_mtime < _STALE_SECONDS:
            return False
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OverflowError, OSError):
        return False
    return False


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows has no handle on a folder to sync
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that sync no folders
            raise
    finally:
        os.close(handle)


def _free_bytes(folder: Path) -> str:
    try:
        status = os.statvfs(folder)
    except OSError:
        return f"{folder} cannot be asked for its free space"
    return f"{status.f_bavail * status.f_frsize:,} bytes are free at {folder}"
