"""Result: the record of one checkpoint under one protocol and one draw, stored as JSON with its predictions as NPZ."""

import hashlib
import io
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
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
# Of protocols with another image size than the network's, since MSN's and DINO's positions follow their authors' rules.
RESIZED_PROTOCOL_VERSION = 2
ID_DIGITS = 16
MOVE_AWAY = "Move it (and its .npz) away; the same evaluation writes it again."
_LATER_FIELDS = {"distribution", "structure_sha256", "mean_std_from", "positions"}
Status = Literal["ok", "not_converged", "failed"]


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The evaluated checkpoint. The fields are those of `Checkpoint`, and the following.

    Attributes:
        allow_missing: Patterns of weights that were allowed to be absent.
        distribution: Name and version of the plug-in distribution that supplied the encoder. Not written where it is None.
        structure_sha256: Of the network's modules. Not written where it is None.
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
    structure_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """The validation images that were scored.

    Attributes:
        sha256: SHA-256 of the lines `id TAB sha256(file bytes)`, in the data set's order.
    """

    name: str
    sha256: str
    class_map_sha256: str
    classes: int
    val_images: int
    skipped: int


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The labelled images of one draw.

    Attributes:
        overlap: Number of validation images with the same bytes as a labelled image. None in older records.
    """

    subset: str
    draw: int
    images: int
    sha256: str
    overlap: int | None = None


@dataclass(frozen=True, kw_only=True)
class TransformInfo:
    """The image transform. Sizes are in pixels; `mean` and `std` refer to pixel values in [0, 1].

    Attributes:
        mean_std_from: What states mean and std. Not written where it is None, in older records.
        positions: How position embeddings were interpolated for images of `crop` pixels. Not written where it is None: they
            were used as they are.
    """

    resize: int
    crop: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean_std_from: str | None = None
    positions: str | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureInfo:
    """The features that the probe was fitted to.

    Attributes:
        degenerate: What is wrong with the features, such as a collapsed representation. None where nothing is known.
    """

    tap: str
    dim: int | None
    precision: str
    decoder: str
    transform: TransformInfo
    degenerate: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeInfo:
    """The probe, its hyper-parameters, how the solver ended, and what was chosen on the labelled images."""

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
    """Durations in seconds.

    Attributes:
        extract: Duration of the extraction pass, which several results may share.
        images_per_second: Throughput of that pass. None where every feature came from the cache.
        decode_share: Fraction of that pass spent waiting for decoded images.
        encode_share: Fraction of that pass spent in the encoder.
    """

    extract: float
    probe: float
    total: float
    images_per_second: float | None = None
    decode_share: float | None = None
    encode_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class EnvironmentInfo:
    """Versions, device and settings of the computation."""

    package: str
    git: str | None
    python: str
    torch: str
    device: str
    batch_size: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement, as in its JSON file. `metrics` and `predictions` are None where it failed."""

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
        if self.protocol_id != _cached_protocol_id(self.protocol):
            raise StoreError(f"result {self.id}: protocol_id does not match the protocol")
        if (self.metrics is None) != (self.status == "failed"):
            raise StoreError(f"result {self.id}: status {self.status!r} contradicts the metrics")


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The outcome of every validation image, in the data set's order.

    Attributes:
        image: (n,) ids as UTF-8 bytes.
        label: (n,) int64.
        prediction: (n,) int64.
        rank_of_label: (n,) int64, 1-based.
    """

    image: NDArray[np.bytes_]
    label: NDArray[np.int64]
    prediction: NDArray[np.int64]
    rank_of_label: NDArray[np.int64]


def protocol_id(protocol: Mapping[str, object]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the protocol's canonical JSON."""
    return _hash_json(protocol)


_protocol_ids: dict[str, str] = {}


def _cached_protocol_id(protocol: Mapping[str, object]) -> str:
    # Thousands of records share a few protocols. `repr` is faster than JSON, and differs wherever the JSON differs.
    text = repr(protocol)
    if text not in _protocol_ids:
        _protocol_ids[text] = protocol_id(protocol)
    return _protocol_ids[text]


