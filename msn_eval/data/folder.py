"""Image folders: `train/<class>/*` and `val/<class>/*`."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from msn_eval.data.dataset import DataSet, Listing, make_dataset, make_split
from msn_eval.data.images import ImageSet, Stamp, decode_image, file_stamp, is_image_name
from msn_eval.data.index import Part, list_parts, make_part
from msn_eval.errors import DataError

_SHOWN = 5
# ImageNet's own names: beside class folders they tell of an unpacking that was not finished.
_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_FLAT_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.\w+")


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
        return file_stamp(self.path(image_id).stat())


def read_folder(name: str, *, allow_class_mismatch: bool = False, cache_dir: Path | None = None) -> DataSet:
    """Read the image folder at path `name`.

    Classes are the folders of `train` and `val`, numbered in the byte order of their names; the two splits must have
    the same ones.
    memory: a folder to remember long listings in, or None
    Raises DataError naming the folder, class or file at fault.
    """
    root = Path(name)
    _check_root(root)
    return make_dataset(
        root.resolve().name or str(root),
        where=str(root),
        train=list_class_folders(root / "train", cache_dir=cache_dir),
        val=list_class_folders(root / "val", cache_dir=cache_dir),
        allow_class_mismatch=allow_class_mismatch,
    )


def read_folder_split(name: str, split: str, *, cache_dir: Path | None = None) -> ImageSet:
    """Read one split of an image folder alone, with its own classes; for extraction, which compares nothing."""
    root = Path(name)
    check_is_folder(root)
    return make_split(list_class_folders(root / split, cache_dir=cache_dir))


def list_class_folders(root: Path, *, cache_dir: Path | None) -> Listing:
    """Give the images of one split, a folder a class. Raises DataError naming the class without images."""
    if not root.is_dir():
        raise DataError("does not exist", where=str(root), hint="Give --data the folder that holds this split.")
    entries = sorted(list_entries(root), key=lambda entry: os.fsencode(entry.name))
    classes = [Path(entry.path) for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    if not classes:
        raise DataError(
            "holds no class folders", where=str(root), hint="Put the images of each class into a folder of its own."
        )
    _check_unpacked(root, {path.name for path in classes}, [entry.name for entry in entries])
    parts = list_parts(classes, _scan_class, root=root, kind="class folders", cache_dir=cache_dir)
    return Listing(
        files={path.name: part.names for path, part in zip(classes, parts, strict=True)},
        source=FolderSource(root),
        passed_over=len(entries) - len(classes) + sum(part.passed_over for part in parts),
    )


def scan_images(folder: Path) -> Part:
    """Give the names of the images that stand in a folder itself."""
    inside = list_entries(folder)
    names = [entry.name for entry in inside if is_image_name(entry.name) and _is_file_or_broken_link(entry)]
    return make_part(names, passed_over=len(inside) - len(names))


def list_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Give what stands in a folder, in any order. Raises DataError naming the folder that cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"cannot be listed: {error.strerror or error}",
            where=str(folder),
            hint="Check its permissions and its disk.",
        ) from error


def check_is_folder(root: Path) -> None:
    """Raise DataError where a data set's folder is missing or a file."""
    if not root.is_dir():
        state = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(
            f"the data folder {state}",
            where=str(root),
            hint="Give --data a folder with train/<class>/* and val/<class>/* or with ImageNet's archives, "
            "wds:FOLDER, hf:NAME, or `digits` to try things out.",
        )


def _check_root(root: Path) -> None:
    check_is_folder(root)
    for split in ("train", "val"):
        if not (root / split).is_dir():
            there = sorted(entry.name for entry in list_entries(root))
            shards = any(name.startswith(f"{split}-") and name.endswith(".tar") for name in there)
            raise DataError(
                f"has no folder {split!r} (it holds: {', '.join(there[:_SHOWN]) or 'nothing'})",
                where=str(root),
                hint=f"Give wds:{root} if these are the archives of a WebDataset."
                if shards
                else f"An image folder has train/<class>/* and val/<class>/*; make {root / split}, or give its parent.",
            )


def _scan_class(folder: Path) -> Part:
    part = scan_images(folder)
    if not part.names:
        raise _empty_class(folder)
    return part


def _check_unpacked(root: Path, classes: set[str], names: Iterable[str]) -> None:
    """Refuse a half-unpacked ImageNet: what is left in its archives, or not yet sorted, would be missing in silence."""
    for name in names:
        packed = _CLASS_TAR.fullmatch(name)
        if packed and packed[1] not in classes:
            raise DataError(
                f"holds {name} beside class folders, but no folder {packed[1]}",
                where=str(root),
                hint="Unpack every class, or move the folders away to have all archives read in place.",
            )
        if _FLAT_IMAGE.fullmatch(name):
            raise DataError(
                f"holds {name} beside class folders: sorting the images into classes was not finished",
                where=str(root),
                hint="Finish it, or move all images back out of their folders to have them read with their labels.",
            )


def _is_file_or_broken_link(entry: os.DirEntry[str]) -> bool:
    """A link to nothing is an image that cannot be read, and is told as such; not a file of another kind."""
    return entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists())


def _empty_class(folder: Path) -> DataError:
    inner = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    hint = f"The images seem to be one level down, in {inner[0]}/: move them up." if inner else "Remove it or fill it."
    return DataError("this class has no images", where=str(folder), hint=hint)
