"""Assignment: how much of a representation belongs to each prototype; sharpened and balanced, it becomes a target.

Everything is computed from logarithms, so that no small probability is lost and none is raised to a power.
"""

import torch
from torch import Tensor
from torch.nn import functional

from msn_eval.errors import UsageError
from msn_pretrain.distributed.collective import max_over_ranks, sum_over_ranks


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
    raise UsageError(f"no prior {name!r}", remedy="Known: uniform, power_law.")


def _log_mass(log_assignments: Tensor) -> Tensor:
    """Give (k,), the logarithm of the sum over the rows of all ranks."""
    largest = _finite(max_over_ranks(log_assignments.amax(dim=0)))
    return largest + sum_over_ranks((log_assignments - largest).exp().sum(dim=0)).log()


def _finite(logarithms: Tensor) -> Tensor:
    """Give 0 for the logarithm of 0: nothing divided by nothing stays nothing."""
    return torch.where(logarithms == -torch.inf, 0.0, logarithms)
