"""Ranking: scores of classes into predictions and the rank of each label, with ties to the smaller class."""

import torch
from torch import Tensor

from msn_eval.errors import NumericalError


def rank_labels(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Give each image's predicted class and the 1-based rank of its label.

    scores: (m, n_classes), higher is better; equal scores rank by smaller class index
    labels: (m,) int64
    returns: (m,) int64 and (m,) int64
    Raises NumericalError for NaN, which every comparison would let pass.
    """
    if bool(scores.isnan().any()):
        raise NumericalError(
            "scores are NaN", remedy="The features or the fit overflowed; retry with --precision fp32."
        )
    labels = labels.to(scores.device)
    own = scores.gather(1, labels[:, None])
    classes = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > own) | ((scores == own) & (classes < labels[:, None]))
    best = scores.amax(dim=1, keepdim=True)
    prediction = (scores == best).to(torch.uint8).argmax(dim=1)  # of equal maxima the first
    return prediction.cpu(), (1 + ahead.sum(dim=1)).cpu()
