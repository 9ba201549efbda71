"""Classification sets of torchvision with official splits: downloaded and unpacked once, then read as a CSV file or as tars.

torchvision.datasets downloads, checks each file's MD5 and unpacks. What it leaves is listed in a CSV file, or, where it has
arrays, written as one tar per split. These are written last and exist only if everything before is complete.
"""

import http.client
import importlib.util
import io
import os
import re
import tarfile
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

from PIL import Image

from msn_eval.data.csv_list import list_csv, write_csv
from msn_eval.data.dataset import SPLITS, DatasetListing, LoadOptions
from msn_eval.data.index import ContainerIndex, index_containers, make_index
from msn_eval.data.tar import list_members, open_archives, read_members
from msn_eval.errors import DataError, StoreError, UsageError, did_you_mean
from msn_eval.files.atomic import describe_free_space, prepare_folder, remove, written_atomically
from msn_eval.files.hf_hub import offline_variable

_ARCHIVES = (".gz", ".tgz", ".zip", ".mat")  # what torchvision downloads
# RuntimeError is torchvision's, where the MD5 is another.
_DOWNLOAD_ERRORS = (RuntimeError, urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException)
_TIMEOUT_SECONDS = 60.0
_LOCK_SECONDS = 24 * 3600.0
# torchvision checks no hash of this archive. This one is in the loaders of several libraries.
_AIRCRAFT_MD5 = "d4acdd33327262359767eeaa97a4f732"
# The authors' copy of the files that torchvision takes from Google Drive, which often refuses.
_PCAM_URL = "https://zenodo.org/records/2546921/files"
_FORBIDDEN = re.compile("[/\0]")  # in class names, as for Hugging Face data sets


@dataclass(frozen=True, kw_only=True)
class _Set:
    """A set of torchvision.

    Attributes:
        cls: Its class in torchvision.datasets.
        splits: The argument for train and for val: a value of `split`, or of the flag `train`.
        names: Attribute with the class names, or the format of a class number.
        folder: Where torchvision puts the archives, below its root.
        fetch: Downloads what torchvision would not check or could not get.
        requires: A package that torchvision needs to read it.
    """

    cls: str
    splits: tuple[str | bool, str | bool] = ("train", "test")
    names: str = "classes"
    folder: str = ""
    fetch: Callable[[Any, Path], None] | None = None
    requires: str = ""


def _fetch_aircraft(cls: Any, folder: Path) -> None:
    from torchvision.datasets.utils import download_url

    download_url(cls._URL, folder, md5=_AIRCRAFT_MD5)


