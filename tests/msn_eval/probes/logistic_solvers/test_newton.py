"""Newton's method in chunks: the same minimum and certificate for all chunk sizes and ranks; and what its directions save."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from msn_eval.features.extraction import Features
from msn_eval.probes.base import centre_rows
from msn_eval.probes.logistic import Logistic
from msn_eval.probes.logistic_solvers import newton
from msn_eval.probes.logistic_solvers.newton import (
    RowShare,
    is_large,
    minimise_by_newton,
    minimise_in_chunks,
    minimise_path,
    search_line,
)
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, Solution, certify

_LAMBDAS = (1.0, 0.0025)


def _draw(n: int = 500, d: int = 24, classes: int = 6, *, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    """Draw clusters whose axes differ in l2, far from the origin, one row of them constant."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=generator)
    spread = torch.linspace(0, -3, d).exp()
    values = (centres[labels] + noise * torch.randn(n, d, generator=generator)) * spread + 3
    values[7] = 1.25
    return values, labels


def _share(values: Tensor, labels: Tensor) -> RowShare:
    return RowShare(values=values, labels=labels, n_classes=6, n=len(values))


def _whole(values: Tensor, labels: Tensor, l2: float) -> CrossEntropyProblem:
    return CrossEntropyProblem(rows=centre_rows(values), labels=labels, n_classes=6, mu=l2 / len(values))


def _solve(share: RowShare, *, target: float = 1e-6) -> list[Solution]:
    return [item for item, _ in minimise_in_chunks(share, [s / share.n for s in _LAMBDAS], target=target)]


@pytest.mark.parametrize("noise", [0.1, 1.5], ids=["separable", "overlapping"])
@pytest.mark.parametrize("chunk_values", [900, 499 * 30, 1 << 20], ids=["some", "all except one", "all"])
def test_chunks_give_the_minimum_and_the_certificate_of_all_rows_at_once(
    chunk_values: int, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newton, "_CHUNK_VALUES", chunk_values)
    values, labels = _draw(noise=noise)

    result = _solve(_share(values, labels))

    for l2, item in zip(_LAMBDAS, result, strict=True):
        problem = _whole(values, labels, l2)
        proven, (alone, _) = certify(problem, item.weights), minimise_by_newton(problem, target=1e-9)
        assert item.gap <= 1e-6
        assert (item.objective, item.gap) == pytest.approx((proven.objective, proven.gap), rel=1e-9)
        assert item.objective == pytest.approx(alone.objective, rel=2e-6)


def test_gradients_go_on_in_float64_where_float32_leads_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    share, stages, take_steps = _share(*_draw()), [], newton._take_steps
    monkeypatch.setattr(newton, "_take_steps", lambda *arguments: stages.append(take_steps(*arguments)) or stages[-1])

    ((solution, steps),) = minimise_in_chunks(share, [0.0025 / share.n], target=1e-12)

    assert solution.gap <= 1e-12
    assert steps == sum(taken for _, taken in stages)
    assert [taken > 0 for _, taken in stages] == [True, True, False]


@pytest.mark.parametrize(("n", "d"), [(20, 50), (30, 40)])
def test_products_go_on_in_float64_where_float32_takes_every_row_for_certain(n: int, d: int) -> None:
    generator, labels = torch.Generator().manual_seed(0), torch.arange(n) % 5
    values = torch.randn(5, d, generator=generator)[labels] + 1.5 * torch.randn(n, d, generator=generator)

    ((solution, _),) = minimise_in_chunks(replace(_share(values, labels), n_classes=5), [1e-9 / n], target=1e-6)

    assert solution.gap <= 1e-6


