"""Result: one checkpoint, one protocol, one draw; one JSON file, and its predictions beside it."""

import contextlib
import gc
import hashlib
import io
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from msn_eval.atomic_file import write_atomically
from msn_eval.errors import StoreError, UsageError
from msn_eval.json_fields import parse_json, read_fields
from msn_eval.metrics import Metrics
from msn_eval.probe_recipe import Params

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)
SCHEMA = 1
PROTOCOL_VERSION = 1
_ID_DIGITS = 16
_RECORD_NAME = re.compile(rf"[0-9a-f]{{{_ID_DIGITS}}}\.json")
_READ_AT_ONCE = 64
_READERS = 8
_FAR_SECONDS = 0.001  # a file
Status = Literal["ok", "not_converged", "failed"]


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """What was evaluated; the fields are those of Checkpoint.

    allow_missing: the patterns by which weights were allowed to be absent, where some were
    """

    name: str
    path: str
    sha256: str | None
    weights_sha256: str
    format: str
    key: str | None
    arch: str
    params: int
    matched: float
    epoch: int | None
    allow_missing: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The validation images that were scored. sha256: over `id TAB sha256(file bytes)` lines in order."""

    name: str
    sha256: str
    class_map_sha256: str
    classes: int
    val_images: int
    skipped: int


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """The labelled images of one draw.

    overlap: validation images that are also among them, byte for byte; None in records written before it was counted
    """

    subset: str
    draw: int
    images: int
    sha256: str
    overlap: int | None = None


@dataclass(frozen=True, kw_only=True)
class TransformFacts:
    """How pixels were made. Sizes in pixels; mean and std on the [0, 1] scale."""

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FeatureFacts:
    """Which vectors were used.

    degenerate: what is wrong with those of an evaluation in all, such as a collapsed representation; None where nothing is known
    """

    tap: str
    dim: int | None
    precision: str
    decoder: str
    transform: TransformFacts
    degenerate: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeFacts:
    """The probe, one setting of it, how its fit came out, and what it chose from the labelled images."""

    name: str
    version: int
    params: Params
    solver: str | None
    converged: bool | None
    certificate: float | None
    objective: float | None
    iterations: int | None
    chosen: Mapping[str, float | str] | None = None


@dataclass(frozen=True, kw_only=True)
class TimingFacts:
    """Seconds. `extract` is that of the pass that this result shares with others.

    images_per_second:          of that pass, None where every feature was in the cache
    decode_share, encode_share: of its time, waiting for pixels and in the encoder
    """

    extract: float
    probe: float
    total: float
    images_per_second: float | None = None
    decode_share: float | None = None
    encode_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class EnvironmentFacts:
    """What the numbers were computed with."""

    package: str
    git: str | None
    python: str
    torch: str
    device: str
    batch_size: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement, as in the JSON file. `metrics` and `predictions` are None where it failed."""

    id: str
    status: Status
    error: str | None
    created: str
    protocol_id: str
    protocol: Mapping[str, object]
    checkpoint: CheckpointFacts
    data: DataFacts
    split: SplitFacts
    features: FeatureFacts
    probe: ProbeFacts
    metrics: Metrics | None
    timing_s: TimingFacts
    environment: EnvironmentFacts
    predictions: str | None

    def __post_init__(self) -> None:
        if self.protocol_id != _id_of(self.protocol):
            raise StoreError(f"result {self.id}: its protocol is not the one of its protocol_id")
        if (self.metrics is None) != (self.status == "failed"):
            raise StoreError(f"result {self.id}: status {self.status!r} does not go with its metrics")


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Every validation image's outcome, in the data set's order.

    image:         ids as UTF-8 bytes
    label:         (n,) int64
    prediction:    (n,) int64
    rank_of_label: (n,) int64, 1-based
    """

    image: NDArray[np.bytes_]
    label: NDArray[np.int64]
    prediction: NDArray[np.int64]
    rank_of_label: NDArray[np.int64]


def canonical_json(value: object) -> str:
    """Give JSON with sorted keys, no spaces and the shortest float that reads back: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def protocol_id(protocol: Mapping[str, object]) -> str:
    """Give the first 16 hex digits of the SHA-256 of the protocol's canonical JSON."""
    return _digest(protocol)


_ids: dict[str, str] = {}  # of protocols as Python writes them, which tells more apart than JSON does
_MOST_IDS = 10_000


def _id_of(protocol: Mapping[str, object]) -> str:
    """Give `protocol_id`, once for the many records that have the same protocol."""
    text = repr(protocol)
    if text not in _ids:
        found = protocol_id(protocol)
        if len(_ids) >= _MOST_IDS:
            return found
        _ids[text] = found
    return _ids[text]


