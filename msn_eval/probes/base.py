"""The contract of a probe, and what several probes share.

A probe module holds a frozen dataclass that implements `FeatureProbe`, and a function `configure` that an `Entry` or an
entry point names. A complete plug-in:

    @dataclass(frozen=True, kw_only=True)
    class NearestMean(FeatureProbe):
        name: ClassVar[str] = "nearest-mean"
        version: ClassVar[int] = 1

        @property
        def taps(self) -> tuple[str, ...]:
            return ("cls",)

        def configs(self, n: int) -> tuple[Params, ...]:
            return ({},)

        def fit(self, train, device, *, workers=None, other_taps=()) -> FittedProbe:
            rows, labels = train.values.to(device), train.labels.to(device)
            present = labels.unique()  # a class can have no labelled image, and must never be predicted then
            means = torch.stack([rows[labels == label].mean(dim=0) for label in present])

            def scores(values: Tensor) -> Iterator[Tensor]:
                result = torch.full((len(values), train.n_classes), -torch.inf, dtype=torch.float64, device=device)
                result[:, present] = -torch.cdist(values.to(device), means).double()
                yield result

            return FittedProbe(settings=(ProbeConfig(params={}),), scores=scores)

    def configure(config: EvaluationConfig, subset: Subset) -> Iterator[NearestMean]:
        yield NearestMean()
"""

import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from msn_eval.config.recipes import Params
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.distributed.group import Group
from msn_eval.errors import NumericalError, format_count
from msn_eval.features.extraction import Features

TrainsOn = Literal["features", "augmented features", "images"]


class Probe(Protocol):
    """A probe with its options, as a frozen dataclass.

    Attributes:
        name: What users type and records state.
        version: Part of the protocol. Raise it when the same options give different predictions.
        trains_on: What the evaluation passes to it. "features": features of the labelled images, extracted once and
            cached; such a probe is a `FeatureProbe`. "augmented features": features of new random crops in every epoch.
            "images": the encoder changes too.
        has_probabilities: Whether the softmax of the scores is the probe's probability of each class.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    trains_on: ClassVar[TrainsOn] = "features"
    has_probabilities: ClassVar[bool] = False

    @property
    def taps(self) -> tuple[str, ...]:
        """The taps that the probe asks for: usually one, several if `fit` chooses among them.

        An encoder without a tap uses another one by the rule of `resolve_tap`.
        """
        ...

    def configs(self, n: int) -> tuple[Params, ...]:
        """Return the hyper-parameters of every protocol that the probe stands for.

        Each is a protocol with records of its own. Name everything that changes a prediction, but nothing that `fit`
        chooses from the labelled images by a fixed rule.

        Args:
            n: Number of labelled images.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """The ranks of a group, each with a device to compute on. Ranks other than 0 wait in `distributed.serve`."""

    group: Group
    device: torch.device


class FeatureProbe(Probe, Protocol):
    """A probe that is fitted to features of the labelled images. A subclass inherits `trains_on`."""

    def fit(
        self,
        train: Features,
        device: torch.device,
        *,
        workers: WorkerGroup | None = None,
        other_taps: Sequence[Features] = (),
    ) -> "FittedProbe":
        """Fit every configuration to the labelled images.

        The validation features are not passed, so nothing can be chosen on them. `check_labelled` has accepted all
        features.

        Args:
            train: Features at the first of `taps`. A class may have no labelled image; it must never be predicted.
            device: Where to compute. Features are float32 on the CPU, here and where they are scored.
            workers: Ranks that wait to share the work; a probe may ignore them.
            other_taps: Features of the same images at the further taps, in the order of `taps`.

        Raises:
            NumericalError: These labelled images cannot be fitted. The evaluation records a failed result.
        """
        ...


