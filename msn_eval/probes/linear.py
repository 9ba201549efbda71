"""A linear layer by SGD on cached features, its learning rate and weight decay chosen on held-out labelled images."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import Tensor

from msn_eval.config.recipes import LinearRecipe, Params
from msn_eval.errors import NumericalError
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FittedProbe, ProbeConfig, centred_rows

MOMENTUM = 0.9
_SMALLEST = 1e-30


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one head is trained.

    learning_rate: > 0, at the first step; falls to 0 along a cosine over all steps
    weight_decay:  >= 0, on the weights; the bias is left alone
    """

    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Trained heads: scores of head i are rows @ weights[i].T + biases[i].

    weights: (h, n_classes, d) float32; biases: (h, n_classes) float32
    losses:  (h,) float64, mean cross-entropy over the last epoch, as the batches came
    """

    weights: Tensor
    biases: Tensor
    losses: Tensor

    @cached_property
    def diverged(self) -> tuple[bool, ...]:
        """Tell of each head whether it left the finite numbers."""
        finite = self.weights.isfinite().all(dim=(1, 2)) & self.biases.isfinite().all(dim=1) & self.losses.isfinite()
        return tuple(not one for one in finite.tolist())


def train_heads(
    rows: Tensor,
    labels: Tensor,
    recipes: Sequence[Recipe],
    *,
    n_classes: int,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> Heads:
    """Train as `train_grid` does, on rows as they are, heads that all must come out finite.

    rows: (n, d) floating, as the protocol prepares them; taken in float32
    Raises NumericalError where a head diverges.
    """
    values = rows.to(torch.float32)
    heads = train_grid(
        lambda some: values[some][None],
        labels,
        recipes,
        n_classes=n_classes,
        epochs=epochs,
        batch_size=batch_size,
        generator=generator,
    )
    refuse_divergence(heads, recipes)
    return heads


def refuse_divergence(heads: Heads, recipes: Sequence[Recipe]) -> None:
    """Raise NumericalError naming the first head that diverged, if one did."""
    lost = [one for one, gone in zip(recipes, heads.diverged, strict=True) if gone]
    if lost:
        raise NumericalError(
            f"the linear layer diverged at learning rate {lost[0].learning_rate:g}", hint="Use a smaller one."
        )


def train_grid(
    take: Callable[[Tensor], Tensor],
    labels: Tensor,
    recipes: Sequence[Recipe],
    *,
    n_classes: int,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> Heads:
    """Minimise mean softmax cross-entropy by SGD with Nesterov momentum, from zero, for every tap and recipe at once.

    take:      gives the rows of some places at each of t taps of one width, (t, b, d) float32, as the protocol prepares them:
               all need not be in memory
    labels:    (n,) int64 in [0, n_classes)
    recipes:   of the heads of one tap, the same for each
    generator: on the CPU; draws the order of every epoch, the same for all heads and on every device
    returns:   the heads tap by tap, of each recipe by recipe
    All heads see the same batches and share one batched product a step; none depends on the others, one that diverges neither.
    The steps are those of torch.optim.SGD(nesterov=True); an epoch's last batch may be short, and counts by its own mean.
    Source: the linear evaluation of arXiv:2204.07141, section A.3: SGD, Nesterov momentum 0.9, cosine, no warm-up.
    """
    n, first = len(labels), take(labels.new_zeros(1))
    h, (t, _, d) = len(recipes), first.shape
    # One row a layer and class; buffers are made once, since large ones are given back to the system at every step.
    weights, biases = first.new_zeros(t, h * n_classes, d), first.new_zeros(t, 1, h * n_classes)
    speed, bias_speed, gradient = torch.zeros_like(weights), torch.zeros_like(biases), torch.empty_like(weights)
    scores = first.new_empty(t * min(batch_size, n) * h * n_classes)
    rate, decay = (
        first.new_tensor(column).repeat_interleave(n_classes)
        for column in ([one.learning_rate for one in recipes], [one.weight_decay for one in recipes])
    )
    steps, step = epochs * -(-n // batch_size), 0
    losses = torch.zeros(t, h, dtype=torch.float64, device=first.device)
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator).to(labels.device)
        for some in torch.split(order, batch_size):
            batch, b = take(some), len(some)
            logits = scores[: t * b * h * n_classes].view(t, b, h * n_classes)
            torch.baddbmm(biases, batch, weights.mT, out=logits)
            residual = logits.view(t, b, h, n_classes)
            if epoch == epochs - 1:
                losses += _losses(residual, labels[some]) * (b / n)
            # In its place: a second buffer would push the first out of the cache.
            torch.softmax(residual, dim=3, out=residual)
            # What a float32 holds only as a denormal number moves no weight, and makes a product ten times as slow.
            torch.threshold_(residual, _SMALLEST, 0.0)
            residual[:, torch.arange(b, device=labels.device), :, labels[some]] -= 1
            torch.bmm(logits.mT, batch / b, out=gradient).addcmul_(decay[:, None], weights)
            bias_gradient = logits.sum(dim=1, keepdim=True) / b
            share = (1 + math.cos(math.pi * step / steps)) / 2
            speed.mul_(MOMENTUM).add_(gradient)
            bias_speed.mul_(MOMENTUM).add_(bias_gradient)
            weights.addcmul_(rate[:, None], gradient.add_(speed, alpha=MOMENTUM), value=-share)
            biases.addcmul_(rate, bias_gradient.add_(bias_speed, alpha=MOMENTUM), value=-share)
            step += 1
    return Heads(
        weights=weights.view(t * h, n_classes, d), biases=biases.view(t * h, n_classes), losses=losses.flatten()
    )


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Give each layer's mean cross-entropy, (t, h) float64, from (t, b, h, n_classes) logits."""
    t, _, h, _ = logits.shape
    own = logits.gather(3, labels[:, None, None].expand(t, -1, h, 1))[..., 0]
    return (logits.logsumexp(dim=3) - own).mean(dim=1).to(torch.float64)