@pytest.mark.parametrize("chunked", [True, False])
def test_conjugate_directions_and_their_preconditioner_save_most_of_the_products(
    chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    products, multiply = [], newton._curvature_product
    monkeypatch.setattr(newton, "_curvature_product", lambda *arguments: products.append(1) or multiply(*arguments))

    for noise in (0.1, 1.5):
        values, labels = _draw(noise=noise)
        if chunked:
            _solve(_share(values, labels))
        else:
            list(minimise_path(_whole(values, labels, 1.0), [l2 / len(values) for l2 in _LAMBDAS], target=1e-6))

    assert len(products) <= (230 if chunked else 400)


def test_newton_steps_that_swing_between_both_ends_of_a_line_are_halved() -> None:
    trials = []

    def slope_at(length: float) -> tuple[float, float]:
        trials.append(length)
        slope, other_end = length - 0.4, 1 - length / 2 if length < 0.4 else 0.55 - length / 2
        return slope, slope / (length - other_end)  # so little curved that a step leads to the other end

    length = search_line(slope_at, -1.0, share=0.2)

    assert 0.2 <= length <= 0.6
    assert len(trials) <= 4


def test_probe_over_many_rows_scores_as_it_does_over_few(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels = _draw()
    ids = tuple(map(str, range(len(values))))
    train = Features(
        values=values, labels=labels * 2, image_ids=ids, n_classes=12, tap="cls"
    )  # every other class empty
    queries = _draw(50, noise=3.0)[0]
    probe, cpu = Logistic(lambdas=(0.0025, 1.0)), torch.device("cpu")
    few = probe.fit(train, cpu)
    monkeypatch.setattr(newton, "_WHOLE_BYTES", 0)
    monkeypatch.setattr("msn_eval.probes.logistic.reduced_rows", None)  # never called

    many = probe.fit(train, cpu)

    assert [item.params for item in many.settings] == [item.params for item in few.settings]
    for item, other in zip(many.settings, few.settings, strict=True):
        assert item.converged
        assert item.objective == pytest.approx(other.objective, rel=1e-6)
    for ours, theirs in zip(many.scores(queries), few.scores(queries), strict=True):
        assert torch.equal(ours.isinf(), theirs.isinf())
        assert torch.equal(ours.argmax(dim=1), theirs.argmax(dim=1))


@pytest.mark.parametrize(
    ("n", "width", "classes", "large"),
    [
        (12_811, 1024, 1000, False),
        (128_112, 384, 1000, True),
        (1_281_167, 384, 1000, True),
        (20_000, 768, 10, False),
        (100_000, 1024, 2, True),  # for its rows alone
        (60_000, 10, 1200, True),  # for its logits alone
    ],
)
def test_sizes_that_are_large(n: int, width: int, classes: int, large: bool) -> None:
    assert is_large(n, width, classes) is large


def test_short_memory_makes_smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    share = _share(*_draw())
    usual = newton.chunk_rows(share)
    monkeypatch.setattr(newton, "available_bytes", lambda: 1 << 20)

    assert usual == (1 << 20) // 30
    assert newton.chunk_rows(share) == (1 << 20) // 128 // 30  # room for 128 bytes a value
    monkeypatch.setattr(newton, "available_bytes", lambda: 0)
    assert newton.chunk_rows(share) == 1


def _solved_on_a_rank(values: Tensor, labels: Tensor) -> list[tuple[Tensor, float, float]]:
    from torch import distributed

    from msn_eval.probes.distributed import add_up

    rank = distributed.get_rank()
    own = slice(0, 180) if rank == 0 else slice(180, None)  # uneven
    share = replace(_share(values, labels), values=values[own], labels=labels[own], total=add_up)
    return [(item.weights, item.objective, item.gap) for item in _solve(share)]


def test_ranks_with_uneven_shares_give_what_one_process_gives(on_ranks: Callable[..., list[Any]]) -> None:
    values, labels = _draw()
    alone = _solve(_share(values, labels))

    first, second = on_ranks(_solved_on_a_rank, values, labels)

    for l2, item, mine, other in zip(_LAMBDAS, alone, first, second, strict=True):
        assert torch.equal(mine[0], other[0])
        assert mine[1:] == other[1:]
        proven = certify(_whole(values, labels, l2), mine[0])
        assert mine[2] <= 1e-6
        assert (proven.objective, proven.gap) == pytest.approx(mine[1:], rel=1e-9)  # over the rows of both
        assert mine[1] == pytest.approx(item.objective, rel=1e-6)
