"""Baseline: which images a checkpoint classifies correctly, as one small file that is reviewed like code.

The file is JSON text of stable bytes: equal results give an equal file, so that every change is visible in a review. For
every draw it holds one bit per image (base64 of packed bits, first image first) and the hashes of its predictions and its
labelled images; for every protocol, the complete protocol. `sha256` covers all other fields.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msn_eval.errors import ComparisonError
from msn_eval.files.json_records import canonical_json
from msn_eval.files.regular import MOST_TEXT_BYTES, read_regular_file
from msn_eval.results.predictions import ProtocolPredictions, group_by_protocol, name_protocol, read_draws
from msn_eval.results.reading import describe_transform
from msn_eval.results.record import Result
from msn_eval.results.statistics import Integers, count_right

SCHEMA = 1
_KIND = "msn-eval baseline"
_CHECKPOINT_FIELDS = ("name", "sha256", "weights_sha256", "key", "arch", "params", "epoch", "structure_sha256")


@dataclass(frozen=True, kw_only=True)
class BaselineDraw:
    """One draw. `right` is base64 of packed bits, one per image; the other fields are those of its record."""

    draw: int
    labelled_images: int
    split_sha256: str
    overlap: int | None
    top1: float
    predictions_sha256: str
    right: str


@dataclass(frozen=True, kw_only=True)
class BaselineProtocol:
    """One protocol with its draws.

    Attributes:
        title: Its name for people.
        images: Number of test images.
        images_sha256: SHA-256 of the lines `id TAB label` of these, in order.
        made_with: What may differ between comparable results: versions, device, precision, tap, transform, solver.
    """

    protocol_id: str
    protocol: Mapping[str, Any]
    title: str
    images: int
    images_sha256: str
    made_with: Mapping[str, Any]
    draws: tuple[BaselineDraw, ...]

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Whether each image is right in each draw, (draws, images)."""
        packed = [np.frombuffer(base64.b64decode(draw.right), dtype=np.uint8) for draw in self.draws]
        return np.unpackbits(np.stack(packed), axis=1, count=self.images).astype(bool)

    @cached_property
    def scores(self) -> Integers:
        """The number of draws in which each image is right, (images,)."""
        return count_right(self.right)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One checkpoint's results to compare others with.

    Attributes:
        checkpoint: Name, hashes, key, architecture and epoch of the checkpoint.
        data: The data set's name, as given.
    """

    checkpoint: Mapping[str, Any]
    data: str
    protocols: tuple[BaselineProtocol, ...]

    @cached_property
    def sha256(self) -> str:
        """The hash that the file states: of its canonical JSON without this field."""
        return hashlib.sha256(canonical_json(_get_content(self)).encode()).hexdigest()


def make_baseline(results: Sequence[Result], folders: Sequence[Path]) -> Baseline:
    """Make a baseline from one checkpoint's results.

    Args:
        results: Results of one checkpoint, at least one.
        folders: Where their predictions are.

    Raises:
        ComparisonError: A result failed, did not converge, was scored on a part of the images (`--limit`), or is damaged.
            The error names every such protocol.
    """
    protocols, problems = [], ""
    for group in group_by_protocol(results).values():
        try:
            protocols.append(_make_protocol(read_draws(group, folders)))
        except ComparisonError as error:
            problems += f"\n  {name_protocol(group[0])} [{group[0].protocol_id}]: {error}"
    if problems:
        hint = "Measure them again, or give a folder without them."
        raise ComparisonError(f"these results cannot be a baseline:{problems}", hint=hint)
    return Baseline(
        checkpoint={name: getattr(results[0].checkpoint, name) for name in _CHECKPOINT_FIELDS},
        data=results[0].data.trained_on or results[0].data.name,
        protocols=tuple(sorted(protocols, key=lambda protocol: (protocol.title, protocol.protocol_id))),
    )


def check_complete(result: Result) -> None:
    """Raise ComparisonError for a result that was scored on a part of the images."""
    if result.protocol.get("limit") is not None:
        raise ComparisonError(f"scored on a part of the images (--limit {result.protocol['limit']})")


def _make_protocol(predictions: ProtocolPredictions) -> BaselineProtocol:
    first = predictions.first
    check_complete(first)
    if predictions.unconverged:
        raise ComparisonError(f"draws {list(predictions.unconverged)} did not converge")
    draws = tuple(map(_make_draw, predictions.results, predictions.right, predictions.prediction))
    return BaselineProtocol(
        protocol_id=first.protocol_id,
        protocol=first.protocol,
        title=name_protocol(first),
        images=len(predictions.image),
        images_sha256=predictions.images_sha256,
        made_with=describe_computation(first),
        draws=draws,
    )


def _make_draw(result: Result, right: NDArray[np.bool_], prediction: Integers) -> BaselineDraw:
    return BaselineDraw(
        draw=result.split.draw,
        labelled_images=result.split.images,
        split_sha256=result.split.sha256,
        overlap=result.split.overlap,
        top1=int(right.sum()) / len(right),
        predictions_sha256=hash_predictions(prediction),
        right=base64.b64encode(np.packbits(right).tobytes()).decode(),
    )


def describe_computation(result: Result) -> dict[str, Any]:
    """Return what may differ between comparable results, and is shown where it does."""
    fields = {name: getattr(result.environment, name) for name in ("package", "torch", "device")}
    fields |= {name: getattr(result.features, name) for name in ("decoder", "precision", "tap")}
    return fields | {"transform": describe_transform(result.features), "solver": result.probe.solver}


def hash_predictions(prediction: Integers) -> str:
    """Return the SHA-256 of the predicted classes as little-endian int64."""
    return hashlib.sha256(prediction.astype("<i8").tobytes()).hexdigest()


def _get_content(baseline: Baseline) -> dict[str, Any]:
    return {"kind": _KIND, "schema": SCHEMA, **asdict(baseline)}


def render_baseline(baseline: Baseline) -> str:
    """Render the text of the file. Equal baselines give equal text."""
    content = _get_content(baseline) | {"sha256": baseline.sha256}
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_baseline(path: Path) -> Baseline:
    """Read a baseline.

    Raises:
        ComparisonError: The file does not exist, or is not as it was written. The error names the file.
    """
    hint = "Make one and review it: msn-eval baseline RUNS --out FILE."
    try:
        text = read_regular_file(path, most_bytes=MOST_TEXT_BYTES)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ComparisonError(f"no baseline: {reason}", where=str(path), hint=hint) from error
    try:
        content = json.loads(text)
        if (content["kind"], content["schema"]) != (_KIND, SCHEMA):
            raise ValueError(f"kind {content['kind']!r}, schema {content['schema']!r}; this version reads {SCHEMA}")
        protocols = tuple(
            BaselineProtocol(**protocol | {"draws": tuple(BaselineDraw(**draw) for draw in protocol["draws"])})
            for protocol in content["protocols"]
        )
        baseline = Baseline(checkpoint=content["checkpoint"], data=content["data"], protocols=protocols)
        # The text contains the hash, so this compares the hash too.
        if render_baseline(baseline) != text.decode():
            raise ValueError("its content does not match its sha256: it was edited or damaged")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problem = f"not a readable baseline: {type(error).__name__}: {error}"
        raise ComparisonError(problem, where=str(path), hint=hint) from error
    return baseline
