"""Image folders: `train/<class>/*` and `val/<class>/*`."""

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from msn_eval.datasets.dataset import DataSet
from msn_eval.datasets.listing import Listing, make_dataset, make_split
from msn_eval.errors import DataError
from msn_eval.images import ImageSet, Stamp, decode_image, is_image_name

_SHOWN = 5


@dataclass(frozen=True)
class FolderSource:
    """Image files under `root`, an image's id being its path below it."""

    root: Path

    def read(self, image_id: str) -> bytes:
        return self.path(image_id).read_bytes()

    def decode(self, content: bytes) -> Image.Image:
        return decode_image(content)

    def path(self, image_id: str) -> Path:
        return self.root / image_id

    def place(self, image_id: str) -> str:
        return str(self.path(image_id))

    def stamp(self, image_id: str) -> Stamp:
        status = self.path(image_id).stat()
        return status.st_size, status.st_mtime_ns


def read_folder(name: str, *, allow_class_mismatch: bool = False) -> DataSet:
    """Read the image folder at path `name`.

    Classes are the folders of `train` and `val`, numbered in the byte order of their names; the two splits must have
    the same ones. Raises DataError naming the folder, class or file at fault.
    """
    root = Path(name)
    _check_root(root)
    return make_dataset(
        root.resolve().name or str(root),
        where=str(root),
        train=_scan_split(root / "train"),
        val=_scan_split(root / "val"),
        allow_class_mismatch=allow_class_mismatch,
    )


def read_folder_split(name: str, split: str) -> ImageSet:
    """Read one split of an image folder alone, with its own classes; for extraction, which compares nothing."""
    root = Path(name)
    if not root.is_dir():
        raise _no_folder(root)
    return make_split(_scan_split(root / split))


def _check_root(root: Path) -> None:
    if not root.is_dir():
        raise _no_folder(root)
    for split in ("train", "val"):
        if not (root / split).is_dir():
            there = sorted(entry.name for entry in root.iterdir())[:_SHOWN]
            raise DataError(
                f"has no folder {split!r} (it holds: {', '.join(there) or 'nothing'})",
                where=str(root),
                remedy=f"An image folder has train/<class>/* and val/<class>/*; make {root / split}, or give its parent.",
            )


def _no_folder(root: Path) -> DataError:
    state = "is a file, not a folder" if root.exists() else "does not exist"
    return DataError(
        f"the data folder {state}",
        where=str(root),
        remedy="Give --data a folder with train/<class>/* and val/<class>/*, or `digits` to try things out.",
    )


def _scan_split(root: Path) -> Listing:
    files: dict[str, list[str]] = {}
    passed_over = 0
    if not root.is_dir():
        raise DataError("does not exist", where=str(root), remedy="Give --data the folder that holds this split.")
    for entry in sorted(_listing(root), key=lambda entry: os.fsencode(entry.name)):
        if entry.name.startswith(".") or not entry.is_dir():
            passed_over += 1
            continue
        inside = _listing(Path(entry.path))
        names = [inner.name for inner in inside if is_image_name(inner.name) and _is_file_or_broken_link(inner)]
        passed_over += len(inside) - len(names)
        if not names:
            raise _empty_class(Path(entry.path))
        files[entry.name] = names
    if not files:
        raise DataError(
            "holds no class folders", where=str(root), remedy="Put the images of each class into a folder of its own."
        )
    return Listing(files=files, source=FolderSource(root), passed_over=passed_over)


def _listing(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"cannot be listed: {error.strerror or error}",
            where=str(folder),
            remedy="Check its permissions and its disk.",
        ) from error


def _is_file_or_broken_link(entry: os.DirEntry[str]) -> bool:
    """A link to nothing is an image that cannot be read, and is told as such; not a file of another kind."""
    return entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())


def _empty_class(folder: Path) -> DataError:
    inner = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    hint = f"The images seem to be one level down, in {inner[0]}/: move them up." if inner else "Remove it or fill it."
    return DataError("this class has no images", where=str(folder), remedy=hint)
