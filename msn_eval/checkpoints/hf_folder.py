"""Hub folder: weights of a repository of the Hugging Face hub, or of a folder in the same layout.

A repository is read at one commit, from the cache that all libraries of that hub share. Nothing from it is ever run.
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from msn_eval.checkpoints.hub_files import CONFIG, INDEX_SUFFIX, PREPROCESSOR, WEIGHT_FILES, shard_names
from msn_eval.checkpoints.hub_files import image_statistics as image_statistics
from msn_eval.checkpoints.hub_files import read_hub_config as read_hub_config
from msn_eval.checkpoints.hub_files import weight_files as weight_files
from msn_eval.errors import CheckpointError, StoreError
from msn_eval.files.atomic import write_atomically
from msn_eval.files.hf_hub import UnreachableError, ask_hub, offline_variable

_log = logging.getLogger(__name__)
_ANSWER_SECONDS = 10.0
_COMMIT = re.compile("[0-9a-f]{40}")
_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class HubFolder:
    """A folder with a config.json and all of its weights.

    revision: commit, 40 hex digits; None for a folder of the user's own
    repo:     OWNER/NAME on the hub; None likewise
    """

    folder: Path
    revision: str | None
    repo: str | None


@dataclass(frozen=True, kw_only=True)
class _Repository:
    """One revision (branch, tag or commit) of a repository, and its place in the cache."""

    name: str
    revision: str
    cache: Path

    def __str__(self) -> str:
        return f"hf:{self.name}@{self.revision}"

    @property
    def place(self) -> Path:
        return self.cache / f"models--{self.name.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        return self.place / "snapshots" / commit


def open_hub(name: str) -> HubFolder:
    """Open what stands behind `hf:`, a folder that exists or OWNER/NAME[@REVISION], and download what the cache lacks.

    Raises CheckpointError where it is not there or not usable, StoreError where the cache cannot be written.
    """
    check_hub_name(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        read_hub_config(folder)
        weight_files(folder)
        return HubFolder(folder=folder, revision=None, repo=None)
    repository, _, revision = name.partition("@")
    return _open_repository(_Repository(name=repository, revision=revision or "main", cache=_cache_folder()))


def check_hub_name(name: str) -> None:
    """Raise CheckpointError for what is neither a folder that exists nor a name that the hub could know."""
    # Unlike Path.is_dir this gives False for names too long for the disk.
    if os.path.isdir(os.path.expanduser(name)):  # noqa: PTH111, PTH112
        return
    if _REPOSITORY.fullmatch(name) is None or ".." in name:
        raise CheckpointError(
            "is neither a folder that exists nor OWNER/NAME or OWNER/NAME@REVISION on the hub",
            where=f"hf:{name}",
            remedy="Write for example hf:facebook/vit-msn-small. A single weight file is given by its path, without hf:.",
        )


def _open_repository(repository: _Repository) -> HubFolder:
    commit = _cached_commit(repository)
    lacking = _lacking(repository, commit)
    forbidden = offline_variable()
    why = f"${forbidden} forbids to download it"
    if forbidden is None and (lacking or commit != repository.revision):
        try:
            return _download(repository)
        except UnreachableError as error:
            why = f"the hub cannot be reached: {error}"
            _log.warning("%s: %s", repository, why)
    if commit is None or lacking:
        revision = "" if repository.revision == "main" else f" --revision {repository.revision}"
        raise CheckpointError(
            f"the cache {repository.cache} lacks {lacking}, and {why}",
            where=str(repository),
            remedy=f"Where there is a network, run `hf download {repository.name}{revision}` (formerly huggingface-cli) and "
            f"copy the folder {repository.place.name} of its cache into this one ($HF_HUB_CACHE names another).",
            kept=f"As it is, it can be given by its folder: hf:{repository.snapshot(commit)}"
            if commit is not None and lacking.startswith(PREPROCESSOR)
            else "",
        )
    read_hub_config(repository.snapshot(commit))
    return HubFolder(folder=repository.snapshot(commit), revision=commit, repo=repository.name)


def _cache_folder() -> Path:
    """Give the hub's cache, by its own variables as they are now; its library reads them once, when it is imported."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(named or Path(os.environ.get("HF_HOME") or user / "huggingface") / "hub").expanduser()


def _cached_commit(repository: _Repository) -> str | None:
    if _COMMIT.fullmatch(repository.revision):
        return repository.revision if repository.snapshot(repository.revision).is_dir() else None
    try:
        commit = (repository.place / "refs" / repository.revision).read_text(errors="replace").strip()
    except OSError:
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _lacking(repository: _Repository, commit: str | None) -> str:
    """Say what the cache lacks of a commit, nothing where all is there."""
    if commit is None:
        return "this revision"
    folder = repository.snapshot(commit)
    if not (folder / CONFIG).exists():
        return CONFIG
    try:
        weight_files(folder)
    except CheckpointError as error:
        return f"weights: {folder.name} {error.what}"
    # Other libraries fetch weights alone, and a guessed mean and std would move the score without a word. The hub's
    # library notes what a repository does not have; timm's config states them itself.
    absent = (repository.place / ".no_exist" / commit / PREPROCESSOR).exists()
    if (folder / PREPROCESSOR).exists() or absent or "pretrained_cfg" in read_hub_config(folder):
        return ""
    return f"{PREPROCESSOR}, which would state mean and std, or a note that there is none"


def _download(repository: _Repository) -> HubFolder:
    from huggingface_hub import HfApi, hf_hub_download

    where, cache = str(repository), repository.cache
    endpoint = os.environ.get("HF_ENDPOINT") or None
    api = HfApi(endpoint=endpoint)
    info = ask_hub(
        lambda: api.model_info(repository.name, revision=repository.revision, timeout=_ANSWER_SECONDS), where, cache
    )
    commit, names = str(info.sha), {sibling.rfilename for sibling in info.siblings or ()}
    weights = next((name for name in WEIGHT_FILES if name in names), None)
    if not _COMMIT.fullmatch(commit) or CONFIG not in names or weights is None:
        raise CheckpointError(
            f"the repository has no {CONFIG}, or none of {', '.join(WEIGHT_FILES)}",
            where=where,
            remedy="Take one in the layout of transformers or timm, or download its weight file and give the path.",
        )

    def fetch(name: str) -> Path:
        def ask() -> str:
            return hf_hub_download(repository.name, name, revision=commit, cache_dir=cache, endpoint=endpoint)

        return Path(ask_hub(ask, where, cache))

    folder = fetch(CONFIG).parent
    if PREPROCESSOR in names:
        fetch(PREPROCESSOR)
    read_hub_config(folder)  # before the weights: what is refused costs no download
    fetch(weights)
    for shard in shard_names(folder, weights) if weights.endswith(INDEX_SUFFIX) else ():
        fetch(shard)
    weight_files(folder)
    _remember(repository, commit, has_preprocessor=PREPROCESSOR in names)
    return HubFolder(folder=folder, revision=commit, repo=repository.name)


def _remember(repository: _Repository, commit: str, *, has_preprocessor: bool) -> None:
    """Note, as the hub's library does, what will be needed without a network: the commit of a name, what does not exist."""
    notes = {repository.place / "refs" / repository.revision: commit} if repository.revision != commit else {}
    if not has_preprocessor:
        notes[repository.place / ".no_exist" / commit / PREPROCESSOR] = ""
    try:
        for path, text in notes.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode())
    except (OSError, StoreError) as error:
        _log.info("%s cannot be noted for use without a network: %s", repository, error)
