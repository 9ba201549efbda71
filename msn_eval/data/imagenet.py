"""Folders of images by class; and ImageNet and Tiny ImageNet as they are distributed: tars read in place, flat val."""

import logging
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from msn_eval.data.dataset import SPLITS, VAL_NAMES, DatasetListing, Listing, LoadOptions, UnknownLayoutError
from msn_eval.data.folder import (
    FolderSource,
    check_is_folder,
    folder_name,
    holds_class_folders,
    is_folder,
    list_class_folders,
    list_entries,
    scan_images,
)
from msn_eval.data.imagenet_labels import TINY_LABELS, WNID, read_labels
from msn_eval.data.images import is_image_name, name_in_class
from msn_eval.data.index import ContainerIndex, index_containers, make_index
from msn_eval.data.tar import TarMember, list_members, open_archives, read_members
from msn_eval.errors import DataError

_log = logging.getLogger(__name__)
_TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
_KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")
_CLASS_TAR = re.compile(rf"({WNID.pattern})\.tar")
_TINY_IMAGES, _TINY_CLASSES = "images", "wnids.txt"
_THREADS = 8
_SHOWN = 5


@dataclass(frozen=True)
class FlatSource(FolderSource):
    """Image files that are all directly in `root`. An image's id is its class and its name."""

    def path(self, image_id: str) -> Path:
        return self.root / image_id.rpartition("/")[2]


@dataclass(frozen=True)
class TinySource(FolderSource):
    """Image files of Tiny ImageNet, in the folder `images` of each class."""

    def path(self, image_id: str) -> Path:
        name, _, file = image_id.partition("/")
        return self.root / name / _TINY_IMAGES / file


def list_directory(place: str, options: LoadOptions) -> DatasetListing:
    """List the folder `place`: ImageNet as distributed where a split is stored in such a form, else an image folder.

    ImageNet's training images are class folders, one tar per class, or ILSVRC2012_img_train.tar. Its validation images are
    class folders, all in the folder `val`, or ILSVRC2012_img_val.tar; flat ones take their classes from label files.
    Tiny ImageNet has its images in `train/<class>/images` and `val/images`, and the classes of the latter in a file.

    The folder of val may also be called `valid`, `validation` or `test`; then its name is part of that of the data set.
    Where val alone is wanted, class folders without splits are val.

    Raises:
        DataError: Naming the file, and its line, at fault.
    """
    root = Path(place)
    check_is_folder(root, hint="Give a folder that exists, or another data set.")
    base = _find_base(root)
    if options.splits == ("val",) and holds_class_folders(base):
        listing = list_class_folders(base, cache_dir=options.cache_dir)
        return DatasetListing(name=folder_name(root), splits={"val": listing})
    folders = {split: _find_split_folder(root, base, split) for split in options.splits}
    splits: dict[str, Listing] = {}
    for split, folder in folders.items():
        known = splits["train"].files.keys() if "train" in splits and not options.allow_class_mismatch else None
        splits[split] = _list_split(root, folder, split, known, options.cache_dir)
    name = folder_name(root)
    if folders.get("val", base / "val") != base / "val":
        name = f"{name} ({folders['val'].name})"
        _log.info("%s: validation images are those of the folder %s", root, folders["val"].name)
    return DatasetListing(name=name, splits=splits)


def _find_base(root: Path) -> Path:
    """Return the folder of `train` and `val`, which is three levels down in Kaggle's archive."""
    has_splits = any((root / split).is_dir() for split in SPLITS)
    return root / _KAGGLE if not has_splits and (root / _KAGGLE).is_dir() else root


def _find_split_folder(root: Path, base: Path, split: str) -> Path:
    """Return the folder of a split: that of val may have other names, but not beside ImageNet's tar of val.

    Many a `test` holds images without classes: with another name than `val` only class folders count.
    """
    has_tar = any((parent / _TARS["val"]).is_file() for parent in (base, root))
    others = () if split == "train" or has_tar or (base / split).is_dir() else VAL_NAMES[1:]
    folders = (base / name for name in others if (base / name).is_dir())
    return next((folder for folder in folders if any(map(is_folder, list_entries(folder)))), base / split)


