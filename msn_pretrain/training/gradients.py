"""Loss and gradients of one step, in one pass or in micro-batches.

MSN's gradients in micro-batches are still those of the complete batch. Every image goes through the encoder twice: first without
gradient, so that head, BatchNorm, Sinkhorn and mean entropy see all images at once, then with the gradient of its features.
SimSiam's encoder has BatchNorm of its own, which only ever sees a micro-batch.
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
    """Compute the loss of one step and add its gradients to those of the model.

    Args:
        model: MSN or SimSiam.
        views: Each (b, 3, S, S), normalised.
        kept: Patches that the masked anchor views keep.
        sharpening: T of the targets.
        micro_batch: Images per pass, 0 for all of them.
        autocast: Context of all forward passes.
    """
    images = len(views[0])
    if micro_batch in (0, images) or micro_batch > images:
        with autocast:
            step: Step = model(views, kept=kept, sharpening=sharpening)
        step.total.backward()  # type: ignore[no-untyped-call]
        return step
    if isinstance(model, MSN):
        return _backward_in_two_passes(model, views, kept, sharpening=sharpening, size=micro_batch, autocast=autocast)
    return _backward_per_micro_batch(model, views, size=micro_batch, autocast=autocast)


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    """A part of one anchor view.

    Attributes:
        images: (b, 3, S, S).
        kept: Patches that it keeps.
        group: Whether the view is masked, and its size. Views of one group share BatchNorm statistics in the head.
        state: Of torch's random generators before its first forward pass.
    """

    images: Tensor
    kept: Tensor | None
    group: tuple[bool, int]
    state: tuple[Tensor, Tensor | None]


def _backward_in_two_passes(
    model: MSN,
    views: Sequence[Tensor],
    kept: Tensor | None,
    *,
    sharpening: float,
    size: int,
    autocast: AbstractContextManager[None],
) -> Step:
    parts: list[_MicroBatch] = []
    first_pass: list[Tensor] = []
    with torch.no_grad(), autocast:
        target_features = torch.cat([model.target.trunk(part) for part in torch.split(views[0], size)])
        targets = model.target.head(target_features)
        for images, own, group in _micro_batches(model, views[1:], kept, size):
            parts.append(_MicroBatch(images=images, kept=own, group=group, state=_generator_state(images.device)))
            first_pass.append(model.anchor.trunk(images, own))
    features = [output.detach().requires_grad_() for output in first_pass]
    with autocast:
        by_group = groupby(zip(parts, features, strict=True), key=lambda pair: pair[0].group)
        anchors = [model.anchor.head(torch.cat([feature for _, feature in group])) for _, group in by_group]
        loss = model.compute_loss(torch.cat(anchors), targets, sharpening=sharpening)
    loss.total.backward()  # type: ignore[no-untyped-call]
    state_after = _generator_state(views[0].device)
    for part, feature in zip(parts, features, strict=True):
        # The second pass must draw the same stochastic depth as the first.
        _set_generator_state(part.state, part.images.device)
        with autocast:
            second_pass = model.anchor.trunk(part.images, part.kept)
        second_pass.backward(feature.grad)
    _set_generator_state(state_after, views[0].device)
    values = {name: getattr(loss, name).detach() for name in ("total", "cross_entropy", "me_max", "entropy")}
    return Step(total=loss.total, parts=values, features=target_features, outputs=targets, targets=loss.targets)


def _micro_batches(
    model: MSN, views: Sequence[Tensor], kept: Tensor | None, size: int
) -> list[tuple[Tensor, Tensor | None, tuple[bool, int]]]:
    micro_batches = []
    for number, view in enumerate(views):
        masked = number < model.random_views and kept is not None
        for start in range(0, len(view), size):
            own = None
            if masked and kept is not None:
                first = number * len(view) + start
                own = kept if kept.dim() == 1 else kept[first : first + min(size, len(view) - start)]
            group = (number < model.random_views, view.shape[-1])
            micro_batches.append((view[start : start + size], own, group))
    return micro_batches


def _backward_per_micro_batch(
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


def _generator_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_generator_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Compute the common L2 norm of the gradients of some parameters, a scalar."""
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
