"""ContainerIndex: what one class folder or archive holds; listed once and cached until the folder or archive changes.

Listing a million files, or the headers of a 138 GB archive, takes minutes on many disks; asking a thousand folders when
they last changed does not. The cache only saves time: where it is damaged or missing, everything is listed again.
"""

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msn_eval.data.images import SUFFIXES, reading
from msn_eval.errors import StoreError
from msn_eval.files.atomic import write_atomically

_log = logging.getLogger(__name__)
_VERSION = 2  # of the file and of what the scans put into it
_FEWEST_IMAGES = 10_000  # that are worth a file
_SETTLED_NS = 2_000_000_000  # the coarsest clock among file systems ticks every two seconds
_THREADS = 8

State = tuple[int, ...]  # inode, bytes, nanoseconds of the last change of the content and of anything


@dataclass(frozen=True, kw_only=True, eq=False)
class ContainerIndex:
    """The images of one class folder or archive.

    Attributes:
        names: File names, or ids where it holds several classes.
        numbers: (n, c) int64, what else is known of each image; c = 0 for the files of a folder.
        passed_over: Number of files that were not taken for images.
        has_folders: Whether the images of folders below are among them. The times of the folder or archive do not show
            changes there, so the index is not cached.
    """

    names: tuple[str, ...]
    numbers: NDArray[np.int64]
    passed_over: int = 0
    has_folders: bool = False


def make_index(
    names: Iterable[str],
    numbers: Sequence[Sequence[int]] | NDArray[np.int64] = (),
    *,
    columns: int = 0,
    passed_over: int = 0,
) -> ContainerIndex:
    """Return the index of these images, with a row of `columns` numbers for each."""
    names = tuple(names)
    table = np.array(numbers, dtype=np.int64).reshape(len(names), columns)
    return ContainerIndex(names=names, numbers=table, passed_over=passed_over)


def index_containers(
    paths: Sequence[Path], scan: Callable[[Path], ContainerIndex], *, root: Path, kind: str, cache_dir: Path | None
) -> tuple[ContainerIndex, ...]:
    """Return the index of each path, from the cache where the path has not changed since it was scanned.

    Args:
        paths: Class folders or archives, no two with the same name.
        scan: Lists one of them.
        root: What they make up together. It names the cache file, together with `kind`.
        kind: How they are scanned.
        cache_dir: Folder that caches long listings, or None to scan everything.
    """
    started = time.time_ns()
    states = {path.name: _read_state(path) for path in paths}
    cache_name = hashlib.sha256(kind.encode() + b"\0" + os.fsencode(root.resolve())).hexdigest()[:16]
    file = None if cache_dir is None else cache_dir / "indexes" / f"{cache_name}.index"
    cached = {} if file is None else _read_cache(file, root, kind)
    indexes = {name: cached[name][1] for name, state in states.items() if name in cached and cached[name][0] == state}
    # A later change has a different time, unless it falls into the same tick of the disk's clock.
    settled = {name for name, state in states.items() if name in indexes or max(state[2:]) + _SETTLED_NS <= started}
    changed = [path for path in paths if path.name not in indexes]
    with ThreadPoolExecutor(_THREADS) as pool:
        indexes |= zip((path.name for path in changed), pool.map(scan, changed), strict=True)
    lasting = {name for name in settled if not indexes[name].has_folders}
    if file is not None and {name: states[name] for name in lasting} != {name: cached[name][0] for name in cached}:
        _write_cache(file, root, kind, {name: (states[name], indexes[name]) for name in states if name in lasting})
    return tuple(indexes[path.name] for path in paths)


def _read_state(path: Path) -> State:
    with reading(path):
        status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _heading(root: Path, kind: str) -> dict[str, object]:
    """Return what must be equal for a cached index to be valid, besides its version."""
    return {"root": str(root.resolve()), "kind": kind, "suffixes": sorted(SUFFIXES)}


def _write_cache(file: Path, root: Path, kind: str, indexes: dict[str, tuple[State, ContainerIndex]]) -> None:
    if sum(len(index.names) for _, index in indexes.values()) < _FEWEST_IMAGES and not file.exists():
        return
    listed = {
        name: [state, index.names, index.numbers.T.tolist(), index.passed_over]
        for name, (state, index) in indexes.items()
    }
    payload = zlib.compress(json.dumps([_heading(root, kind), listed], separators=(",", ":")).encode(), 1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, _seal(payload) + payload)
    except (OSError, StoreError) as error:
        _log.warning("%s: the listing cannot be cached for the next run: %s", file, error)


def _read_cache(file: Path, root: Path, kind: str) -> dict[str, tuple[State, ContainerIndex]]:
    """Return the cached indexes, none where the file is missing, damaged or of another version."""
    try:
        seal, _, payload = file.read_bytes().partition(b"\n")
        if seal + b"\n" != _seal(payload):
            return {}
        heading, listed = json.loads(zlib.decompress(payload))
        if heading != _heading(root, kind):
            return {}
        return {
            name: (
                tuple(state),
                make_index(names, np.array(table, dtype=np.int64).T, columns=len(table), passed_over=passed_over),
            )
            for name, (state, names, table, passed_over) in listed.items()
        }
    except (OSError, ValueError, TypeError, LookupError, AttributeError, zlib.error):
        return {}


def _seal(payload: bytes) -> bytes:
    return f"msn-eval image index {_VERSION} {hashlib.sha256(payload).hexdigest()}\n".encode()
