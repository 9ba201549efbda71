"""ImageNet as it is distributed: training tars read in place, validation images in one flat folder or tar."""

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msn_eval.data.dataset import DataSet, Listing, make_dataset, make_split
from msn_eval.data.folder import FolderSource, check_is_folder, list_class_folders, list_entries, scan_images
from msn_eval.data.imagenet_labels import WNID, read_labels
from msn_eval.data.images import ImageSet, is_image_name
from msn_eval.data.index import Part, list_parts, make_part
from msn_eval.data.tar import TarMember, list_members, open_archives, read_members
from msn_eval.errors import DataError

_TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
_KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")
_CLASS_TAR = re.compile(rf"({WNID.pattern})\.tar")
_THREADS = 8
_SHOWN = 5


@dataclass(frozen=True)
class FlatSource(FolderSource):
    """Image files that all stand in `root` itself, an image's id being its class and its name."""

    def path(self, image_id: str) -> Path:
        return self.root / image_id.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class _Split:
    """Where and how the images of one split are stored."""

    form: Literal["class folders", "class tars", "train tar", "flat folder", "flat tar"]
    path: Path


def is_imagenet(root: Path) -> bool:
    """Tell whether a folder holds ImageNet in some form of its own, and not simply class folders in both splits."""
    if not root.is_dir():
        return False
    if _base(root) != root:
        return True
    found = [_find_split(root, split) for split in ("train", "val")]
    return any(split is not None and split.form != "class folders" for split in found)


def read_imagenet(name: str, *, allow_class_mismatch: bool = False, cache_dir: Path | None = None) -> DataSet:
    """Read ImageNet from the folder `name`, each split in whatever form it is.

    train: class folders, a tar a class, or ILSVRC2012_img_train.tar
    val:   class folders, all images flat in `val`, or ILSVRC2012_img_val.tar; flat images take their classes from
           label files beside them
    Raises DataError naming the file, and its line, at fault.
    """
    root = Path(name)
    check_is_folder(root)
    train = _list_split(root, "train", None, cache_dir)
    known = None if allow_class_mismatch else train.files.keys()
    val = _list_split(root, "val", known, cache_dir)
    return make_dataset(
        root.resolve().name or str(root),
        where=str(root),
        train=train,
        val=val,
        allow_class_mismatch=allow_class_mismatch,
    )


def read_imagenet_split(name: str, split: str, *, cache_dir: Path | None = None) -> ImageSet:
    """Read one split of ImageNet alone, with its own classes."""
    check_is_folder(Path(name))
    return make_split(_list_split(Path(name), split, None, cache_dir))


def _base(root: Path) -> Path:
    """Give the folder of `train` and `val`, which Kaggle's archive has three levels down."""
    here = any((root / split).is_dir() for split in _TARS)
    return root / _KAGGLE if not here and (root / _KAGGLE).is_dir() else root


def _find_split(root: Path, split: str) -> _Split | None:
    base = _base(root)
    folder = base / split
    entries = list_entries(folder) if folder.is_dir() else []
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in entries):
        return _Split(form="class folders", path=folder)
    if split == "train" and any(_CLASS_TAR.fullmatch(entry.name) for entry in entries):
        return _Split(form="class tars", path=folder)
    if split == "val" and any(is_image_name(entry.name) for entry in entries):
        return _Split(form="flat folder", path=folder)
    for place in (folder, base, root):
        if (place / _TARS[split]).is_file():
            return _Split(form="train tar" if split == "train" else "flat tar", path=place / _TARS[split])
    return None


def _list_split(root: Path, split: str, known: Iterable[str] | None, cache_dir: Path | None) -> Listing:
    found = _find_split(root, split)
    if found is None:
        raise _no_split(root, split)
    match found.form:
        case "class folders":
            return list_class_folders(found.path, cache_dir=cache_dir)
        case "class tars":
            return _list_class_tars(found.path, cache_dir)
        case "train tar":
            return _list_train_tar(found.path, cache_dir)
        case "flat folder":
            return _list_flat_folder(found.path, _label_folders(root), known, cache_dir)
        case "flat tar":
            return _list_flat_tar(found.path, _label_folders(root), known, cache_dir)


