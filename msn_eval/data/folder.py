"""Image folders: `train/<class>/*` and `val/<class>/*`."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from msn_eval.data.dataset import Listing
from msn_eval.data.images import Stamp, decode_image, file_stamp, is_image_name, reading
from msn_eval.data.index import ContainerIndex, index_containers, make_index
from msn_eval.errors import DataError

# ImageNet's own names. Beside class folders they show that unpacking was not finished.
_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_FLAT_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.\w+")


@dataclass(frozen=True)
class FolderSource:
    """Image files under `root`. An image's id is its path below it."""

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
        return file_stamp(self.path(image_id).stat())


def folder_name(root: Path) -> str:
    """Return the name of a data set that is kept in a folder."""
    return root.resolve().name or str(root)


def list_class_folders(root: Path, *, cache_dir: Path | None) -> Listing:
    """List the images of one split with one folder per class. Raises DataError naming the class without images."""
    entries = sorted(list_entries(root), key=lambda entry: os.fsencode(entry.name))
    classes = [Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    _check_unpacked(root, {path.name for path in classes}, [entry.name for entry in entries])
    indexes = index_containers(classes, _scan_class, root=root, kind="class folders", cache_dir=cache_dir)
    return Listing(
        files={path.name: index.names for path, index in zip(classes, indexes, strict=True)},
        source=FolderSource(root),
        passed_over=len(entries) - len(classes) + sum(index.passed_over for index in indexes),
    )


def scan_images(folder: Path) -> ContainerIndex:
    """List the images directly in a folder."""
    entries = list_entries(folder)
    names = [entry.name for entry in entries if is_image_name(entry.name) and _is_file_or_broken_link(entry)]
    return make_index(names, passed_over=len(entries) - len(names))


def list_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds, in any order. Raises DataError naming a folder that cannot be listed."""
    with reading(folder), os.scandir(folder) as entries:
        return list(entries)


def check_is_folder(
    root: Path,
    hint: str = "Give --data a folder with train/<class>/* and val/<class>/* or with ImageNet's archives, "
    "wds:FOLDER, hf:NAME, or `digits` to try things out.",
) -> None:
    """Raise DataError where a data set's folder is missing or a file."""
    if not root.is_dir():
        state = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"the data folder {state}", where=str(root), hint=hint)


def _scan_class(folder: Path) -> ContainerIndex:
    index = scan_images(folder)
    if not index.names:
        nested = min((f"{entry.name}/" for entry in folder.iterdir() if entry.is_dir()), default="")
        hint = (
            f"The images seem to be one level down, in {nested}: move them up." if nested else "Remove it or fill it."
        )
        raise DataError("this class has no images", where=str(folder), hint=hint)
    return index


def _check_unpacked(root: Path, classes: set[str], names: Iterable[str]) -> None:
    """Refuse a half-unpacked ImageNet: images still in archives or not yet sorted would be missing silently."""
    for name in names:
        packed = _CLASS_TAR.fullmatch(name)
        if (packed and packed[1] not in classes) or _FLAT_IMAGE.fullmatch(name):
            raise DataError(
                f"holds {name} beside class folders: unpacking it into a class folder was not finished",
                where=str(root),
                hint="Finish it, or undo it, so that all archives or images are read in place.",
            )


def _is_file_or_broken_link(entry: os.DirEntry[str]) -> bool:
    # A broken link is an image that cannot be read and is reported, not a file of another kind.
    return entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())
