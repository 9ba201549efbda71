"""Files that exist completely or not at all, whenever the process is killed."""

import contextlib
import errno
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from msn_eval.errors import StoreError, UsageError

_TABLE_SUFFIXES = (".csv", ".json", ".md", ".html")
_SUFFIX = ".tmp"
_STALE_SECONDS = 24 * 3600


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`: a unique temporary file beside it, fsync, rename, fsync of the folder.

    Raises StoreError when the disk refuses; `path` is then unchanged.
    """
    with written_atomically(path, f"{len(content):,} bytes") as temporary, temporary.open("xb") as file:
        file.write(content)


@contextlib.contextmanager
def written_atomically(path: Path, what: str) -> Iterator[Path]:
    """Yield the name of a temporary file or folder, which is renamed to `path` when the block has filled it.

    Args:
        what: What is written, for the error.

    Raises:
        StoreError: The disk refuses; `path` is then unchanged.
    """
    suffix = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}{_SUFFIX}"
    temporary = path.with_name(f".{path.name}.{suffix}")
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
            hint=f"Free space or choose another folder; {describe_free_space(path.parent)}.",
            kept="Files written before are unchanged; the same command continues from there.",
        ) from error


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def check_folder_name(folder: Path, *, option: str) -> None:
    """Raise UsageError if `folder` is a file, or a new folder with the name of a table."""
    if folder.is_file() or (folder.suffix in _TABLE_SUFFIXES and not folder.is_dir()):
        tables = " Tables are printed by `msn-eval report RUNS --format csv`." if option == "--out" else ""
        hint = f"Give another {option} folder.{tables}"
        raise UsageError("is the name of a file, not of a folder", where=str(folder), hint=hint)


def prepare_folder(folder: Path, *, option: str) -> None:
    """Create `folder`, check that it can be written, and remove what killed processes left there.

    Raises:
        UsageError: It cannot be a folder; the error names `option`.
        StoreError: The disk refuses.
    """
    check_folder_name(folder, option=option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.fsync(file.fileno())
    except OSError as error:
        what, hint = f"cannot be written: {error.strerror or error}", f"Give another {option} folder."
        is_name = error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
        raise (UsageError if is_name else StoreError)(what, where=str(folder), hint=hint) from error
    for leftover in folder.glob(f".*{_SUFFIX}"):
        if _is_abandoned(leftover):
            with contextlib.suppress(FileNotFoundError):  # another process removes it as well
                remove(leftover)


def _is_abandoned(temporary: Path) -> bool:
    """Whether a temporary file is older than a day and of a dead process of this host."""
    try:
        name, pid, _ = temporary.name.removesuffix(_SUFFIX).rsplit(".", 2)
        if time.time() - temporary.stat().st_mtime < _STALE_SECONDS or not name.endswith(f".{socket.gethostname()}"):
            return False
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, OSError) as error:
        return isinstance(error, ProcessLookupError)
    return False


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that do not sync folders
            raise
    finally:
        os.close(handle)


def describe_free_space(folder: Path) -> str:
    """Describe the free space of a folder's disk."""
    try:
        return f"{shutil.disk_usage(folder).free:,} bytes are free at {folder}"
    except OSError:
        return f"the free space at {folder} is unknown"