def _list_split(root: Path, folder: Path, split: str, known: Iterable[str] | None, cache_dir: Path | None) -> Listing:
    """List the images of a split in the form in which they are stored."""
    base, entries = folder.parent, list_entries(folder) if folder.is_dir() else []
    folders = [entry.name for entry in entries if is_folder(entry) and not entry.name.startswith(".")]
    if folders == [_TINY_IMAGES] and (folder / TINY_LABELS).is_file():
        folder, folders = folder / _TINY_IMAGES, []
        entries = list_entries(folder)
    if folders:
        listing = list_class_folders(folder, cache_dir=cache_dir)
        return _without_tiny_images(listing, folder) if (root / _TINY_CLASSES).is_file() else listing
    class_tars = sorted((entry.name for entry in entries if _CLASS_TAR.fullmatch(entry.name)), key=os.fsencode)
    if split == "train" and class_tars:
        paths = [folder / name for name in class_tars]
        archives = open_archives(paths)
        indexes = index_containers(paths, _scan_class_tar, root=folder, kind="class tars", cache_dir=cache_dir)
        classes = [[path.stem] * len(index.names) for path, index in zip(paths, indexes, strict=True)]
        return list_members(archives, indexes, classes, root=folder)
    if split == "val" and any(is_image_name(entry.name) for entry in entries):
        (index,) = index_containers([folder], scan_images, root=folder, kind="flat folder", cache_dir=cache_dir)
        wnids = read_labels(index.names, _label_folders(root), where=str(folder), known=known)
        of_class: dict[str, list[str]] = {}
        for file, wnid in zip(index.names, wnids, strict=True):
            of_class.setdefault(wnid, []).append(file)
        return Listing(files=of_class, source=FlatSource(folder), passed_over=index.passed_over)
    path = next((parent / _TARS[split] for parent in (folder, base, root) if (parent / _TARS[split]).is_file()), None)
    if path is None:
        raise _missing_split(root, base, split)
    archives = open_archives([path])
    if split == "val":
        (index,) = index_containers([path], _scan_flat_tar, root=path, kind="flat tar", cache_dir=cache_dir)
        wnids = read_labels(index.names, _label_folders(root), where=str(path), known=known)
        return list_members(archives, [index], [wnids], root=path)
    (index,) = index_containers([path], _scan_train_tar, root=path, kind="train tar", cache_dir=cache_dir)
    ids = [image_id.partition("/") for image_id in index.names]
    files = make_index([file for *_, file in ids], index.numbers, columns=2, passed_over=index.passed_over)
    return list_members(archives, [files], [[name for name, *_ in ids]], root=path)


def _without_tiny_images(listing: Listing, folder: Path) -> Listing:
    """Leave out the folder `images` of each class of Tiny ImageNet: an image's id is its class and its file."""
    prefix = f"{_TINY_IMAGES}/"
    if not all(file.startswith(prefix) for files in listing.files.values() for file in files):
        return listing
    files = {name: [file.removeprefix(prefix) for file in files] for name, files in listing.files.items()}
    return replace(listing, files=files, source=TinySource(folder))


def _missing_split(root: Path, base: Path, split: str) -> DataError:
    names = sorted(entry.name for entry in list_entries(root))
    hint = f"Put the images of each class into a folder {split}/<class>, or {_TARS[split]} of ImageNet beside them."
    whole = base / "train" if split == "val" and (base / "train").is_dir() else base
    if any(root.glob(f"{split}-*.tar")):
        hint = f"Give wds:{root} if these are the archives of a WebDataset."
        return DataError(f"has no {split} images", where=str(root), hint=hint)
    if holds_class_folders(whole):
        hint = (
            f"Draw a val split once with `msn-eval data split {whole} --out DIR`, and give the CSV file that it writes."
        )
    held = ", ".join(names[:_SHOWN]) or "nothing"
    return UnknownLayoutError(f"has no {split} images (it holds: {held})", where=str(root), hint=hint)


def _scan_class_tar(path: Path) -> ContainerIndex:
    return _index_images(read_members(path), path.stem, where=str(path))


def _scan_flat_tar(path: Path) -> ContainerIndex:
    return _index_images(read_members(path), None, where=str(path))


def _scan_train_tar(path: Path) -> ContainerIndex:
    """List the ids of the images in the class tars of a tar, with their offsets in the outer one."""
    members = read_members(path)
    tars = [(member, match[1]) for member in members if (match := _CLASS_TAR.fullmatch(member.file))]
    if not tars:
        raise DataError(
            "holds no class tars such as n01440764.tar",
            where=str(path),
            hint=f"{_TARS['train']} is a tar of tars; unpack any other one, with a folder for each class.",
        )

    def scan(member: TarMember, wnid: str) -> ContainerIndex:
        return _index_images(read_members(path, within=member), wnid, where=f"{path}: {member.name}")

    with ThreadPoolExecutor(_THREADS) as pool:  # the headers of a thousand archives are far apart
        indexes = list(pool.map(scan, *zip(*tars, strict=True)))
    names = [f"{wnid}/{file}" for (_, wnid), index in zip(tars, indexes, strict=True) for file in index.names]
    rows = [row for index in indexes for row in index.numbers.tolist()]
    passed_over = len(members) - len(tars) + sum(index.passed_over for index in indexes)
    return make_index(names, rows, columns=2, passed_over=passed_over)


def _index_images(members: list[TarMember], wnid: str | None, *, where: str) -> ContainerIndex:
    """Return the images among the members of an archive, with their offsets and sizes.

    Args:
        members: What the archive holds.
        wnid: The class whose folder the archive stands for; None in a flat archive, whose folders mean nothing.
        where: The archive, for the error.
    """

    def name(member: TarMember) -> str:
        if wnid is None:
            return member.file
        is_inside = f"/{wnid}/" in f"/{member.name}"
        return name_in_class(member.name if is_inside else f"{wnid}/{member.name}", wnid)

    named = [(name(member), member) for member in members if member.is_file]
    images = [(name, member) for name, member in named if is_image_name(name)]
    if not images:
        raise DataError("this archive has no images", where=where, hint="Download or write it again.")
    rows = [(member.offset, member.size) for _, member in images]
    return make_index((name for name, _ in images), rows, columns=2, passed_over=len(members) - len(images))


def _label_folders(root: Path) -> list[Path]:
    """Return the folders that may hold label files; Kaggle's is beside its ILSVRC folder."""
    base = _find_base(root)
    above = [base.resolve().parents[2]] if base.resolve().parts[-3:] == _KAGGLE.parts else []
    return list({folder.resolve(): folder for folder in (root, base, base / "val", *above)}.values())