def result_id(*, weights_sha256: str, key: str | None, protocol_id: str, draw: int) -> str:
    """Give the id of a measurement before it is made: a hash of weights, network key, protocol and draw."""
    return _digest([weights_sha256, key, protocol_id, draw])


def _digest(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:_ID_DIGITS]


def write_result(folder: Path, result: Result, predictions: Predictions | None) -> None:
    """Write a result and its predictions, each whole or not at all; the record last, so that it vouches for both."""
    if predictions is not None and result.predictions is not None:
        packed = io.BytesIO()
        np.savez_compressed(packed, **vars(predictions))
        write_atomically(folder / result.predictions, packed.getvalue())
    write_atomically(
        folder / f"{result.id}.json", (json.dumps(as_json(result), indent=1, allow_nan=False) + "\n").encode()
    )


def as_json(result: Result) -> dict[str, Any]:
    """Give the record as it stands in its file."""
    return {"schema": SCHEMA, **asdict(result)}


def read_result(path: Path) -> Result:
    """Read one record. Raises StoreError naming the file where it is damaged or of another schema."""
    try:
        return parse_result(path.read_bytes(), path)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error


def parse_result(text: bytes, path: Path) -> Result:
    """Give the record that a file's bytes are. Raises StoreError naming `path` where they are none of this schema."""
    try:
        content = parse_json(text)
        schema = content.pop("schema")
        if schema != SCHEMA or isinstance(schema, bool):
            raise _wrong_schema(path, schema)
        result = read_fields(Result, content)
        if result.metrics is not None:
            _check_metrics(result.metrics)
        return result
    except KeyError:
        raise _unreadable(path, "it states no schema") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(path, f"{error}") from error
    except StoreError as error:
        raise StoreError(error.what, where=error.where or str(path), remedy=error.remedy or _MOVE_AWAY) from error


_MOVE_AWAY = "Move it away (and its .npz); the same evaluation writes it anew."


def _unreadable(path: Path, reason: str) -> StoreError:
    return StoreError(f"is no readable result: {reason}", where=str(path), remedy=_MOVE_AWAY)


def _wrong_schema(path: Path, schema: object) -> StoreError:
    newer = isinstance(schema, int) and schema > SCHEMA
    return StoreError(
        f"is a record of schema {schema!r}, this version of msn-eval reads {SCHEMA}",
        where=str(path),
        remedy="Update msn-eval." if newer else "No version wrote such a record; move it away.",
    )


def _check_metrics(metrics: Metrics) -> None:
    low, high = metrics.top1_ci95
    shares = (metrics.top1, metrics.top5, low, high)
    if not all(0 <= share <= 1 for share in shares) or metrics.top1 > metrics.top5 or low > high or metrics.n < 1:
        raise ValueError(f"its metrics are no accuracies: {metrics}")


def read_predictions(path: Path) -> Predictions:
    """Read the predictions beside a record. Raises StoreError naming the file where it is damaged."""
    try:
        # NumPy would leave a file open that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return Predictions(**{one.name: stored[one.name] for one in fields(Predictions)})
    except Exception as error:  # zipfile, zlib and NumPy each have their own kinds
        raise StoreError(f"are no readable predictions: {error}", where=str(path)) from error


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
                        remedy="Report the folders one at a time.",
                    )
            except StoreError as error:
                faults.append(error)
                continue
            if known is None or (
                known[0].status == "failed" and result.status != "failed"
            ):  # a retry may have succeeded
                found[result.id] = (result, path)
    if not found and not faults:
        raise UsageError("no results here", where=", ".join(map(str, chosen)), remedy="Run msn-eval with --out first.")
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
            f"no such result folder: {error.strerror}", where=str(folder), remedy="Give the --out folder of a run."
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
        raise _unreadable(path, text.strerror or str(text)) from text
    result = parse_result(text, path)
    if result.id != path.stem:
        raise StoreError(
            f"holds the record of {result.id}: it was renamed or edited", where=str(path), remedy=_MOVE_AWAY
        )
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
    return StoreError(f"{len(faults)} records cannot be used\n{lines}", remedy=_MOVE_AWAY)


def read_results(folders: "str | Path | Sequence[str | Path]") -> "pd.DataFrame":
    """Give the records of one or several result folders as a table, one row a record.

    Columns are the record's fields joined by dots, such as `metrics.top1`; accuracies are fractions in [0, 1].
    """
    import pandas as pd

    chosen = [folders] if isinstance(folders, str | Path) else list(folders)
    return pd.json_normalize([as_json(result) for result in list_results(chosen)])
