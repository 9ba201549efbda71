"""Result: one checkpoint, one protocol, one draw; one JSON file, and its predictions beside it."""

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from msn_eval.atomic_file import write_atomically
from msn_eval.errors import StoreError, UsageError
from msn_eval.metrics import Metrics

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)
SCHEMA = 1
PROTOCOL_VERSION = 1
_ID_DIGITS = 16
Status = Literal["ok", "not_converged", "failed"]


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """What was evaluated; the fields are those of Checkpoint."""

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
    """The labelled images of one draw."""

    subset: str
    draw: int
    images: int
    sha256: str


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
    """Which vectors were used."""

    tap: str
    dim: int | None
    precision: str
    decoder: str
    transform: TransformFacts


@dataclass(frozen=True, kw_only=True)
class ProbeFacts:
    """The probe, one setting of it, how its fit came out, and what it chose from the labelled images."""

    name: str
    version: int
    params: Mapping[str, int | float]
    solver: str | None
    converged: bool | None
    certificate: float | None
    objective: float | None
    iterations: int | None
    chosen: Mapping[str, float] | None = None


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
        if self.protocol_id != protocol_id(self.protocol):
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
    """Read one record. Raises StoreError naming the file where it is damaged or of a newer schema."""
    try:
        content = json.loads(path.read_bytes())
        schema = content.pop("schema")
        if schema != SCHEMA:
            raise StoreError(
                f"schema {schema}, this version reads {SCHEMA}", where=str(path), remedy="Update msn-eval."
            )
        features = content["features"]
        transform = features.pop("transform")
        metrics = content["metrics"]
        return Result(
            **{name: content[name] for name in _PLAIN_FIELDS},
            checkpoint=CheckpointFacts(**content["checkpoint"]),
            data=DataFacts(**content["data"]),
            split=SplitFacts(**content["split"]),
            features=FeatureFacts(
                **features,
                transform=TransformFacts(**transform | {name: tuple(transform[name]) for name in ("mean", "std")}),
            ),
            probe=ProbeFacts(**content["probe"]),
            metrics=metrics and Metrics(**metrics | {"top1_ci95": tuple(metrics["top1_ci95"])}),
            timing_s=TimingFacts(**content["timing_s"]),
            environment=EnvironmentFacts(**content["environment"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(
            f"is no readable result: {type(error).__name__}: {error}",
            where=str(path),
            remedy="Move it away (and its .npz); the same evaluation writes it anew.",
        ) from error


_PLAIN_FIELDS = ("id", "status", "error", "created", "protocol_id", "protocol", "predictions")


def read_predictions(path: Path) -> Predictions:
    """Read the predictions beside a record. Raises StoreError naming the file where it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Predictions(**{one.name: stored[one.name] for one in fields(Predictions)})
    except Exception as error:  # zipfile, zlib and NumPy each have their own kinds
        raise StoreError(f"are no readable predictions: {error}", where=str(path)) from error


def list_results(folders: Iterable[str | Path]) -> list[Result]:
    """Read every record of some result folders, each once, in the order of folder and file name.

    Raises UsageError for a folder that is not there or holds no results, StoreError for a record that cannot be read or
    stands twice with different labelled images.
    """
    found: dict[str, Result] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UsageError("no such result folder", where=str(folder), remedy="Give the --out folder of a run.")
        for path in sorted(folder.glob(f"{'[0-9a-f]' * _ID_DIGITS}.json")):  # a table left here is no record
            result = read_result(path)
            known = found.get(result.id)
            if known is not None and known.split.sha256 != result.split.sha256:
                raise StoreError(
                    f"result {result.id} stands in several folders, measured with different labelled images",
                    where=str(path),
                    remedy="Report the folders one at a time.",
                )
            if known is None or known.status == "failed":  # a retry elsewhere may have succeeded
                found[result.id] = result
    if not found:
        raise UsageError("no results here", where=", ".join(map(str, folders)), remedy="Run msn-eval with --out first.")
    return list(found.values())


def read_results(folders: "str | Path | Sequence[str | Path]") -> "pd.DataFrame":
    """Give the records of one or several result folders as a table, one row a record.

    Columns are the record's fields joined by dots, such as `metrics.top1`; accuracies are fractions in [0, 1].
    """
    import pandas as pd

    chosen = [folders] if isinstance(folders, str | Path) else list(folders)
    return pd.json_normalize([as_json(result) for result in list_results(chosen)])