def _no_split(root: Path, split: str) -> DataError:
    there = sorted(entry.name for entry in list_entries(root))
    forms = {"train": "class folders, class tars n01440764.tar", "val": "class folders, all images"}
    return DataError(
        f"has no {split} images (it holds: {', '.join(there[:_SHOWN]) or 'nothing'})",
        where=str(root),
        hint=f"Put {_TARS[split]} there, or fill a folder {split} with {forms[split]}.",
    )


def _list_class_tars(folder: Path, cache_dir: Path | None) -> Listing:
    names = sorted((entry.name for entry in list_entries(folder)), key=os.fsencode)
    paths = [folder / name for name in names if _CLASS_TAR.fullmatch(name)]
    archives = open_archives(paths)
    parts = list_parts(paths, _scan_class_tar, root=folder, kind="class tars", cache_dir=cache_dir)
    classes = [[path.stem] * len(part.names) for path, part in zip(paths, parts, strict=True)]
    return list_members(archives, parts, classes, root=folder)


def _scan_class_tar(path: Path) -> Part:
    return _take_images(read_members(path), where=str(path))


def _list_train_tar(path: Path, cache_dir: Path | None) -> Listing:
    archives = open_archives([path])
    (part,) = list_parts([path], _scan_train_tar, root=path, kind="train tar", cache_dir=cache_dir)
    ids = [image_id.partition("/") for image_id in part.names]
    files = Part(names=tuple(file for _, _, file in ids), numbers=part.numbers, passed_over=part.passed_over)
    return list_members(archives, [files], [[name for name, _, _ in ids]], root=path)


def _scan_train_tar(path: Path) -> Part:
    """Give the ids of the images in the class tars of a tar, with their offsets in the outer one."""
    members = read_members(path)
    tars = [(member, found[1]) for member in members if (found := _CLASS_TAR.fullmatch(member.file))]
    if not tars:
        raise DataError(
            "holds no class tars such as n01440764.tar",
            where=str(path),
            hint=f"{_TARS['train']} is a tar of tars; unpack another one, with a folder for each class.",
        )

    def scan(entry: tuple[TarMember, str]) -> Part:
        return _take_images(read_members(path, within=entry[0]), where=f"{path}: {entry[0].name}")

    with ThreadPoolExecutor(_THREADS) as pool:  # the headers of a thousand archives lie far apart
        parts = list(pool.map(scan, tars))
    names = [f"{wnid}/{file}" for (_, wnid), part in zip(tars, parts, strict=True) for file in part.names]
    rows = [row for part in parts for row in part.numbers.tolist()]
    passed_over = len(members) - len(tars) + sum(part.passed_over for part in parts)
    return make_part(names, rows, columns=2, passed_over=passed_over)


def _take_images(members: list[TarMember], *, where: str) -> Part:
    """Give the images among the members of an archive, with their offsets and sizes."""
    images = [member for member in members if member.is_file and is_image_name(member.file)]
    if not images:
        raise DataError("this archive has no images", where=where, hint="Download or write it again.")
    rows = [(member.offset, member.size) for member in images]
    return make_part([member.file for member in images], rows, columns=2, passed_over=len(members) - len(images))


def _list_flat_folder(folder: Path, places: list[Path], known: Iterable[str] | None, cache_dir: Path | None) -> Listing:
    (part,) = list_parts([folder], scan_images, root=folder, kind="flat folder", cache_dir=cache_dir)
    files: dict[str, list[str]] = {}
    for file, wnid in zip(part.names, read_labels(part.names, places, where=str(folder), known=known), strict=True):
        files.setdefault(wnid, []).append(file)
    return Listing(files=files, source=FlatSource(folder), passed_over=part.passed_over)


def _list_flat_tar(path: Path, places: list[Path], known: Iterable[str] | None, cache_dir: Path | None) -> Listing:
    archives = open_archives([path])
    (part,) = list_parts([path], _scan_class_tar, root=path, kind="flat tar", cache_dir=cache_dir)
    wnids = read_labels(part.names, places, where=str(path), known=known)
    return list_members(archives, [part], [wnids], root=path)


def _label_folders(root: Path) -> list[Path]:
    """Give the folders in which label files may stand; Kaggle's stands beside its ILSVRC folder."""
    base = _base(root)
    above = [base.resolve().parents[2]] if base.resolve().parts[-3:] == _KAGGLE.parts else []
    return list({place.resolve(): place for place in (root, base, base / "val", *above)}.values())
