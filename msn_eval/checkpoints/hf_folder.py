"""Weights of a repository of the Hugging Face hub, or of a local folder in the same layout.

A repository is read at one commit, from the cache that all libraries of the hub share. No code from it is ever run.
"""

import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path, PurePath

from msn_eval.errors import CheckpointError
from msn_eval.files.hf_hub import UnreachableError, offline_variable, translate_hub_errors
from msn_eval.files.regular import MOST_TEXT_BYTES, read_regular_file

_log = logging.getLogger(__name__)
CONFIG = "config.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
INDEX_SUFFIX = ".index.json"
# In the order of preference: formats that can hold nothing but tensors come first.
WEIGHT_FILES = tuple(
    f"{name}{end}" for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX_SUFFIX)
)
_TIMEOUT_SECONDS = 10.0
_COMMIT = re.compile("[0-9a-f]{40}")
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)


def open_hub(name: str) -> tuple[Path, str]:
    """Open a local folder or a repository OWNER/NAME[@REVISION], and download what the cache lacks.

    Returns the folder, with a config.json and all of its weights, and its name with `hf:` and a repository's commit. Raises
    CheckpointError where it does not exist or is not usable, StoreError where the cache cannot be written.
    """
    check_hub_name(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        find_weight_files(folder)
    else:
        repository, _, revision = name.partition("@")
        folder = _open_repository(repository, revision or "main")
        name = f"{repository}@{folder.name}"
    read_hub_config(folder)
    return folder, f"hf:{name}"


def check_hub_name(name: str) -> None:
    """Raise CheckpointError for a name that is neither an existing folder nor a possible repository."""
    # Unlike Path.is_dir, os.path.isdir returns False for names too long for the disk.
    if os.path.isdir(os.path.expanduser(name)):  # noqa: PTH111, PTH112
        return
    if _REPOSITORY.fullmatch(name) is None or ".." in name:
        what = "Neither an existing folder nor OWNER/NAME or OWNER/NAME@REVISION on the hub"
        hint = "Write for example hf:facebook/vit-msn-small. Give a single weight file by its path, without hf:."
        raise CheckpointError(what, where=f"hf:{name}", hint=hint)


def _open_repository(repository: str, revision: str) -> Path:
    """Return the snapshot of a repository in the cache, with all that is needed."""
    from huggingface_hub import constants, try_to_load_from_cache

    where, forbidden = f"hf:{repository}@{revision}", offline_variable()
    with translate_hub_errors(where, CheckpointError):
        cached = try_to_load_from_cache(repository, CONFIG, revision=revision)
    folder = Path(cached).parent if isinstance(cached, str) else None
    missing = _find_missing(repository, folder) if folder is not None else CONFIG
    reason = f"${forbidden} forbids to download it"
    if forbidden is None and (missing or not _COMMIT.fullmatch(revision)):
        try:
            with translate_hub_errors(where, CheckpointError):
                return _download(repository, revision, where)
        except UnreachableError as error:
            reason = f"the hub cannot be reached: {error}"
            _log.warning("%s: %s", where, reason)
    if folder is None or missing:
        option = "" if revision == "main" else f" --revision {revision}"
        hint = f"On a machine with a network, run `hf download {repository}{option}` and copy the folder "
        hint += f"models--{repository.replace('/', '--')} of its cache into this one ($HF_HUB_CACHE names another)."
        has_weights = missing.startswith((PREPROCESSOR, PROCESSOR))
        kept = f"To use it as it is, give its folder: hf:{folder}" if has_weights else ""
        what = f"The cache {constants.HF_HUB_CACHE} lacks {missing}, and {reason}"
        raise CheckpointError(what, where=where, hint=hint, kept=kept)
    return folder


def _find_missing(repository: str, folder: Path) -> str:
    """Describe what the cache lacks of a snapshot; an empty string where it is complete."""
    from huggingface_hub import try_to_load_from_cache

    try:
        find_weight_files(folder)
    except CheckpointError as error:
        return f"weights ({error.what})"
    # Other libraries download weights alone, and a guessed mean and std would change the score silently. The hub's
    # library records what a repository does not have; timm's config states mean and std itself.
    config, (_, processor) = read_hub_config(folder), read_image_processor(folder)
    for name in () if processor or "pretrained_cfg" in config else (PREPROCESSOR, PROCESSOR):
        if try_to_load_from_cache(repository, name, revision=folder.name) is None:
            return f"{name} (which may state mean and std), or the record that the repository has none"
    return ""


def _download(repository: str, revision: str, where: str) -> Path:
    """Download config, image processor and weights of one commit, and return its snapshot."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    # This request fails quickly where the hub is silent; those for files are retried for a minute.
    info = HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_SECONDS)
    names = {sibling.rfilename for sibling in info.siblings or ()}
    weights = next((name for name in WEIGHT_FILES if name in names), None)
    if CONFIG not in names or weights is None:
        what = f"The repository has no {CONFIG}, or none of {', '.join(WEIGHT_FILES)}"
        hint = "Choose one in the layout of transformers or timm, or download its weight file and give the path."
        raise CheckpointError(what, where=where, hint=hint)
    folder = Path(hf_hub_download(repository, CONFIG, revision=revision)).parent
    for name in (PREPROCESSOR, PROCESSOR):
        with suppress(*() if name in names else (EntryNotFoundError,)):  # records that there is none
            hf_hub_download(repository, name, revision=folder.name)
    read_hub_config(folder)  # before the weights: a refused repository costs no download
    hf_hub_download(repository, weights, revision=folder.name)
    for file in _list_files(folder, weights):
        hf_hub_download(repository, file, revision=folder.name)
    find_weight_files(folder)
    return folder


def find_weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the weight files of a folder. Raises CheckpointError naming what is missing or a link out of the folder."""
    first = next((name for name in WEIGHT_FILES if os.path.lexists(folder / name)), None)
    if first is None:
        hint = "Give a folder that `save_pretrained` wrote, or the path of the weight file itself."
        raise CheckpointError(f"The folder holds none of {', '.join(WEIGHT_FILES)}", where=str(folder), hint=hint)
    return tuple(_check_file(folder / name) for name in _list_files(folder, first))


def _list_files(folder: Path, name: str) -> list[str]:
    """Return a weight file, or those over which an index distributes the weights: files beside it, in its own format."""
    if not name.endswith(INDEX_SUFFIX):
        return [name]
    weight_map = _read_json(folder / name).get("weight_map")
    suffix = PurePath(name.removesuffix(INDEX_SUFFIX)).suffix
    names = sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else []
    odd = [file for file in names if PurePath(file).name != file or "\\" in file or PurePath(file).suffix != suffix]
    if odd or not names:
        what = f"{odd[0]!r} is not the name of a {suffix} file beside the index" if odd else "No weight_map with files"
        hint = "The index is damaged or hostile; download it again from its publisher."
        raise CheckpointError(what, where=str(folder / name), hint=hint)
    return names


def read_hub_config(folder: Path) -> dict[str, object]:
    """Read a folder's config.json. Raises CheckpointError where it is missing or damaged, or requires its own code."""
    config, processor = _read_json(folder / CONFIG), read_image_processor(folder)
    for path, content in ((folder / CONFIG, config), processor):
        levels: list[object] = [content]
        for value in levels:
            levels += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if any(isinstance(value, dict) and "auto_map" in value for value in levels):
            what = "Requires code of its own repository (auto_map), which is never run here"
            hint = "Choose a repository without it, or wrap the network yourself: py:package.module:factory."
            raise CheckpointError(what, where=str(path), hint=hint)
    return config


def read_image_processor(folder: Path) -> tuple[Path, dict[str, object]]:
    """Return the file that describes a folder's image processor, and the description, which is empty without one.

    As transformers does, `image_processor` in processor_config.json is preferred to preprocessor_config.json.
    """
    if os.path.lexists(folder / PROCESSOR):
        nested = _read_json(folder / PROCESSOR).get("image_processor")
        if isinstance(nested, dict):
            return folder / PROCESSOR, nested
    path = folder / PREPROCESSOR
    return path, _read_json(path) if os.path.lexists(path) else {}


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(read_regular_file(_check_file(path), most_bytes=MOST_TEXT_BYTES))
        if isinstance(content, dict):
            return content
        problem = "Not a JSON object"
    except (OSError, ValueError, RecursionError) as error:
        problem = f"Cannot be read as JSON: {str(error)[:160]}"
    hint = "Download it again from its publisher, or check its permissions."
    raise CheckpointError(problem, where=str(path), hint=hint)


def _check_file(path: Path) -> Path:
    """Return a file of a folder; a link may lead only to the folder itself or to the blobs of its cache."""
    folder = path.parent.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":  # CACHE/models--OWNER--NAME/snapshots/COMMIT; repositories may share blobs
        allowed += [(folder.parents[1] / "blobs").resolve(), (folder.parents[2] / "blobs").resolve()]
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where a parent folder is closed
        raise CheckpointError("No such file, or not readable", where=str(path), hint="Download or copy it again.")
    if not any(path.resolve().is_relative_to(root) for root in allowed):
        what = f"A link that leads out of its folder, to {path.resolve()}"
        raise CheckpointError(what, where=str(path), hint="Put the file itself there if you trust it.")
    return path