Configure = Callable[[EvaluationConfig, Subset], Iterator[Probe]]
"""Signature of `configure`: yield the probes that the options of an evaluation ask for on one draw of a subset."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """One configuration of a probe, and how well its fit came out.

    Attributes:
        params: Hyper-parameters, as `Probe.configs` returns them.
        solver: Name of the solver, None if there is a closed form.
        converged: Whether the solver reached its target, None if it has none.
        certificate: Relative duality gap, None for probes without one.
        objective: Value of what was minimised.
        iterations: Number of steps of the solver.
        chosen: What the fit chose from the labelled images, by a rule that is part of the protocol.
    """

    params: Params
    solver: str | None = None
    converged: bool | None = None
    certificate: float | None = None
    objective: float | None = None
    iterations: int | None = None
    chosen: Mapping[str, float | str] | None = None


@dataclass(frozen=True, kw_only=True)
class FittedProbe:
    """A probe fitted to labelled images.

    Attributes:
        settings: The configurations that were fitted.
        scores: Function from (m, d) features to one (m, n_classes) float64 matrix per configuration, in the order of
            `settings`. Higher is better; -inf for a class that cannot be predicted.
        failures: Hyper-parameters of each configuration that could not be fitted, and why.
        tap: The tap whose features `scores` takes, if `fit` was given several.
    """

    settings: tuple[ProbeConfig, ...]
    scores: Callable[[Tensor], Iterator[Tensor]]
    failures: tuple[tuple[Params, NumericalError], ...] = ()
    tap: str | None = None


def fit_probe(
    probe: FeatureProbe,
    train: Features,
    device: torch.device,
    *,
    workers: WorkerGroup | None = None,
    other_taps: Sequence[Features] = (),
) -> FittedProbe:
    """Check the labelled images, then fit the probe to them. See `FeatureProbe.fit`.

    Raises:
        NumericalError: By `check_labelled` or by the probe.
    """
    for features in (train, *other_taps):
        check_labelled(features)
    return probe.fit(train, device, workers=workers, other_taps=other_taps)


def normalise_rows(values: Tensor) -> Tensor:
    """Return the rows of (n, d) floating values, L2-normalised, in float64. A zero row stays zero."""
    rows = values.to(torch.float64)
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, torch.ones_like(length))


def centre_rows(values: Tensor) -> Tensor:
    """Subtract its own mean from each row of (n, d) floating values, then L2-normalise it, in float64.

    A constant row becomes zero.

    Source: the released evaluation of arXiv:2204.07141. No statistic crosses rows, so test images do not affect each other.
    """
    rows = values.to(torch.float64)
    centred = rows - rows.mean(dim=1, keepdim=True)
    # A constant row minus its mean is rounding noise, which normalisation would blow up to unit length.
    rounding = torch.finfo(torch.float64).eps * rows.shape[1] * rows.abs().amax(dim=1, keepdim=True)
    constant = centred.abs().amax(dim=1, keepdim=True) <= rounding
    return normalise_rows(torch.where(constant, torch.zeros_like(centred), centred))


_BLOCK_ROWS = 4096
_COLLAPSED = 1e-6  # share of the squared length; float32 noise on one vector leaves about 1e-14, networks 1e-3 and more
_SHOWN = 5
_MEASURED_SIZE = 512  # of matrices; a product takes about 1 ms on a GPU that is slow at it
_BLOCK_VALUES = 1 << 22  # of probabilities that are in memory at once


def check_labelled(train: Features) -> None:
    """Refuse labelled images that no probe can learn from.

    Labels are checked on the CPU: a GPU would report an index out of range as a device-side assertion.

    Raises:
        NumericalError: Fewer than two classes, labels outside [0, n_classes), or features that are not finite.
    """
    labels = train.labels.cpu()
    wrong = ((labels < 0) | (labels >= train.n_classes)).nonzero().flatten().tolist()
    if wrong:
        first = f"{train.image_ids[wrong[0]]} has {int(labels[wrong[0]])}"
        raise NumericalError(
            f"{format_count(len(wrong), 'label is', 'labels are')} outside of 0 to {train.n_classes - 1}, first {first}",
            hint="Number the classes from 0.",
        )
    if len(torch.unique(labels)) < 2:
        raise NumericalError(
            f"the {len(labels)} labelled images are of a single class",
            hint="Label images of at least two classes.",
        )
    finite = torch.cat([block.isfinite().all(dim=1) for block in torch.split(train.values, _BLOCK_ROWS)])
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        names = ", ".join(train.image_ids[row] for row in bad[:_SHOWN])
        raise NumericalError(
            f"features at tap {train.tap} are not finite for {format_count(len(bad), 'labelled image')}, first {names}",
            hint="Retry with --precision fp32.",
        )


def describe_collapse(values: Tensor) -> str:
    """Describe what is degenerate about (n, d) features; an empty string if nothing is.

    Features have collapsed if all rows, centred and normalised, are nearly the same vector: probes then score at chance.
    Constant rows are counted, zero rows among them: centred they are zero, and say nothing about their image.
    """
    n = len(values)
    constant = zero = 0
    total = torch.zeros(values.shape[1], dtype=torch.float64)
    for block in torch.split(values, _BLOCK_ROWS):
        rows = centre_rows(block).cpu()
        constant += int((rows == 0).all(dim=1).sum())
        zero += int((block == 0).all(dim=1).sum())
        total += rows.sum(dim=0)
    problems = []
    others = n - constant
    # The variance of unit vectors is 1 minus the squared length of their mean.
    if others == 0 or (n > 1 and 1 - float((total / others).square().sum()) < _COLLAPSED):
        problems.append("collapsed representation: all images have the same features, up to scale and offset")
    if constant:
        have = "has" if constant == 1 else "have"
        problems.append(f"{constant:,} of {n:,} images {have} constant features, {zero:,} of them zero")
    return "; ".join(problems)


def rank_labels(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predicted class of each image and the 1-based rank of its label.

    Args:
        scores: (m, n_classes), higher is better; equal scores rank by smaller class index.
        labels: (m,) int64.

    Returns:
        (m,) int64 predictions and (m,) int64 ranks, on the CPU.

    Raises:
        NumericalError: A score is NaN; comparisons with NaN are false and would give a rank of 1.
    """
    if bool(scores.isnan().any()):
        raise NumericalError("scores are NaN", hint="The features or the fit overflowed; retry with --precision fp32.")
    labels = labels.to(scores.device)
    own = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > own) | ((scores == own) & (classes < labels[:, None]))
    best = scores.amax(dim=1, keepdim=True)
    prediction = (scores == best).to(torch.uint8).argmax(dim=1)  # the first of equal maxima
    return prediction.cpu(), (1 + ahead.sum(dim=1)).cpu()


