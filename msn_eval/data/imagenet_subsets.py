"""The ImageNet lists of the MSN paper: known by content, found in folders, downloaded from their repository."""

import hashlib
import http.client
import json
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from msn_eval.errors import DataError
from msn_eval.files.atomic import prepare_folder, write_atomically
from msn_eval.files.package_data import find_package_folder

FOLDER_VARIABLE = "MSN_EVAL_LISTS"
_TIMEOUT_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class PublishedList:
    """One published list: its name here and what its bytes must be."""

    subset: str
    draw: int
    path: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Where the lists were published, which classes they cover, and their contents by hash."""

    url: str
    class_map_sha256: str
    val_images: int
    lists: tuple[PublishedList, ...]

    def lists_of(self, subset: str) -> tuple[PublishedList, ...]:
        return tuple(entry for entry in self.lists if entry.subset == subset)


@cache
def read_publication() -> Publication:
    """Read the description of the lists that ships with the package."""
    content = json.loads((find_package_folder("imagenet_subsets") / "published_lists.json").read_text())
    return Publication(
        url=content["url"],
        class_map_sha256=content["class_map_sha256"],
        val_images=content["val_images"],
        lists=tuple(PublishedList(**entry) for entry in content["lists"]),
    )


def list_folders() -> tuple[Path, ...]:
    """Return the folders that are searched for the lists, in order."""
    named = os.environ.get(FOLDER_VARIABLE)
    shipped = find_package_folder("imagenet_subsets")
    return (*([Path(named)] if named else []), shipped, Path("imagenet_subsets"), find_user_list_folder())


def find_user_list_folder() -> Path:
    """Return the folder that `subsets fetch` fills by default."""
    import platformdirs

    return platformdirs.user_data_path("msn-eval") / "imagenet_subsets"


def find_list(wanted: PublishedList) -> Path | None:
    """Find a list by its size and SHA-256, whatever its name, or return None."""
    for folder in list_folders():
        for path in sorted(folder.rglob("*.txt")) if folder.is_dir() else ():
            if path.is_file() and path.stat().st_size == wanted.bytes and _sha256(path) == wanted.sha256:
                return path
    return None


def read_published_list(wanted: PublishedList) -> tuple[Path, str]:
    """Return the file and text of a published list. Raises DataError with the way to get it where it is missing."""
    path = find_list(wanted)
    if path is None:
        folders = ", ".join(str(folder) for folder in list_folders())
        raise DataError(
            f"the published list {wanted.subset}@{wanted.draw} ({wanted.path}) was not found in {folders}",
            hint="Run `msn-eval subsets fetch` once, or copy the lists of github.com/facebookresearch/msn there; "
            f"${FOLDER_VARIABLE} names another folder.",
        )
    return path, path.read_text(encoding="utf-8")


def fetch_lists(folder: Path, url: str) -> Iterator[tuple[PublishedList, str]]:
    """Download every list that `folder` lacks, and yield each with `kept` or `fetched`.

    Args:
        folder: Where to put them.
        url: Folder of the lists on a web server, normally the pinned commit of the public repository.

    Raises:
        DataError: The server cannot be reached, or its bytes are not the published ones.
    """
    for entry in read_publication().lists:
        target = folder / entry.path
        if target.is_file() and _sha256(target) == entry.sha256:
            yield entry, "kept"
            continue
        content = _download(f"{url.rstrip('/')}/{entry.path}", target)
        digest = hashlib.sha256(content).hexdigest()
        if digest != entry.sha256:
            raise DataError(
                f"{len(content):,} bytes with SHA-256 {digest[:16]}… instead of {entry.sha256[:16]}…",
                where=f"{url}/{entry.path}",
                hint="This is not the published list. Download it from github.com/facebookresearch/msn manually.",
            )
        prepare_folder(target.parent, option="--to")
        write_atomically(target, content)
        yield entry, "fetched"


def _download(url: str, target: Path) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            return bytes(response.read())
    except (http.client.HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"could not be downloaded: {reason}",
            where=url,
            hint=f"Without a network, download it elsewhere and put it at {target}; then run this again.",
            kept="Lists fetched before are kept.",
        ) from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
