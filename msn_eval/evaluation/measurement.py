"""Measurement: a task of a plan about to become a result, and the result that an earlier run may have made of it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from msn_eval.checkpoints.checkpoint import Checkpoint
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.decoders import decoder_version
from msn_eval.errors import NumericalError, StoreError
from msn_eval.evaluation.plan import Plan, Task
from msn_eval.features.encoder import Encoder, resolve_tap
from msn_eval.probes import ProbeConfig
from msn_eval.probes.linear import Linear
from msn_eval.results.record import (
    CheckpointInfo,
    DataInfo,
    FeatureInfo,
    Predictions,
    ProbeInfo,
    Result,
    SplitInfo,
    Status,
    TimingInfo,
    TransformInfo,
    describe_environment,
    read_result,
    result_id,
)
from msn_eval.results.statistics import measure

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cost:
    """What the features of a checkpoint cost, both splits together."""

    seconds: float
    batch_size: int
    images_per_second: float | None = None
    decode_share: float | None = None
    encode_share: float | None = None


@dataclass(frozen=True)
class Measurement:
    """One task about to become a result."""

    plan: Plan
    encoder: Encoder
    task: Task
    cost: Cost
    degenerate: str | None = None

    def done(self, setting: ProbeConfig, predictions: Predictions, dim: int, probe_seconds: float) -> Result:
        status: Status = "not_converged" if setting.converged is False else "ok"
        result = self._result(setting, dim, probe_seconds)
        return replace(
            result,
            status=status,
            error=None,
            metrics=measure(predictions.rank_of_label),
            predictions=f"{result.id}.npz",
        )

    def failed(self, error: NumericalError) -> Result:
        return replace(self._result(ProbeConfig(params=self.task.params), None, 0.0), error=str(error))

    def _result(self, setting: ProbeConfig, dim: int | None, probe_seconds: float) -> Result:
        plan, task, encoder = self.plan, self.task, self.encoder
        return Result(
            id=id_of(encoder, task),
            status="failed",
            error=None,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            protocol_id=task.protocol_id,
            protocol=task.protocol,
            checkpoint=_checkpoint_facts(encoder.checkpoint, plan.request),
            data=DataInfo(
                name=plan.data_name,
                sha256=plan.val_sha256,
                class_map_sha256=plan.classes_sha256,
                classes=len(plan.val.classes),
                val_images=len(plan.val),
                skipped=len(plan.skipped(task.subset)),
            ),
            split=SplitInfo(
                subset=task.subset.name,
                draw=task.subset.draw,
                images=len(task.subset),
                sha256=task.split_sha256,
                overlap=task.overlap,
            ),
            features=replace(
                _feature_facts(encoder, taps_of(encoder, task, plan.request), dim, plan.decoder),
                degenerate=self.degenerate,
            ),
            probe=ProbeInfo(
                name=task.probe.name,
                version=task.probe.version,
                params=dict(setting.params),
                solver=setting.solver,
                converged=setting.converged,
                certificate=setting.certificate,
                objective=setting.objective,
                iterations=setting.iterations,
                chosen=None if setting.chosen is None else dict(setting.chosen),
            ),
            metrics=None,
            timing_s=TimingInfo(
                extract=round(self.cost.seconds, 4),
                probe=round(probe_seconds, 4),
                total=round(self.cost.seconds + probe_seconds, 4),
                images_per_second=self.cost.images_per_second,
                decode_share=self.cost.decode_share,
                encode_share=self.cost.encode_share,
            ),
            environment=describe_environment(plan.device, batch_size=self.cost.batch_size, seed=plan.request.seed),
            predictions=None,
        )


def id_of(encoder: Encoder, task: Task) -> str:
    """Give the id of the result that a task will have."""
    return result_id(
        weights_sha256=encoder.checkpoint.weights_sha256,
        key=encoder.checkpoint.key,
        protocol_id=task.protocol_id,
        draw=task.subset.draw,
    )


def known_result(out: Path, encoder: Encoder, task: Task, request: EvaluationConfig) -> Result | None:
    """Give the finished result of a task from an earlier run, or None.

    Raises StoreError where the folder holds a result of the same id that was made with other labelled images, or by
    another network or transform from the same weights: the id leaves these out, and they must not pass for each other.
    """
    path = out / f"{id_of(encoder, task)}.json"
    if not path.exists():
        return None
    known = read_result(path)
    if known.status == "failed":
        return None
    if known.split.sha256 != task.split_sha256:
        raise StoreError(
            f"holds a result of {known.split.subset}@{known.split.draw} with other labelled images than the data set gives now",
            where=str(path),
            hint="The training images changed since: use another --out folder, or restore them.",
        )
    facts = _feature_facts(encoder, taps_of(encoder, task, request), known.features.dim, request.decoder)
    # The versions of a decoder and bf16 against fp16 may differ between comparable results.
    same = replace(known.features, decoder=facts.decoder, precision=facts.precision, degenerate=None)
    if same != facts or known.checkpoint.arch != encoder.arch:
        raise StoreError(
            f"holds a result of the same weights read as {known.checkpoint.arch} with {known.features.transform}; "
            f"now they are read as {encoder.arch} with {facts.transform}",
            where=str(path),
            hint="Use another --out folder for this reading.",
        )
    if request.solver not in ("auto", known.probe.solver) and known.probe.name == "logistic":
        _log.warning(
            "%s was solved by %s before and is kept; use another --out for %s", path, known.probe.solver, request.solver
        )
    return known


def taps_of(encoder: Encoder, task: Task, request: EvaluationConfig) -> dict[str, str]:
    """Say where an encoder is tapped for each tap that a task names. Raises UsageError for one that was asked for and is not
    there: what stands in for the tap of a rule would be a surprise among taps of the user's choice."""
    if request.tap is not None:
        return {name: resolve_tap(encoder, request.tap, by_hand=True) for name in task.taps}
    chosen = isinstance(task.probe, Linear) and bool(task.probe.named_taps)
    return {name: resolve_tap(encoder, name, by_hand=chosen, option="linear.taps") for name in task.taps}


def _feature_facts(encoder: Encoder, taps: Mapping[str, str], dim: int | None, decoder: str) -> FeatureInfo:
    transform = encoder.transform
    return FeatureInfo(
        tap=",".join(taps.values()),
        dim=dim,
        precision=encoder.precision,
        decoder=decoder_version(decoder),
        transform=TransformInfo(**vars(transform)),
    )


def _checkpoint_facts(checkpoint: Checkpoint, request: EvaluationConfig) -> CheckpointInfo:
    return CheckpointInfo(
        name=checkpoint.name,
        path=checkpoint.path,
        sha256=checkpoint.sha256,
        weights_sha256=checkpoint.weights_sha256,
        format=checkpoint.format,
        key=checkpoint.key,
        arch=checkpoint.arch,
        params=checkpoint.params,
        matched=checkpoint.matched,
        epoch=checkpoint.epoch,
        allow_missing=tuple(request.allow_missing) if checkpoint.matched < 1 else (),
    )
