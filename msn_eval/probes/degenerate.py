"""Degenerate features and labels: what must be refused before a probe sees it, and what must be told."""

import torch
from torch import Tensor

from msn_eval.errors import NumericalError
from msn_eval.features.extraction import Features
from msn_eval.probes.rows import centred_rows

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
            remedy="Number the classes from 0.",
        )
    if len(torch.unique(labels)) < 2:
        raise NumericalError(
            f"the {len(labels)} labelled images are of a single class", remedy="Label images of at least two classes."
        )
    finite = torch.cat([part.isfinite().all(dim=1) for part in torch.split(train.values, _BLOCK_ROWS)])
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        names = ", ".join(train.image_ids[row] for row in bad[:_SHOWN])
        raise NumericalError(
            f"features at tap {train.tap} are not finite for {len(bad)} labelled images, first {names}",
            remedy="Retry with --precision fp32.",
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