def result_id(*, weights_sha256: str, key: str | None, protocol_id: str, draw: int) -> str:
    """Return the id of a measurement: a hash of weights, network key, protocol and draw, known before it is made."""
    return _hash_json([weights_sha256, key, protocol_id, draw])


def _hash_json(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:ID_DIGITS]


def flatten_fields(content: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the values of a nested mapping by their dotted path, such as `probe.params.k`."""
    fields: dict[str, object] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            fields |= flatten_fields(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields


def write_result(folder: Path, result: Result, predictions: Predictions | None) -> None:
    """Write a result and its predictions atomically. The record is written last, so a record implies its predictions."""
    if predictions is not None and result.predictions is not None:
        packed = io.BytesIO()
        np.savez_compressed(packed, **vars(predictions))
        write_atomically(folder / result.predictions, packed.getvalue())
    text = json.dumps(encode_result(result), indent=1, allow_nan=False) + "\n"
    write_atomically(folder / f"{result.id}.json", text.encode())


def encode_result(result: Result) -> dict[str, Any]:
    """Return the record as the JSON object of its file."""
    return {"schema": SCHEMA, **asdict(result, dict_factory=omit_unset)}


def omit_unset(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict for `dataclasses.asdict` without the later fields that are None, so that older records keep their bytes."""
    return {name: value for name, value in fields if value is not None or name not in _LATER_FIELDS}


def read_content(path: Path) -> bytes | OSError:
    """Return the bytes of a file, or why it is unreadable. Threads may call it; parsing takes the interpreter lock."""
    try:
        return path.read_bytes()
    except OSError as error:
        return error


def read_result(path: Path) -> Result:
    """Read one record.

    Raises:
        StoreError: The file is unreadable, damaged or of another schema. The error names the file.
    """
    return parse_result(read_content(path), path)


def parse_result(text: bytes | OSError, path: Path) -> Result:
    """Parse what `read_content` returned for the record file `path`. Raises StoreError as `read_result` does."""
    try:
        if isinstance(text, OSError):
            raise text
        content = parse_json(text)
        schema = content.pop("schema")
        if type(schema) is not int or schema != SCHEMA:
            hint = "Update msn-eval." if type(schema) is int and schema > SCHEMA else MOVE_AWAY
            raise StoreError(f"a record of schema {schema!r}; this version of msn-eval reads {SCHEMA}", hint=hint)
        result = read_fields(Result, content)
        if result.metrics is not None:
            _check_metrics(result.metrics)
        return result
    except StoreError as error:
        raise StoreError(error.what, where=str(path), hint=error.hint or MOVE_AWAY) from error
    except KeyError:
        raise StoreError("not a readable result: it states no schema", where=str(path), hint=MOVE_AWAY) from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"not a readable result: {reason}", where=str(path), hint=MOVE_AWAY) from error


def _check_metrics(metrics: Metrics) -> None:
    low, high = metrics.top1_ci95
    if not 0 <= metrics.top1 <= metrics.top5 <= 1 or not 0 <= low <= high <= 1 or metrics.n < 1:
        raise ValueError(f"its metrics are not accuracies: {metrics}")


def read_predictions(path: Path) -> Predictions:
    """Read the predictions of a record.

    Raises:
        StoreError: The file is missing or damaged. The error names the file.
    """
    try:
        # Opened here, because NumPy does not close a file that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return Predictions(**{field.name: stored[field.name] for field in fields(Predictions)})
    except Exception as error:  # zipfile, zlib and NumPy each raise their own kinds
        raise StoreError(f"not readable predictions: {error}", where=str(path)) from error


def describe_environment(device: "torch.device", *, batch_size: int, seed: int) -> EnvironmentInfo:
    """Return the versions, the device and the settings that a record states."""
    import torch

    return EnvironmentInfo(
        package=__version__,
        git=_read_commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        device=f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device),
        batch_size=batch_size,
        seed=seed,
    )


@cache
def _read_commit() -> str | None:
    """Return the commit of the checkout that the package runs from, followed by `+` if tracked files differ, or None."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
