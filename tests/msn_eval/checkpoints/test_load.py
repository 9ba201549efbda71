"""Weights into a network: what fits, what does not, and the error."""

import math

import pytest
import torch
from torch import Tensor, nn

from msn_eval.checkpoints.load import check_fit, check_real, fit_weights, load_weights
from msn_eval.checkpoints.sanity_checks import describe_values
from msn_eval.errors import CheckpointError

Weights = dict[str, Tensor]


def expected() -> Weights:
    return {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2), "b.weight": torch.zeros(4, 2)}


def drawn() -> Weights:
    return {name: torch.arange(1.0, 1 + tensor.numel()).reshape(tensor.shape) for name, tensor in expected().items()}


def without(*names: str) -> Weights:
    return {name: tensor for name, tensor in drawn().items() if name not in names}


# How they compare.


def test_weights_that_fit_have_no_lines() -> None:
    fit = fit_weights(drawn(), expected())
    assert (fit.lines, fit.missing, fit.left_over, fit.reshaped, fit.waived, fit.matched) == ((), (), (), (), (), 1.0)


def test_missing_weights_are_named_in_order() -> None:
    fit = fit_weights(without("b.weight", "a.bias"), expected())
    assert (fit.missing, fit.lines) == (
        ("a.bias", "b.weight"),
        ("a.bias: missing in the file", "b.weight: missing in the file"),
    )


def test_weights_left_over_are_named_in_order() -> None:
    fit = fit_weights(drawn() | {"z": torch.ones(1), "c": torch.ones(1)}, expected())
    assert (fit.left_over, fit.lines) == (("c", "z"), ("c: no place in the model", "z: no place in the model"))


def test_reshaped_weights_are_reported_with_both_shapes() -> None:
    fit = fit_weights(drawn() | {"a.weight": torch.ones(3, 2)}, expected())
    assert (fit.reshaped, fit.lines) == (("a.weight",), ("a.weight: file (3, 2), model (2, 3)",))


@pytest.mark.parametrize(
    ("weights", "lost"),
    [(without("a.bias"), 2), (drawn() | {"b.weight": torch.ones(9)}, 8), (without("a.weight", "a.bias"), 8), ({}, 16)],
    ids=["missing", "reshaped", "two missing", "all"],
)
def test_matched_is_the_share_of_values_that_the_file_holds(weights: Weights, lost: int) -> None:
    assert fit_weights(weights, expected()).matched == pytest.approx(1 - lost / 16, abs=1e-12)


def test_network_without_weights_is_matched_by_nothing() -> None:
    assert fit_weights(drawn(), {}).matched == 0.0


def test_counts_of_batches_may_be_absent() -> None:
    whole = expected() | {"bn.num_batches_tracked": torch.tensor(0)}
    assert fit_weights(drawn(), whole).lines == ()


def test_counts_of_batches_may_be_there() -> None:
    whole = expected() | {"bn.num_batches_tracked": torch.tensor(0)}
    assert fit_weights(drawn() | {"bn.num_batches_tracked": torch.tensor(7)}, whole).lines == ()


def test_pattern_waives_what_it_matches_and_no_more() -> None:
    fit = fit_weights(without("a.weight", "b.weight"), expected(), ("b.*",))
    assert (fit.waived, fit.missing) == (("b.weight",), ("a.weight",))


def test_waived_weights_are_not_matched() -> None:
    assert fit_weights(without("b.weight"), expected(), ("b.*",)).matched == 0.5


# Errors about weights that do not fit.


def message(weights: Weights, *, hint: str = "") -> str:
    with pytest.raises(CheckpointError) as caught:
        check_fit(fit_weights(weights, expected()), of=3, arch="vit_x", where="vit.pth", hint=hint)
    return str(caught.value)


def test_misfit_is_one_block_with_its_place_its_lines_and_a_hint() -> None:
    assert message(without("a.bias"), hint="The weights look like vit_y. ") == (
        "vit.pth: 1 of 3 weights do not fit vit_x\n"
        "  a.bias: missing in the file\n"
        "The weights look like vit_y. Name another architecture with --arch, another network of the file with "
        "--checkpoint-key, or, where weights may stay untrained, --allow-missing PATTERN."
    )


def test_beyond_five_misfits_the_rest_is_counted() -> None:
    text = message(drawn() | {f"x{number}": torch.ones(1) for number in range(8)})
    assert (text.count("no place"), "\n  and 3 more\n" in text) == (5, True)


# Into the network.


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def state() -> Weights:
    return {
        name: torch.full_like(tensor, 3) for name, tensor in network().state_dict().items() if "num_batches" not in name
    }


def load(into: nn.Module, weights: Weights, allow_missing: tuple[str, ...] = ()) -> float:
    infos = {name: describe_values(tensor) for name, tensor in weights.items()}
    expected = into.state_dict()
    fit = fit_weights(weights, expected, allow_missing)
    check_fit(fit, of=len(expected), arch="linear", where="vit.pth")
    check_real(weights, expected, where="vit.pth")
    load_weights(into, weights, infos, where="vit.pth")
    return fit.matched


def test_every_weight_takes_its_place() -> None:
    into = network()
    load(into, state())
    assert all(torch.equal(into.state_dict()[name], tensor) for name, tensor in state().items())


def test_weights_that_may_be_missing_stay_as_they_are() -> None:
    into = network()
    before = into[0].bias.clone()
    load(into, {name: tensor for name, tensor in state().items() if name != "0.bias"}, ("0.*",))
    assert torch.equal(into[0].bias, before)


def test_share_of_values_that_came_from_the_file_is_given() -> None:
    weights = {name: tensor for name, tensor in state().items() if name != "0.bias"}
    assert load(network(), weights, ("0.*",)) == pytest.approx(14 / 16, abs=1e-12)


def test_network_stays_as_it_is_where_a_weight_is_missing() -> None:
    into = network()
    before = into[0].weight.clone()
    with pytest.raises(CheckpointError, match=r"1 of 7 weights do not fit linear"):
        load(into, {name: tensor for name, tensor in state().items() if name != "1.bias"})
    assert torch.equal(into[0].weight, before)


@pytest.mark.parametrize("bad", [torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.complex64)])
def test_weight_that_is_not_a_real_number_is_refused(bad: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"1 weights are not real numbers \(0\.bias\)"):
        load(network(), state() | {"0.bias": bad})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weight_that_is_not_finite_is_refused_and_counted(value: float) -> None:
    with pytest.raises(CheckpointError, match=r"1 weights hold NaN or infinite values \(0\.bias: 1 of 2\)"):
        load(network(), state() | {"0.bias": torch.tensor([1.0, value])})


def test_weight_that_is_infinite_in_the_networks_precision_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"NaN or infinite values \(0\.bias: 1 of 2\)"):
        load(network(), state() | {"0.bias": torch.tensor([1.0, 1e200], dtype=torch.float64)})
