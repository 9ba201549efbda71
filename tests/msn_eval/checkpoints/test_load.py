"""Weights into a network: what fits, what does not, and the error."""

import math

import pytest
import torch
from torch import Tensor, nn

from msn_eval.checkpoints.load import fit_weights, load_weights
from msn_eval.checkpoints.sanity_checks import describe_values
from msn_eval.errors import CheckpointError

Weights = dict[str, Tensor]
EXPECTED = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2), "b.weight": torch.zeros(4, 2)}


def without(*names: str) -> Weights:
    return {name: torch.ones_like(tensor) for name, tensor in EXPECTED.items() if name not in names}


@pytest.mark.parametrize(
    ("weights", "lines"),
    [
        (without(), ()),
        (without("b.weight", "a.bias"), ("a.bias: missing in the file", "b.weight: missing in the file")),
        (
            without() | {"z": torch.ones(1), "c": torch.ones(1)},
            ("c: no place in the model", "z: no place in the model"),
        ),
        (without() | {"a.weight": torch.ones(3, 2)}, ("a.weight: file (3, 2), model (2, 3)",)),
        (without() | {"a.bias": torch.ones(2).long()}, ("a.bias: file torch.int64, model torch.float32",)),
        (without() | {"a.bias": torch.ones(2).cfloat()}, ("a.bias: file torch.complex64, model torch.float32",)),
    ],
    ids=["fits", "missing", "left over", "reshaped", "integers", "complex"],
)
def test_weights_that_do_not_fit_are_listed_in_order(weights: Weights, lines: tuple[str, ...]) -> None:
    assert fit_weights(weights, EXPECTED).lines == lines


@pytest.mark.parametrize(
    ("weights", "lost"),
    [
        (without(), 0),
        (without("a.bias"), 2),
        (without() | {"b.weight": torch.ones(9)}, 8),
        (without("a.weight", "a.bias"), 8),
        ({}, 16),
    ],
    ids=["all there", "missing", "reshaped", "two missing", "all missing"],
)
def test_matched_is_the_share_of_values_that_the_file_holds(weights: Weights, lost: int) -> None:
    assert fit_weights(weights, EXPECTED).matched == pytest.approx(1 - lost / 16, abs=1e-12)


def test_network_without_weights_is_matched_by_nothing() -> None:
    assert fit_weights(without(), {}).matched == 0.0


@pytest.mark.parametrize("counts", [{}, {"bn.num_batches_tracked": torch.tensor(7)}], ids=["absent", "present"])
def test_counts_of_batches_may_be_absent(counts: Weights) -> None:
    expected = EXPECTED | {"bn.num_batches_tracked": torch.tensor(0)}
    assert fit_weights(without() | counts, expected).lines == ()


def test_pattern_waives_the_weights_that_it_matches() -> None:
    fit = fit_weights(without("a.weight", "b.weight"), EXPECTED, ("b.*",))
    assert (fit.waived, fit.missing, fit.matched) == (("b.weight",), ("a.weight",), 2 / 16)


def load(network: nn.Module, weights: Weights) -> None:
    infos = {name: describe_values(tensor) for name, tensor in weights.items()}
    load_weights(network, weights, infos, where="vit.pth")


def test_absent_weights_stay_as_they_are() -> None:
    network = nn.Linear(3, 2)
    before = network.bias.clone()
    load(network, {"weight": torch.full((2, 3), 3.0)})
    assert torch.equal(network.bias, before)
    assert network.weight.eq(3).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200], ids=str)
def test_weight_that_is_not_finite_in_float32_is_refused_and_counted(value: float) -> None:
    network = nn.Linear(3, 2)
    before = network.weight.clone()
    weights = {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, value], dtype=torch.float64)}
    with pytest.raises(CheckpointError, match=r"1 weights hold NaN or infinite values \(bias: 1 of 2\)"):
        load(network, weights)
    assert torch.equal(network.weight, before)
