"""Linear layers by stochastic gradient descent on frozen features, any number of them in one pass over the rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from msn_eval.errors import NumericalError

MOMENTUM = 0.9


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
        lambda some: values[some],
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
    """Minimise mean softmax cross-entropy by SGD with Nesterov momentum, from zero, for every recipe at once.

    take:      gives the rows of some places, (b, d) float32, as the protocol prepares them: all need not be in memory
    labels:    (n,) int64 in [0, n_classes)
    generator: on the CPU; draws the order of every epoch, the same for all heads and on every device
    All heads see the same batches and share one product a batch; none depends on the others, one that diverges neither.
    The steps are those of torch.optim.SGD(nesterov=True); an epoch's last batch may be short, and counts by its own mean.
    Source: the linear evaluation of arXiv:2204.07141, section A.3: SGD, Nesterov momentum 0.9, cosine, no warm-up.
    """
    n, first = len(labels), take(labels.new_zeros(1))
    rate = first.new_tensor([one.learning_rate for one in recipes])[:, None, None]
    decay = first.new_tensor([one.weight_decay for one in recipes])[:, None, None]
    weights = first.new_zeros(len(recipes), n_classes, first.shape[1])
    biases = first.new_zeros(len(recipes), n_classes)
    speed, bias_speed = torch.zeros_like(weights), torch.zeros_like(biases)
    steps, step = epochs * -(-n // batch_size), 0
    losses = torch.zeros(len(recipes), dtype=torch.float64, device=first.device)
    for _ in range(epochs):
        losses.zero_()
        order = torch.randperm(n, generator=generator).to(labels.device)
        for some in torch.split(order, batch_size):
            batch = take(some)
            residual, loss = _residual(batch, labels[some], weights, biases)
            losses += loss.to(torch.float64) * (len(some) / n)
            gradient = torch.tensordot(residual, batch, dims=([0], [0])) + decay * weights
            bias_gradient = residual.sum(dim=0)
            share = (1 + math.cos(math.pi * step / steps)) / 2
            speed.mul_(MOMENTUM).add_(gradient)
            bias_speed.mul_(MOMENTUM).add_(bias_gradient)
            weights -= share * rate * (gradient + MOMENTUM * speed)
            biases -= share * rate[:, :, 0] * (bias_gradient + MOMENTUM * bias_speed)
            step += 1
    return Heads(weights=weights, biases=biases, losses=losses)


def _residual(batch: Tensor, labels: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
    """Give the derivative of each head's mean loss by its logits, (b, h, n_classes), and the losses, (h,)."""
    logits = torch.tensordot(batch, weights, dims=([1], [2])) + biases
    logs = logits.log_softmax(dim=2)
    own = labels[:, None, None].expand(-1, logits.shape[1], 1)
    loss = -logs.gather(2, own)[:, :, 0].mean(dim=0)
    residual = logs.exp()
    residual.scatter_add_(2, own, residual.new_full(own.shape, -1.0))
    return residual / len(batch), loss
