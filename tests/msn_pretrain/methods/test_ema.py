"""The target follows the anchor."""

import copy

import torch
from torch import nn

from msn_pretrain.methods.ema import follow


def two_networks() -> tuple[nn.Module, nn.Module]:
    target = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    return target, nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def test_a_share_stays_and_the_rest_comes_from_the_anchor() -> None:
    target, anchor = two_networks()
    before = copy.deepcopy(target)

    follow(target, anchor, share=0.75)

    for now, was, comes in zip(target.parameters(), before.parameters(), anchor.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * was + 0.25 * comes)


def test_statistics_of_the_target_are_its_own() -> None:
    target, anchor = two_networks()
    anchor(torch.randn(8, 3))

    follow(target, anchor, share=0.5)

    assert torch.equal(target[1].running_mean, torch.zeros(3))


def test_a_share_of_one_moves_nothing() -> None:
    target, anchor = two_networks()
    before = [parameter.clone() for parameter in target.parameters()]

    follow(target, anchor, share=1.0)

    assert all(torch.equal(now, was) for now, was in zip(target.parameters(), before, strict=True))
