"""Statistics of tensors, compared with those of torch."""

import math

import pytest
import torch
from torch import Tensor

from msn_eval.checkpoints.networks import ChosenNetwork, StoredNetwork
from msn_eval.checkpoints.sanity_checks import (
    describe_values,
    find_alarms,
    join_statistics,
)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mean_and_std_are_torchs(dtype: torch.dtype) -> None:
    values = random(300, 700, dtype=dtype)
    facts = describe_values(values)
    exact = values.double()
    assert facts.mean == pytest.approx(float(exact.mean()), abs=1e-12)
    assert facts.std == pytest.approx(float(exact.std(correction=0)), rel=1e-9)


def test_extremes_and_zeros_are_counted_over_all_pieces() -> None:
    values = random(100_000)
    values[[5, 70_000, 99_999]] = torch.tensor([0.0, -50.0, 60.0])
    facts = describe_values(values)
    assert (facts.values, facts.zeros, facts.lowest, facts.highest) == (100_000, 1, -50.0, 60.0)


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    facts = describe_values(torch.tensor([1.0, math.nan, 3.0, math.inf, -math.inf]))
    assert (facts.not_finite, facts.finite, facts.mean, facts.lowest, facts.highest) == (3, 2, 2.0, 1.0, 3.0)


@pytest.mark.parametrize("values", [torch.empty(0), torch.tensor([math.nan])])
def test_nothing_finite_has_no_mean(values: torch.Tensor) -> None:
    facts = describe_values(values)
    assert (facts.mean, facts.std) == (None, None)


@pytest.mark.parametrize(
    ("values", "equal"),
    [([1.0, 1.0], True), ([1.0, 2.0], False), ([1.0, math.nan], False), ([], False), ([0.0], False)],
)
def test_all_equal_takes_every_value(values: list[float], equal: bool) -> None:
    assert describe_values(torch.tensor(values)).all_equal(1.0) is equal


def test_facts_of_parts_are_those_of_the_whole() -> None:
    values = random(90_000)
    parts = join_statistics(describe_values(part) for part in values.split(7_000))
    together = describe_values(values)
    assert (parts.values, parts.lowest, parts.highest) == (together.values, together.lowest, together.highest)
    assert parts.total == pytest.approx(together.total, rel=1e-12)


def test_complex_values_are_described_by_their_parts() -> None:
    assert describe_values(torch.tensor([3 - 4j])).lowest == -4.0


Weights = dict[str, Tensor]
UNTOUCHED = "every norm has its initial values (scale 1, shift 0): these weights look untrained"


def trained() -> Weights:
    return {
        "blocks.0.mlp.fc1.weight": torch.arange(6.0).reshape(2, 3),
        "blocks.0.mlp.fc1.bias": torch.zeros(2),
        "blocks.0.norm1.weight": torch.tensor([1.0, 0.9]),
        "blocks.0.norm1.bias": torch.tensor([0.0, 0.1]),
        "norm.weight": torch.ones(2),
        "norm.bias": torch.zeros(2),
    }


def stored(weights: Weights, key: str | None = None, beside: Weights | None = None) -> StoredNetwork:
    return StoredNetwork(key=key, words=(key,) if key else (), tensors=weights, beside=beside or {})


def alarms(weights: Weights, *, dropped: Weights | None = None, passed_over: StoredNetwork | None = None) -> list[str]:
    """Return the alarms of a network with `weights` that are used and `dropped` that are not."""
    network = stored(weights | (dropped or {}), "student")
    choice = ChosenNetwork(network=network, why="the only network", passed_over=passed_over)
    return list(find_alarms(choice, {name: describe_values(tensor) for name, tensor in weights.items()}))


@pytest.mark.parametrize(
    ("used", "dropped"),
    [
        ({}, {}),
        ({"blocks.0.mlp.fc1.weight": torch.eye(2)[:1]}, {}),
        ({"blocks.0.norm1.bias": torch.zeros(2)}, {}),
        ({"queue.weight": torch.zeros(0, 3)}, {}),
        ({}, {"fc.fc1.weight": torch.ones(8, 2), "fc.fc2.weight": torch.ones(8, 8)}),
    ],
    ids=["trained", "not all zeros", "shifts of zeros", "no values", "projection head"],
)
def test_trained_weights_raise_no_alarm(used: Weights, dropped: Weights) -> None:
    assert alarms(trained() | used, dropped=dropped) == []


def test_weights_without_norms_do_not_look_untrained() -> None:
    assert alarms({"fc1.weight": torch.eye(2)}) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    weights = trained() | {"blocks.0.mlp.fc1.bias": torch.tensor([0.0, value])}
    assert alarms(weights) == ["NaN or infinite values in blocks.0.mlp.fc1.bias"]


def test_three_names_are_shown_and_the_rest_counted() -> None:
    weights = trained() | {f"x{number}.weight": torch.full((2, 2), math.nan) for number in range(5)}
    assert alarms(weights) == ["NaN or infinite values in x0.weight, x1.weight, x2.weight and 2 more"]


def test_names_in_an_alarm_are_shortened_so_that_it_ends_with_its_count() -> None:
    weights = trained() | {f"{number}{'x' * 3000}.weight": torch.full((2, 2), math.nan) for number in range(5)}
    (alarm,) = alarms(weights)
    assert (len(alarm) < 400, alarm[-11:]) == (True, " and 2 more")


def test_matrix_of_zeros_alone_is_named() -> None:
    weights = trained() | {"blocks.0.mlp.fc1.weight": torch.zeros(2, 3)}
    assert alarms(weights) == ["nothing but zeros in blocks.0.mlp.fc1.weight"]


def test_norms_as_initialised_look_untrained() -> None:
    fresh = {"blocks.0.norm1.weight": torch.ones(2), "blocks.0.norm1.bias": torch.zeros(2)}
    assert alarms(trained() | fresh) == [UNTOUCHED]


@pytest.mark.parametrize(
    ("name", "value"), [("norm.weight", [1.0, 1.001]), ("norm.bias", [0.0, -1e-6])], ids=["scale", "shift"]
)
def test_one_trained_norm_is_enough(name: str, value: list[float]) -> None:
    fresh = {"blocks.0.norm1.weight": torch.ones(2), "blocks.0.norm1.bias": torch.zeros(2)}
    assert alarms(trained() | fresh | {name: torch.tensor(value)}) == []


def test_constant_matrix_with_a_shift_is_not_a_trained_norm() -> None:
    """A linear layer has a weight and a bias as a norm has, and another shape."""
    fresh = {
        "norm.weight": torch.ones(2),
        "norm.bias": torch.zeros(2),
        "fc1.weight": torch.eye(2),
        "fc1.bias": torch.ones(2),
    }
    assert alarms(fresh) == [UNTOUCHED]


def test_student_beside_its_teacher_names_the_teacher() -> None:
    assert alarms(trained(), passed_over=stored(trained(), "teacher")) == [
        "'teacher' stands beside it, and is what the method's authors evaluate"
    ]


@pytest.mark.parametrize("name", ["head", "fc", "classifier"])
def test_classifier_on_top_is_reported_with_its_classes(name: str) -> None:
    found = alarms(trained(), dropped={f"{name}.weight": torch.ones(1000, 2)})
    assert found == ["a classifier of 1,000 classes is on top: the weights were trained or fine-tuned with labels"]