def _fetch_pcam(cls: Any, folder: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    for split in ("train", "test"):
        for file, _, md5 in cls._FILES[split].values():
            download_and_extract_archive(f"{_PCAM_URL}/{file}.gz", str(folder), md5=md5)


SETS = {
    "cifar10": _Set(cls="CIFAR10", splits=(True, False)),
    "cifar100": _Set(cls="CIFAR100", splits=(True, False)),
    "stl10": _Set(cls="STL10"),
    "svhn": _Set(cls="SVHN", names="{}"),
    "mnist": _Set(cls="MNIST", splits=(True, False), names="{}", folder="MNIST/raw"),
    "fashionmnist": _Set(cls="FashionMNIST", splits=(True, False), folder="FashionMNIST/raw"),
    "flowers102": _Set(cls="Flowers102", folder="flowers-102"),
    "oxfordpets": _Set(cls="OxfordIIITPet", splits=("trainval", "test"), folder="oxford-iiit-pet"),
    "dtd": _Set(cls="DTD", folder="dtd"),
    "food101": _Set(cls="Food101"),
    "aircraft": _Set(cls="FGVCAircraft", fetch=_fetch_aircraft),
    "gtsrb": _Set(cls="GTSRB", names="{:05d}", folder="gtsrb"),
    "pcam": _Set(cls="PCAM", names="{}", folder="pcam", fetch=_fetch_pcam, requires="h5py"),
    "imagenette": _Set(cls="Imagenette", splits=("train", "val"), names="wnids"),
}


def list_torchvision(place: str, options: LoadOptions) -> DatasetListing:
    """List a set of torchvision, downloaded first where the cache lacks it.

    An image of a set of arrays is `CLASS/iiiiii.png`, where iiiiii is its row in its split; its bytes are those of a PPM or
    PGM file of its pixels, so hashes depend on no image encoder.

    Raises:
        DataError: The download fails, is damaged or is forbidden. The hint names the address and the place of the file.
        UsageError: torchvision has no such set here, or the cache cannot be a folder.
        StoreError: The disk refuses.
    """
    if place not in SETS:
        what = f"--data tv:{place}: no such data set.{did_you_mean(place.lower(), SETS)}"
        raise UsageError(what, hint=f"Known: {', '.join(f'tv:{name}' for name in SETS)}.")
    folder = _find_cache(options.cache_dir) / "torchvision" / place
    table, tars = folder / f"{place}.csv", {split: folder / f"{split}.tar" for split in SPLITS}
    if not _is_complete(table, tars.values()):
        _download_once(SETS[place], folder, table, tars)
    if table.is_file():
        return list_csv(str(table), options)
    splits = {}
    for split in options.splits:
        archives = open_archives([tars[split]])
        indexes = index_containers(
            [tars[split]], _scan_tar, root=tars[split], kind="tar of class folders", cache_dir=options.cache_dir
        )
        names = [name.partition("/") for name in indexes[0].names]
        files = make_index([file for *_, file in names], indexes[0].numbers, columns=2)
        splits[split] = list_members(archives, [files], [[name for name, *_ in names]], root=tars[split])
    return DatasetListing(name=place, splits=splits)


def _find_cache(cache_dir: Path | None) -> Path:
    if cache_dir is not None:
        return cache_dir
    import platformdirs

    return platformdirs.user_cache_path("msn-eval")


def _is_complete(table: Path, tars: Iterable[Path]) -> bool:
    return table.is_file() or all(tar.is_file() for tar in tars)


def _scan_tar(path: Path) -> ContainerIndex:
    members = read_members(path)
    rows = [(member.offset, member.size) for member in members]
    return make_index((member.name for member in members), rows, columns=2)


def _download_once(chosen: _Set, folder: Path, table: Path, tars: dict[str, Path]) -> None:
    """Download, unpack and list a set, while other processes wait."""
    import filelock

    if chosen.requires and importlib.util.find_spec(chosen.requires) is None:
        what = f"torchvision needs {chosen.requires} to read it, which is not installed"
        raise DataError(what, where=f"tv:{folder.name}", hint=f"pip install 'msn-eval[{folder.name}]'")
    root = folder / "download"
    archives = root / chosen.folder
    prepare_folder(archives, option="--cache")
    with filelock.FileLock(folder / "download.lock", timeout=_LOCK_SECONDS):
        if _is_complete(table, tars.values()):
            return
        _remove_unpacked(archives)  # of a process that was killed while it unpacked
        with _translate_errors(folder.name, archives):
            opened = _open_splits(chosen, root, archives)
            rows = []
            for split, dataset in opened.items():
                name = _name_classes(chosen, dataset)
                files = _list_files(dataset)
                if files is None:
                    _write_tar(tars[split], dataset, name)
                else:
                    rows += [
                        (Path(os.path.relpath(file, folder)).as_posix(), name(label), split) for file, label in files
                    ]
        if rows:
            write_csv(table, rows)
        else:
            _remove_unpacked(archives)


def _remove_unpacked(archives: Path) -> None:
    for path in archives.iterdir():
        if path.is_dir() or path.suffix not in _ARCHIVES:
            remove(path)


def _open_splits(chosen: _Set, root: Path, archives: Path) -> dict[str, Any]:
    """Download and open both splits with torchvision."""
    import torchvision.datasets

    cls = getattr(torchvision.datasets, chosen.cls)
    if chosen.fetch is not None:
        chosen.fetch(cls, archives)
    arguments = [{"train": value} if isinstance(value, bool) else {"split": value} for value in chosen.splits]
    return {split: cls(root, download=True, **given) for split, given in zip(SPLITS, arguments, strict=True)}


def _name_classes(chosen: _Set, dataset: Any) -> Callable[[int], str]:
    if "{" in chosen.names:
        return chosen.names.format
    names = [_FORBIDDEN.sub("_", name) for name in getattr(dataset, chosen.names)]
    return names.__getitem__


def _list_files(dataset: Any) -> list[tuple[str | Path, int]] | None:
    """Return the file and label of each image, None where the set has arrays. torchvision has no public way to ask."""
    if hasattr(dataset, "_samples"):
        return list(dataset._samples)
    files = getattr(dataset, "_image_files", getattr(dataset, "_images", None))
    return None if files is None else list(zip(files, dataset._labels, strict=True))


def _write_tar(path: Path, dataset: Any, name: Callable[[int], str]) -> None:
    with written_atomically(path, "images") as temporary, tarfile.open(temporary, "w") as archive:
        for row in range(len(dataset)):
            image, label = dataset[row]
            content = _encode(image)
            header = tarfile.TarInfo(f"{name(label)}/{row:06d}.png")
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))


def _encode(image: Image.Image) -> bytes:
    """Return the PPM file of an RGB image, or the PGM file of a grey one."""
    kind = {"RGB": "P6", "L": "P5"}[image.mode]
    return f"{kind}\n{image.width} {image.height}\n255\n".encode() + image.tobytes()


class _Requests(urllib.request.BaseHandler):
    """Remembers the address of the last file that was requested, and refuses all where downloads are forbidden."""

    def __init__(self) -> None:
        self.url = ""
        self.redirected: set[str] = set()

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        if request.unverifiable:  # so urllib marks what a server redirected to
            self.redirected.add(request.full_url)
        elif request.full_url not in self.redirected:
            self.url = request.full_url
        if (forbidden := offline_variable()) is not None:
            raise urllib.error.URLError(f"${forbidden} forbids to download it")
        request.timeout = _TIMEOUT_SECONDS  # torchvision sets none, and would wait forever
        return request

    https_request = http_request


@contextmanager
def _translate_errors(name: str, archives: Path) -> Iterator[None]:
    """Raise what torchvision raises while it downloads, unpacks and reads as DataError, or StoreError of a full disk."""
    requests = _Requests()
    previous = getattr(urllib.request, "_opener", None)
    urllib.request.install_opener(urllib.request.build_opener(requests))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickles and tar filters
            yield
    except StoreError:
        raise
    except (
        Exception
    ) as error:  # urllib, http, zlib, tarfile, zipfile, pickle, scipy and torchvision have kinds of their own
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
            hint = f"Free space or give another --cache; {describe_free_space(archives)}."
            raise StoreError(f"cannot be written: {error.strerror}", where=str(archives), hint=hint) from error
        target = archives / requests.url.rpartition("/")[2]
        hint = f"Remove {archives} and try again."
        if requests.url and isinstance(error, _DOWNLOAD_ERRORS):
            hint = f"Download {requests.url} on a machine with a network and put it at {target}, or try again later."
            hint += " The file that is there now is not the published one, by its MD5." if target.is_file() else ""
        reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        what = f"could not be downloaded or unpacked: {reason}"
        raise DataError(what, where=requests.url or f"tv:{name}", hint=hint) from error
    finally:
        urllib.request.install_opener(previous)
