"""Part: what one class folder or archive holds; listed once, and remembered until the folder or archive changes.

Listing a million files, or the headers of a 138 GB archive, takes minutes on many disks; asking a thousand folders
when they last changed does not. Like every memory this one is a shortcut: damaged or missing, it is made anew.
"""

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msn_eval.data.images import SUFFIXES
from msn_eval.errors import DataError, StoreError
from msn_eval.files.atomic import write_atomically

_log = logging.getLogger(__name__)
_VERSION = 1  # of the file and of what the scans put into it
_FEWEST_IMAGES = 10_000  # that are worth a file
_SETTLED_NS = 2_000_000_000  # the coarsest clock among file systems ticks every two seconds
_THREADS = 8

State = tuple[int, ...]  # inode, bytes, nanoseconds of the last change of content and of anything at all


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """The images of one class folder or archive.

    names:       file names, or ids where the part holds several classes
    numbers:     (n, c) int64, what else is known of each image; c = 0 for the files of a folder
    passed_over: files that were not taken for images
    """

    names: tuple[str, ...]
    numbers: NDArray[np.int64]
    passed_over: int = 0

    def __post_init__(self) -> None:
        if self.numbers.ndim != 2 or len(self.numbers) != len(self.names):
            raise ValueError(f"{len(self.names)} images with numbers of shape {self.numbers.shape}")


def make_part(
    names: Iterable[str], numbers: Sequence[Sequence[int]] = (), *, columns: int = 0, passed_over: int = 0
) -> Part:
    """Give a part of these images.

    numbers: a row of so many columns an image
    """
    kept = tuple(names)
    table = np.array(numbers, dtype=np.int64).reshape(len(kept), columns)
    return Part(names=kept, numbers=table, passed_over=passed_over)


def list_parts(
    paths: Sequence[Path], scan: Callable[[Path], Part], *, root: Path, kind: str, cache_dir: Path | None
) -> tuple[Part, ...]:
    """Give the part at each path, by `scan` where it changed since it was remembered.

    paths:  class folders or archives, no two of one name
    root:   what they make up together; names the memory, with `kind`
    kind:   how they are scanned
    memory: a folder to remember long listings in, or None to scan everything
    """
    started = time.time_ns()
    states = {path.name: _state(path) for path in paths}
    index = _index_file(root, kind, cache_dir)
    known = _recall(index, root, kind)
    trusted = {name: known[name][1] for name, state in states.items() if name in known and known[name][0] == state}
    unknown = [path for path in paths if path.name not in trusted]
    if len(paths) > 1:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = dict(zip((path.name for path in unknown), pool.map(scan, unknown), strict=True))
    else:
        found = {path.name: scan(path) for path in unknown}
    parts = trusted | found
    fresh = {
        name: (state, parts[name]) for name, state in states.items() if name in trusted or _settled(state, started)
    }
    if index is not None and {name: entry[0] for name, entry in fresh.items()} != {
        name: entry[0] for name, entry in known.items()
    }:
        _remember(index, root, kind, fresh)
    return tuple(parts[path.name] for path in paths)


def _state(path: Path) -> State:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}", where=str(path), hint="Check its permissions and its disk."
        ) from error
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _settled(state: State, started: int) -> bool:
    """Tell whether any later change gives another time: not so for one within the same tick of the disk's clock."""
    return max(state[2:]) + _SETTLED_NS <= started


def _index_file(root: Path, kind: str, cache_dir: Path | None) -> Path | None:
    if cache_dir is None:
        return None
    name = hashlib.sha256(kind.encode() + b"\0" + os.fsencode(root.resolve())).hexdigest()[:16]
    return cache_dir / "indexes" / f"{name}.index"


def _heading(root: Path, kind: str) -> dict[str, object]:
    """Give what must be equal for an index to be of use, beside its version."""
    return {"root": str(root.resolve()), "kind": kind, "suffixes": sorted(SUFFIXES)}


def _remember(index: Path, root: Path, kind: str, parts: Mapping[str, tuple[State, Part]]) -> None:
    if sum(len(part.names) for _, part in parts.values()) < _FEWEST_IMAGES and not index.exists():
        return
    listed = {
        name: [state, part.names, part.numbers.T.tolist(), part.passed_over] for name, (state, part) in parts.items()
    }
    payload = zlib.compress(json.dumps([_heading(root, kind), listed], separators=(",", ":")).encode(), 1)
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(index, _seal(payload) + payload)
    except (OSError, StoreError) as error:
        _log.warning("%s: the listing cannot be remembered for the next run: %s", index, error)


def _recall(index: Path | None, root: Path, kind: str) -> dict[str, tuple[State, Part]]:
    """Read what was remembered; an index that is damaged or of another version is as good as none."""
    if index is None:
        return {}
    try:
        seal, _, payload = index.read_bytes().partition(b"\n")
        if seal + b"\n" != _seal(payload):
            return {}
        heading, listed = json.loads(zlib.decompress(payload))
        if heading != _heading(root, kind):
            return {}
        return {
            name: (
                tuple(state),
                Part(
                    names=tuple(names),
                    numbers=np.array(columns, dtype=np.int64).reshape(len(columns), len(names)).T,
                    passed_over=passed_over,
                ),
            )
            for name, (state, names, columns, passed_over) in listed.items()
        }
    except (OSError, ValueError, TypeError, LookupError, AttributeError, zlib.error):
        return {}


def _seal(payload: bytes) -> bytes:
    return f"msn-eval image index {_VERSION} {hashlib.sha256(payload).hexdigest()}\n".encode()
