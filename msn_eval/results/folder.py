"""Result folder: reads the records that a run left in it, one by one or as a data frame."""

import contextlib
import gc
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msn_eval.errors import DamagedRecordError, StoreError, UsageError, format_count, suggest_paths
from msn_eval.results.reading import describe_reading, list_reading_differences
from msn_eval.results.record import (
    ID_DIGITS,
    MEASURE_AGAIN,
    Result,
    StoredRecord,
    encode_result,
    parse_result,
    read_stored,
    recover_identity,
)

if TYPE_CHECKING:
    import pandas as pd

FIRST_COLUMNS = (
    "checkpoint.name", "data.name", "split.subset", "split.draw", "split.images", "probe.name",
    "metrics.top1", "metrics.top5", "metrics.top1_ci95", "metrics.n", "status", "protocol_id",
)  # fmt: skip
_RECORD_NAME = re.compile(rf"[0-9a-f]{{{ID_DIGITS}}}\.json")
_BATCH_SIZE = 64  # files
_READERS = 8


@dataclass(frozen=True, kw_only=True)
class ResultScan:
    """The content of some result folders.

    Attributes:
        results: Every readable record, each once, in the order of folder and file name.
        paths: The file of each record, in the same order.
        faults: Errors of the records that must not be used. Each names its file.
        damaged: What damaged records claim to be, without numbers, as far as it is known and no other file has the result.
    """

    results: tuple[Result, ...]
    paths: tuple[Path, ...]
    faults: tuple[StoreError, ...]
    damaged: tuple[Result, ...] = ()


def scan_results(folders: Iterable[str | Path]) -> ResultScan:
    """Read every record of some result folders. A damaged record becomes a fault and hides no other.

    A record is a file named by an id; tables and other files are ignored. Of a record that is in several folders, the
    first one counts, except that any result replaces a failed one.

    Raises:
        UsageError: A folder does not exist, or there are no records at all.
    """
    directories = [Path(folder) for folder in folders]
    records: dict[str, tuple[Result, Path]] = {}
    faults: list[StoreError] = []
    damaged: dict[str, Result] = {}
    paths = [path for folder in directories for path in _list_record_paths(folder)]
    with disabled_garbage_collection():
        for stored in _read_files(paths):
            try:
                result = parse_result(stored)
            except StoreError as error:
                faults.append(error)
                if isinstance(error, DamagedRecordError) and (claimed := recover_identity(stored)) is not None:
                    damaged[claimed.id] = claimed
                continue
            known, _ = records.get(result.id, (result, stored.path))
            if known.split.sha256 != result.split.sha256:
                what = f"result {result.id} is in several folders, measured with different labelled images"
                faults.append(StoreError(what, where=str(stored.path), hint="Report the folders one at a time."))
            elif known is result or (known.status == "failed" and result.status != "failed"):  # a retry succeeded
                records[result.id] = (result, stored.path)
            elif differences := list_reading_differences(describe_reading(known), describe_reading(result)):
                what = (
                    f"result {result.id} is in several folders, its weights read differently: {'; '.join(differences)}"
                )
                faults.append(StoreError(what, where=str(stored.path), hint="Report the folders one at a time."))
    if not records and not faults:
        where = ", ".join(map(str, directories))
        raise UsageError("no results here", where=where, hint="Run msn-eval with --out first.")
    results, files = [result for result, _ in records.values()], [path for _, path in records.values()]
    unknown = tuple(claimed for identity, claimed in damaged.items() if identity not in records)
    return ResultScan(results=tuple(results), paths=tuple(files), faults=tuple(faults), damaged=unknown)


@contextlib.contextmanager
def disabled_garbage_collection() -> Iterator[None]:
    """Disable the garbage collector: it would traverse thousands of live records again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _list_record_paths(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [folder / name for name in sorted(entry.name for entry in entries) if _RECORD_NAME.fullmatch(name)]
    except OSError as error:
        what = "no such result folder"
        if not isinstance(error, FileNotFoundError):
            what += f": {error.strerror}"
        elif suggestion := suggest_paths(str(folder)):
            what += f".{suggestion}"
        raise UsageError(what, where=str(folder), hint="Give the --out folder of a run.") from error


def _read_files(paths: Sequence[Path]) -> Iterator[StoredRecord]:
    """Yield the files of each record, in order; threads shorten the many waits for a network disk."""
    batches = [paths[start : start + _BATCH_SIZE] for start in range(0, len(paths), _BATCH_SIZE)]
    with ThreadPoolExecutor(_READERS) as readers:
        for batch in readers.map(lambda batch: list(map(read_stored, batch)), batches):
            yield from batch


def list_results(folders: Iterable[str | Path]) -> list[Result]:
    """Read every record of some result folders, each once, in the order of folder and file name.

    Raises:
        UsageError: A folder does not exist or holds no results.
        StoreError: Records are damaged, or stored twice with different labelled images. The error names all of them.
    """
    scan = scan_results(folders)
    if scan.faults:
        raise combine_faults(scan.faults)
    return list(scan.results)


def combine_faults(faults: Sequence[StoreError]) -> StoreError:
    """Return one error that lists all faults."""
    if len(faults) == 1:
        return faults[0]
    lines = "\n".join(f"{fault.where}: {fault.what}" for fault in faults)
    hints = {fault.hint for fault in faults}
    hint = hints.pop() if len(hints) == 1 else MEASURE_AGAIN
    return StoreError(f"{format_count(len(faults), 'record')} cannot be used\n{lines}", hint=hint)


def read_results(out: str | Path | Sequence[str | Path]) -> "pd.DataFrame":
    """Read the records of one or several result folders as a data frame.

    Args:
        out: The `out` folder of a run, or several of them.

    Returns:
        One row per record. Columns are the record's fields joined by dots, such as `metrics.top1` and
        `probe.params.k`, those of `FIRST_COLUMNS` first. Accuracies are fractions in [0, 1].

    Raises:
        UsageError: A folder does not exist or holds no results.
        StoreError: Records are unreadable or damaged. The error names all of them.
    """
    folders = [out] if isinstance(out, str | Path) else out
    return make_frame(list_results(folders))


def make_frame(results: Iterable[Result]) -> "pd.DataFrame":
    """Return results as a data frame, as `read_results` does."""
    import pandas as pd

    frame = pd.json_normalize([encode_result(result) for result in results])
    return frame.reindex(columns=[*FIRST_COLUMNS, *(name for name in frame if name not in FIRST_COLUMNS)])
