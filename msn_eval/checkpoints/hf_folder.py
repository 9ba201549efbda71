"""Hub folder: weights of a repository of the Hugging Face hub, or of a folder in the same layout.

A repository is read at one commit, from the cache that all libraries of that hub share. Nothing from it is ever run.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

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
            hint="Write for example hf:facebook/vit-msn-small. A single weight file is given by its path, without hf:.",
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
            hint=f"Where there is a network, run `hf download {repository.name}{revision}` (formerly huggingface-cli) and "
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
            hint="Take one in the layout of transformers or timm, or download its weight file and give the path.",
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


# In the order of preference: what can hold nothing but tensors comes first.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
INDEX_SUFFIX = ".index.json"
_MAX_JSON_BYTES = 10_000_000
_SHOWN = 5
_LARGEST = sys.float_info.max  # JSON's integers may be larger, and then are no numbers here

Triple = tuple[float, float, float]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Give the weight files of a folder, by the first of WEIGHT_FILES that is there.

    Raises CheckpointError naming what is missing, damaged, or leads out of the folder.
    """
    first = next((name for name in WEIGHT_FILES if os.path.lexists(folder / name)), None)
    if first is None:
        raise CheckpointError(
            f"holds none of {', '.join(WEIGHT_FILES)}",
            where=str(folder),
            hint="Give a folder that `save_pretrained` wrote, or the path of the weight file itself.",
        )
    if not first.endswith(INDEX_SUFFIX):
        return (_own_file(folder, first),)
    shards = shard_names(folder, first)
    missing = [name for name in shards if not os.path.lexists(folder / name)]
    if missing:
        raise CheckpointError(
            f"lacks {len(missing)} of the {len(shards)} files that {first} names: {', '.join(missing[:_SHOWN])}",
            where=str(folder),
            hint="Fetch or copy them again; all of them are needed.",
        )
    return tuple(_own_file(folder, name) for name in shards)


def shard_names(folder: Path, index: str) -> tuple[str, ...]:
    """Read which files an index spreads the weights over.

    Raises CheckpointError for names that are not plain ones of the index's own kind, such as a pickle among safetensors.
    """
    named = _read_json(folder, index).get("weight_map")
    kind = PurePath(index.removesuffix(INDEX_SUFFIX)).suffix
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    odd = [name for name in names if PurePath(name).name != name or "\\" in name or PurePath(name).suffix != kind]
    if odd or not names:
        raise CheckpointError(
            f"names {odd[0]!r}, no plain name of a {kind} file beside it" if odd else "has no weight_map with files",
            where=str(folder / index),
            hint="The index is damaged or hostile; fetch it again from where it was published.",
        )
    return tuple(names)


def read_hub_config(folder: Path) -> dict[str, object]:
    """Read a folder's config.json as plain data.

    Raises CheckpointError where it is missing or damaged, and where the folder wants its own code run.
    """
    if not os.path.lexists(folder / CONFIG):
        raise CheckpointError(
            f"holds no {CONFIG}",
            where=str(folder),
            hint="Copy it from where the weights came from, or give the path of the weight file itself.",
        )
    config = _read_json(folder, CONFIG)
    _refuse_code(folder / CONFIG, config)
    if os.path.lexists(folder / PREPROCESSOR):
        _refuse_code(folder / PREPROCESSOR, _read_json(folder, PREPROCESSOR))
    return config


def image_statistics(folder: Path) -> tuple[Triple, Triple] | None:
    """Give mean and std a channel from a folder's preprocessor_config.json, None where it states neither.

    Zeros and ones where it says that images are not normalised.
    Raises CheckpointError where they are not three finite numbers each, or a std is not positive.
    """
    path = folder / PREPROCESSOR
    if not os.path.lexists(path):
        return None
    stated = _read_json(folder, PREPROCESSOR)
    if stated.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return stated_statistics(path, stated, "image_mean", "image_std")


def stated_statistics(
    path: Path, stated: Mapping[str, object], mean_name: str, std_name: str
) -> tuple[Triple, Triple] | None:
    """Give mean and std a channel that a file states under two names, None where it states neither.

    Raises CheckpointError where they are not three finite numbers each, or a std is not positive.
    """
    if stated.get(mean_name) is None and stated.get(std_name) is None:
        return None
    mean, std = _triple(path, stated, mean_name), _triple(path, stated, std_name)
    if min(std) <= 0:
        raise CheckpointError(f"{std_name} {list(std)} is not positive", where=str(path), hint="Correct it by hand.")
    return mean, std


def _triple(path: Path, stated: Mapping[str, object], name: str) -> Triple:
    values = stated.get(name)
    if isinstance(values, list):
        numbers = [float(value) for value in values if type(value) in (int, float) and abs(value) <= _LARGEST]
        if len(numbers) == len(values) == 3:
            return numbers[0], numbers[1], numbers[2]
    raise CheckpointError(
        f"{name} is not three finite numbers: {str(values)[:60]}", where=str(path), hint="Correct it by hand."
    )


def _refuse_code(path: Path, content: Mapping[str, object]) -> None:
    if "auto_map" in content:
        raise CheckpointError(
            "wants code of its own repository run (auto_map), which never happens here",
            where=str(path),
            hint="Take a repository that transformers or timm knows without it, or wrap the network yourself: "
            "py:package.module:factory.",
        )


def _read_json(folder: Path, name: str) -> dict[str, object]:
    path = _own_file(folder, name)
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
        if len(text) > _MAX_JSON_BYTES:
            raise ValueError(f"more than {_MAX_JSON_BYTES:,} bytes")
        content = json.loads(text, object_pairs_hook=_without_repetition)
    except OSError as error:
        raise CheckpointError(
            f"cannot be read: {error.strerror or error}", where=str(path), hint="Check its permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"is damaged: {str(error)[:160]}", where=str(path), hint="Fetch it again from where it was published."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            "holds no JSON object", where=str(path), hint="Fetch it again from where it was published."
        )
    return content


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):  # readers differ in which of the two they take
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {repeated[:60]!r} is there twice")
    return content


def _own_file(folder: Path, name: str) -> Path:
    """Give a file of a folder, and let a link lead nowhere but to the blobs of the cache that the folder is part of."""
    path, home = folder / name, folder.resolve()
    homes = [home]
    if (
        home.parent.name == "snapshots"
    ):  # CACHE/models--OWNER--NAME/snapshots/COMMIT; blobs may be shared by repositories
        homes += [(home.parents[1] / "blobs").resolve(), (home.parents[2] / "blobs").resolve()]
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises where a folder on the way is closed
        raise CheckpointError("is no readable file", where=str(path), hint="Fetch or copy it again.")
    if not any(path.resolve().is_relative_to(one) for one in homes):
        raise CheckpointError(
            f"is a link that leads out of its folder, to {path.resolve()}",
            where=str(path),
            hint="Put the file itself there where it is meant.",
        )
    return path
