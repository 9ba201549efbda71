"""Baseline: what a checkpoint got right, image by image, as one small file that is reviewed like code.

JSON text of stable bytes: equal results give an equal file, and a change of it is a change that somebody sees. Of every
draw it keeps one bit an image (base64 of packed bits, first image first), the hash of its predictions and of its labelled
images; of every protocol the whole protocol. `sha256` covers all the rest.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msn_eval.errors import ComparisonError, MsnEvalError
from msn_eval.files.atomic import write_atomically
from msn_eval.files.json_records import canonical_json
from msn_eval.results.predictions import CheckpointPredictions, by_protocol, protocol_title, read_checkpoint_predictions
from msn_eval.results.record import Result, protocol_id
from msn_eval.results.statistics import Integers, count_right

SCHEMA = 1
_KIND = "msn-eval baseline"


@dataclass(frozen=True, kw_only=True)
class BaselineDraw:
    """One draw. right: base64 of the packed bits, one an image; the other fields are those of its record."""

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

    title:         its name for people
    images:        test images scored
    images_sha256: over the lines `id TAB label` of these, in order
    made_with:     what may differ between comparable results: versions, device, precision, tap, transform, solver
    """

    protocol_id: str
    protocol: Mapping[str, Any]
    title: str
    images: int
    images_sha256: str
    made_with: Mapping[str, Any]
    draws: tuple[BaselineDraw, ...]

    def __post_init__(self) -> None:
        if self.protocol_id != protocol_id(self.protocol):
            raise ValueError(f"{self.title}: the protocol is not the one of its protocol_id")
        if not self.draws or len({one.draw for one in self.draws}) != len(self.draws):
            raise ValueError(f"{self.title}: no draw, or one twice")
        for one, right in zip(self.draws, self.right, strict=True):
            if int(right.sum()) / self.images != one.top1:
                raise ValueError(f"{self.title}: draw {one.draw} has not its accuracy")

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Tell which image was right in which draw, (draws, images)."""
        return np.stack([_unpacked(one.right, self.images) for one in self.draws])

    @cached_property
    def scores(self) -> Integers:
        """Give the number of draws in which each image was right, (images,)."""
        return count_right(self.right)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One checkpoint's results to compare others with.

    checkpoint: its name, hashes, key, architecture and epoch
    data:       the name of the data set, as it was given
    """

    checkpoint: Mapping[str, Any]
    data: str
    protocols: tuple[BaselineProtocol, ...]

    def __post_init__(self) -> None:
        if len({one.protocol_id for one in self.protocols}) != len(self.protocols) or not self.protocols:
            raise ValueError("no protocol, or one twice")

    @cached_property
    def sha256(self) -> str:
        """Give the hash that the file states: over its canonical JSON without this line."""
        return hashlib.sha256(canonical_json(_content(self)).encode()).hexdigest()


def make_baseline(results: Sequence[Result], folders: Sequence[Path]) -> Baseline:
    """Make a baseline of one checkpoint's results.

    folders: where their predictions stand
    Raises ComparisonError naming every protocol that is no measure to hold others against: failed, not converged,
    scored on a part of the images (`--limit`), or damaged.
    """
    protocols, problems = [], []
    for group in by_protocol(results).values():
        title = protocol_title(group[0])
        try:
            answers = read_checkpoint_predictions(group, folders)
            if group[0].protocol.get("limit") is not None:
                raise ComparisonError(f"scored on a part of the images (--limit {group[0].protocol['limit']})")
            if answers.unconverged:
                raise ComparisonError(f"draws {list(answers.unconverged)} did not converge")
            protocols.append(_protocol(answers, title))
        except ComparisonError as error:
            problems.append(f"  {title} [{group[0].protocol_id}]: {error}")
    if problems:
        raise ComparisonError(
            "these results can be no baseline:\n" + "\n".join(problems),
            hint="Measure them anew, or give a folder without them.",
        )
    checkpoint = results[0].checkpoint
    facts = {
        name: getattr(checkpoint, name)
        for name in ("name", "sha256", "weights_sha256", "key", "arch", "params", "epoch")
    }
    ordered = sorted(protocols, key=lambda one: (one.title, one.protocol_id))
    return Baseline(checkpoint=facts, data=results[0].data.name, protocols=tuple(ordered))


