"""Collapse: numbers that tell whether prototypes are still told apart, beside those of the features themselves."""

import torch
from torch import Tensor

from msn_eval.features.collapse import effective_rank as effective_rank
from msn_eval.features.collapse import spread as spread


@torch.no_grad()
def prototypes_in_use(targets: Tensor) -> int:
    """Give how many prototypes are the largest of some row. targets: (n, k)."""
    return len(set(targets.argmax(dim=1).tolist()))


@torch.no_grad()
def mean_entropy(targets: Tensor) -> float:
    """Give the mean entropy of rows that sum to 1, in nats. targets: (n, k)."""
    return float(torch.special.entr(targets.double()).sum(dim=1).mean())
