"""EMA: the target follows the anchor."""

from collections.abc import Iterable

import torch
from torch import nn


@torch.no_grad()
def follow(target: nn.Module, anchor: nn.Module, *, share: float) -> None:
    """Move the target's weights: `share` of each stays, the rest comes from the anchor.

    Buffers are left alone: as in the release, the target's BatchNorm has statistics of its own.
    Source: arXiv:2204.07141, section 3; github.com/facebookresearch/msn, src/msn_train.py.
    """
    weights = _values(target.parameters())
    torch._foreach_mul_(weights, share)
    torch._foreach_add_(weights, _values(anchor.parameters()), alpha=1.0 - share)


def _values(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach() for parameter in parameters]
