"""Assignments against the formulas of the paper and the release, written out plainly in float64."""

import pytest
import torch
from torch import Tensor, distributed

from msn_eval.errors import UsageError
from msn_pretrain import sinkhorn
from msn_pretrain.methods.assignment import balanced, log_predictions, log_prior, sharpened


def plain_sinkhorn(assignments: Tensor, iterations: int) -> Tensor:
    q = assignments.T / assignments.sum()
    k, n = q.shape
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True) / k
        q = q / q.sum(dim=0, keepdim=True) / n
    return (q * n).T


def some_assignments(n: int = 8, k: int = 5) -> Tensor:
    return torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).mul(3).softmax(dim=1)


def test_sinkhorn_is_the_plain_formula() -> None:
    torch.testing.assert_close(sinkhorn(some_assignments()), plain_sinkhorn(some_assignments(), 3), rtol=1e-12, atol=0)


def test_sinkhorn_of_many_iterations_gives_every_prototype_as_much() -> None:
    torch.testing.assert_close(
        sinkhorn(some_assignments(), 200).mean(dim=0), torch.full((5,), 0.2, dtype=torch.float64)
    )


def own_share(rows: Tensor) -> Tensor:
    return sinkhorn(rows.chunk(distributed.get_world_size())[distributed.get_rank()])


def test_sinkhorn_on_two_ranks_of_four_is_that_on_one_of_eight(on_ranks) -> None:
    shares = on_ranks(own_share, some_assignments())

    torch.testing.assert_close(torch.cat(shares), sinkhorn(some_assignments()), rtol=1e-12, atol=0)


def test_sinkhorn_stays_finite_where_the_plain_formula_divides_nothing_by_nothing() -> None:
    assignments = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])

    assert plain_sinkhorn(assignments, 3).isnan().any()
    assert sinkhorn(assignments).sum(dim=1).tolist() == pytest.approx([1, 1])


def test_assignments_beyond_the_range_of_float32_stay_apart() -> None:
    representations, prototypes = torch.eye(2), torch.eye(2)
    logarithms = log_predictions(representations, prototypes, temperature=0.005)

    assert (logarithms.exp() == torch.eye(2)).all()  # 1 / exp(200) is 0 in float32
    assert balanced(logarithms, iterations=3).isfinite().all()


def test_sharpening_a_softmax_divides_its_temperature() -> None:
    rows, prototypes = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)

    sharp = sharpened(log_predictions(rows, prototypes, temperature=0.1), sharpening=0.25)

    torch.testing.assert_close(sharp, log_predictions(rows, prototypes, temperature=0.025))


def test_sharpening_is_a_power_divided_by_its_sum() -> None:
    rows = some_assignments()
    power = rows**4

    torch.testing.assert_close(sharpened(rows.log(), sharpening=0.25).exp(), power / power.sum(dim=1, keepdim=True))


def test_power_law_prior_falls_with_the_number_of_the_prototype() -> None:
    shares = torch.arange(1, 6, dtype=torch.float64) ** -0.5

    torch.testing.assert_close(log_prior("power_law", 5, exponent=0.5).exp(), shares / shares.sum())


def test_unknown_prior_is_refused() -> None:
    with pytest.raises(UsageError, match="no prior 'normal'"):
        log_prior("normal", 4)