_log = logging.getLogger(__name__)
_SCORED_VALUES = 1 << 24  # scores of all heads that are held at once
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Linear(LinearRecipe):
    """A linear layer with bias on centred, normalised rows: softmax cross-entropy by SGD with Nesterov momentum.

    Every layer of the grid is trained at once, each time without another stratified tenth of the labelled images; the one
    with the best mean accuracy on these is trained anew on all. Of several taps each has the grid to itself, and the best of
    all layers is taken. The grid, the taps and the rule are the protocol, not the choice.
    Source: the linear evaluation of arXiv:2204.07141, appendix A.3, without its augmentation.
    """

    name: ClassVar[str] = "linear"
    version: ClassVar[int] = 1
    tap: ClassVar[str] = "cls"

    @property
    def grid(self) -> tuple[Recipe, ...]:
        """Give every layer of a tap, learning rate by learning rate."""
        return tuple(
            Recipe(learning_rate=rate, weight_decay=decay) for rate in self.learning_rates for decay in self.decays
        )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What held-out images say of every layer, tap by tap, and of each in the order of the grid.

    accuracies: (h,) float64, the mean over seeds of the share of held-out images that are right; -1 where it diverged
    losses:     (h,) float64, their mean cross-entropy, likewise; infinite where it diverged
    """

    accuracies: Tensor
    losses: Tensor


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The labelled images' features at taps of one width, whose layers share a product.

    taps:   where they were taken
    values: of each tap, (n, d) float32; on `device`, or in memory where that has no room for them
    """

    taps: tuple[str, ...]
    values: tuple[Tensor, ...]
    device: torch.device

    def take(self, places: Tensor) -> Tensor:
        """Give the rows of some places at every tap, as the protocol has them: (t, b, d) float32."""
        some = (one[places.to(one.device)].to(self.device) for one in self.values)
        return torch.stack([centred_rows(rows).to(torch.float32) for rows in some])

    def only(self, tap: str) -> "Stack":
        """Give one tap alone."""
        return replace(self, taps=(tap,), values=(self.values[self.taps.index(tap)],))


def stacked(offered: Sequence[Features], device: torch.device) -> tuple[Stack, ...]:
    """Put features of the same images at several taps together by their widths."""
    fit_at_once = _fit_at_once([features.values for features in offered], device)
    by_width: dict[int, list[Features]] = {}
    for features in offered:
        by_width.setdefault(features.values.shape[1], []).append(features)
    return tuple(
        Stack(
            taps=tuple(features.tap for features in alike),
            values=tuple(features.values.to(device) if fit_at_once else features.values for features in alike),
            device=device,
        )
        for alike in by_width.values()
    )


