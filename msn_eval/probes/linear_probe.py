"""Linear layers by stochastic gradient descent on frozen features, any number of them in one pass over the rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from msn_eval.errors import NumericalError

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
            f"the linear layer diverged at learning rate {lost[0].learning_rate:g}", remedy="Use a smaller one."
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
