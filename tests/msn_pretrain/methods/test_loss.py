"""The losses against plain float64 formulas of the papers, on one rank and on two."""

import math

import lightly.loss
import pytest
import torch
from torch import Tensor, distributed

from msn_eval.errors import UsageError
from msn_pretrain import msn_loss, simsiam_loss, sinkhorn
from msn_pretrain.methods.loss import balance, log_predictions, make_log_prior

SETTINGS = {"temperature": 0.2, "sharpening": 0.5, "me_max_weight": 0.7, "entropy_weight": 0.3}


def plain_msn_loss(
    anchors: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    sharpening: float = 0.25,
    sinkhorn_iterations: int = 3,
    me_max_weight: float = 1.0,
    entropy_weight: float = 0.0,
) -> dict[str, Tensor]:
    """Compute equations 1 to 3 of arXiv:2204.07141 with the release's targets, as they are written."""
    unit = [rows / rows.norm(dim=1, keepdim=True) for rows in (anchors, targets.detach(), prototypes)]
    p = torch.exp(unit[0] @ unit[2].T / temperature)
    p = p / p.sum(dim=1, keepdim=True)
    with torch.no_grad():
        t = torch.exp(unit[1] @ unit[2].T / temperature)
        t = (t / t.sum(dim=1, keepdim=True)) ** (1 / sharpening)
        t = t / t.sum(dim=1, keepdim=True)
        for _ in range(sinkhorn_iterations):
            t = t / t.sum(dim=0, keepdim=True)
            t = t / t.sum(dim=1, keepdim=True)
    views = len(anchors) // len(targets)
    cross_entropy = -sum(
        (t[row] * p[view * len(t) + row].log()).sum() for view in range(views) for row in range(len(t))
    ) / len(anchors)
    mean = p.mean(dim=0)
    me_max = math.log(len(prototypes)) + (mean * mean.log()).sum()
    entropy = -(p * p.log()).sum(dim=1).mean()
    total = cross_entropy + me_max_weight * me_max + entropy_weight * entropy
    return {"total": total, "cross_entropy": cross_entropy, "me_max": me_max, "entropy": entropy}


def some_rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return 3 views of 8 anchors, 8 targets, 6 prototypes, of width 5."""
    return some_rows(24, 5, seed=1), some_rows(8, 5, seed=2), some_rows(6, 5, seed=3)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_parts_are_the_plain_formulas(iterations: int) -> None:
    settings = SETTINGS | {"sinkhorn_iterations": iterations}

    loss, plain = msn_loss(*some_batch(), **settings), plain_msn_loss(*some_batch(), **settings)

    torch.testing.assert_close(loss.detached_parts(), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", ["total", "cross_entropy", "me_max", "entropy"])
def test_gradients_are_those_of_the_plain_formulas(part: str) -> None:
    ours, plain = some_batch(), some_batch()
    for rows in (*ours, *plain):
        rows.requires_grad_()

    getattr(msn_loss(*ours, **SETTINGS), part).backward()
    plain_msn_loss(*plain, **SETTINGS)[part].backward()

    assert ours[1].grad is None
    for number in (0, 2):
        torch.testing.assert_close(ours[number].grad, plain[number].grad, rtol=1e-11, atol=1e-13)


def test_defaults_are_those_of_the_release_without_weight_on_entropy() -> None:
    torch.testing.assert_close(msn_loss(*some_batch()).total, plain_msn_loss(*some_batch())["total"])


def test_single_precision_is_within_a_millionth() -> None:
    loss = msn_loss(*(rows.float() for rows in some_batch()), **SETTINGS)

    plain = plain_msn_loss(*some_batch(), **SETTINGS)
    torch.testing.assert_close(loss.detached_parts(), plain, rtol=1e-6, atol=1e-6, check_dtype=False)


def share_of(rows: Tensor, views: int) -> Tensor:
    """Return this rank's images of each view."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    return torch.cat([view.chunk(world)[rank] for view in rows.chunk(views)])


def loss_of_own_share(anchors: Tensor, targets: Tensor, prototypes: Tensor, weight: Tensor) -> dict[str, Tensor]:
    prototypes.requires_grad_()
    weight.requires_grad_()
    loss = msn_loss(share_of(anchors, 3) @ weight, share_of(targets, 1) @ weight, prototypes, **SETTINGS)
    loss.total.backward()
    distributed.all_reduce(weight.grad)
    return loss.detached_parts() | {"weight": weight.grad / distributed.get_world_size(), "prototypes": prototypes.grad}


