"""Image folders: `train/<class>/*` and `val/<class>/*`."""

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from msn_eval.datasets.dataset import DataSet
from msn_eval.errors import DataError
from msn_eval.images import ImageSet, decode_image, is_image_name

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


@dataclass(frozen=True, kw_only=True)
class _Split:
    """The files of one split, by class."""

    root: Path
    files: dict[str, list[str]]
    passed_over: int


def read_folder(name: str, *, allow_class_mismatch: bool = False) -> DataSet:
    """Read the image folder at path `name`.

    Classes are the folders of `train` and `val`, numbered in the byte order of their names; the two splits must have
    the same ones. Raises DataError naming the folder, class or file at fault.
    """
    root = Path(name)
    _check_root(root)
    train, val = _scan_split(root / "train"), _scan_split(root / "val")
    classes = tuple(sorted(train.files.keys() | val.files.keys(), key=os.fsencode))
    if train.files.keys() != val.files.keys() and not allow_class_mismatch:
        raise _class_mismatch(root, train, val)
    return DataSet(
        name=root.resolve().name or str(root), train=_image_set(train, classes), val=_image_set(val, classes)
    )


def read_folder_split(name: str, split: str) -> ImageSet:
    """Read one split of an image folder alone, with its own classes; for extraction, which compares nothing."""
    root = Path(name)
    if not root.is_dir():
        raise _no_folder(root)
    found = _scan_split(root / split)
    return _image_set(found, tuple(sorted(found.files, key=os.fsencode)))


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


def _scan_split(root: Path) -> _Split:
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
    return _Split(root=root, files=files, passed_over=passed_over)


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


def _class_mismatch(root: Path, train: _Split, val: _Split) -> DataError:
    def sample(names: set[str]) -> str:
        shown = sorted(names, key=os.fsencode)
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        return ", ".join(shown[:_SHOWN]) + more

    only_train, only_val = train.files.keys() - val.files.keys(), val.files.keys() - train.files.keys()
    parts = [f"only in train: {sample(only_train)}"] if only_train else []
    parts += [f"only in val: {sample(only_val)}"] if only_val else []
    return DataError(
        f"train and val differ in their classes ({'; '.join(parts)})",
        where=str(root),
        remedy="Labels would shift. Complete the split, or pass --allow-class-mismatch to number the union of both.",
    )


def _image_set(split: _Split, classes: tuple[str, ...]) -> ImageSet:
    number = {name: label for label, name in enumerate(classes)}
    rows = sorted(
        ((f"{name}/{file}", number[name]) for name, files in split.files.items() for file in files),
        key=lambda row: os.fsencode(row[0]),
    )
    return ImageSet(
        ids=tuple(image_id for image_id, _ in rows),
        labels=tuple(label for _, label in rows),
        classes=classes,
        source=FolderSource(split.root),
        passed_over=split.passed_over,
    )
