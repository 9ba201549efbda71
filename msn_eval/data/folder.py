"""Image folders: `train/<class>/*` and `val/<class>/*`. As in torchvision, an image may be in a folder below its class."""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from msn_eval.data.dataset import VAL_NAMES, Listing, UnknownLayoutError
from msn_eval.data.images import NO_CLASSES, ImageSet, Stamp, decode_image, file_stamp, is_image_name, reading
from msn_eval.data.index import ContainerIndex, index_containers, make_index
from msn_eval.errors import DataError, format_count, suggest_paths
from msn_eval.files.regular import read_regular_file

_log = logging.getLogger(__name__)
# ImageNet's own names. Beside class folders they show that unpacking was not finished.
_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_FLAT_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.\w+")


@dataclass(frozen=True)
class FolderSource:
    """Image files under `root`. An image's id is its path below it."""

    root: Path

    def read(self, image_id: str) -> bytes:
        return read_regular_file(self.path(image_id))

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
    classes = [Path(entry.path) for entry in entries if not entry.name.startswith(".") and is_folder(entry)]
    _check_unpacked(root, {path.name for path in classes}, [entry.name for entry in entries])
    indexes = index_containers(classes, _scan_class, root=root, kind="class folders", cache_dir=cache_dir)
    nested = sum("/" in name for index in indexes if index.has_folders for name in index.names)
    if nested:
        images = format_count(nested, "image")
        _log.info("%s: %s in folders below the folder of their class", root, images)
    return Listing(
        files={path.name: index.names for path, index in zip(classes, indexes, strict=True)},
        source=FolderSource(root),
        passed_over=len(entries) - len(classes) + sum(index.passed_over for index in indexes),
    )


def list_tree(root: Path) -> ImageSet:
    """List every image in and below a folder, without classes: ids are paths. Raises DataError where there is none."""
    index = _scan_class(root)
    ids = tuple(sorted(index.names, key=os.fsencode))
    return ImageSet(
        ids=ids,
        labels=(0,) * len(ids),
        classes=NO_CLASSES,
        source=FolderSource(root),
        passed_over=index.passed_over,
    )


def scan_images(folder: Path) -> ContainerIndex:
    """List the images directly in a folder."""
    entries = list_entries(folder)
    # Links to nothing, pipes and folders with the name of an image are bad images, which are reported, not passed over.
    names = [entry.name for entry in entries if is_image_name(entry.name)]
    return make_index(names, passed_over=len(entries) - len(names))


def list_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds, in any order. Raises DataError naming a folder that cannot be listed."""
    with reading(folder), os.scandir(folder) as entries:
        return list(entries)


def check_is_folder(root: Path, hint: str) -> None:
    """Raise UnknownLayoutError where a data set's folder is missing or a file, DataError where its name seems mistyped."""
    if not root.is_dir():
        state = "is a file, not a folder" if root.exists() else "does not exist"
        if suggestion := "" if root.exists() else suggest_paths(str(root)):
            raise DataError(f"the data folder {state}.{suggestion}", where=str(root), hint=hint)
        raise UnknownLayoutError(f"the data folder {state}", where=str(root), hint=hint)


def holds_class_folders(root: Path) -> bool:
    """Whether every folder in `root` holds images directly, as the folders of classes do, and none is that of a split."""
    folders = [entry for entry in list_entries(root) if not entry.name.startswith(".") and is_folder(entry)]
    if not folders or {entry.name for entry in folders} & {"train", *VAL_NAMES}:
        return False
    return all(any(is_image_name(entry.name) for entry in list_entries(Path(folder.path))) for folder in folders)


def _scan_class(folder: Path) -> ContainerIndex:
    """List the images in a class folder and in the folders below it. Folders whose names start with a dot are passed over."""
    names: list[str] = []
    passed_over = 0
    seen: set[tuple[int, int]] = set()
    folders = [""]
    for below in folders:  # it grows meanwhile
        with reading(folder / below):
            status = (folder / below).stat()
        if (status.st_dev, status.st_ino) in seen:
            hint = "Remove the link: its images would count twice."
            raise DataError("links to a folder of the same class", where=str(folder / below), hint=hint)
        seen.add((status.st_dev, status.st_ino))
        entries = list_entries(folder / below)
        if not entries and is_image_name(below.rpartition("/")[0]):  # it stands where an image should be
            names.append(below.removesuffix("/"))
        for entry in entries:
            if is_image_name(entry.name) and not is_folder(entry):
                names.append(f"{below}{entry.name}")
            elif is_folder(entry) and not entry.name.startswith("."):
                folders.append(f"{below}{entry.name}/")
            else:
                passed_over += 1
    if not names:
        raise DataError("this class has no images", where=str(folder), hint="Remove it or fill it.")
    return replace(make_index(names, passed_over=passed_over), has_folders=len(folders) > 1)


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


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether a folder's entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
