"""Regular files of a bounded size. A pipe, a device or an endless file is refused, never waited for."""

import errno
import os
import stat
from pathlib import Path

MOST_TEXT_BYTES = 1 << 28  # of a list or table: more than a line of 200 characters for each image of ImageNet


def read_regular_file(path: Path, *, most_bytes: int | None = None) -> bytes:
    """Read a regular file.

    Args:
        path: The file, or a link to it.
        most_bytes: The largest size that is read; None for any.

    Raises:
        OSError: It is missing, unreadable, larger, or of another kind; `strerror` says which.
    """
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, device or socket"
            raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
        if most_bytes is not None and status.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"it is larger than {most_bytes:,} bytes", str(path))
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    # Opening a pipe would wait for a writer.
    return os.open(path, flags | os.O_NONBLOCK)
