"""Result folder: the records that a run left in it, read one by one or as a table; what cannot be read hides no other."""

import contextlib
import gc
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import StoreError, UsageError
from msn_eval.results.record import ID_DIGITS, MOVE_AWAY, Result, as_json, parse_result, unreadable_result

if TYPE_CHECKING:
    import pandas as pd

_RECORD_NAME = re.compile(rf"[0-9a-f]{{{ID_DIGITS}}}\.json")
_READ_AT_ONCE = 64
_READERS = 8
_FAR_SECONDS = 0.001  # a file


@dataclass(frozen=True, kw_only=True)
class ResultScan:
    """What stands in some result folders.

    results: every readable record, each once, in the order of folder and file name
    paths:   the file of each, in the same order
    faults:  what is wrong with the others, each naming its file
    """

    results: tuple[Result, ...]
    paths: tuple[Path, ...]
    faults: tuple[StoreError, ...]


def scan_results(folders: Iterable[str | Path]) -> ResultScan:
    """Read every record of some result folders; one that cannot be read is a fault and hides no other.

    A record is a file named by an id: tables and other files left in the folder are none. Of a record that stands in
    several folders the first counts, before a failed one any other.
    Raises UsageError for a folder that is not there, or where there are no records at all.
    """
    chosen = [Path(folder) for folder in folders]
    found: dict[str, tuple[Result, Path]] = {}
    faults: list[StoreError] = []
    with no_collections():
        for path, text in _texts(path for folder in chosen for path in _record_paths(folder)):
            try:
                result = _parsed(text, path)
                known = found.get(result.id)
                if known is not None and known[0].split.sha256 != result.split.sha256:
                    raise StoreError(
                        f"result {result.id} stands in several folders, measured with different labelled images",
                        where=str(path),
                        hint="Report the folders one at a time.",
                    )
            except StoreError as error:
                faults.append(error)
                continue
            if known is None or (
                known[0].status == "failed" and result.status != "failed"
            ):  # a retry may have succeeded
                found[result.id] = (result, path)
    if not found and not faults:
        raise UsageError("no results here", where=", ".join(map(str, chosen)), hint="Run msn-eval with --out first.")
    results, paths = zip(*found.values(), strict=True) if found else ((), ())
    return ResultScan(results=results, paths=paths, faults=tuple(faults))


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Keep the garbage collector still: thousands of records are no garbage, and it would walk them all again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _record_paths(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if _RECORD_NAME.fullmatch(entry.name))
    except OSError as error:
        raise UsageError(
            f"no such result folder: {error.strerror}", where=str(folder), hint="Give the --out folder of a run."
        ) from error
    return [folder / name for name in names]


def _texts(paths: Iterable[Path]) -> Iterator[tuple[Path, bytes | OSError]]:
    """Read files one by one or, where the first of them show a disk that is far away, many at a time: threads beside
    the parser cost more than a near disk takes, and thousands of waits far more than threads."""
    chosen = list(paths)
    batches = [chosen[start : start + _READ_AT_ONCE] for start in range(0, len(chosen), _READ_AT_ONCE)]
    started = time.perf_counter()
    first = [_read_all(batch) for batch in batches[:1]]
    is_far = time.perf_counter() - started > _FAR_SECONDS * _READ_AT_ONCE
    with ThreadPoolExecutor(_READERS) as readers:
        rest = readers.map(_read_all, batches[1:]) if is_far else map(_read_all, batches[1:])
        for batch, texts in zip(batches, chain(first, rest), strict=True):
            yield from zip(batch, texts, strict=True)


def _read_all(paths: Sequence[Path]) -> list[bytes | OSError]:
    return [_read_one(path) for path in paths]


def _read_one(path: Path) -> bytes | OSError:
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe of that name is not waited for
        with os.fdopen(opened, "rb", buffering=0) as file:
            return file.read() if stat.S_ISREG(os.fstat(opened).st_mode) else OSError(0, "it is no file")
    except OSError as error:
        return error


def _parsed(text: bytes | OSError, path: Path) -> Result:
    if isinstance(text, OSError):
        raise unreadable_result(path, text.strerror or str(text)) from text
    result = parse_result(text, path)
    if result.id != path.stem:
        raise StoreError(f"holds the record of {result.id}: it was renamed or edited", where=str(path), hint=MOVE_AWAY)
    return result


def list_results(folders: Iterable[str | Path]) -> list[Result]:
    """Read every record of some result folders, each once, in the order of folder and file name.

    Raises UsageError for a folder that is not there or holds no results, StoreError naming every record that cannot be
    read or stands twice with different labelled images.
    """
    scan = scan_results(folders)
    if scan.faults:
        raise all_faults(scan.faults)
    return list(scan.results)


def all_faults(faults: Sequence[StoreError]) -> StoreError:
    """Give one error that tells of all."""
    if len(faults) == 1:
        return faults[0]
    lines = "\n".join(f"{fault.where}: {fault.what}" for fault in faults)
    return StoreError(f"{len(faults)} records cannot be used\n{lines}", hint=MOVE_AWAY)


def read_results(folders: "str | Path | Sequence[str | Path]") -> "pd.DataFrame":
    """Give the records of one or several result folders as a table, one row a record.

    Columns are the record's fields joined by dots, such as `metrics.top1`; accuracies are fractions in [0, 1].
    """
    import pandas as pd

    chosen = [folders] if isinstance(folders, str | Path) else list(folders)
    return pd.json_normalize([as_json(result) for result in list_results(chosen)])
