"""Ridge regression against scikit-learn and against leaving every row out in turn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge

from msn_eval.features.extraction import Features
from msn_eval.probes.base import centre_rows, rank_labels
from msn_eval.probes.ridge import GRID, Ridge, solve_ridge

CPU = torch.device("cpu")


def _features(values: torch.Tensor, labels: torch.Tensor, n_classes: int) -> Features:
    ids = tuple(f"{row:04d}.png" for row in range(len(values)))
    return Features(values=values, labels=labels, image_ids=ids, n_classes=n_classes, tap="cls")


def _clusters(n: int, d: int, *, n_classes: int = 3, noise: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    labels[-1] = 0  # classes of unequal size
    centres = torch.randn(n_classes, d, generator=generator)
    return _features(centres[labels] + noise * torch.randn(n, d, generator=generator), labels, n_classes)


def _one_hot(labels: torch.Tensor, n_classes: int) -> np.ndarray:
    return np.eye(n_classes)[labels.numpy()]


def _scores(train: Features, values: torch.Tensor) -> torch.Tensor:
    (scores,) = Ridge().fit(train, CPU).scores(values)
    return scores


@pytest.mark.parametrize(("n", "d"), [(14, 5), (8, 20), (6, 6)])
def test_leave_one_out_errors_are_those_of_leaving_every_row_out_in_turn(n: int, d: int) -> None:
    train = _clusters(n, d)
    rows, targets = centre_rows(train.values), _one_hot(train.labels, 3)
    naive = []
    for alpha in GRID:
        squares = []
        for row in range(n):
            rest = np.arange(n) != row
            model = SklearnRidge(alpha=alpha, solver="svd", tol=1e-12).fit(rows.numpy()[rest], targets[rest])
            squares.append((model.predict(rows.numpy()[row : row + 1])[0] - targets[row]) ** 2)
        naive.append(np.mean(squares))

    fit = solve_ridge(rows, train.labels, n_classes=3)

    np.testing.assert_allclose(fit.errors.numpy(), naive, rtol=1e-8)
    assert GRID[int(np.argmin(naive))] == fit.alpha


@pytest.mark.parametrize(("n", "d"), [(40, 8), (9, 30)])
def test_scores_are_scikit_learns_at_the_chosen_strength(n: int, d: int) -> None:
    train = _clusters(n, d)
    queries = torch.randn(50, d, generator=torch.Generator().manual_seed(1))
    (setting,) = Ridge().fit(train, CPU).settings
    assert setting.chosen is not None
    model = SklearnRidge(alpha=setting.chosen["alpha"], solver="svd")
    model.fit(centre_rows(train.values).numpy(), _one_hot(train.labels, 3))

    scores = _scores(train, queries)

    np.testing.assert_allclose(scores.numpy(), model.predict(centre_rows(queries).numpy()), atol=1e-9)


def test_choice_does_not_enter_the_parameters_that_a_protocol_is_known_by() -> None:
    both = [Ridge().fit(_clusters(60, 10, noise=noise), CPU).settings[0].params for noise in (0.01, 5.0)]

    assert both == [Ridge().configs(20)[0]] * 2
    assert Ridge().configs(20) == ({"alpha_first": 1e-4, "alpha_last": 1e4, "alphas": 17},)


def test_one_image_per_class_is_fitted_as_smoothly_as_the_grid_allows() -> None:
    train = _features(torch.eye(4, 12), torch.arange(4), 4)

    (setting,) = Ridge().fit(train, CPU).settings

    assert setting.chosen is not None
    assert setting.chosen["alpha"] == GRID[-1]
    assert _scores(train, train.values).argmax(dim=1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("values", [torch.zeros(6, 5), torch.full((6, 5), 0.3), torch.eye(5)[[2] * 6]], ids=str)
def test_equal_features_give_the_class_shares(values: torch.Tensor) -> None:
    train = _features(values, torch.tensor([0, 1, 1, 2, 2, 2]), 3)

    scores = _scores(train, values)

    torch.testing.assert_close(scores, torch.tensor([[1, 2, 3]]).double().expand(6, 3) / 6, rtol=0, atol=1e-12)


def test_rounding_of_equal_rows_is_not_an_axis() -> None:
    item = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows = 1e16 * centre_rows(item * torch.tensor([[1], [3], [5], [7], [11], [13], [17]]))
    assert (rows[1:] - rows[:1]).any()  # or there is nothing to test

    fit = solve_ridge(rows, torch.arange(7) % 2, n_classes=2)

    assert not fit.weights.any()


def test_rows_far_longer_than_the_grid_reaches_have_errors_all_the_same() -> None:
    rows = 1e10 * torch.eye(8, dtype=torch.float64)  # each is all of its own prediction, to the last digit

    fit = solve_ridge(rows, torch.arange(8) % 3, n_classes=3)

    assert fit.errors.isfinite().all()


def test_record_states_the_error_at_the_chosen_strength() -> None:
    train = _clusters(14, 5)

    (setting,) = Ridge().fit(train, CPU).settings

    fit = solve_ridge(centre_rows(train.values), train.labels, n_classes=3)
    assert setting.chosen == {"alpha": fit.alpha, "left_out_error": float(fit.errors[GRID.index(fit.alpha)])}


def test_a_class_without_labelled_images_is_never_chosen() -> None:
    train = _clusters(30, 8)
    sparse = _features(train.values, torch.tensor([1, 2, 4])[train.labels], 5)

    scores = _scores(sparse, train.values)

    prediction, rank = rank_labels(scores, torch.full((30,), 3))
    assert set(prediction.tolist()) <= {1, 2, 4}
    assert set(rank.tolist()) == {5}


def test_rotating_the_centred_rows_changes_no_error() -> None:
    train = _clusters(20, 7)
    rows = centre_rows(train.values)
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q

    turned = solve_ridge(rows @ turn, train.labels, n_classes=3)

    torch.testing.assert_close(turned.errors, solve_ridge(rows, train.labels, n_classes=3).errors)
