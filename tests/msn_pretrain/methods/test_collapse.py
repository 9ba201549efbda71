"""Numbers that tell a collapse."""

import math

import pytest
import torch

from msn_pretrain.methods.collapse import effective_rank, mean_entropy, prototypes_in_use, spread


def test_equal_features_have_no_spread_and_rank_one() -> None:
    features = torch.ones(20, 8)

    assert spread(features) == pytest.approx(0, abs=1e-6)
    assert effective_rank(features) == pytest.approx(1)


def test_random_directions_have_spread_one() -> None:
    features = torch.randn(5_000, 64, generator=torch.Generator().manual_seed(0))

    assert spread(features) == pytest.approx(1, abs=0.01)


def test_rank_counts_directions_of_equal_strength() -> None:
    assert effective_rank(torch.eye(6)[:, :4]) == pytest.approx(4)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_rank_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -4, shape[1])
    shares = torch.linalg.svdvals(features.double())
    shares = shares / shares.sum()

    assert effective_rank(features) == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-6)


def test_features_that_are_nothing_have_rank_one() -> None:
    assert effective_rank(torch.zeros(4, 3)) == 1


def test_prototypes_in_use_are_those_that_some_image_is_nearest_to() -> None:
    assert prototypes_in_use(torch.tensor([[0.6, 0.4, 0.0], [0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])) == 2


def test_entropy_of_certain_and_even_targets() -> None:
    assert mean_entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]])) == pytest.approx(math.log(2) / 2)
