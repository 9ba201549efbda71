"""TarSource: images read in place from tar archives, and how the members of archives become a listing."""

import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msn_eval.data.images import Stamp, decode_image, file_stamp
from msn_eval.data.index import Part
from msn_eval.data.listing import Listing
from msn_eval.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A tar archive as it was when its headers were read; what was found in it is void once it changes."""

    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class ClassMembers:
    """The images of one class.

    files:  names in byte order
    places: (n, 3) int64, a row a file: which archive, the offset of its bytes in it, their number
    """

    files: tuple[str, ...]
    places: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TarSource:
    """Members of archives. It holds no open file, so that forks, threads and pickles have nothing to share.

    root: the archive, or the folder or first archive of many; no two splits have the same
    """

    root: Path
    archives: tuple[Archive, ...]
    classes: Mapping[str, ClassMembers]

    def read(self, image_id: str) -> bytes:
        archive, offset, size = self._find(image_id)
        descriptor = os.open(archive.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            _check_unchanged(archive, os.fstat(descriptor))
            content = os.pread(descriptor, size, offset)
            while len(content) < size:  # one call gives at most two gigabytes, and less when a signal comes
                more = os.pread(descriptor, size - len(content), offset + len(content))
                if not more:
                    raise OSError(f"the archive ends {size - len(content)} bytes before the image does")
                content += more
            return content
        finally:
            os.close(descriptor)

    def decode(self, content: bytes) -> Image.Image:
        return decode_image(content)

    def place(self, image_id: str) -> str:
        return f"{self._find(image_id)[0].path}: {image_id}"

    def stamp(self, image_id: str) -> Stamp:
        archive, offset, size = self._find(image_id)
        status = archive.path.stat()
        return size, *file_stamp(status)[1:], status.st_size, offset

    def _find(self, image_id: str) -> tuple[Archive, int, int]:
        name, _, file = image_id.partition("/")
        members = self.classes[name]
        row = bisect_left(members.files, os.fsencode(file), key=os.fsencode)
        if members.files[row : row + 1] != (file,):
            raise KeyError(image_id)
        archive, offset, size = members.places[row].tolist()
        return self.archives[archive], offset, size


def open_archives(paths: Iterable[Path]) -> tuple[Archive, ...]:
    """Give archives as they are now; to be asked before their headers are read, so that no change slips in between."""
    archives = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(
                f"cannot be read: {error.strerror or error}", where=str(path), remedy="Check its permissions."
            ) from error
        archives.append(Archive(path=path, size=status.st_size, mtime_ns=status.st_mtime_ns))
    return tuple(archives)


def list_members(
    archives: tuple[Archive, ...], parts: Sequence[Part], classes: Sequence[Sequence[str]], *, root: Path
) -> Listing:
    """Give the images of archives by class, read in place.

    parts:   what each archive holds: file names, with the offset and the size of each as their first two numbers
    classes: the class of each image of each part
    Raises DataError where two images of a class have one name.
    """
    files = [file for part in parts for file in part.names]
    numbers = [np.full((len(part.names), 1), number, dtype=np.int64) for number, part in enumerate(parts)]
    places = np.concatenate(
        [np.hstack([number, part.numbers[:, :2]]) for number, part in zip(numbers, parts, strict=True)]
    )
    grouped: dict[str, list[int]] = {}
    for row, name in enumerate(chain.from_iterable(classes)):
        grouped.setdefault(name, []).append(row)
    members = {}
    for name, rows in grouped.items():
        rows.sort(key=lambda row: os.fsencode(files[row]))
        for one, other in pairwise(rows):
            if files[one] == files[other]:
                raise _duplicate(archives[places[one, 0]], archives[places[other, 0]], f"{name}/{files[one]}")
        members[name] = ClassMembers(files=tuple(files[row] for row in rows), places=places[rows])
    return Listing(
        files={name: found.files for name, found in members.items()},
        source=TarSource(root=root, archives=archives, classes=members),
        passed_over=sum(part.passed_over for part in parts),
    )


def _check_unchanged(archive: Archive, status: os.stat_result) -> None:
    if (status.st_size, status.st_mtime_ns) != (archive.size, archive.mtime_ns):
        raise OSError("the archive changed after its images were listed; start again")


def _duplicate(one: Archive, other: Archive, image_id: str) -> DataError:
    where = str(one.path) if one == other else f"{one.path} and {other.path}"
    return DataError(
        f"hold{'s' if one == other else ''} two images of the id {image_id}",
        where=where,
        remedy="Remove or rename one of them: an id is a class and a file name without folders.",
    )