def _protocol(answers: CheckpointPredictions, title: str) -> BaselineProtocol:
    first = answers.first
    draws = tuple(
        BaselineDraw(
            draw=result.split.draw,
            labelled_images=result.split.images,
            split_sha256=result.split.sha256,
            overlap=result.split.overlap,
            top1=int(right.sum()) / len(right),
            predictions_sha256=predictions_sha256(prediction),
            right=_packed(right),
        )
        for result, right, prediction in zip(answers.results, answers.right, answers.prediction, strict=True)
    )
    return BaselineProtocol(
        protocol_id=first.protocol_id,
        protocol=first.protocol,
        title=title,
        images=len(answers.image),
        images_sha256=answers.images_sha256,
        made_with=made_with(first),
        draws=draws,
    )


def made_with(result: Result) -> dict[str, Any]:
    """Give what may differ between comparable results, and is shown where it does."""
    return {
        "package": result.environment.package,
        "torch": result.environment.torch,
        "decoder": result.features.decoder,
        "device": result.environment.device,
        "precision": result.features.precision,
        "tap": result.features.tap,
        "transform": json.loads(canonical_json(asdict(result.features.transform))),
        "solver": result.probe.solver,
    }


def predictions_sha256(prediction: Integers) -> str:
    """Give the SHA-256 of predicted classes as little-endian int64."""
    return hashlib.sha256(prediction.astype("<i8").tobytes()).hexdigest()


def _packed(right: NDArray[np.bool_]) -> str:
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def _unpacked(text: str, images: int) -> NDArray[np.bool_]:
    packed = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    if images < 1 or len(packed) != -(-images // 8):
        raise ValueError(f"bits for {8 * len(packed)} images instead of {images}")
    return np.unpackbits(packed, count=images).astype(bool)


def _content(baseline: Baseline) -> dict[str, Any]:
    return {"kind": _KIND, "schema": SCHEMA, **asdict(baseline)}


def render_baseline(baseline: Baseline) -> str:
    """Give the text of the file; equal baselines, equal text."""
    content = _content(baseline) | {"sha256": baseline.sha256}
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write the file, in full or not at all. Raises StoreError."""
    write_atomically(path, render_baseline(baseline).encode())


def read_baseline(path: Path) -> Baseline:
    """Read a baseline. Raises ComparisonError naming the file where there is none or it is not as it was written."""
    hint = "Make one on purpose, and review it: msn-eval baseline RUNS --out FILE."
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise ComparisonError("no baseline: there is no such file", where=str(path), hint=hint) from error
    except OSError as error:
        raise ComparisonError(f"no baseline: {error.strerror or error}", where=str(path), hint=hint) from error
    try:
        content = json.loads(text)
        stated = content.pop("sha256")
        if (content["kind"], content["schema"]) != (_KIND, SCHEMA):
            raise ValueError(f"kind {content['kind']!r}, schema {content['schema']!r}; this version reads {SCHEMA}")
        protocols = (
            BaselineProtocol(**one | {"draws": tuple(BaselineDraw(**draw) for draw in one["draws"])})
            for one in content["protocols"]
        )
        baseline = Baseline(checkpoint=content["checkpoint"], data=content["data"], protocols=tuple(protocols))
        if stated != baseline.sha256 or render_baseline(baseline) != text.decode():
            raise ValueError("its content is not that of its sha256: it was edited or damaged")
    except (MsnEvalError, ValueError, TypeError, KeyError, AttributeError, binascii.Error, RecursionError) as error:
        problem = f"no readable baseline: {type(error).__name__}: {error}"
        raise ComparisonError(problem, where=str(path), hint=hint) from error
    return baseline
