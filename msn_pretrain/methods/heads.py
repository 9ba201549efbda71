"""Heads: the small networks behind an encoder that only pre-training uses."""

from collections import OrderedDict
from typing import cast

from torch import nn

from msn_pretrain.methods.batch_norm import share_batch_norm


def projection_head(width: int, *, hidden: int = 2048, output: int = 256, batch_norm: bool = True) -> nn.Sequential:
    """Build MSN's head: three linear layers, after the first two BatchNorm and GELU.

    The paper puts a BatchNorm before the first layer, too; the release, which made the published weights, does not.
    Layers have the release's names. Source: github.com/facebookresearch/msn, src/msn_train.py.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, inputs in ((1, width), (2, hidden)):
        layers[f"fc{number}"] = nn.Linear(inputs, hidden)
        if batch_norm:
            layers[f"bn{number}"] = nn.BatchNorm1d(hidden)
        layers[f"gelu{number}"] = nn.GELU()
    layers["fc3"] = nn.Linear(hidden, output)
    return cast(nn.Sequential, share_batch_norm(nn.Sequential(layers)))


def simsiam_projector(width: int, *, layers: int = 3, output: int = 2048) -> nn.Sequential:
    """Build SimSiam's projector: linear layers with BatchNorm, ReLU between them; the last BatchNorm has no weights.

    No layer has a bias, since a BatchNorm follows; the release holds its last layer's at its first value.
    Source: arXiv:2011.10566, section 3; github.com/facebookresearch/simsiam, simsiam/builder.py.
    """
    parts: list[nn.Module] = []
    for number in range(1, layers + 1):
        last = number == layers
        parts += [nn.Linear(width, output, bias=False), nn.BatchNorm1d(output, affine=not last)]
        parts += [] if last else [nn.ReLU(inplace=True)]
        width = output
    return cast(nn.Sequential, share_batch_norm(nn.Sequential(*parts)))


def simsiam_predictor(width: int, *, hidden: int = 512) -> nn.Sequential:
    """Build SimSiam's predictor: two linear layers, after the first BatchNorm and ReLU. Source: as the projector's."""
    parts = [
        nn.Linear(width, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, width),
    ]
    return cast(nn.Sequential, share_batch_norm(nn.Sequential(*parts)))
