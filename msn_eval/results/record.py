"""Result: one checkpoint, one protocol, one draw; one JSON file, and its predictions beside it."""

import hashlib
import io
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from msn_eval.config.recipes import Params
from msn_eval.errors import StoreError
from msn_eval.files.atomic import write_atomically
from msn_eval.files.json_records import canonical_json, parse_json, read_fields
from msn_eval.results.statistics import Metrics
from msn_eval.version import __version__

if TYPE_CHECKING:
    import torch

SCHEMA = 1
PROTOCOL_VERSION = 1
ID_DIGITS = 16
MOVE_AWAY = "Move it away (and its .npz); the same evaluation writes it anew."
Status = Literal["ok", "not_converged", "failed"]


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What was evaluated; the fields are those of Checkpoint.

    allow_missing: the patterns by which weights were allowed to be absent, where some were
    distribution:  name and version of the plug-in that reads such checkpoints, None for a built-in reader
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
    distribution: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """The validation images that were scored. sha256: over `id TAB sha256(file bytes)` lines in order."""

    name: str
    sha256: str
    class_map_sha256: str
    classes: int
    val_images: int
    skipped: int


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The labelled images of one draw.

    overlap: validation images that are also among them, byte for byte; None in records written before it was counted
    """

    subset: str
    draw: int
    images: int
    sha256: str
    overlap: int | None = None


@dataclass(frozen=True, kw_only=True)
class TransformInfo:
    """How pixels were made. Sizes in pixels; mean and std on the [0, 1] scale."""

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FeatureInfo:
    """Which vectors were used.

    degenerate: what is wrong with those of an evaluation in all, such as a collapsed representation; None where nothing is known
    """

    tap: str
    dim: int | None
    precision: str
    decoder: str
    transform: TransformInfo
    degenerate: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeInfo:
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
class TimingInfo:
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
class EnvironmentInfo:
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
    checkpoint: CheckpointInfo
    data: DataInfo
    split: SplitInfo
    features: FeatureInfo
    probe: ProbeInfo
    metrics: Metrics | None
    timing_s: TimingInfo
    environment: EnvironmentInfo
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
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:ID_DIGITS]


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
    record = {"schema": SCHEMA, **asdict(result)}
    if result.checkpoint.distribution is None:
        del record["checkpoint"]["distribution"]  # stands in records of plug-ins alone
    return record


def read_result(path: Path) -> Result:
    """Read one record. Raises StoreError naming the file where it is damaged or of another schema."""
    try:
        return parse_result(path.read_bytes(), path)
    except OSError as error:
        raise unreadable_result(path, error.strerror or str(error)) from error


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
        raise unreadable_result(path, "it states no schema") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise unreadable_result(path, f"{error}") from error
    except StoreError as error:
        raise StoreError(error.what, where=error.where or str(path), hint=error.hint or MOVE_AWAY) from error


def unreadable_result(path: Path, reason: str) -> StoreError:
    """Give the error that says of a file why it is no record."""
    return StoreError(f"is no readable result: {reason}", where=str(path), hint=MOVE_AWAY)


def _wrong_schema(path: Path, schema: object) -> StoreError:
    newer = isinstance(schema, int) and schema > SCHEMA
    return StoreError(
        f"is a record of schema {schema!r}, this version of msn-eval reads {SCHEMA}",
        where=str(path),
        hint="Update msn-eval." if newer else "No version wrote such a record; move it away.",
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


def describe_environment(device: "torch.device", *, batch_size: int, seed: int) -> EnvironmentInfo:
    """Give what a record states of its surroundings."""
    import torch

    name = f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
    return EnvironmentInfo(
        package=__version__,
        git=_commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        device=name,
        batch_size=batch_size,
        seed=seed,
    )


@cache
def _commit() -> str | None:
    """Give the commit of the checkout that the package runs from, `+` behind it where files differ; else None."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=30, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")
