"""Files that are there in full or not at all, whenever the process is killed."""

import contextlib
import errno
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from msn_eval.errors import StoreError, UsageError

_SUFFIX = ".tmp"
_STALE_SECONDS = 24 * 3600


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path`: a unique temporary file beside it, fsync, rename, fsync of the folder.

    Raises StoreError when the disk refuses; `path` then is as it was before.
    """
    with written_atomically(path, f"{len(content):,} bytes") as temporary, temporary.open("xb") as file:
        file.write(content)


@contextlib.contextmanager
def written_atomically(path: Path, what: str) -> Iterator[Path]:
    """Give the name of a temporary file or folder, which is at `path` once the block has filled it and ended well.

    what: is written, for the error
    Raises StoreError when the disk refuses; `path` then is as it was before.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        try:
            yield temporary
            for file in temporary.iterdir() if temporary.is_dir() else (temporary,):
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            remove(temporary)
    except OSError as error:
        raise StoreError(
            f"could not write {what}: {error.strerror or error}",
            where=str(path),
            hint=f"Free space or choose another folder; {free_bytes(path.parent)}.",
            kept="Files written before are untouched; the same command goes on from there.",
        ) from error


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


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
            f"cannot be written: {error.strerror or error}", where=str(folder), hint=f"Give another {option} folder."
        ) from error
    for left in folder.glob(f".*{_SUFFIX}"):
        if _is_abandoned(left):
            with contextlib.suppress(FileNotFoundError):  # another process sweeps as well
                remove(left)


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


def sync_folder(folder: Path) -> None:
    """Have the names in a folder written to the disk."""
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


def free_bytes(folder: Path) -> str:
    """Say how much room there is in a folder."""
    try:
        status = os.statvfs(folder)
    except OSError:
        return f"{folder} cannot be asked for its free space"
    return f"{status.f_bavail * status.f_frsize:,} bytes are free at {folder}"