def _fit_at_once(values: Sequence[Tensor], device: torch.device) -> bool:
    """Tell whether a GPU is to hold all rows at once: they take at most half of its free memory."""
    if device.type != "cuda":
        return True
    needed = sum(one.numel() * one.element_size() for one in values)
    return 2 * needed <= torch.cuda.mem_get_info(device)[0]


def linear_settings(probe: Linear) -> tuple[Params, ...]:
    """Give the one protocol that a grid, or a single learning rate, is."""
    if probe.lr is not None:
        names: tuple[str, ...] = ("lr", "weight_decay", "epochs", "batch_size", "seed")
    else:
        rates, decays = ("lr_first", "lr_last", "lrs"), ("weight_decay_first", "weight_decay_last", "weight_decays")
        names = (*rates, *decays, "epochs", "batch_size", "seeds", "seed")
    params: dict[str, int | float | str] = {name: getattr(probe, name) for name in names}
    if probe.named_taps:
        params["taps"] = ",".join(probe.named_taps)
    return (params,)


def fit_linear(
    probe: Linear, train: Features, device: torch.device, *, elsewhere: Sequence[Features] = ()
) -> FittedProbe:
    """Choose a layer of the grid, train it on all labelled images. A class without images is never chosen.

    elsewhere: the same images at further taps, of which one is chosen too
    Raises NumericalError where no class has two images to choose by, or every layer diverges.
    """
    offered = (train, *elsewhere)
    assert all(features.image_ids == train.image_ids for features in elsewhere)
    present, labels = torch.unique(train.labels.to(device), return_inverse=True)
    n_classes = len(present)
    stacks = stacked(offered, device)
    layers = [(tap, recipe) for stack in stacks for tap in stack.taps for recipe in probe.grid]
    (tap, recipe), chosen = layers[0], None
    if len(layers) > 1:
        found = held_out_scores(probe, stacks, labels, n_classes=n_classes)
        best = best_layer(found, [recipe for _, recipe in layers])
        tap, recipe = layers[best]
        choice: dict[str, float | str] = {"tap": tap} if elsewhere else {}
        chosen = choice | {
            "lr": recipe.learning_rate,
            "weight_decay": recipe.weight_decay,
            "held_out_accuracy": float(found.accuracies[best]),
            "diverged": int((found.accuracies < 0).sum()),
        }
    alone = next(stack.only(tap) for stack in stacks if tap in stack.taps)
    heads = _trained(probe, alone.take, labels, [recipe], n_classes, probe.seed)
    refuse_divergence(heads, [recipe])
    setting = ProbeConfig(
        params=linear_settings(probe)[0],
        solver="sgd",
        objective=float(heads.losses[0]),
        iterations=probe.epochs * -(-len(labels) // probe.batch_size),
        chosen=chosen,
    )

    def scores(queries: Tensor) -> Iterator[Tensor]:
        rows = centred_rows(queries.to(device))
        whole = rows.new_full((len(rows), train.n_classes), -torch.inf)
        whole[:, present] = rows @ heads.weights[0].double().T + heads.biases[0].double()
        yield whole

    return FittedProbe(settings=(setting,), scores=scores, tap=tap)


def held_out_scores(probe: Linear, stacks: Sequence[Stack], labels: Tensor, *, n_classes: int) -> HeldOut:
    """Train every layer without a tenth of the rows, and score it on them; another tenth for every seed, the same for all.

    labels: (n,) int64 in [0, n_classes), every class present
    Raises NumericalError where no class has two rows, and where every layer diverges.
    """
    taps = [tap for stack in stacks for tap in stack.taps]
    right = torch.zeros(len(taps) * len(probe.grid), dtype=torch.float64)
    loss, gone = torch.zeros_like(right), torch.zeros(len(right), dtype=torch.bool)
    for seed in range(probe.seed, probe.seed + probe.seeds):
        held = draw_held_out(labels.cpu(), seed=seed).to(labels.device)
        if not held.any():
            raise NumericalError(
                f"linear: the {len(labels)} labelled images are one a class, and none is left over to choose by",
                hint=f"Give the one learning rate, linear.lr=3{_and_tap(taps)}, or use more labelled images.",
            )
        kept, left_out = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
        of_seed = []
        for stack in stacks:
            take = partial(_take_some, stack.take, kept)
            heads = _trained(probe, take, labels[kept], probe.grid, n_classes, seed)
            of_seed.append((*_score(heads, stack.take, labels, left_out), torch.tensor(heads.diverged)))
        hits, losses, diverged = (torch.cat(column) for column in zip(*of_seed, strict=True))
        right += hits / probe.seeds
        loss += losses / probe.seeds
        gone |= diverged
    if gone.any():
        _tell_of_divergence(probe, taps, gone)
    return HeldOut(
        accuracies=torch.where(gone, -torch.ones_like(right), right),
        losses=torch.where(gone, torch.full_like(loss, torch.inf), loss),
    )


def _and_tap(taps: Sequence[str]) -> str:
    return f", and one tap, linear.taps={taps[0]}" if len(taps) > 1 else ""


def _tell_of_divergence(probe: Linear, taps: Sequence[str], gone: Tensor) -> None:
    """Warn of the layers that diverged. Raises NumericalError where all did."""
    if gone.all():
        raise NumericalError(
            f"linear: all {len(gone)} layers diverged", hint="Use smaller ones: linear.lr_last, linear.lr_first."
        )
    names = [
        f"{one.learning_rate:g} with decay {one.weight_decay:g}{f' at {tap}' if len(taps) > 1 else ''}"
        for tap in taps
        for one in probe.grid
    ]
    lost = [name for name, diverged in zip(names, gone.tolist(), strict=True) if diverged]
    told = ", ".join(lost[:_SHOWN])
    _log.warning("linear: %d of %d layers diverged and are left out: learning rates %s", len(lost), len(gone), told)


def _take_some(take: Callable[[Tensor], Tensor], kept: Tensor, some: Tensor) -> Tensor:
    return take(kept[some])


def draw_held_out(labels: Tensor, *, seed: int) -> Tensor:
    """Draw a tenth of each class, of a class with fewer than ten rows one, and of a class with a single row none.

    returns: (n,) bool, true for the rows that are held out
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero()[:, 0]
        if len(rows) > 1:
            shuffled = rows[torch.randperm(len(rows), generator=generator)]
            held[shuffled[: max(1, len(rows) // 10)]] = True
    return held


def best_layer(found: HeldOut, grid: Sequence[Recipe]) -> int:
    """Give the place of the layer with the best accuracy; of equal ones with the smallest loss, then the smallest rate."""
    places = range(len(grid))
    return min(
        places,
        key=lambda place: (
            -round(float(found.accuracies[place]), 12),
            float(found.losses[place]),
            grid[place].learning_rate,
            place,
        ),
    )


def _trained(
    probe: Linear,
    take: Callable[[Tensor], Tensor],
    labels: Tensor,
    recipes: Sequence[Recipe],
    n_classes: int,
    seed: int,
) -> Heads:
    return train_grid(
        take,
        labels,
        recipes,
        n_classes=n_classes,
        epochs=probe.epochs,
        batch_size=probe.batch_size,
        generator=torch.Generator().manual_seed(seed),
    )


def _score(heads: Heads, take: Callable[[Tensor], Tensor], labels: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Give each head's share of right answers and mean cross-entropy on the rows at some places, (h,) float64 on the CPU."""
    h, n_classes = heads.biases.shape
    right, loss = torch.zeros(h, dtype=torch.float64), torch.zeros(h, dtype=torch.float64)
    for some in torch.split(places, max(1, _SCORED_VALUES // (h * n_classes))):
        rows = take(some)  # (t, b, d); the heads stand tap by tap
        of_taps = heads.weights.view(len(rows), -1, rows.shape[2])
        scores = torch.bmm(rows, of_taps.mT).transpose(0, 1).reshape(len(some), h, n_classes) + heads.biases
        own = labels[some][:, None]
        right += (scores.argmax(dim=2) == own).sum(dim=0).double().cpu() / len(places)
        logs = scores.log_softmax(dim=2).gather(2, own[:, :, None].expand(-1, h, -1))[:, :, 0]
        loss -= logs.sum(dim=0).double().cpu() / len(places)
    return right, loss
