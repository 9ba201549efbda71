"""A linear layer by SGD on cached features; learning rate and weight decay are chosen on held-out labelled images."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from msn_eval.config.recipes import LinearRecipe, Params
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.errors import NumericalError
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FeatureProbe, FittedProbe, ProbeConfig, WorkerGroup, centre_rows

_log = logging.getLogger(__name__)
MOMENTUM = 0.9
_SMALLEST = 1e-30
_SCORED_VALUES = 1 << 24  # scores of all heads that are in memory at once
_SHOWN = 5
_TakeRows = Callable[[Tensor], Tensor]  # from row numbers to the rows at each of t taps of one width, (t, b, d) float32


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one head is trained.

    Attributes:
        learning_rate: At the first step, > 0; falls to 0 along a cosine over all steps.
        weight_decay: Of the weights, >= 0; the bias has none.
    """

    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Linear(FeatureProbe):
    """A linear layer with bias on centred, normalised rows: softmax cross-entropy by SGD with Nesterov momentum.

    All layers of the grid are trained at once, for each seed without a different stratified tenth of the labelled images.
    The layer with the best mean accuracy on these tenths is trained again on all images. If several taps are given, each
    has the grid to itself, and the best of all layers is chosen. The grid, the taps and the rule are part of the protocol;
    the choice is not.

    Source: the linear evaluation of arXiv:2204.07141, appendix A.3, without its augmentation.
    """

    name: ClassVar[str] = "linear"
    version: ClassVar[int] = 1
    has_probabilities: ClassVar[bool] = True

    recipe: LinearRecipe = field(default_factory=LinearRecipe)

    @property
    def taps(self) -> tuple[str, ...]:
        return self.recipe.named_taps or ("cls",)

    def configs(self, n: int) -> tuple[Params, ...]:
        """Return the one protocol that a grid, or a single learning rate, is."""
        names: tuple[str, ...]
        if self.recipe.lr is not None:
            names = ("lr", "weight_decay", "epochs", "batch_size", "seed")
        else:
            rates, decays = ("lr_first", "lr_last", "lrs"), ("weight_decay_first", "weight_decay_last", "weight_decays")
            names = (*rates, *decays, "epochs", "batch_size", "seeds", "seed")
        params: dict[str, int | float | str] = {name: getattr(self.recipe, name) for name in names}
        if self.recipe.named_taps:
            params["taps"] = ",".join(self.recipe.named_taps)
        return (params,)

    def fit(
        self,
        train: Features,
        device: torch.device,
        *,
        workers: WorkerGroup | None = None,
        other_taps: Sequence[Features] = (),
    ) -> FittedProbe:
        """Choose a layer of the grid and train it on all labelled images. See `FeatureProbe.fit`.

        Raises:
            NumericalError: No class has two images to choose by, or every layer diverges.
        """
        recipe = self.recipe
        present, labels = torch.unique(train.labels.to(device), return_inverse=True)
        stacks = stack_taps((train, *other_taps), device)
        layers = [(tap, head) for stack in stacks for tap in stack.taps for head in make_grid(recipe)]
        chosen: dict[str, float | str] | None = None
        tap, head = layers[0]
        if len(layers) > 1:
            scores = score_held_out(recipe, stacks, labels, n_classes=len(present))
            best = choose_layer(scores, [head for _, head in layers])
            tap, head = layers[best]
            chosen = {"tap": tap} if other_taps else {}
            chosen |= {
                "lr": head.learning_rate,
                "weight_decay": head.weight_decay,
                "held_out_accuracy": float(scores.accuracies[best]),
                "diverged": int((scores.accuracies < 0).sum()),
            }
        take = next(stack.select_tap(tap) for stack in stacks if tap in stack.taps).take
        heads = _train(recipe, take, labels, [head], len(present), recipe.seed)
        refuse_divergence(heads, [head])
        config = ProbeConfig(
            params=self.configs(len(labels))[0],
            solver="sgd",
            objective=float(heads.losses[0]),
            iterations=recipe.epochs * -(-len(labels) // recipe.batch_size),
            chosen=chosen,
        )

        def score(queries: Tensor) -> Iterator[Tensor]:
            rows = centre_rows(queries.to(device))
            scores = rows.new_full((len(rows), train.n_classes), -torch.inf)
            scores[:, present] = rows @ heads.weights[0].double().T + heads.biases[0].double()
            yield scores

        return FittedProbe(settings=(config,), scores=score, tap=tap)


def configure(config: EvaluationConfig, subset: Subset) -> Iterator[Linear]:
    """Yield the probe with the recipe of the options."""
    yield Linear(config.linear)


def make_grid(recipe: LinearRecipe) -> tuple[Recipe, ...]:
    """Return every layer of the grid at one tap, learning rate by learning rate."""
    return tuple(
        Recipe(learning_rate=rate, weight_decay=decay) for rate in recipe.learning_rates for decay in recipe.decays
    )


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Trained heads: the scores of head i are rows @ weights[i].T + biases[i].

    Attributes:
        weights: (h, n_classes, d) float32.
        biases: (h, n_classes) float32.
        losses: (h,) float64, mean cross-entropy of the batches of the last epoch, each before its step.
    """

    weights: Tensor
    biases: Tensor
    losses: Tensor

    @cached_property
    def diverged(self) -> tuple[bool, ...]:
        """Whether each head has values that are not finite."""
        finite = self.weights.isfinite().all(dim=(1, 2)) & self.biases.isfinite().all(dim=1) & self.losses.isfinite()
        return tuple((~finite).tolist())


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
    """Train one head per recipe as `train_grid` does, on (n, d) rows as they are, in float32.

    Raises:
        NumericalError: A head diverges.
    """
    values = rows.to(torch.float32)
    heads = train_grid(
        lambda indices: values[indices][None],
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
    """Raise NumericalError that names the first head that diverged, if one did."""
    for recipe, diverged in zip(recipes, heads.diverged, strict=True):
        if diverged:
            raise NumericalError(
                f"the linear layer diverged at learning rate {recipe.learning_rate:g}", hint="Use a smaller one."
            )


def train_grid(
    take: _TakeRows,
    labels: Tensor,
    recipes: Sequence[Recipe],
    *,
    n_classes: int,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> Heads:
    """Minimise mean softmax cross-entropy by SGD with Nesterov momentum, from zero, for every tap and recipe at once.

    All heads see the same batches and share one batched product per step. None depends on the others, nor on one that
    diverges. The steps are those of torch.optim.SGD(nesterov=True). The last batch of an epoch may be smaller, and its
    gradient is its own mean.

    Args:
        take: Returns the rows of some images at each of t taps, as the probe prepares them; they need not all be in memory.
        labels: (n,) int64 in [0, n_classes).
        recipes: Of the heads of one tap, the same for each tap.
        n_classes: Number of classes.
        epochs: Passes over the rows.
        batch_size: Rows per step.
        generator: On the CPU. It draws the order of every epoch, the same for all heads and on every device.

    Returns:
        t * len(recipes) heads, tap by tap, and of each tap recipe by recipe.

    Source: the linear evaluation of arXiv:2204.07141, section A.3: SGD, Nesterov momentum 0.9, cosine, no warm-up.
    """
    n, first = len(labels), take(labels.new_zeros(1))
    h, (t, _, d) = len(recipes), first.shape
    # One row per head and class. Buffers are allocated once: large ones would return to the system after every step.
    weights, biases = first.new_zeros(t, h * n_classes, d), first.new_zeros(t, 1, h * n_classes)
    momentum, bias_momentum, gradient = torch.zeros_like(weights), torch.zeros_like(biases), torch.empty_like(weights)
    scores = first.new_empty(t * min(batch_size, n) * h * n_classes)
    rate = first.new_tensor([recipe.learning_rate for recipe in recipes]).repeat_interleave(n_classes)
    decay = first.new_tensor([recipe.weight_decay for recipe in recipes]).repeat_interleave(n_classes)
    steps, step = epochs * -(-n // batch_size), 0
    losses = torch.zeros(t, h, dtype=torch.float64, device=first.device)
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator).to(labels.device, non_blocking=True)
        for indices in torch.split(order, batch_size):
            batch, b = take(indices), len(indices)
            logits = scores[: t * b * h * n_classes].view(t, b, h * n_classes)
            torch.baddbmm(biases, batch, weights.mT, out=logits)
            residual = logits.view(t, b, h, n_classes)
            if epoch == epochs - 1:
                losses += _compute_losses(residual, labels[indices]) * (b / n)
            # In place: a second buffer would push the first out of the cache.
            torch.softmax(residual, dim=3, out=residual)
            # Denormal numbers move no weight, and make a product ten times as slow.
            torch.threshold_(residual, _SMALLEST, 0.0)
            # The gradient of cross-entropy by the logits is softmax minus one-hot.
            residual[:, torch.arange(b, device=labels.device), :, labels[indices]] -= 1
            torch.bmm(logits.mT, batch / b, out=gradient).addcmul_(decay[:, None], weights)
            bias_gradient = logits.sum(dim=1, keepdim=True) / b
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            momentum.mul_(MOMENTUM).add_(gradient)
            bias_momentum.mul_(MOMENTUM).add_(bias_gradient)
            # Nesterov: the step is along gradient + MOMENTUM * momentum.
            weights.addcmul_(rate[:, None], gradient.add_(momentum, alpha=MOMENTUM), value=-cosine)
            biases.addcmul_(rate, bias_gradient.add_(bias_momentum, alpha=MOMENTUM), value=-cosine)
            step += 1
    return Heads(
        weights=weights.view(t * h, n_classes, d), biases=biases.view(t * h, n_classes), losses=losses.flatten()
    )


def _compute_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each head's mean cross-entropy, (t, h) float64, from (t, b, h, n_classes) logits."""
    t, _, h, _ = logits.shape
    own = logits.gather(3, labels[:, None, None].expand(t, -1, h, 1))[..., 0]
    return (logits.logsumexp(dim=3) - own).mean(dim=1).to(torch.float64)


@dataclass(frozen=True, kw_only=True)
class HeldOutScores:
    """Scores of every layer on held-out images: tap by tap, and of each tap in the order of the grid.

    Attributes:
        accuracies: (h,) float64, mean over seeds; -1 for a layer that diverged.
        losses: (h,) float64, mean cross-entropy, mean over seeds; infinite for a layer that diverged.
    """

    accuracies: Tensor
    losses: Tensor


@dataclass(frozen=True, kw_only=True)
class TapStack:
    """Features of the labelled images at taps of one width, whose layers share a product.

    Attributes:
        taps: The taps.
        values: Of each tap, (n, d) float32, on `device`, or in host memory if they do not fit.
        device: Where rows are used.
    """

    taps: tuple[str, ...]
    values: tuple[Tensor, ...]
    device: torch.device

    def take(self, indices: Tensor) -> Tensor:
        """Return some rows at every tap, centred and normalised: (t, b, d) float32."""
        rows = (values[indices.to(values.device)].to(self.device) for values in self.values)
        return torch.stack([centre_rows(some).to(torch.float32) for some in rows])

    def select_tap(self, tap: str) -> "TapStack":
        """Return one tap alone."""
        return replace(self, taps=(tap,), values=(self.values[self.taps.index(tap)],))


def stack_taps(offered: Sequence[Features], device: torch.device) -> tuple[TapStack, ...]:
    """Group features of the same images at several taps by their widths.

    A GPU holds all rows at once if they take at most half of its free memory.
    """
    needed = sum(features.values.numel() * features.values.element_size() for features in offered)
    fits = device.type != "cuda" or 2 * needed <= torch.cuda.mem_get_info(device)[0]
    by_width: dict[int, list[Features]] = {}
    for features in offered:
        by_width.setdefault(features.values.shape[1], []).append(features)
    return tuple(
        TapStack(
            taps=tuple(features.tap for features in group),
            values=tuple(features.values.to(device) if fits else features.values for features in group),
            device=device,
        )
        for group in by_width.values()
    )


def score_held_out(
    recipe: LinearRecipe, stacks: Sequence[TapStack], labels: Tensor, *, n_classes: int
) -> HeldOutScores:
    """Train every layer without a tenth of the rows, and score it on them; once per seed, which draws the tenth.

    Args:
        recipe: The grid.
        stacks: The features.
        labels: (n,) int64 in [0, n_classes), every class present.
        n_classes: Number of classes.

    Raises:
        NumericalError: No class has two rows, or every layer diverges.
    """
    taps, grid = [tap for stack in stacks for tap in stack.taps], make_grid(recipe)
    accuracies = torch.zeros(len(taps) * len(grid), dtype=torch.float64)
    losses, diverged = torch.zeros_like(accuracies), torch.zeros(len(accuracies), dtype=torch.bool)
    for seed in range(recipe.seed, recipe.seed + recipe.seeds):
        held_out = draw_held_out(labels.cpu(), seed=seed).to(labels.device)
        if not held_out.any():
            one_tap = f", and one tap, linear.taps={taps[0]}" if len(taps) > 1 else ""
            raise NumericalError(
                f"linear: the {len(labels)} labelled images are one per class, and none is left over to choose by",
                hint=f"Give the one learning rate, linear.lr=3{one_tap}, or use more labelled images.",
            )
        kept, held = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
        columns = []
        for stack in stacks:
            heads = _train(recipe, _take_from(stack, kept), labels[kept], grid, n_classes, seed)
            columns.append((*_score(heads, stack, labels, held), torch.tensor(heads.diverged)))
        seed_accuracies, seed_losses, seed_diverged = (torch.cat(column) for column in zip(*columns, strict=True))
        accuracies += seed_accuracies / recipe.seeds
        losses += seed_losses / recipe.seeds
        diverged |= seed_diverged
    _report_divergence(taps, grid, diverged)
    return HeldOutScores(
        accuracies=accuracies.masked_fill(diverged, -1.0), losses=losses.masked_fill(diverged, torch.inf)
    )


def _take_from(stack: TapStack, kept: Tensor) -> _TakeRows:
    return lambda indices: stack.take(kept[indices])


def _report_divergence(taps: Sequence[str], grid: Sequence[Recipe], diverged: Tensor) -> None:
    """Warn of the layers that diverged. Raises NumericalError if all did."""
    if diverged.all():
        raise NumericalError(
            "linear: diverged at every learning rate",
            hint="Use smaller ones: linear.lr_last, linear.lr_first.",
        )
    layers = [(tap, head) for tap in taps for head in grid]
    names = [
        f"{head.learning_rate:g} with decay {head.weight_decay:g}{f' at {tap}' if len(taps) > 1 else ''}"
        for (tap, head), is_lost in zip(layers, diverged.tolist(), strict=True)
        if is_lost
    ]
    if names:
        shown = ", ".join(names[:_SHOWN])
        _log.warning(
            "linear: left out %d of %d layers, which diverged: learning rates %s", len(names), len(layers), shown
        )


def draw_held_out(labels: Tensor, *, seed: int) -> Tensor:
    """Draw a tenth of each class, at least one row of a class with two or more, none of a class with a single row.

    Returns:
        (n,) bool, true for the rows that are held out.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero()[:, 0]
        if len(rows) > 1:
            shuffled = rows[torch.randperm(len(rows), generator=generator)]
            held_out[shuffled[: max(1, len(rows) // 10)]] = True
    return held_out


def choose_layer(scores: HeldOutScores, layers: Sequence[Recipe]) -> int:
    """Return the index of the most accurate layer; of equal ones that of the smallest loss, then of the smallest rate."""
    return min(
        range(len(layers)),
        key=lambda index: (
            -round(float(scores.accuracies[index]), 12),
            float(scores.losses[index]),
            layers[index].learning_rate,
        ),
    )


def _train(
    recipe: LinearRecipe, take: _TakeRows, labels: Tensor, heads: Sequence[Recipe], n_classes: int, seed: int
) -> Heads:
    return train_grid(
        take,
        labels,
        heads,
        n_classes=n_classes,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        generator=torch.Generator().manual_seed(seed),
    )


def _score(heads: Heads, stack: TapStack, labels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each head's accuracy and mean cross-entropy on some rows, (h,) float64 on the CPU."""
    h, n_classes = heads.biases.shape
    accuracy, loss = heads.biases.new_zeros(2, h, dtype=torch.float64)
    for indices in torch.split(rows, max(1, _SCORED_VALUES // (h * n_classes))):
        values = stack.take(indices)  # (t, b, d); the heads are in the order of the taps
        by_tap = heads.weights.view(len(values), -1, values.shape[2])
        scores = torch.bmm(values, by_tap.mT).transpose(0, 1).reshape(len(indices), h, n_classes) + heads.biases
        own = labels[indices][:, None]
        accuracy += (scores.argmax(dim=2) == own).sum(dim=0).double() / len(rows)
        log_likelihood = scores.log_softmax(dim=2).gather(2, own[:, :, None].expand(-1, h, -1))[:, :, 0]
        loss -= log_likelihood.sum(dim=0).double() / len(rows)
    return accuracy.cpu(), loss.cpu()
