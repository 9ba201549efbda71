"""The splits of a data set as the `datasets` library loads them, from the hub, its cache or a folder; its errors in our words."""

import contextlib
import errno
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import CheckpointError, DataError, MsnEvalError, StoreError, UsageError
from msn_eval.files.hf_hub import UnreachableError, ask_hub, offline_variable

_CONFIG_AND_REVISION = r"(?::(?P<config>[\w.+-]+))?(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?"
_ON_THE_HUB = re.compile(rf"(?P<place>[\w.-]+/[\w.-]+){_CONFIG_AND_REVISION}", re.ASCII)
_IN_A_FOLDER = re.compile(r"(?P<place>.+):(?P<config>[\w.+-]+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class HubName:
    """What stands behind `hf:`, taken apart. `folder` is None for a data set of the hub."""

    text: str
    place: str
    config: str | None
    revision: str | None
    folder: Path | None

    def __str__(self) -> str:
        return f"hf:{self.text}"

    @property
    def short(self) -> str:
        if self.folder is None:
            return self.text
        return f"{self.folder.name}:{self.config}" if self.config else self.folder.name


def parse_name(text: str) -> HubName:
    """Take a name apart; a folder that exists goes before the hub's name of the same spelling."""
    for place, config in ((text, None), *((found["place"], found["config"]) for found in _matches(_IN_A_FOLDER, text))):
        folder = os.path.expanduser(place)  # noqa: PTH111 - Path knows no folder of a name too long for the disk
        if os.path.isdir(folder):  # noqa: PTH112
            return HubName(text=text, place=place, config=config, revision=None, folder=Path(folder).resolve())
    for found in _matches(_ON_THE_HUB, text):
        if ".." not in text and not text.startswith("."):
            return HubName(text=text, folder=None, **found.groupdict())
    raise DataError(
        "is neither a folder that exists nor OWNER/NAME, OWNER/NAME:CONFIG or OWNER/NAME@REVISION on the hub",
        where=f"hf:{text}",
        hint="Write for example hf:uoft-cs/cifar10, or the path of a folder with train-*.parquet and "
        "validation-*.parquet. An image folder is given by its path, without hf:.",
    )


def _matches(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    found = pattern.fullmatch(text)
    return [] if found is None else [found]


if TYPE_CHECKING:
    import datasets

    Table = tuple[str, datasets.Dataset]  # a split by the data set's own name for it

_log = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0
_BARS_VARIABLE = "HF_DATASETS_DISABLE_PROGRESS_BARS"  # goes before what a program says
_SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}  # in the order of preference
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENOTDIR}
_WEB_CLIENTS = ("httpx", "requests", "urllib3", "aiohttp", "huggingface_hub", "fsspec")


def load_splits(where: HubName, wanted: Sequence[str]) -> "dict[str, Table]":
    """Load the wanted splits, `train` or `val`, mapped into memory from the disk."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"data sets called hf: need the `datasets` library ({error})",
            where=str(where),
            hint="Install it: pip install 'msn-eval[hf]'.",
        ) from error
    unwanted = (
        not datasets.are_progress_bars_disabled() and not sys.stderr.isatty() and _BARS_VARIABLE not in os.environ
    )
    if unwanted:
        datasets.disable_progress_bars()
    try:
        if where.folder is None:
            return _load_from_hub(where, wanted)
        return _load_folder(where, where.folder, wanted)
    except (MsnEvalError, KeyboardInterrupt):
        raise
    except Exception as error:  # the library has no common base for what it raises
        raise _translate(error, where) from error
    finally:
        if unwanted:
            datasets.enable_progress_bars()


def _load_folder(where: HubName, folder: Path, wanted: Sequence[str]) -> "dict[str, Table]":
    import datasets

    if (folder / "dataset_dict.json").is_file():
        stored = datasets.DatasetDict.load_from_disk(folder, keep_in_memory=False)
        names = {split: _choose_split(where, split, list(stored)) for split in wanted}
        return {split: (name, stored[name]) for split, name in names.items()}
    if (folder / "state.json").is_file():
        raise DataError(
            "is a single split that `save_to_disk` wrote",
            where=str(where),
            hint="Save a DatasetDict of train and validation, and give its folder, which holds a dataset_dict.json.",
        )
    # An absolute path, since the library takes some relative ones for names of its own.
    return _prepare(where, datasets.load_dataset_builder(str(folder), where.config), wanted)


def _load_from_hub(where: HubName, wanted: Sequence[str]) -> "dict[str, Table]":
    import datasets

    commit, why = where.revision, ""
    forbidden = offline_variable()
    if forbidden is not None or datasets.config.HF_HUB_OFFLINE:
        why = f"${forbidden or 'HF_DATASETS_OFFLINE'} forbids to ask the hub"
    else:
        try:
            commit = _ask_commit(where)
            _log.info("%s is at commit %s", where, commit)
        except UnreachableError as error:
            why = f"the hub cannot be reached: {error}"
            _log.warning("%s: %s; taking what the cache holds", where, why)
    with _unplugged() if why else contextlib.nullcontext():
        try:
            builder = datasets.load_dataset_builder(where.place, where.config, revision=commit)
        except Exception as error:
            raise (
                _not_cached(where, why) if why and not _is_disk_error(error) else _translate(error, where)
            ) from error
        # The library falls back to whatever its cache holds of this name, without a look at the revision.
        if type(builder).__module__.endswith(".cache.cache") and commit is not None and builder.hash != commit:
            raise _not_cached(where, why or "the hub stopped answering")
        return _prepare(where, builder, wanted)


def _ask_commit(where: HubName) -> str:
    """Ask once and shortly which commit is meant: the library itself would ask a silent hub for half a minute."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        info = ask_hub(
            lambda: api.dataset_info(where.place, revision=where.revision, timeout=_ANSWER_SECONDS),
            str(where),
            _cache(),
        )
    except CheckpointError as error:
        raise DataError(error.what, where=error.where, hint=error.hint) from error
    return str(info.sha)


