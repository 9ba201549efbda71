"""Readouts that no tested layout has. tests/test_layouts.py compares the others with the libraries."""

import torch
from timm.models.crossvit import CrossVit
from torch import nn

from msn_eval.models.readout import find_readout, read_taps


def test_network_of_several_scales_has_the_feature_that_timm_pools() -> None:
    sizes = {"img_size": 48, "img_scale": (1.0, 1.0), "patch_size": (12, 16), "embed_dim": (16, 32)}
    network = CrossVit(**sizes, depth=((1, 1, 1),), num_heads=(2, 2), mlp_ratio=(1, 1, 1), num_classes=0).eval()
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))

    readout = find_readout(network, 48)
    with torch.no_grad():
        features = read_taps(network, readout, nn.Identity(), images, readout.taps)
        expected = network(images)

    assert readout.taps == ("pool",)
    assert torch.allclose(features["pool"], expected)
