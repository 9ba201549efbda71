"""Gradients: loss and gradients of one step, in one piece or, where memory is short, in micro-batches.

In micro-batches MSN's are still those of the whole batch: every image goes through the encoder twice, first without
gradient, so that head, BatchNorm, Sinkhorn and mean entropy see all of them at once, then with the gradient that they gave
back. SimSiam's projector could be treated so, its encoder's own BatchNorm could not: it sees a micro-batch at a time.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from msn_pretrain.methods.msn import MSN, Step
from msn_pretrain.methods.simsiam import SimSiam

Model = MSN | SimSiam


def compute_gradients(
    model: Model,
    views: Sequence[Tensor],
    kept: Tensor | None,
    *,
    sharpening: float,
    micro_batch: int,
    autocast: AbstractContextManager[None],
) -> Step:
    """Compute one step's loss, and add its gradients to the model's.

    views:       each (b, 3, S, S), normalised
    kept:        which patches the masked anchors keep
    micro_batch: images at once, 0 for all of them
    autocast:    in which everything forward is computed
    """
    images = len(views[0])
    if micro_batch in (0, images) or micro_batch > images:
        with autocast:
            step: Step = model(views, kept=kept, sharpening=sharpening)
        step.total.backward()  # type: ignore[no-untyped-call]
        return step
    if isinstance(model, MSN):
        return _in_two_passes(model, views, kept, sharpening=sharpening, size=micro_batch, autocast=autocast)
    return _piece_by_piece(model, views, size=micro_batch, autocast=autocast)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A micro-batch of one anchor view.

    group: views of one size, masked or not, whose projections share BatchNorm statistics
    state: of torch's generators before the encoder saw it the first time
    """

    images: Tensor
    kept: Tensor | None
    group: tuple[bool, int]
    state: tuple[Tensor, Tensor | None]


def _in_two_passes(
    model: MSN,
    views: Sequence[Tensor],
    kept: Tensor | None,
    *,
    sharpening: float,
    size: int,
    autocast: AbstractContextManager[None],
) -> Step:
    pieces: list[_Piece] = []
    seen: list[Tensor] = []
    with torch.no_grad(), autocast:
        target_features = torch.cat([model.target.trunk(part) for part in torch.split(views[0], size)])
        targets = model.target.head(target_features)
        for images, own, group in _micro_batches(model, views[1:], kept, size):
            pieces.append(_Piece(images=images, kept=own, group=group, state=_generators(images.device)))
            seen.append(model.anchor.trunk(images, own))
    features = [one.detach().requires_grad_() for one in seen]
    with autocast:
        by_group = groupby(zip(pieces, features, strict=True), key=lambda one: one[0].group)
        anchors = [model.anchor.head(torch.cat([feature for _, feature in alike])) for _, alike in by_group]
        loss = model.compared(torch.cat(anchors), targets, sharpening=sharpening)
    loss.total.backward()  # type: ignore[no-untyped-call]
    after = _generators(views[0].device)
    for piece, feature in zip(pieces, features, strict=True):
        _set_generators(piece.state, piece.images.device)
        with autocast:
            again = model.anchor.trunk(piece.images, piece.kept)
        again.backward(feature.grad)
    _set_generators(after, views[0].device)
    parts = {name: getattr(loss, name).detach() for name in ("total", "cross_entropy", "me_max", "entropy")}
    return Step(total=loss.total, parts=parts, features=target_features, outputs=targets, targets=loss.targets)


def _micro_batches(
    model: MSN, views: Sequence[Tensor], kept: Tensor | None, size: int
) -> list[tuple[Tensor, Tensor | None, tuple[bool, int]]]:
    found = []
    for number, view in enumerate(views):
        masked = number < model.random_views and kept is not None
        for start in range(0, len(view), size):
            own = None
            if masked and kept is not None:
                first = number * len(view) + start
                own = kept if kept.dim() == 1 else kept[first : first + min(size, len(view) - start)]
            group = (number < model.random_views, view.shape[-1])
            found.append((view[start : start + size], own, group))
    return found


def _piece_by_piece(
    model: SimSiam, views: Sequence[Tensor], *, size: int, autocast: AbstractContextManager[None]
) -> Step:
    steps = []
    images = len(views[0])
    for start in range(0, images, size):
        part = [view[start : start + size] for view in views]
        with autocast:
            step: Step = model(part)
        (step.total * (len(part[0]) / images)).backward()  # type: ignore[no-untyped-call]
        steps.append((step, len(part[0]) / images))
    total = torch.stack([step.total.detach() * share for step, share in steps]).sum()
    return replace(
        steps[0][0],
        total=total,
        parts={"total": total},
        features=torch.cat([step.features for step, _ in steps]),
        outputs=torch.cat([step.outputs for step, _ in steps]),
    )


def _generators(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_generators(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def norm_of(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Give the common norm of some parameters' gradients."""
    return torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
