"""Result: the record of one checkpoint under one protocol and one draw, stored as JSON with its predictions as NPZ."""

import hashlib
import io
import json
import math
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from msn_eval.config.recipes import Params
from msn_eval.errors import DamagedRecordError, StoreError
from msn_eval.files.atomic import write_atomically
from msn_eval.files.json_records import add_seal, canonical_json, parse_json, read_fields, remove_seal
from msn_eval.results.statistics import Metrics, compute_metrics
from msn_eval.version import __version__

if TYPE_CHECKING:
    import torch

SCHEMA = 2
PROTOCOL_VERSION = 1
# Of protocols with another image size than the network's, since MSN's and DINO's positions follow their authors' rules.
RESIZED_PROTOCOL_VERSION = 2
ID_DIGITS = 16
MEASURE_AGAIN = "Run the same evaluation again: it measures damaged results again."
# Fields that are not written where they are None, so that older records keep their bytes; and the field, if any, that tells a
# None of these records from a missing value.
_LATER_FIELDS = {
    **dict.fromkeys(("distribution", "structure_sha256", "mean_std_from", "positions", "brier", "ece"), ""),
    "nll": "brier",
    **dict.fromkeys(("rankme", "alpha", "spectrum_images"), "spectrum_images"),
    **dict.fromkeys(("trained_on", "trained_classes"), ""),
    **dict.fromkeys(("timm", "torchvision", "numpy", "os", "processor"), ""),
}
_CALIBRATION = ("nll", "brier", "ece")
_TOLERANCE = 1e-9  # of a recomputed calibration: logarithms differ between processors in the last digit
Status = Literal["ok", "not_converged", "failed", "damaged"]


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
    """The images that were scored: the validation images, or those of a test set.

    Attributes:
        sha256: SHA-256 of the lines `id TAB sha256(file bytes)`, in the data set's order.
        classes: Number of classes that a prediction may be of.
        trained_on: For a test set, the name of the data set of the labelled images. Not written where it is None.
        trained_classes: Likewise, its number of classes.
    """

    name: str
    sha256: str
    class_map_sha256: str
    classes: int
    val_images: int
    skipped: int
    trained_on: str | None = None
    trained_classes: int | None = None


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
        rankme: RankMe of the features of the validation images. None where they have none: one image, or zero features.
        alpha: Exponent of their eigenspectrum. None likewise, and with fewer than 13 eigenvalues.
        spectrum_images: Number of images that both were computed from. None, and none of the three written, in older records
            and where the encoder was fine-tuned.
    """

    tap: str
    dim: int | None
    precision: str
    decoder: str
    transform: TransformInfo
    degenerate: str | None = None
    rankme: float | None = None
    alpha: float | None = None
    spectrum_images: int | None = None


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
    """Versions, device and settings of the computation. The later fields are None in older records."""

    package: str
    git: str | None
    python: str
    torch: str
    device: str
    batch_size: int
    seed: int
    timm: str | None = None
    torchvision: str | None = None
    numpy: str | None = None
    os: str | None = None
    processor: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement, as in its JSON file. `metrics` and `predictions` are None where it failed.

    Attributes:
        status: `damaged` stands in no file: it marks what is left of a record that must not be believed.
        predictions_sha256: Of the bytes of the file of predictions. None before it is written.
    """

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
    predictions_sha256: str | None = None

    def __post_init__(self) -> None:
        if self.protocol_id != _cached_protocol_id(self.protocol):
            raise ValueError("protocol_id does not match the protocol")
        if (self.metrics is None) != (self.status in ("failed", "damaged")):
            raise ValueError(f"status {self.status!r} contradicts the metrics")


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The outcome of every scored image, in the data set's order.

    Where several classes are right for an image, `label` is the first of them, `prediction` is `label` where the predicted
    class is one of them, and `rank_of_label` is that of the best ranked.

    Attributes:
        image: (n,) ids as UTF-8 bytes.
        label: (n,) int64.
        prediction: (n,) int64.
        rank_of_label: (n,) int64, 1-based.
        confidence: (n,) float32, the largest probability. None, as the next two, for a probe without probabilities, and in
            older files.
        probability_of_label: (n,) float32.
        sum_of_squares: (n,) float32, the squared probabilities summed over classes.
    """

    image: NDArray[np.bytes_]
    label: NDArray[np.int64]
    prediction: NDArray[np.int64]
    rank_of_label: NDArray[np.int64]
    confidence: NDArray[np.float32] | None = None
    probability_of_label: NDArray[np.float32] | None = None
    sum_of_squares: NDArray[np.float32] | None = None

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that there are, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}

    @property
    def metrics(self) -> Metrics:
        """The metrics of a record with these predictions."""
        return compute_metrics(
            self.rank_of_label,
            confidence=self.confidence,
            probability_of_label=self.probability_of_label,
            sum_of_squares=self.sum_of_squares,
        )


def protocol_id(protocol: Mapping[str, object]) -> str:
    """Return the first 16 hex digits of the SHA-256 of the protocol's canonical JSON."""
    return _hash_json(protocol)