@contextlib.contextmanager
def _unplugged() -> Iterator[None]:
    """Keep the library from asking a hub that is known to be silent."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _prepare(where: HubName, builder: "datasets.DatasetBuilder", wanted: Sequence[str]) -> "dict[str, Table]":
    """Have the library write its Arrow files where the cache has none yet, and map them."""
    builder.download_and_prepare()
    names = {split: _choose_split(where, split, list(builder.info.splits or ())) for split in wanted}
    return {split: (name, builder.as_dataset(split=name)) for split, name in names.items()}


def _choose_split(where: HubName, wanted: str, there: Sequence[str]) -> str:
    for name in _SPLITS[wanted]:
        if name in there:
            return name
    raise DataError(
        f"has no split {' or '.join(map(repr, _SPLITS[wanted]))} (it has: {', '.join(there) or 'none'})",
        where=str(where),
        hint="Files of a local folder are told apart by their names: train-*.parquet and validation-*.parquet.",
    )


def _cache() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE)


def _chain(error: BaseException) -> list[BaseException]:
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found


def _is_disk_error(error: BaseException) -> bool:
    return any(isinstance(one, OSError) and one.errno in _DISK for one in _chain(error))


def _translate(error: Exception, where: HubName) -> MsnEvalError:
    """Tell in words of ours what the library raised."""
    chain = _chain(error)
    for one in chain:
        if isinstance(one, OSError) and one.errno in _DISK:
            place = os.fsdecode(one.filename) if isinstance(one.filename, str | bytes) else str(_cache())
            if where.folder is not None and Path(place).is_relative_to(where.folder):
                return DataError(f"cannot be read: {one.strerror}", where=place, hint="Check its permissions.")
            return StoreError(
                f"the cache of the `datasets` library cannot be written: {one.strerror}",
                where=place,
                hint="Free space, or name a folder of your own: $HF_DATASETS_CACHE (and $HF_HUB_CACHE for downloads). "
                "What `save_to_disk` wrote is read where it is and needs no cache.",
            )
    if where.folder is None and any(_is_of_the_web(one) for one in chain):
        return _not_cached(where, f"the hub cannot be reached: {first_line(error)}")
    text = first_line(error)
    if "onfig" in text and isinstance(error, ValueError):  # several, and none or an unknown one was named
        listed = " ".join(str(error).split())[:600]
        return DataError(listed, where=str(where), hint=f"Choose one: hf:{where.place}:CONFIG.")
    if "scripts are no longer supported" in text:
        return DataError(
            "comes with code of its own, which is never run here",
            where=str(where),
            hint="Take a version of it in Parquet files; many have one in their branch refs/convert/parquet: "
            f"hf:{where.place}@refs/convert/parquet.",
        )
    return DataError(
        f"the `datasets` library cannot load it: {type(error).__name__}: {text}",
        where=str(where),
        hint="It reads folders of train-*.parquet and validation-*.parquet, what `save_to_disk` wrote, and most layouts "
        "of the hub. An image folder is given by its path, without hf:.",
    )


def _is_of_the_web(error: BaseException) -> bool:
    return isinstance(error, ConnectionError) or type(error).__module__.startswith(_WEB_CLIENTS)


def _not_cached(where: HubName, why: str) -> DataError:
    revision = f" --revision {where.revision}" if where.revision else ""
    return DataError(
        f"{why}, and the cache {_cache()} does not hold this data set"
        + (f" at a commit known to be {where.revision}" if where.revision else ""),
        where=str(where),
        hint=f"Where there is a network, run `hf download --repo-type dataset {where.place}{revision} --local-dir DIR`, "
        f"copy DIR here and give it: hf:DIR{f':{where.config}' if where.config else ''}.",
    )


def first_line(error: BaseException) -> str:
    """Give the first line of an error's text that says something, shortened."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text[:300]
