"""The five networks that the authors of MSN released, downloaded once and then read from the user's cache.

No hashes were published with them. The SHA-256 of the first download is kept beside the file, in `FILE.sha256`, and every
later load is checked against it. This detects later damage, not a wrong file on the first day.
"""

import os
from pathlib import Path

from msn_eval.checkpoints.download import download
from msn_eval.errors import CheckpointError, did_you_mean
from msn_eval.files.atomic import write_atomically
from msn_eval.files.hf_hub import offline_variable

FOLDER_VARIABLE = "MSN_EVAL_WEIGHTS"
URL_VARIABLE = "MSN_EVAL_WEIGHTS_URL"
_URL = "https://dl.fbaipublicfiles.com/msn"
# The file of each network.
MSN_RELEASES = {
    name: f"{name}_{epochs}ep.pth.tar"
    for name, epochs in {"vits16": 800, "vitb16": 600, "vitl16": 600, "vitb4": 300, "vitl7": 200}.items()
}


def find_release(name: str) -> str:
    """Return the file name of a released network. Raises CheckpointError for a name that is not one of the five."""
    if name not in MSN_RELEASES:
        what = f"MSN released no network {name!r}.{did_you_mean(name, MSN_RELEASES)}"
        hint = f"The released networks are {', '.join(f'msn:{known}' for known in MSN_RELEASES)}."
        raise CheckpointError(what, where=f"msn:{name}", hint=hint)
    return MSN_RELEASES[name]


def find_weights_folder() -> Path:
    """Return the folder of released weights: $MSN_EVAL_WEIGHTS, or one in the user's cache."""
    import platformdirs

    folder = os.environ.get(FOLDER_VARIABLE)
    return Path(folder).expanduser() if folder else platformdirs.user_cache_path("msn-eval") / "weights"


def fetch_msn(name: str) -> Path:
    """Return the file of a released network, and download it first where the cache lacks it.

    Raises:
        CheckpointError: The name is unknown, or the download fails or is forbidden; the hint names the address to
            download manually and the path to put the file at.
        UsageError, StoreError: The file cannot be stored.
    """
    file = find_release(name)
    path = find_weights_folder() / file
    if path.is_file():
        return path
    url = f"{(os.environ.get(URL_VARIABLE) or _URL).rstrip('/')}/{file}"
    hint = f"Download {url} manually, on a machine with a network, and put it at {path}; ${FOLDER_VARIABLE} names another folder."
    forbidden = offline_variable()
    if forbidden is not None:
        what = f"No such file: {path}, and ${forbidden} forbids to download it"
        raise CheckpointError(what, where=f"msn:{name}", hint=hint)
    digest = download(url, path, hint=hint)
    # In the format of `sha256sum -c`.
    write_atomically(path.with_name(f"{path.name}.sha256"), f"{digest}  {path.name}\n".encode())
    return path