_UNPACKING = Lock()
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


def write_result(folder: Path, result: Result, predictions: Predictions | None) -> Result:
    """Write a result and its predictions atomically, and return the result with the hash of its predictions.

    The record is written last, so a record implies its predictions.
    """
    if predictions is not None and result.predictions is not None:
        packed = io.BytesIO()
        np.savez_compressed(packed, allow_pickle=False, **predictions.arrays)
        write_atomically(folder / result.predictions, packed.getvalue())
        result = replace(result, predictions_sha256=hashlib.sha256(packed.getvalue()).hexdigest())
    text = json.dumps(encode_result(result), indent=1, allow_nan=False) + "\n"
    write_atomically(folder / f"{result.id}.json", text.encode())
    return result


def encode_result(result: Result) -> dict[str, Any]:
    """Return the record as the JSON object of its file, closed with its seal."""
    return add_seal({"schema": SCHEMA, **asdict(result, dict_factory=omit_unset)})


def omit_unset(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict for `dataclasses.asdict` without the later fields that are unset, so that older records keep their bytes."""
    content = dict(fields)
    unset = {name for name, sign in _LATER_FIELDS.items() if content.get(name) is None and content.get(sign) is None}
    return {name: value for name, value in content.items() if name not in unset}


@dataclass(frozen=True, kw_only=True)
class StoredRecord:
    """The files of one record.

    Attributes:
        path: Of the record. Its predictions are beside it.
        text: The bytes of the record, or why they cannot be read.
        predictions_sha256: Of the bytes of its predictions, or why these cannot be read.
    """

    path: Path
    text: bytes | OSError
    predictions_sha256: str | OSError


def read_stored(path: Path) -> StoredRecord:
    """Read the files of the record `path`. Threads may call it; parsing takes the interpreter lock."""
    text, predictions = _read_bytes(path), _read_bytes(path.with_suffix(".npz"))
    digest = predictions if isinstance(predictions, OSError) else hashlib.sha256(predictions).hexdigest()
    return StoredRecord(path=path, text=text, predictions_sha256=digest)


def _read_bytes(path: Path) -> bytes | OSError:
    try:
        return path.read_bytes()
    except OSError as error:
        return error


def read_result(path: Path) -> Result:
    """Read one record, and check that it and its predictions are as they were written.

    The predictions of a sealed record may be missing. Those of schema 1 may not: its metrics are recomputed from them.

    Raises:
        DamagedRecordError: The record or its predictions are unreadable or changed. The error names the file.
        StoreError: A later version wrote it.
    """
    return parse_result(read_stored(path))


def parse_result(stored: StoredRecord) -> Result:
    """Parse what `read_stored` returned. Raises as `read_result` does."""
    path = stored.path
    try:
        if isinstance(stored.text, OSError):
            raise stored.text
        schema, result = _parse_record(stored.text)
        if result.metrics is not None:
            _check_metrics(result.metrics)
    except KeyError:
        what = "not a readable result: it states no schema"
        raise DamagedRecordError(what, where=str(path), hint=MEASURE_AGAIN) from None
    except StoreError as error:
        raise StoreError(error.what, where=str(path), hint=error.hint) from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DamagedRecordError(f"not a readable result: {reason}", where=str(path), hint=MEASURE_AGAIN) from error
    if result.id != path.stem:
        what = f"holds the record of {result.id}: it was renamed or edited"
        raise DamagedRecordError(what, where=str(path), hint=f"Move it away. {MEASURE_AGAIN}")
    if result.predictions is None:
        return result
    if problem := _find_predictions_fault(result, stored, sealed=schema > 1):
        raise DamagedRecordError(f"{path.stem}.npz: {problem}", where=str(path), hint=MEASURE_AGAIN)
    if schema > 1 or isinstance(stored.predictions_sha256, OSError):
        return result
    return replace(result, predictions_sha256=stored.predictions_sha256)


def _parse_record(text: bytes) -> tuple[int, Result]:
    """Return the schema of a record and its content, whose seal is checked from schema 2 on."""
    content = parse_json(text)
    schema = content["schema"]
    if type(schema) is not int or schema != 1:
        content = remove_seal(content)
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        what = f"a record of schema {schema!r}; this version of msn-eval reads 1 to {SCHEMA}"
        raise StoreError(what, hint="Update msn-eval.")
    del content["schema"]
    return schema, read_fields(Result, content)


def _check_metrics(metrics: Metrics) -> None:
    low, high = metrics.top1_ci95
    if not 0 <= metrics.top1 <= metrics.top5 <= 1 or not 0 <= low <= high <= 1 or metrics.n < 1:
        raise ValueError(f"its metrics are not accuracies: {metrics}")
    nll, brier, ece = metrics.nll, metrics.brier, metrics.ece
    if brier is None or ece is None:
        is_valid = nll is brier is ece is None
    else:
        is_valid = 0 <= brier <= 2 and 0 <= ece <= 1 and (nll is None or nll >= 0)
    if not is_valid:
        raise ValueError(f"its metrics are not a calibration: {metrics}")


def _find_predictions_fault(result: Result, stored: StoredRecord, *, sealed: bool) -> str:
    """Return why predictions are not those of their record, or an empty string."""
    digest = stored.predictions_sha256
    if result.predictions != f"{result.id}.npz":
        return f"the record names {result.predictions!r}, which is not the file of its id"
    if isinstance(digest, OSError):
        if sealed and isinstance(digest, FileNotFoundError):
            return ""
        return f"not readable predictions: {digest.strerror or digest}"
    if sealed:
        return "" if digest == result.predictions_sha256 else "not the predictions that the record was made from"
    try:
        predictions = read_predictions(stored.path.with_suffix(".npz"))
    except StoreError as error:
        return error.what
    return "; ".join(list_metrics_faults(result, predictions))


def list_metrics_faults(result: Result, predictions: Predictions) -> Iterator[str]:
    """Yield each metric of a record that does not follow from its predictions."""
    if result.metrics is not None and not len(predictions.rank_of_label):
        yield "no images"
    elif result.metrics is not None:
        computed = vars(predictions.metrics)
        for name, recorded in vars(result.metrics).items():
            if recorded != computed[name] and not (name in _CALIBRATION and _is_close(recorded, computed[name])):
                yield f"metrics.{name}: recorded {recorded}, computed from the predictions {computed[name]}"


def _is_close(first: float | None, second: float | None) -> bool:
    if first is None or second is None:
        return False
    return math.isclose(first, second, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def recover_identity(stored: StoredRecord) -> Result | None:
    """Return what a damaged record claims to be, without its numbers, or None if its id does not follow from that."""
    try:
        assert isinstance(stored.text, bytes)
        content = parse_json(stored.text)
        names = {field.name for field in fields(Result)} & content.keys()
        kept = {name: content[name] for name in names}
        claimed = read_fields(Result, kept | {"status": "damaged", "metrics": None})
        weights, key = claimed.checkpoint.weights_sha256, claimed.checkpoint.key
        expected = result_id(weights_sha256=weights, key=key, protocol_id=claimed.protocol_id, draw=claimed.split.draw)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, AssertionError):
        return None
    return claimed if expected == stored.path.stem else None


def read_predictions(path: Path, *, sha256: str | None = None) -> Predictions:
    """Read the predictions of a record.

    Args:
        path: Their file.
        sha256: Of the bytes that it must have. None for a record that does not state it.

    Raises:
        DamagedRecordError: The file is missing, damaged, or has different bytes. The error names the file.
    """
    names = {field.name: field.default is MISSING for field in fields(Predictions)}
    needed = [name for name, is_needed in names.items() if is_needed]
    return Predictions(**read_arrays(path, needed, optional=names.keys() - set(needed), sha256=sha256))


def read_arrays(
    path: Path, names: Iterable[str], *, optional: Iterable[str] = (), sha256: str | None = None
) -> dict[str, NDArray[Any]]:
    """Read some arrays of a file of predictions, the optional ones where it has them. Raises as `read_predictions` does."""
    try:
        packed = path.read_bytes()
        if sha256 not in (None, hashlib.sha256(packed).hexdigest()):
            raise ValueError("not those that the record was made from")
        # NumPy parses headers as Python. In several threads, CPython 3.11 refuses that at times: "AST constructor recursion
        # depth mismatch".
        with _UNPACKING, np.load(io.BytesIO(packed), allow_pickle=False) as stored:
            return {name: stored[name] for name in (*names, *(name for name in optional if name in stored))}
    except Exception as error:  # zipfile, zlib and NumPy each raise their own kinds
        reason = getattr(error, "strerror", None) or error
        what = f"not readable predictions: {reason}"
        raise DamagedRecordError(what, where=str(path), hint=MEASURE_AGAIN) from error


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
        timm=version("timm"),  # importing them takes seconds
        torchvision=version("torchvision"),
        numpy=np.__version__,
        os=platform.platform(),
        processor=_read_processor(),
    )


@cache
def _read_processor() -> str:
    """Return the model of the processor, or its architecture where the system does not name the model."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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
