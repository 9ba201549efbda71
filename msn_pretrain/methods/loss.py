"""Loss: what MSN and SimSiam minimise.

On several ranks each gives its share of the rows, and values are those of the one global batch, on every rank. Gradients of
anchors and of weights are such that their mean over ranks, which DistributedDataParallel takes, is the gradient of the
global batch; that of the prototypes is so on each rank already.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from msn_eval.distributed.collective import max_over_ranks, sum_over_ranks, with_mean_gradient
from msn_eval.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class MSNLoss:
    """MSN's loss and its parts, scalars of the global batch.

    total:         cross_entropy + me_max_weight * me_max + entropy_weight * entropy
    cross_entropy: mean over anchors of H(target, prediction)
    me_max:        KL divergence of the mean prediction from the prior; for the uniform one log k - H(mean prediction)
    entropy:       mean over anchors of H(prediction)
    targets:       (b, k), what this rank's anchors were compared with, without gradient
    """

    total: Tensor
    cross_entropy: Tensor
    me_max: Tensor
    entropy: Tensor
    targets: Tensor


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
) -> MSNLoss:
    """Compare anchor views with the sharpened, balanced assignments of their target views.

    anchors:    (views * b, d), view-major: the b rows of the first view, then those of the second
    targets:    (b, d), without gradient
    prototypes: (k, d)
    All are L2-normalised here. Half precision is computed in float32, float64 stays.
    Raises UsageError for shapes that do not fit and settings out of range.
    Source: arXiv:2204.07141, section 3 and appendix A.1; github.com/facebookresearch/msn, src/losses.py.
    """
    return prior_matching_loss(
        anchors,
        targets,
        prototypes,
        logarithm_of_prior=None,
        temperature=temperature,
        sharpening=sharpening,
        sinkhorn_iterations=sinkhorn_iterations,
        me_max_weight=me_max_weight,
        entropy_weight=entropy_weight,
    )


def prior_matching_loss(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    *,
    logarithm_of_prior: Tensor | None,
    temperature: float,
    sharpening: float,
    sinkhorn_iterations: int,
    me_max_weight: float,
    entropy_weight: float,
) -> MSNLoss:
    """Do as `msn_loss`, with the mean prediction drawn to a prior instead of the uniform distribution.

    logarithm_of_prior: (k,), None for the uniform one
    Source: arXiv:2210.07277 (PMSN).
    """
    _check(anchors, targets, prototypes, temperature=temperature, sharpening=sharpening, iterations=sinkhorn_iterations)
    n_prototypes = len(prototypes)
    prior = log_prior("uniform", n_prototypes) if logarithm_of_prior is None else logarithm_of_prior
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, prototypes = _at_least_single(anchors), _at_least_single(prototypes)
        wanted = target_assignments(
            targets, prototypes, temperature=temperature, sharpening=sharpening, sinkhorn_iterations=sinkhorn_iterations
        )
        log_predicted = log_predictions(anchors, with_mean_gradient(prototypes), temperature=temperature)
        log_by_view = log_predicted.view(-1, *wanted.shape)
        sums = torch.stack(
            [
                -(wanted.to(log_by_view.dtype) * log_by_view).sum(),
                -(log_predicted.exp() * log_predicted).sum(),
                log_predicted.new_tensor(float(len(anchors))),
            ]
        )
        cross_entropy, entropy, n_rows = sum_over_ranks(sums)
        log_mean = log_mean_of_all_ranks(log_predicted, n_rows=n_rows.detach())
        me_max = (log_mean.exp() * (log_mean - prior.to(log_mean))).sum()
        cross_entropy, entropy = cross_entropy / n_rows.detach(), entropy / n_rows.detach()
    return MSNLoss(
        total=cross_entropy + me_max_weight * me_max + entropy_weight * entropy,
        cross_entropy=cross_entropy,
        me_max=me_max,
        entropy=entropy,
        targets=wanted,
    )


@torch.no_grad()
def target_assignments(
    targets: Tensor, prototypes: Tensor, *, temperature: float, sharpening: float, sinkhorn_iterations: int
) -> Tensor:
    """Give (b, k), what anchors are to predict: assignments of targets, sharpened, then balanced.

    In float64 inside, whatever the dtype: cosines are divided by 0.025, and it is a small matrix.
    """
    logarithms = log_predictions(targets.double(), prototypes.double(), temperature=temperature)
    logarithms = sharpened(logarithms, sharpening=sharpening)
    return balanced(logarithms, iterations=sinkhorn_iterations).exp().to(_at_least_single(targets).dtype)


def simsiam_loss(p1: Tensor, z2: Tensor, p2: Tensor, z1: Tensor) -> Tensor:
    """Give the symmetric negative cosine: of each view's prediction with the other view's projection.

    p1, p2: (b, d) predictions of the first and second view
    z1, z2: (b, d) projections, detached here
    returns: scalar in [-1, 1], of the global batch
    Raises UsageError for shapes that differ.
    Source: arXiv:2011.10566, equation 2.
    """
    if not (p1.dim() == 2 and p1.shape == z2.shape == p2.shape == z1.shape):
        shapes = ", ".join(str(tuple(one.shape)) for one in (p1, z2, p2, z1))
        raise UsageError(f"predictions and projections of shapes {shapes}", hint="Give four of one shape (b, d).")
    with torch.autocast(p1.device.type, enabled=False):
        p1, z2, p2, z1 = (_at_least_single(one) for one in (p1, z2, p2, z1))
        first = functional.cosine_similarity(p1, z2.detach(), dim=1)
        second = functional.cosine_similarity(p2, z1.detach(), dim=1)
        sums = torch.stack([first.sum() + second.sum(), first.new_tensor(2.0 * len(first))])
        cosines, count = sum_over_ranks(sums)
    return cast(Tensor, -cosines / count.detach())


def _at_least_single(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _check(
    anchors: Tensor, targets: Tensor, prototypes: Tensor, *, temperature: float, sharpening: float, iterations: int
) -> None:
    shapes = tuple(tuple(one.shape) for one in (anchors, targets, prototypes))
    fits = all(len(shape) == 2 for shape in shapes) and len({shape[1] for shape in shapes}) == 1
    if not fits or not len(targets) or not len(anchors) or len(anchors) % len(targets):
        raise UsageError(
            f"anchors {shapes[0]}, targets {shapes[1]} and prototypes {shapes[2]} do not fit",
            hint="Give (views * b, d), (b, d) and (k, d).",
        )
    if not (temperature > 0 and sharpening > 0 and iterations >= 0):
        raise UsageError(
            f"temperature {temperature}, sharpening {sharpening}, {iterations} iterations of Sinkhorn",
            hint="Give temperatures and sharpening above 0 and a number of iterations that is not negative.",
        )


def log_predictions(representations: Tensor, prototypes: Tensor, *, temperature: float) -> Tensor:
    """Give the logarithms of the softmax over cosines with the prototypes, divided by `temperature`.

    representations: (n, d)
    prototypes:      (k, d)
    returns:         (n, k), the exponentials of its rows sum to 1
    Source: arXiv:2204.07141, section 3.
    """
    cosines = functional.normalize(representations, dim=1) @ functional.normalize(prototypes, dim=1).T
    return (cosines / temperature).log_softmax(dim=1)


def sharpened(log_assignments: Tensor, *, sharpening: float) -> Tensor:
    """Raise assignments to the power 1 / `sharpening` and divide by their sum, in logarithms.

    log_assignments, returns: (n, k)
    For a softmax at temperature T this is the softmax at T times `sharpening`: the paper's two temperatures (0.1 for
    anchors, 0.025 for targets) and the release's power of 1 / 0.25 are one formula.
    """
    return (log_assignments / sharpening).log_softmax(dim=1)


def sinkhorn(assignments: Tensor, iterations: int = 3) -> Tensor:
    """Balance assignments over prototypes: give every prototype an equal part of the global batch, then every row sum 1.

    assignments: (n, k) probabilities, those of this rank; sums over rows are over the rows of all ranks
    returns:     (n, k), of the same dtype, rows sum to 1 after at least one iteration
    A prototype that no row of any rank gives anything keeps nothing.
    Source: Cuturi 2013, arXiv:1306.0895, in the form of the MSN release (src/losses.py, distributed_sinkhorn).
    """
    return balanced(assignments.detach().log(), iterations=iterations).exp()


@torch.no_grad()
def balanced(log_assignments: Tensor, *, iterations: int) -> Tensor:
    """Do as `sinkhorn`, from logarithms to logarithms. The constants 1/k and 1/n of the formula cancel in each row."""
    for _ in range(iterations):
        log_assignments = log_assignments - _finite(_log_mass(log_assignments))
        log_assignments = log_assignments - log_assignments.logsumexp(dim=1, keepdim=True)
    return log_assignments


def log_mean_of_all_ranks(log_assignments: Tensor, *, n_rows: Tensor | float) -> Tensor:
    """Give (k,), the logarithms of the mean assignment over the `n_rows` rows of all ranks, with gradient."""
    return _log_mass(log_assignments) - torch.as_tensor(n_rows, dtype=log_assignments.dtype).log()


def log_prior(name: str, n_prototypes: int, *, exponent: float = 0.25) -> Tensor:
    """Give (k,) float64, the logarithms of the share of images that each prototype should get.

    name: `uniform`, or `power_law`, where prototype i of 1, 2, … gets a share proportional to i ** -exponent
    Raises UsageError for another name.
    Source: arXiv:2210.07277, which pre-trains with a power law where classes are not equally frequent.
    """
    if name == "uniform":
        return torch.zeros(n_prototypes, dtype=torch.float64).log_softmax(dim=0)
    if name == "power_law":
        order = torch.arange(1, n_prototypes + 1, dtype=torch.float64)
        return (-exponent * order.log()).log_softmax(dim=0)
    raise UsageError(f"no prior {name!r}", hint="Known: uniform, power_law.")


def _log_mass(log_assignments: Tensor) -> Tensor:
    """Give (k,), the logarithm of the sum over the rows of all ranks."""
    largest = _finite(max_over_ranks(log_assignments.amax(dim=0)))
    return largest + sum_over_ranks((log_assignments - largest).exp().sum(dim=0)).log()


def _finite(logarithms: Tensor) -> Tensor:
    """Give 0 for the logarithm of 0: nothing divided by nothing stays nothing."""
    return torch.where(logarithms == -torch.inf, 0.0, logarithms)
