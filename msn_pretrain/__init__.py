"""Pre-training of the checkpoints that msn_eval measures.

Public names are imported on first use: `import msn_pretrain` alone loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msn_pretrain.methods.loss import msn_loss, simsiam_loss, sinkhorn

__all__ = ["msn_loss", "simsiam_loss", "sinkhorn"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'msn_pretrain' has no attribute {name!r}")
    return getattr(import_module("msn_pretrain.methods.loss"), name)
