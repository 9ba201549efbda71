"""Loss and gradients of one step, in one pass or in micro-batches.

MSN's gradients in micro-batches are still those of the complete batch. Every image goes through the encoder twice: first without
gradient, so that head, BatchNorm, Sinkhorn and mean entropy see all images at once, then with the gradient of its features.
SimSiam's encoder has BatchNorm of its own, which only ever sees a micro-batch.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn

from msn_eval.distributed.collective import is_sharded
from msn_pretrain.methods.msn import MSN, Step
from msn_pretrain.methods.simsiam import SimSiam

Model = MSN | SimSiam
Mark = Callable[[str], None]  # called with `forward` and `backward` as they begin


def ignore_mark(name: str) -> None:
    """Do nothing: the default of whatever times the parts of a step."""


def compute_gradients(
    model: Model,
    views: Sequence[Tensor],
    kept: Tensor | None,
    *,
    sharpening: float,
    micro_batch: int,
    autocast: AbstractContextManager[None],
    mark: Mark = ignore_mark,
) -> Step:
    """Compute the loss of one step and add its gradients to those of the model.

    Args:
        model: MSN or SimSiam.
        views: Each (b, 3, S, S), normalised.
        kept: Patches that the masked anchor views keep.
        sharpening: T of the targets.
        micro_batch: Images per pass, 0 for all of them.
        autocast: Context of all forward passes.
        mark: See `Mark`.
    """
    images = len(views[0])
    if micro_batch in (0, images) or micro_batch > images:
        with autocast:
            step: Step = model(views, kept=kept, sharpening=sharpening)
        mark("backward")
        step.total.backward()  # type: ignore[no-untyped-call]
        return step
    if isinstance(model, MSN):
        return _backward_in_two_passes(
            model, views, kept, sharpening=sharpening, size=micro_batch, autocast=autocast, mark=mark
        )
    return _backward_per_micro_batch(model, views, size=micro_batch, autocast=autocast, mark=mark)


def _backward_in_two_passes(
    model: MSN,
    views: Sequence[Tensor],
    kept: Tensor | None,
    *,
    sharpening: float,
    size: int,
    autocast: AbstractContextManager[None],
    mark: Mark,
) -> Step:
    device = views[0].device
    micro_batches = _split_anchor_views(model, views[1:], kept, size)
    states: list[_GeneratorState] = []  # before each first forward pass
    first_pass: list[Tensor] = []
    with torch.no_grad(), autocast:
        target_features = torch.cat([model.target.trunk(images) for images in torch.split(views[0], size)])
        targets = model.target.head(target_features)
        for images, own_kept, _ in micro_batches:
            states.append(_get_generator_state(device))
            first_pass.append(model.anchor.trunk(images, own_kept))
    features = [output.detach().requires_grad_() for output in first_pass]
    with autocast:
        by_group = groupby(zip(micro_batches, features, strict=True), key=lambda pair: pair[0][2])
        anchors = [model.anchor.head(torch.cat([feature for _, feature in group])) for _, group in by_group]
        loss = model.compute_loss(torch.cat(anchors), targets, sharpening=sharpening)
    mark("backward")
    loss.total.backward()  # type: ignore[no-untyped-call]
    state_after = _get_generator_state(device)
    for (images, own_kept, _), state, feature in zip(micro_batches, states, features, strict=True):
        _set_generator_state(state, device)  # the second pass must draw the same stochastic depth as the first
        mark("forward")
        with autocast:
            second_pass = model.anchor.trunk(images, own_kept)
        mark("backward")
        second_pass.backward(feature.grad)
    _set_generator_state(state_after, device)
    return Step(
        total=loss.total, parts=loss.detached_parts(), features=target_features, outputs=targets, targets=loss.targets
    )


def _split_anchor_views(
    model: MSN, views: Sequence[Tensor], kept: Tensor | None, size: int
) -> list[tuple[Tensor, Tensor | None, tuple[bool, int]]]:
    """Return the images, the kept patches and the group of each micro-batch.

    The group is whether the view is masked, and its size: views of one group share BatchNorm statistics in the head.
    """
    micro_batches = []
    for number, view in enumerate(views):
        is_random = number < model.random_views
        for start in range(0, len(view), size):
            images = view[start : start + size]
            own_kept = kept if is_random else None
            if own_kept is not None and own_kept.dim() == 2:
                first = number * len(view) + start
                own_kept = own_kept[first : first + len(images)]
            micro_batches.append((images, own_kept, (is_random, view.shape[-1])))
    return micro_batches


def _backward_per_micro_batch(
    model: SimSiam, views: Sequence[Tensor], *, size: int, autocast: AbstractContextManager[None], mark: Mark
) -> Step:
    steps = []
    images = len(views[0])
    for start in range(0, images, size):
        micro_batch = [view[start : start + size] for view in views]
        share = len(micro_batch[0]) / images
        mark("forward")
        with autocast:
            step: Step = model(micro_batch)
        mark("backward")
        (step.total * share).backward()  # type: ignore[no-untyped-call]
        steps.append((step, share))
    total = torch.stack([step.total.detach() * share for step, share in steps]).sum()
    return replace(
        steps[0][0],
        total=total,
        parts={"total": total},
        features=torch.cat([step.features for step, _ in steps]),
        outputs=torch.cat([step.outputs for step, _ in steps]),
    )


_GeneratorState = tuple[Tensor, Tensor | None]


def _get_generator_state(device: torch.device) -> _GeneratorState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_generator_state(state: _GeneratorState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Compute the common L2 norm of the gradients of some parameters, a scalar."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [[gradient for gradient in gradients if is_sharded(gradient) == sharded] for sharded in (False, True)]
    norms = [torch.nn.utils.get_total_norm(part) for part in parts if part]
    if len(parts[1]) == 0:
        return norms[0] if norms else torch.tensor(0.0)
    complete = [cast(Tensor, norm.full_tensor()) if is_sharded(norm) else norm for norm in norms]  # type: ignore[attr-defined]
    return cast(Tensor, torch.linalg.vector_norm(torch.stack(complete)))


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale the gradients of some parameters, whose common norm is `norm`, to a norm of at most `limit`."""
    for sharded in (False, True):
        part = [parameter for parameter in parameters if is_sharded(parameter) == sharded]
        torch.nn.utils.clip_grads_with_norm_(part, limit, norm)
