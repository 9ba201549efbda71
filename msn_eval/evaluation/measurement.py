"""Measurement: a task with one encoder, and the result that it becomes or that an earlier run has made of it."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msn_eval.checkpoints.checkpoint import Checkpoint
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.decoders import decoder_version
from msn_eval.data.images import ImageSet
from msn_eval.errors import DamagedRecordError, NumericalError, StoreError, one_line
from msn_eval.evaluation.plan import Plan, Task
from msn_eval.features.collapse import Spectrum
from msn_eval.features.encoder import Encoder, resolve_tap
from msn_eval.features.extraction import Features
from msn_eval.probes.base import Probe, ProbeConfig, rank_labels, summarise_probabilities
from msn_eval.probes.linear import Linear
from msn_eval.results.reading import describe_reading, list_reading_differences, make_reading
from msn_eval.results.record import (
    CheckpointInfo,
    DataInfo,
    FeatureInfo,
    Predictions,
    ProbeInfo,
    Result,
    SplitInfo,
    TimingInfo,
    TransformInfo,
    describe_environment,
    read_result,
    result_id,
)

_log = logging.getLogger(__name__)
NO_EXTRACTION = TimingInfo(extract=0.0, probe=0.0, total=0.0)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One task with one encoder.

    Attributes:
        plan: The plan of the task.
        encoder: The encoder.
        task: The task.
        timing: What the features cost, both splits together; `probe` is 0.
        batch_size: Images per batch at the end.
        degenerate: What is wrong with the features, None for nothing.
        spectra: By tap, the spectrum of the validation features.
    """

    plan: Plan
    encoder: Encoder
    task: Task
    timing: TimingInfo
    batch_size: int
    degenerate: str | None = None
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)

    def make_result(
        self, config: ProbeConfig, predictions: Predictions, *, dim: int, seconds: float, tap: str | None = None
    ) -> Result:
        """Return the result of a fitted configuration.

        Args:
            config: The configuration, as fitted.
            predictions: Of every scored image.
            dim: Number of values per feature.
            seconds: Time to fit and score.
            tap: The tap of the features that were scored, None if they have no spectrum.
        """
        result = self._result(config, dim, seconds)
        features = result.features
        if (spectrum := self.spectra.get(tap or "")) is not None:
            features = replace(features, rankme=spectrum.rankme, alpha=spectrum.alpha, spectrum_images=spectrum.images)
        return replace(
            result,
            features=features,
            status="not_converged" if config.converged is False else "ok",
            metrics=predictions.metrics,
            predictions=f"{result.id}.npz",
        )

    def make_failure(self, error: NumericalError) -> Result:
        """Return the failed result that states an error."""
        return replace(self._result(ProbeConfig(params=self.task.params), None, 0.0), error=str(error))

    def _result(self, config: ProbeConfig, dim: int | None, seconds: float) -> Result:
        plan, task, encoder = self.plan, self.task, self.encoder
        features = _describe_features(encoder, find_taps(encoder, task, plan.config), dim, plan.decoder)
        return Result(
            id=make_result_id(encoder, task),
            status="failed",
            error=None,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            protocol_id=task.protocol_id,
            protocol=task.protocol,
            checkpoint=_describe_checkpoint(encoder.checkpoint, plan.config),
            data=DataInfo(
                name=task.scored.name,
                sha256=task.scored.sha256,
                class_map_sha256=task.scored.classes_sha256,
                classes=len(task.scored.images.classes),
                val_images=len(task.scored.images),
                skipped=len(task.skipped),
                trained_on=plan.data_name if task.scored.terms else None,
                trained_classes=len(plan.val.classes) if task.scored.terms else None,
            ),
            split=SplitInfo(
                subset=task.subset.name,
                draw=task.subset.draw,
                images=len(task.subset),
                sha256=task.split_sha256,
                overlap=task.overlap,
            ),
            features=replace(features, degenerate=self.degenerate),
            probe=ProbeInfo(name=task.probe.name, version=task.probe.version, **vars(config)),
            metrics=None,
            timing_s=replace(self.timing, probe=round(seconds, 4), total=round(self.timing.extract + seconds, 4)),
            environment=describe_environment(plan.device, batch_size=self.batch_size, seed=plan.config.seed),
            predictions=None,
        )


def label_only(images: ImageSet, tap: str) -> Features:
    """Return the labels of images as Features of width 0."""
    return Features(
        values=torch.empty(len(images), 0),
        labels=torch.tensor(images.labels, dtype=torch.int64),
        image_ids=images.ids,
        n_classes=len(images.classes),
        tap=tap,
    )


