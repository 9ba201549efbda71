"""Release: the five networks that the authors of MSN published, fetched once and then read from the user's cache.

No hashes were published with them. The SHA-256 of what the first download brought is kept beside the file, in
`FILE.sha256`, and every later load is held against that: it finds damage since then, not a wrong file on that day.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from msn_eval.checkpoints.download import download, sweep_parts
from msn_eval.errors import CheckpointError, did_you_mean
from msn_eval.files.atomic import write_atomically
from msn_eval.files.hf_hub import offline_variable

FOLDER_VARIABLE = "MSN_EVAL_WEIGHTS"
URL_VARIABLE = "MSN_EVAL_WEIGHTS_URL"
_URL = "https://dl.fbaipublicfiles.com/msn"


@dataclass(frozen=True, kw_only=True)
class MsnRelease:
    """One released network: its file, and the SHA-256 that was published with it, None where none was."""

    name: str
    file: str
    sha256: str | None = None


MSN_RELEASES = {
    name: MsnRelease(name=name, file=file)
    for name, file in (
        ("vits16", "vits16_800ep.pth.tar"),
        ("vitb16", "vitb16_600ep.pth.tar"),
        ("vitl16", "vitl16_600ep.pth.tar"),
        ("vitb4", "vitb4_300ep.pth.tar"),
        ("vitl7", "vitl7_200ep.pth.tar"),
    )
}


def find_release(name: str) -> MsnRelease:
    """Give the released network called `name`. Raises CheckpointError for a name that is not one of the five."""
    if name not in MSN_RELEASES:
        raise CheckpointError(
            f"MSN released no network {name!r}.{did_you_mean(name, MSN_RELEASES)}",
            where=f"msn:{name}",
            hint=f"There are {', '.join(f'msn:{known}' for known in MSN_RELEASES)}.",
        )
    return MSN_RELEASES[name]


def weights_folder() -> Path:
    """Give the folder that holds released weights: $MSN_EVAL_WEIGHTS, or one in the user's cache."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("msn-eval") / "weights"


def fetch_msn(name: str) -> Path:
    """Give the file of a released network, downloading it where the cache has none.

    Raises CheckpointError for an unknown name, and where it cannot be downloaded: with the address to fetch by hand and
    the path to put the file at. Raises UsageError or StoreError where it cannot be stored.
    """
    release = find_release(name)
    path = weights_folder() / release.file
    if path.is_file():
        sweep_parts(path)  # of a process that was killed while another finished
        return path
    url = f"{(os.environ.get(URL_VARIABLE) or _URL).rstrip('/')}/{release.file}"
    advice = f"Download {url} by hand, where there is a network, and put it at {path}; ${FOLDER_VARIABLE} names another folder."
    forbidden = offline_variable()
    if forbidden is not None:
        raise CheckpointError(
            f"{path} is not there, and ${forbidden} forbids to download it", where=f"msn:{name}", hint=advice
        )
    digest = download(url, path, sha256=release.sha256, advice=advice)
    write_atomically(sidecar_of(path), f"{digest}  {path.name}\n".encode())
    return path


def sidecar_of(path: Path) -> Path:
    """Give the path of the file that holds the SHA-256 of `path`, as `sha256sum -c` reads it."""
    return path.with_name(f"{path.name}.sha256")
