"""Fitted: a probe after it has seen the labelled images. The corridor never hands it the validation labels."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from msn_eval.config.recipes import Params
from msn_eval.errors import NumericalError
from msn_eval.features.extraction import Features


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """One setting of a probe's hyper-parameters, and how well its fit came out.

    certificate: relative duality gap, None for probes that are not solved for
    chosen:      what the fit chose for itself from the labelled images, by a rule that is part of the protocol
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
    """Settings, and a function from (m, d) features to (m, n_classes) scores: one matrix a setting, in their order.

    Scores are float64, higher is better, -inf for a class that cannot be chosen.
    failures: settings that came to nothing, each by its hyper-parameters, and why
    tap:      where several taps were offered, the one whose features the scores are of
    """

    settings: tuple[ProbeConfig, ...]
    scores: Callable[[Tensor], Iterator[Tensor]]
    failures: tuple[tuple[Params, NumericalError], ...] = ()
    tap: str | None = None


def normalised_rows(values: Tensor) -> Tensor:
    """Give rows of unit L2 length in float64; a zero row stays zero.

    values: (n, d) floating
    """
    rows = values.to(torch.float64)
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, torch.ones_like(length))


def centred_rows(values: Tensor) -> Tensor:
    """Give rows less their own mean, then of unit L2 length, in float64; a constant row becomes zero.

    values: (n, d) floating
    Source: the released evaluation of arXiv:2204.07141 (row-wise, so test images do not see each other).
    """
    rows = values.to(torch.float64)
    centred = rows - rows.mean(dim=1, keepdim=True)
    # What subtracting the mean leaves of a constant row is rounding, and must not be blown up to unit length.
    rounding = torch.finfo(torch.float64).eps * rows.shape[1] * rows.abs().amax(dim=1, keepdim=True)
    constant = centred.abs().amax(dim=1, keepdim=True) <= rounding
    return normalised_rows(torch.where(constant, torch.zeros_like(centred), centred))


_BLOCK_ROWS = 4096
_COLLAPSED = 1e-6  # of the rows' squared length; float32 noise on one vector leaves about 1e-14, networks 1e-3 and more
_SHOWN = 5


def check_labelled(train: Features) -> None:
    """Refuse what no probe can learn from: on the CPU, since a GPU would only say that an index is out of range.

    Raises NumericalError for no or one class, labels outside [0, n_classes), and features that are not finite.
    """
    labels = train.labels.cpu()
    wrong = ((labels < 0) | (labels >= train.n_classes)).nonzero().flatten().tolist()
    if wrong:
        first = f"{train.image_ids[wrong[0]]} has {int(labels[wrong[0]])}"
        raise NumericalError(
            f"{len(wrong)} labels are outside of 0 to {train.n_classes - 1}, first {first}",
            hint="Number the classes from 0.",
        )
    if len(torch.unique(labels)) < 2:
        raise NumericalError(
            f"the {len(labels)} labelled images are of a single class", hint="Label images of at least two classes."
        )
    finite = torch.cat([part.isfinite().all(dim=1) for part in torch.split(train.values, _BLOCK_ROWS)])
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        names = ", ".join(train.image_ids[row] for row in bad[:_SHOWN])
        raise NumericalError(
            f"features at tap {train.tap} are not finite for {len(bad)} labelled images, first {names}",
            hint="Retry with --precision fp32.",
        )


def describe_collapse(values: Tensor) -> str:
    """Say what is degenerate about features, (n, d), or give an empty string.

    Counted are constant rows, zero ones among them: centred they are zero, and no probe can place them. Collapsed are
    features whose rows, centred and normalised, are all but the same vector: the probes still answer, at chance.
    """
    n = len(values)
    constant = zero = 0
    total = torch.zeros(values.shape[1], dtype=torch.float64)
    for part in torch.split(values, _BLOCK_ROWS):
        rows = centred_rows(part).cpu()
        constant += int((rows == 0).all(dim=1).sum())
        zero += int((part == 0).all(dim=1).sum())
        total += rows.sum(dim=0)
    told = []
    directed = n - constant
    if directed == 0 or (n > 1 and 1 - float((total / directed).square().sum()) < _COLLAPSED):
        told.append("collapsed representation: all images have the same features, up to scale and offset")
    if constant:
        told.append(f"{constant:,} of {n:,} images have constant features, {zero:,} of them zero")
    return "; ".join(told)


def rank_labels(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Give each image's predicted class and the 1-based rank of its label.

    scores: (m, n_classes), higher is better; equal scores rank by smaller class index
    labels: (m,) int64
    returns: (m,) int64 and (m,) int64
    Raises NumericalError for NaN, which every comparison would let pass.
    """
    if bool(scores.isnan().any()):
        raise NumericalError("scores are NaN", hint="The features or the fit overflowed; retry with --precision fp32.")
    labels = labels.to(scores.device)
    own = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > own) | ((scores == own) & (classes < labels[:, None]))
    best = scores.amax(dim=1, keepdim=True)
    prediction = (scores == best).to(torch.uint8).argmax(dim=1)  # of equal maxima the first
    return prediction.cpu(), (1 + ahead.sum(dim=1)).cpu()