def make_predictions(probe: Probe, image_ids: Sequence[str], labels: Tensor, scores: Tensor) -> Predictions:
    """Return what a probe's scores of images, (m, n_classes), say about them, with their labels, (m,) int64.

    Raises:
        NumericalError: A score is NaN, or infinite where it stands for a probability.
    """
    prediction, rank = rank_labels(scores, labels)
    summary = summarise_probabilities(scores, labels) if probe.has_probabilities else ()
    names = ("confidence", "probability_of_label", "sum_of_squares")
    return Predictions(
        image=np.array([os.fsencode(image_id) for image_id in image_ids]),
        label=labels.numpy(),
        prediction=prediction.numpy(),
        rank_of_label=rank.numpy(),
        **{name: values.numpy() for name, values in zip(names, summary, strict=False)},
    )


def make_result_id(encoder: Encoder, task: Task) -> str:
    """Return the id of the result that a task has with an encoder."""
    return result_id(
        weights_sha256=encoder.checkpoint.weights_sha256,
        key=encoder.checkpoint.key,
        protocol_id=task.protocol_id,
        draw=task.subset.draw,
    )


def find_result(out: Path, encoder: Encoder, task: Task, config: EvaluationConfig) -> Result | None:
    """Return the result of a task from an earlier run, None if there is none, or it failed or is damaged.

    Raises:
        StoreError: The result of this id was made with different labelled images, or by another network or transform from
            the same weights. The id leaves these out, so one would be reported as the other.
    """
    path = out / f"{make_result_id(encoder, task)}.json"
    if not path.exists():
        return None
    try:
        result = read_result(path)
        if result.predictions is not None and not path.with_name(result.predictions).exists():
            raise DamagedRecordError("its predictions are missing", where=str(path))
    except DamagedRecordError as error:
        _log.warning("%s: %s; this result is measured again", error.where, one_line(error.what))
        return None
    if result.status == "failed":
        return None
    if result.split.sha256 != task.split_sha256:
        raise StoreError(
            f"holds a result of {result.split.subset}@{result.split.draw} with different labelled images than the data set "
            "has now",
            where=str(path),
            hint="The training images changed since: use another --out folder, or restore them.",
        )
    features = _describe_features(encoder, find_taps(encoder, task, config), result.features.dim, config.decoder)
    reading = make_reading(_describe_checkpoint(encoder.checkpoint, config), features)
    if differences := list_reading_differences(describe_reading(result), reading):
        raise StoreError(
            f"holds a result of the same weights, read differently: {'; '.join(differences)}",
            where=str(path),
            hint="Use another --out folder for this reading.",
        )
    if config.solver not in ("auto", result.probe.solver) and result.probe.name == "logistic":
        _log.warning(
            "%s was solved by %s before and is kept; use another --out for %s", path, result.probe.solver, config.solver
        )
    return result


def find_taps(encoder: Encoder, task: Task, config: EvaluationConfig) -> dict[str, str]:
    """Return the encoder's own tap for each tap that the task's probe names.

    Raises:
        UsageError: A tap that the user named is missing. Only the tap of a probe's own rule may be replaced.
    """
    if config.tap is not None:
        return {tap: resolve_tap(encoder, config.tap, by_hand=True) for tap in task.probe.taps}
    named = isinstance(task.probe, Linear) and bool(task.probe.recipe.named_taps)
    return {tap: resolve_tap(encoder, tap, by_hand=named, option="linear.taps") for tap in task.probe.taps}


def _describe_features(encoder: Encoder, taps: Mapping[str, str], dim: int | None, decoder: str) -> FeatureInfo:
    return FeatureInfo(
        tap=",".join(taps.values()),
        dim=dim,
        precision=encoder.precision,
        decoder=decoder_version(decoder),
        transform=TransformInfo(**vars(encoder.transform), mean_std_from=encoder.checkpoint.normalisation.source),
    )


def _describe_checkpoint(checkpoint: Checkpoint, config: EvaluationConfig) -> CheckpointInfo:
    own = {field.name for field in fields(CheckpointInfo)} - {"allow_missing"}
    allow_missing = tuple(config.allow_missing) if checkpoint.matched < 1 else ()
    return CheckpointInfo(**{name: getattr(checkpoint, name) for name in own}, allow_missing=allow_missing)