def test_two_ranks_have_values_and_gradients_of_the_global_batch(on_ranks) -> None:
    anchors, targets, prototypes = some_batch()
    weight = some_rows(5, 5, seed=4)
    ranks = on_ranks(loss_of_own_share, anchors, targets, prototypes, weight)

    prototypes.requires_grad_()
    weight.requires_grad_()
    plain = plain_msn_loss(anchors @ weight, targets @ weight, prototypes, **SETTINGS)
    plain["total"].backward()

    expected = {name: value.detach() for name, value in plain.items()}
    expected |= {"weight": weight.grad, "prototypes": prototypes.grad}
    for values in ranks:
        torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-13)


def test_certain_predictions_give_finite_losses_and_gradients() -> None:
    anchors = torch.eye(3).repeat(2, 1).requires_grad_()
    prototypes = torch.eye(3).requires_grad_()

    loss = msn_loss(anchors, torch.eye(3), prototypes, temperature=0.001, entropy_weight=1.0)
    loss.total.backward()

    assert loss.total.isfinite()
    assert anchors.grad.isfinite().all()
    assert prototypes.grad.isfinite().all()


def test_unused_prototype_keeps_loss_and_gradients_finite() -> None:
    anchors = torch.tensor([[1.0, 0.0]]).requires_grad_()
    prototypes = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).requires_grad_()

    loss = msn_loss(anchors, torch.tensor([[1.0, 0.0]]), prototypes, temperature=0.001)
    loss.total.backward()

    assert float(loss.me_max.detach()) == pytest.approx(math.log(2))
    assert prototypes.grad.isfinite().all()


def test_uniform_prior_is_mean_entropy_maximisation_and_another_is_a_divergence() -> None:
    anchors, targets, prototypes = some_batch()
    prior = make_log_prior("power_law", 6, exponent=1.0)
    mean = torch.cosine_similarity(anchors[:, None], prototypes[None], dim=2).div(0.2).softmax(dim=1).mean(dim=0)

    loss = msn_loss(anchors, targets, prototypes, log_prior=prior, **SETTINGS)

    torch.testing.assert_close(loss.me_max, (mean * (mean.log() - prior)).sum())


def test_half_precision_is_computed_in_single() -> None:
    batch = [rows.bfloat16() for rows in some_batch()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = msn_loss(*batch, **SETTINGS)

    torch.testing.assert_close(
        loss.total, msn_loss(*(rows.float() for rows in batch), **SETTINGS).total, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("shapes", "settings"),
    [
        (((7, 5), (8, 5), (6, 5)), {}),
        (((8, 5), (8, 4), (6, 5)), {}),
        (((8, 5), (0, 5), (6, 5)), {}),
        (((8, 5), (8, 5), (6, 5)), {"temperature": 0.0}),
        (((8, 5), (8, 5), (6, 5)), {"sharpening": float("nan")}),
    ],
)
def test_wrong_shapes_and_settings_are_refused(shapes: tuple[tuple[int, int], ...], settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        msn_loss(*(torch.ones(shape) for shape in shapes), **settings)


def some_views() -> list[Tensor]:
    return [some_rows(8, 5, seed=seed) for seed in range(4)]


def test_simsiam_loss_is_that_of_lightly() -> None:
    p1, z2, p2, z1 = some_views()
    cosine = lightly.loss.NegativeCosineSimilarity()

    torch.testing.assert_close(simsiam_loss(p1, z2, p2, z1), 0.5 * (cosine(p1, z2) + cosine(p2, z1)))


def test_only_predictions_of_simsiam_get_a_gradient() -> None:
    views = [rows.requires_grad_() for rows in some_views()]

    simsiam_loss(*views).backward()

    assert [rows.grad is not None for rows in views] == [True, False, True, False]


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


def test_sinkhorn_stays_finite_where_the_plain_formula_divides_zero_by_zero() -> None:
    assignments = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])

    assert plain_sinkhorn(assignments, 3).isnan().any()
    assert sinkhorn(assignments).sum(dim=1).tolist() == pytest.approx([1, 1])


def test_assignments_beyond_the_range_of_float32_stay_apart() -> None:
    representations, prototypes = torch.eye(2), torch.eye(2)
    logarithms = log_predictions(representations, prototypes, temperature=0.005)

    assert (logarithms.exp() == torch.eye(2)).all()  # 1 / exp(200) is 0 in float32
    assert balance(logarithms, iterations=3).isfinite().all()


def test_power_law_prior_falls_with_the_number_of_the_prototype() -> None:
    shares = torch.arange(1, 6, dtype=torch.float64) ** -0.5

    torch.testing.assert_close(make_log_prior("power_law", 5, exponent=0.5).exp(), shares / shares.sum())
