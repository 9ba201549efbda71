"""Facts of tensors, against torch's own on the whole tensor."""

import math

import pytest
import torch

from msn_eval.checkpoints.sanity_checks import TensorFacts, chunks, count_not_finite, describe_values, join_facts


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mean_and_std_are_torchs(dtype: torch.dtype) -> None:
    values = random(300, 700, dtype=dtype)
    facts = describe_values([values])
    exact = values.double()
    assert facts.mean == pytest.approx(float(exact.mean()), abs=1e-12)
    assert facts.std == pytest.approx(float(exact.std(correction=0)), rel=1e-9)


def test_extremes_and_zeros_are_counted_over_all_pieces() -> None:
    values = random(100_000)
    values[[5, 70_000, 99_999]] = torch.tensor([0.0, -50.0, 60.0])
    facts = describe_values([values[:40_000], values[40_000:]])
    assert (facts.values, facts.zeros, facts.lowest, facts.highest) == (100_000, 1, -50.0, 60.0)


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    facts = describe_values([torch.tensor([1.0, math.nan, 3.0, math.inf, -math.inf])])
    assert (facts.not_finite, facts.finite, facts.mean, facts.lowest, facts.highest) == (3, 2, 2.0, 1.0, 3.0)


@pytest.mark.parametrize("values", [torch.empty(0), torch.tensor([math.nan])])
def test_nothing_finite_has_no_mean(values: torch.Tensor) -> None:
    facts = describe_values([values])
    assert (facts.mean, facts.std) == (None, None)


@pytest.mark.parametrize(
    ("values", "equal"),
    [([1.0, 1.0], True), ([1.0, 2.0], False), ([1.0, math.nan], False), ([], False), ([0.0], False)],
)
def test_all_equal_takes_every_value(values: list[float], equal: bool) -> None:
    assert describe_values([torch.tensor(values)]).all_equal(1.0) is equal


def test_facts_of_parts_are_those_of_the_whole() -> None:
    values = random(90_000)
    parts = join_facts(describe_values([part]) for part in values.split(7_000))
    whole = describe_values([values])
    assert (parts.values, parts.lowest, parts.highest) == (whole.values, whole.lowest, whole.highest)
    assert parts.total == pytest.approx(whole.total, rel=1e-12)


def test_facts_of_nothing_are_empty() -> None:
    assert join_facts([]) == TensorFacts()


def test_complex_values_are_described_by_their_parts() -> None:
    assert describe_values([torch.tensor([3 - 4j])]).lowest == -4.0


def test_chunks_cover_a_tensor_in_order() -> None:
    values = random(100_001)
    assert torch.equal(torch.cat(list(chunks(values.reshape(1, -1)))), values)


@pytest.mark.parametrize(
    ("values", "count"),
    [(torch.tensor([math.nan, 1.0, -math.inf]), 2), (torch.tensor([1, 2]), 0), (torch.zeros(0), 0)],
)
def test_not_finite_are_counted(values: torch.Tensor, count: int) -> None:
    assert count_not_finite(values) == count
