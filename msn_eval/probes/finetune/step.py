"""Finetune step: how one step changes the weights, on any number of ranks, in parts as small as memory asks for."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler
from torch import Tensor

from msn_eval.config.recipes import Finetune
from msn_eval.distributed.group import Group, share, sum_over_ranks
from msn_eval.errors import NumericalError, ResourceError
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, is_out_of_memory
from msn_eval.features.encoder import Precision
from msn_eval.probes.finetune.data import Mixing, Order, path_draws
from msn_eval.probes.finetune.model import FinetuneModel
from msn_eval.probes.finetune.predict import Labelled, Pace, logits_of
from msn_eval.probes.training_state import StateFiles
from msn_eval.process import StopRequest

_log = logging.getLogger(__name__)
_SHOWN = 5


@dataclass(kw_only=True)
class Run:
    """A fine-tuning under way: what changes from step to step."""

    trainee: FinetuneModel
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    part: int
    step: int = 0
    loss: tuple[float, int] = (0.0, 0)
    saved_at: float = field(default_factory=time.monotonic)
    refused_step: int | None = None  # at which the disk first refused a state, until one was written


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a fine-tuning has from its first step to its last."""

    probe: Finetune
    labelled: Labelled
    order: Order
    precision: Precision
    group: Group
    pace: Pace
    states: StateFiles | None

    @property
    def steps_an_epoch(self) -> int:
        return max(1, -(-self.labelled.labels.numel() // self.order.batch))


def own_rows(setup: Setup) -> range:
    """Give the rows of each batch that this rank takes, whole pairs but for a last odd one."""
    return share(setup.order.batch, setup.group, block=2)


def take_step(setup: Setup, run: Run, pixels: Tensor, stop: StopRequest) -> bool:
    """Change the weights by one step; tell whether some rank was asked to stop."""
    run.schedule.step_update(run.step)
    loss = _gradients(setup, run, pixels)
    parameters = list(run.trainee.trained.values())
    for one in parameters:
        if one.grad is None:  # this rank has no images in this step
            one.grad = torch.zeros_like(one)
    told = torch.stack([loss, loss.new_tensor(float(stop.number is not None))])
    sum_over_ranks(setup.group, [*(one.grad for one in parameters if one.grad is not None), told])
    norm = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    loss_value, stops = (float(one) for one in told.tolist())
    length = float(norm)
    if not (torch.isfinite(told).all() and torch.isfinite(norm)):
        raise _not_finite(setup, run, loss_value, length)
    if setup.probe.recipe.clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, setup.probe.recipe.clip, norm)
    run.optimizer.step()
    if run.step % setup.steps_an_epoch == 0:
        run.loss = 0.0, 0
    run.loss = run.loss[0] + loss_value, run.loss[1] + 1
    run.step += 1
    return stops > 0


def _gradients(setup: Setup, run: Run, pixels: Tensor) -> Tensor:
    """Put the gradients of this rank's share of a step into the weights; give its share of the mean loss.

    Where memory is short, in smaller parts; what a part that failed has added is taken back first.
    """
    while True:
        run.optimizer.zero_grad(set_to_none=True)
        try:
            return _accumulated(setup, run, pixels)
        except OUT_OF_MEMORY_ERRORS as error:
            if not is_out_of_memory(error):
                raise
            shortage = str(error).partition("\n")[0]
        # Outside of the except block: there the failed attempt's frames, and their tensors with them, would live on.
        device = run.trainee.encoder.device
        run.part = min(run.part, len(pixels))
        if run.part <= 2:
            raise ResourceError(
                f"memory of {device} is too small to train on two images at once: {shortage}",
                hint="Train fewer blocks (finetune.blocks), or use --precision bf16 or another --device.",
            )
        run.part = max(2, run.part // 2 - run.part // 2 % 2)
        _log.warning("out of memory on %s; going on with %d images at once", device, run.part)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _accumulated(setup: Setup, run: Run, pixels: Tensor) -> Tensor:
    probe, order, trainee = setup.probe, setup.order, run.trainee
    device = trainee.encoder.device
    rows = own_rows(setup)
    mix = Mixing(recipe=probe.recipe, n_classes=trainee.head.out_features, seed=probe.seed)
    draws = path_draws(run.step, batch=order.batch, paths=len(trainee.paths), seed=probe.seed)
    labels = setup.labelled.labels[
        torch.tensor([number for _, number in order.items(run.step, rows)], dtype=torch.int64)
    ]
    total = torch.zeros((), device=device)
    loss_of = SoftTargetCrossEntropy()
    for first in range(0, len(rows), run.part):
        some = slice(first, min(first + run.part, len(rows)))
        images, targets = mix(
            pixels[some].to(device, trainee.head.weight.dtype, copy=True, non_blocking=True),
            labels[some].to(device),
            run.step,
        )
        with _paths_drawn(trainee, draws[rows.start + some.start : rows.start + some.stop].to(device)):
            logits = logits_of(trainee, images, setup.precision)
            loss = loss_of(logits, targets) * (len(images) / order.batch)
            loss.backward()
        total += loss.detach()
    return total


@contextmanager
def _paths_drawn(trainee: FinetuneModel, draws: Tensor) -> Iterator[None]:
    for column, path in enumerate(trainee.paths):
        path.draws = draws[:, column]
    try:
        yield
    finally:
        for path in trainee.paths:
            path.draws = None


def _not_finite(setup: Setup, run: Run, loss: float, length: float) -> NumericalError:
    items = setup.order.items(run.step, range(setup.order.batch))
    names = ", ".join(setup.labelled.images.ids[number] for _, number in items[:_SHOWN])
    what = f"the loss is {loss:g}" if loss != loss or abs(loss) == float("inf") else f"the gradient is {length:g} long"
    hint = "Use a smaller finetune.learning_rate or a longer warm-up"
    return NumericalError(
        f"fine-tuning: {what} at step {run.step + 1} of {setup.order.steps} (images {names}, …)",
        hint=f"{hint}, or --precision fp32." if setup.precision != "fp32" else f"{hint}.",
    )
