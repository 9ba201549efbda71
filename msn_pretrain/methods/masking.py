"""Masking: which patches a masked view keeps."""

import math

import torch
from torch import Tensor

from msn_eval.errors import UsageError


def kept_count(n_patches: int, ratio: float) -> int:
    """Give how many of `n_patches` are kept when a share `ratio` is dropped, rounded down as the release does.

    Raises UsageError where none would be left, and for a ratio outside [0, 1).
    """
    kept = math.floor(n_patches * (1.0 - ratio)) if 0 <= ratio < 1 else 0
    if not kept:
        raise UsageError(
            f"a view of {n_patches} patches of which a share of {ratio} is dropped keeps none",
            remedy="Drop a smaller share: masking.ratio=0.15.",
        )
    return kept


def kept_patches(n_patches: int, ratio: float, generator: torch.Generator, *, images: int | None = None) -> Tensor:
    """Draw the patches that are kept, each set equally likely, by a generator on the CPU.

    images:  how many images get a set of their own; None draws one set for all of a batch, as the release does
    returns: (kept,) or (images, kept) int64 on the CPU, ascending, in [0, n_patches)
    """
    kept = kept_count(n_patches, ratio)
    if images is None:
        return torch.randperm(n_patches, generator=generator)[:kept].sort().values
    order = torch.rand(images, n_patches, generator=generator, dtype=torch.float64).argsort(dim=1)
    return order[:, :kept].sort(dim=1).values


def keep_patches(tokens: Tensor, kept: Tensor, *, prefix: int) -> Tensor:
    """Leave the first `prefix` tokens and, of the patches behind them, those in `kept`.

    tokens:  (b, prefix + n, d)
    kept:    (m,) or (b, m) int64, numbers of patches
    returns: (b, prefix + m, d)
    """
    patches = tokens[:, prefix:]
    if kept.dim() == 1:
        chosen = patches.index_select(1, kept)
    else:
        chosen = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
    return torch.cat([tokens[:, :prefix], chosen], dim=1)