@lru_cache
def choose_float64_device(device: torch.device) -> torch.device:
    """Return where float64 products take less time, on a device or on the CPU.

    Many GPUs compute float64 at 1/64 of the rate of float32. Measured once per process; the smallest of several times counts,
    since the first includes the start of a library and others may wait for a busy machine.
    """

    def multiply(factor: Tensor) -> float:
        return float((factor @ factor)[0, 0])  # waits for the device

    cpu = torch.device("cpu")
    if device == cpu:
        return cpu
    factor = torch.ones(_MEASURED_SIZE, _MEASURED_SIZE, dtype=torch.float64)
    seconds = {
        each: min(timeit.repeat(partial(multiply, factor.to(each)), number=1, repeat=4)) for each in (device, cpu)
    }
    return min(seconds, key=seconds.__getitem__)


def summarise_probabilities(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what calibration needs of each image's probabilities, the softmax of its scores.

    Args:
        scores: (m, n_classes) float64, -inf for a class that cannot be predicted.
        labels: (m,) int64.

    Returns:
        Three of (m,) float32 on the CPU: the largest probability, that of the label, and the sum of squares.

    Raises:
        NumericalError: A row has no probabilities: infinite scores, or none.
    """
    parts = []
    rows = max(1, _BLOCK_VALUES // scores.shape[1])
    for block, block_labels in zip(torch.split(scores, rows), torch.split(labels.to(scores.device), rows), strict=True):
        probability = block.softmax(dim=1)
        own = probability.gather(1, block_labels[:, None])[:, 0]
        parts.append(torch.stack([probability.amax(dim=1), own, probability.square().sum(dim=1)]).float().cpu())
    confidence, of_label, squares = torch.cat(parts, dim=1)
    if bool(squares.isnan().any()):
        raise NumericalError(
            "scores are infinite", hint="The features or the fit overflowed; retry with --precision fp32."
        )
    return confidence, of_label, squares
