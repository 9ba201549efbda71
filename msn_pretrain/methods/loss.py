"""Losses of MSN and SimSiam.

On several ranks each rank passes its share of the rows, and the values are those of the global batch, on every rank. Gradients
of anchors and weights are scaled so that their mean over ranks, as DistributedDataParallel computes it, is the gradient of the
global batch. The gradient of the prototypes already is that gradient on each rank.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from msn_eval.distributed.collective import all_reduce_max, all_reduce_sum, average_gradient
from msn_eval.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class MSNLoss:
    """MSN's loss and its parts, scalars of the global batch.

    Attributes:
        total: cross_entropy + me_max_weight * me_max + entropy_weight * entropy.
        cross_entropy: Mean over anchors of H(target, prediction).
        me_max: KL divergence of the mean prediction from the prior; for the uniform prior log k - H(mean prediction).
        entropy: Mean over anchors of H(prediction).
        targets: (b, k), the targets of this rank's anchors, without gradient.
    """

    total: Tensor
    cross_entropy: Tensor
    me_max: Tensor
    entropy: Tensor
    targets: Tensor

    def detached_parts(self) -> dict[str, Tensor]:
        """Return the total and its parts by name, without gradient."""
        return {name: getattr(self, name).detach() for name in ("total", "cross_entropy", "me_max", "entropy")}


def msn_loss(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    sharpening: float = 0.25,
    sinkhorn_iterations: int = 3,
    me_max_weight: float = 1.0,
    entropy_weight: float = 0.0,
    log_prior: Tensor | None = None,
) -> MSNLoss:
    """Compute the loss of anchor views against the sharpened, balanced assignments of their target views.

    All inputs are L2-normalised first. Half precision is computed in float32; float64 stays float64.

    Args:
        anchors: (views * b, d), view-major: the b rows of the first view, then those of the second.
        targets: (b, d); receives no gradient.
        prototypes: (k, d).
        temperature: Of the anchors' softmax, above 0.
        sharpening: T of the targets, above 0; see `sharpen`.
        sinkhorn_iterations: See `sinkhorn`; 0 for none.
        me_max_weight: Weight of the mean-entropy term.
        entropy_weight: Weight of the entropy of the predictions.
        log_prior: (k,), logarithm of the distribution that the mean prediction should match; None means uniform.

    Raises:
        UsageError: Shapes do not fit, or a value is out of range.

    Source: arXiv:2204.07141, section 3 and appendix A.1; github.com/facebookresearch/msn, src/losses.py. The prior is that of
    PMSN, arXiv:2210.07277.
    """
    _check(anchors, targets, prototypes, temperature=temperature, sharpening=sharpening, iterations=sinkhorn_iterations)
    prior = make_log_prior("uniform", len(prototypes)) if log_prior is None else log_prior
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, prototypes = _to_float(anchors), _to_float(prototypes)
        assignments = target_assignments(
            targets, prototypes, temperature=temperature, sharpening=sharpening, sinkhorn_iterations=sinkhorn_iterations
        )
        log_predicted = log_predictions(anchors, average_gradient(prototypes), temperature=temperature)
        # View-major anchors: each view's b rows are compared with the same b targets.
        log_by_view = log_predicted.view(-1, *assignments.shape)
        sums = torch.stack(
            [
                -(assignments.to(log_by_view.dtype) * log_by_view).sum(),
                -(log_predicted.exp() * log_predicted).sum(),
                log_predicted.new_full((), float(len(anchors))),
            ]
        )
        cross_entropy, entropy, n_rows = all_reduce_sum(sums)
        log_mean = log_mean_of_all_ranks(log_predicted, n_rows=n_rows.detach())
        # KL(mean prediction || prior). With the uniform prior this is log k - H(mean prediction), the me-max term.
        me_max = (log_mean.exp() * (log_mean - prior.to(log_mean))).sum()
        cross_entropy, entropy = cross_entropy / n_rows.detach(), entropy / n_rows.detach()
    return MSNLoss(
        total=cross_entropy + me_max_weight * me_max + entropy_weight * entropy,
        cross_entropy=cross_entropy,
        me_max=me_max,
        entropy=entropy,
        targets=assignments,
    )


@torch.no_grad()
def target_assignments(
    targets: Tensor, prototypes: Tensor, *, temperature: float, sharpening: float, sinkhorn_iterations: int
) -> Tensor:
    """Compute what anchors are to predict: the assignments of targets, sharpened, then balanced.

    Computed in float64: cosines are divided by 0.025, and the matrix is small.

    Returns:
        (b, k) in the dtype of `targets`, at least float32.
    """
    log_assignments = log_predictions(targets.double(), prototypes.double(), temperature=temperature)
    log_assignments = sharpen(log_assignments, sharpening=sharpening)
    return balance(log_assignments, iterations=sinkhorn_iterations).exp().to(_to_float(targets).dtype)


def simsiam_loss(p1: Tensor, z2: Tensor, p2: Tensor, z1: Tensor) -> Tensor:
    """Compute SimSiam's symmetric negative cosine similarity: each view's prediction with the other view's projection.

    Args:
        p1: (b, d), prediction of the first view.
        z2: (b, d), projection of the second view; detached here.
        p2: (b, d), prediction of the second view.
        z1: (b, d), projection of the first view; detached here.

    Returns:
        Scalar in [-1, 1] of the global batch.

    Raises:
        UsageError: Shapes differ.

    Source: arXiv:2011.10566, equation 2.
    """
    if not (p1.dim() == 2 and p1.shape == z2.shape == p2.shape == z1.shape):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (p1, z2, p2, z1))
        raise UsageError(f"predictions and projections have the shapes {shapes}", hint="Pass four of one shape (b, d).")
    with torch.autocast(p1.device.type, enabled=False):
        p1, z2, p2, z1 = (_to_float(tensor) for tensor in (p1, z2, p2, z1))
        first = functional.cosine_similarity(p1, z2.detach(), dim=1)
        second = functional.cosine_similarity(p2, z1.detach(), dim=1)
        sums = torch.stack([first.sum() + second.sum(), first.new_full((), 2.0 * len(first))])
        cosines, count = all_reduce_sum(sums)
    return cast(Tensor, -cosines / count.detach())


def _to_float(values: Tensor) -> Tensor:
    """Return float64 as it is, everything else as float32."""
    return values if values.dtype == torch.float64 else values.float()


def _check(
    anchors: Tensor, targets: Tensor, prototypes: Tensor, *, temperature: float, sharpening: float, iterations: int
) -> None:
    shapes = tuple(tuple(tensor.shape) for tensor in (anchors, targets, prototypes))
    fits = all(len(shape) == 2 for shape in shapes) and len({shape[1] for shape in shapes}) == 1
    if not fits or not len(targets) or not len(anchors) or len(anchors) % len(targets):
        what = f"anchors {shapes[0]}, targets {shapes[1]} and prototypes {shapes[2]} do not fit"
        raise UsageError(what, hint="Pass (views * b, d), (b, d) and (k, d).")
    if not (temperature > 0 and sharpening > 0 and iterations >= 0):
        what = f"temperature {temperature}, sharpening {sharpening} or {iterations} Sinkhorn iterations is out of range"
        raise UsageError(what, hint="Temperature and sharpening must be above 0, the number of iterations at least 0.")


def log_predictions(representations: Tensor, prototypes: Tensor, *, temperature: float) -> Tensor:
    """Compute the log-softmax of the cosine similarities with the prototypes, divided by `temperature`.

    Args:
        representations: (n, d).
        prototypes: (k, d).
        temperature: Above 0.

    Returns:
        (n, k); the exponentials of each row sum to 1.

    Source: arXiv:2204.07141, section 3.
    """
    cosines = functional.normalize(representations, dim=1) @ functional.normalize(prototypes, dim=1).T
    return (cosines / temperature).log_softmax(dim=1)


def sharpen(log_assignments: Tensor, *, sharpening: float) -> Tensor:
    """Raise assignments to the power 1 / `sharpening` and normalise their rows, in logarithms.

    A softmax at temperature T becomes the softmax at T * `sharpening`. So the paper's two temperatures (0.1 for anchors, 0.025
    for targets) and the release's power of 1 / 0.25 are one formula.

    Args:
        log_assignments: (n, k).
        sharpening: Above 0.

    Returns:
        (n, k).
    """
    return (log_assignments / sharpening).log_softmax(dim=1)


def sinkhorn(assignments: Tensor, iterations: int = 3) -> Tensor:
    """Balance assignments: alternately normalise columns, so that prototypes share the global batch equally, and rows.

    A prototype to which no row of any rank is assigned stays unused.

    Args:
        assignments: (n, k) probabilities of this rank's rows. Sums over rows include the rows of all ranks.
        iterations: Number of iterations.

    Returns:
        (n, k) in the same dtype; rows sum to 1 after at least one iteration.

    Source: Cuturi 2013, arXiv:1306.0895, in the form of the MSN release (src/losses.py, distributed_sinkhorn).
    """
    return balance(assignments.detach().log(), iterations=iterations).exp()


@torch.no_grad()
def balance(log_assignments: Tensor, *, iterations: int) -> Tensor:
    """Compute `sinkhorn` from logarithms to logarithms, (n, k)."""
    for _ in range(iterations):
        # The usual factors 1/k and 1/n cancel when rows are normalised.
        log_assignments = log_assignments - _zero_if_infinite(_log_mass(log_assignments))
        log_assignments = log_assignments - log_assignments.logsumexp(dim=1, keepdim=True)
    return log_assignments


def log_mean_of_all_ranks(log_assignments: Tensor, *, n_rows: Tensor | float) -> Tensor:
    """Compute the logarithm of the mean assignment over the `n_rows` rows of all ranks, (k,), with gradient."""
    return _log_mass(log_assignments) - torch.as_tensor(n_rows, dtype=log_assignments.dtype).log()


def make_log_prior(name: str, n_prototypes: int, *, exponent: float = 0.25) -> Tensor:
    """Return the logarithm of the share of images that each prototype should get.

    Args:
        name: `uniform`, or `power_law`: prototype i of 1, 2, … gets a share proportional to i ** -exponent.
        n_prototypes: k.
        exponent: Of the power law.

    Returns:
        (k,) float64.

    Source: arXiv:2210.07277, which pre-trains with a power law if classes are not equally frequent.
    """
    weights = torch.zeros(n_prototypes, dtype=torch.float64)
    if name == "power_law":
        weights = -exponent * torch.arange(1, n_prototypes + 1, dtype=torch.float64).log()
    return weights.log_softmax(dim=0)


def _log_mass(log_assignments: Tensor) -> Tensor:
    """Compute the logarithm of the sum over the rows of all ranks, (k,)."""
    # log-sum-exp over ranks: subtracting the largest value of all ranks keeps exp() in range.
    largest = _zero_if_infinite(all_reduce_max(log_assignments.amax(dim=0)))
    return largest + all_reduce_sum((log_assignments - largest).exp().sum(dim=0)).log()


def _zero_if_infinite(logarithms: Tensor) -> Tensor:
    """Replace log(0) by 0, so that a column without mass stays without mass instead of becoming NaN."""
    return torch.where(logarithms == -torch.inf, 0.0, logarithms)
