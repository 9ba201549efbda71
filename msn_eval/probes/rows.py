"""Rows of features as the probes take them. Every row by itself: no statistic crosses images."""

import torch
from torch import Tensor


def normalised_rows(values: Tensor) -> Tensor:
    """Give rows of unit L2 length in float64; a zero row stays zero.

    values: (n, d) floating
    """
    rows = values.to(torch.float64)
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, torch.ones_like(length))


def centred_rows(values: Tensor) -> Tensor:
    """Give rows less their own mean, then of unit L2 length, in float64; a constant row becomes zero.

    values: (n, d) floating
    Source: the released evaluation of arXiv:2204.07141 (row-wise, so test images do not see each other).
    """
    rows = values.to(torch.float64)
    centred = rows - rows.mean(dim=1, keepdim=True)
    # What subtracting the mean leaves of a constant row is rounding, and must not be blown up to unit length.
    rounding = torch.finfo(torch.float64).eps * rows.shape[1] * rows.abs().amax(dim=1, keepdim=True)
    constant = centred.abs().amax(dim=1, keepdim=True) <= rounding
    return normalised_rows(torch.where(constant, torch.zeros_like(centred), centred))
