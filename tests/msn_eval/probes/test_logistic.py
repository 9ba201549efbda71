"""The logistic probe: every solver, every invariance, what it refuses."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from msn_eval.features.extraction import Features
from msn_eval.probes import logistic
from msn_eval.probes.base import FittedProbe, centre_rows
from msn_eval.probes.logistic import Logistic, Solver, _describe, default_lambda
from msn_eval.probes.logistic_solvers import newton
from msn_eval.probes.logistic_solvers.newton import minimise_by_newton
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, Solution

CPU = torch.device("cpu")


def _features(values: torch.Tensor, labels: torch.Tensor, n_classes: int) -> Features:
    ids = tuple(f"{row:04d}.png" for row in range(len(values)))
    return Features(values=values, labels=labels, image_ids=ids, n_classes=n_classes, tap="cls")


def _clusters(*, n: int = 60, d: int = 16, n_classes: int = 4) -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % n_classes
    values = torch.randn(n_classes, d, generator=generator)[labels] + 1.5 * torch.randn(n, d, generator=generator)
    return _features(values, labels, n_classes)


def _queries(d: int = 16) -> torch.Tensor:
    return torch.randn(200, d, generator=torch.Generator().manual_seed(1))


def _only_scores(fitted: FittedProbe, values: torch.Tensor) -> torch.Tensor:
    (scores,) = fitted.scores(values)
    return scores


@pytest.mark.parametrize(("subset", "l2"), [("1pct", 0.075), ("1imgs", 0.0025), ("full", 0.0025)])
def test_default_lambda_is_the_published_one(subset: str, l2: float) -> None:
    assert default_lambda(subset) == l2


@pytest.mark.parametrize("solver", ["auto", "newton", "lbfgs", "sklearn"])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_every_solver_scores_like_scikit_learn_on_centred_rows(solver: Solver, n_classes: int) -> None:
    train = _clusters(n_classes=n_classes)
    inverse_l2 = (2 if n_classes == 2 else 1) / 0.5
    model = LogisticRegression(C=inverse_l2, fit_intercept=False, tol=1e-10, max_iter=5_000)
    model.fit(centre_rows(train.values).numpy(), train.labels.numpy())

    fitted = Logistic(lambdas=(0.5,), solver=solver).fit(train, CPU)

    ours = _only_scores(fitted, _queries()).softmax(dim=1)
    theirs = torch.from_numpy(model.predict_proba(centre_rows(_queries()).numpy()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_settings_state_how_the_fit_came_out() -> None:
    (setting,) = Logistic(lambdas=(0.0025,)).fit(_clusters(), CPU).settings

    assert setting.params == {"lambda": 0.0025}
    assert setting.solver == "newton"
    assert setting.converged is True
    assert setting.certificate is not None
    assert setting.certificate <= 1e-6


@pytest.mark.parametrize(("gap", "converged"), [(1e-9, True), (9e-4, True), (1.1e-3, False)])
def test_a_fit_has_converged_up_to_a_gap_of_a_thousandth(gap: float, converged: bool) -> None:
    setting = _describe("auto", {}, Solution(weights=torch.zeros(2, 3), objective=0.5, gap=gap), 7)

    assert (setting.converged, setting.certificate, setting.objective, setting.iterations) == (converged, gap, 0.5, 7)


@pytest.mark.parametrize("solver", ["lbfgs", "sklearn", "cyanure"])
@pytest.mark.parametrize("large", [False, True])
def test_the_solver_that_is_named_solves(solver: Solver, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    solution = Solution(weights=torch.zeros(4, 16), objective=0.123, gap=0.0)
    monkeypatch.setitem(logistic.MINIMISERS, solver, lambda problem, target: (solution, 3))
    monkeypatch.setattr(logistic, "is_large", lambda *sizes: large)

    (setting,) = Logistic(lambdas=(0.1,), solver=solver).fit(_clusters(), CPU).settings

    assert (setting.solver, setting.objective, setting.iterations) == (solver, 0.123, 3)


def test_a_fit_that_was_cut_short_is_not_called_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton, "_MOST_STEPS", 1)

    (setting,) = Logistic(lambdas=(0.0025,)).fit(_clusters(), CPU).settings

    assert setting.converged is False
    assert setting.certificate is not None
    assert setting.certificate > 1e-3


def test_several_lambdas_give_the_results_of_each_alone() -> None:
    train, lambdas = _clusters(), (0.0025, 1.0, 0.075)

    together = Logistic(lambdas=lambdas).fit(train, CPU)

    alone = [Logistic(lambdas=(item,)).fit(train, CPU) for item in lambdas]
    objectives = [item.settings[0].objective for item in alone]
    assert [item.params["lambda"] for item in together.settings] == list(lambdas)
    assert [item.objective for item in together.settings] == pytest.approx(objectives, rel=1e-6)
    # Each is certified to 1e-6, and they are reached by different ways.
    expected = [_only_scores(item, _queries()) for item in alone]
    torch.testing.assert_close(list(together.scores(_queries())), expected, rtol=0, atol=5e-3)


def test_order_of_the_labelled_images_does_not_matter() -> None:
    train = _clusters()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2)).tolist()
    plain = Logistic(lambdas=(0.075,)).fit(train, CPU)

    shuffled = Logistic(lambdas=(0.075,)).fit(train.only([train.image_ids[row] for row in order]), CPU)

    assert shuffled.settings[0].objective == pytest.approx(plain.settings[0].objective, rel=1e-6)
    torch.testing.assert_close(_only_scores(shuffled, _queries()), _only_scores(plain, _queries()), rtol=0, atol=1e-3)


def test_rotating_features_within_the_centred_space_changes_no_score() -> None:
    train = _clusters()
    ones = torch.ones(16, 1, dtype=torch.float64) / 4
    # Columns 1 to 15 span what is left of the features once each row has lost its mean.
    frame = torch.linalg.qr(torch.cat([ones, torch.eye(16, dtype=torch.float64)[:, 1:]], dim=1)).Q
    turn = torch.linalg.qr(torch.randn(15, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    rotation = frame @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), turn) @ frame.T
    plain = _only_scores(Logistic(lambdas=(0.075,)).fit(train, CPU), _queries())

    rotated = Logistic(lambdas=(0.075,)).fit(_features(train.values.double() @ rotation, train.labels, 4), CPU)

    torch.testing.assert_close(_only_scores(rotated, _queries().double() @ rotation), plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize("n", [12, 39, 40, 41])
def test_fewer_images_than_features_are_solved_as_if_the_rows_had_not_been_reduced(n: int) -> None:
    train = _clusters(n=n, d=40)
    rows = centre_rows(train.values)
    problem = CrossEntropyProblem(rows=rows, labels=train.labels, n_classes=4, mu=0.075 / n)
    complete, _ = minimise_by_newton(problem, target=1e-10)

    fitted = Logistic(lambdas=(0.075,)).fit(train, CPU)

    assert fitted.settings[0].objective == pytest.approx(complete.objective, rel=1e-6)
    scores = _only_scores(fitted, _queries(40))
    torch.testing.assert_close(scores, centre_rows(_queries(40)) @ complete.weights.T, rtol=0, atol=2e-3)


def test_more_features_than_images_that_span_little_are_solved() -> None:
    train = _clusters(n=6, d=40, n_classes=2)
    repeated = _features(train.values[:2].repeat(3, 1), train.labels, 2)

    fitted = Logistic(lambdas=(0.075,)).fit(repeated, CPU)

    assert fitted.settings[0].converged
    assert _only_scores(fitted, repeated.values).argmax(dim=1).tolist() == repeated.labels.tolist()


def test_a_class_without_labelled_images_has_a_column_and_is_never_chosen() -> None:
    train = _clusters()
    labels = torch.tensor([0, 2, 4, 5])[train.labels]

    scores = _only_scores(Logistic(lambdas=(0.0025,)).fit(_features(train.values, labels, 6), CPU), _queries())

    assert scores.shape == (200, 6)
    assert set(scores.argmax(dim=1).tolist()) == {0, 2, 4, 5}
    assert scores[:, [1, 3]].isneginf().all()


@pytest.mark.parametrize("solver", ["lbfgs", "sklearn", "cyanure"])
@pytest.mark.parametrize("present", [(0, 1, 2), (1, 3)], ids=str)
def test_every_solver_scores_alike_where_a_class_has_no_labelled_images(
    solver: Solver, present: tuple[int, ...]
) -> None:
    train = _clusters(n_classes=len(present))
    sparse = _features(train.values, torch.tensor(present)[train.labels], 5)
    newtons = _only_scores(Logistic(lambdas=(0.5,)).fit(sparse, CPU), _queries())

    scores = _only_scores(Logistic(lambdas=(0.5,), solver=solver).fit(sparse, CPU), _queries())

    torch.testing.assert_close(scores.softmax(dim=1), newtons.softmax(dim=1), rtol=0, atol=1e-2)


def test_constant_features_score_every_class_alike() -> None:
    fitted = Logistic(lambdas=(0.1,)).fit(_clusters(), CPU)

    scores = _only_scores(fitted, torch.full((2, 16), 0.1))

    assert torch.equal(scores, torch.zeros(2, 4, dtype=torch.float64))


def test_scores_of_an_image_do_not_depend_on_the_images_scored_with_it() -> None:
    fitted = Logistic(lambdas=(0.1,)).fit(_clusters(), CPU)
    together = _only_scores(fitted, _queries())

    alone = torch.cat([_only_scores(fitted, row[None]) for row in _queries()])

    torch.testing.assert_close(alone, together, rtol=0, atol=1e-12)
