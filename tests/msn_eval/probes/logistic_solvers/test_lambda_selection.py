"""The choice of lambda: left-out errors against leaving out, the spectrum against its closed form, the rule."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from scipy.special import expit
from torch import Tensor

from msn_eval import evaluate
from msn_eval.features.extraction import Features
from msn_eval.probes.base import centre_rows
from msn_eval.probes.logistic import Logistic, LogisticAutoLambda
from msn_eval.probes.logistic_solvers import lambda_selection as lambda_choice
from msn_eval.probes.logistic_solvers import newton as full_data
from msn_eval.probes.logistic_solvers.lambda_selection import (
    GRID,
    LabelledRows,
    auto_settings,
    can_be_left_out,
    choose_by_spectrum,
    choose_strength,
    left_out_error,
    typical_strength,
)
from msn_eval.probes.logistic_solvers.newton import minimise_by_newton
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem

CPU = torch.device("cpu")


def _clusters(n: int, d: int, classes: int, *, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, generator=generator)
    return centre_rows(centres[labels] + noise * torch.randn(n, d, generator=generator)), labels


def _labelled(rows: Tensor, labels: Tensor) -> LabelledRows:
    return LabelledRows(labels=labels, width=rows.shape[1], prepared=rows.__getitem__)


def _weights(rows: Tensor, labels: Tensor, strength: float, classes: int) -> Tensor:
    problem = CrossEntropyProblem(rows=rows, labels=labels, n_classes=classes, mu=strength / len(rows))
    return minimise_by_newton(problem, target=1e-10)[0].weights.double()


def _features(rows: Tensor, labels: Tensor) -> Features:
    ids = tuple(map(str, range(len(rows))))
    return Features(values=rows.float(), labels=labels, image_ids=ids, n_classes=int(labels.max()) + 1, tap="cls")


@pytest.mark.parametrize("strength", [0.01, 0.1, 1.0])
def test_of_two_classes_the_left_out_error_is_that_of_the_newton_step(strength: float) -> None:
    rows, labels = _clusters(60, 10, 2, noise=2.0)
    weights = _weights(rows, labels, strength, 2)
    # One vector v = w_1 - w_0 with the penalty lambda / 4 |v|^2; x'v without row i, by one Newton step.
    score = (rows @ (weights[1] - weights[0])).numpy()
    chance, sign = expit(score), 2 * labels.numpy() - 1
    curvature = chance * (1 - chance)
    inverse = torch.linalg.inv((rows * torch.from_numpy(curvature)[:, None]).T @ rows + strength / 2 * torch.eye(10))
    pull = ((rows @ inverse) * rows).sum(dim=1).numpy()
    without = score + pull * (chance - labels.numpy()) / (1 - curvature * pull)

    assert left_out_error(_labelled(rows, labels), weights, strength) == pytest.approx((without * sign < 0).mean())


def test_left_out_errors_are_about_those_of_leaving_every_row_out_in_turn() -> None:
    rows, labels = _clusters(30, 20, 3, noise=2.0)
    apart = []
    for strength in (0.01, 0.1, 1.0):
        wrong = 0
        for row in range(30):
            rest = torch.arange(30) != row
            without = _weights(rows[rest], labels[rest], strength, 3)
            wrong += int((rows[row] @ without.T).argmax()) != int(labels[row])
        apart.append(
            30 * left_out_error(_labelled(rows, labels), _weights(rows, labels, strength, 3), strength) - wrong
        )

    assert apart == pytest.approx(
        [3, 2, 0]
    )  # one step is too little where the fit is certain of every row: never too kind


def test_the_training_error_is_not_the_left_out_error() -> None:
    rows, labels = _clusters(40, 60, 4, noise=3.0)  # more axes than rows: every row can be fitted
    weights = _weights(rows, labels, 1e-3, 4)

    assert ((rows @ weights.T).argmax(dim=1) == labels).all()
    assert left_out_error(_labelled(rows, labels), weights, 1e-3) > 0.4


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = _clusters(50, 12, 4)
    weights = _weights(rows, labels, 0.1, 4)
    complete = left_out_error(_labelled(rows, labels), weights, 0.1), typical_strength(_labelled(rows, labels))
    monkeypatch.setattr(lambda_choice, "_BLOCK_ROWS", 3)

    some = left_out_error(_labelled(rows, labels), weights, 0.1), typical_strength(_labelled(rows, labels))

    assert some == pytest.approx(complete)


@pytest.mark.parametrize(("n", "d"), [(9, 30), (40, 8)])
def test_typical_strength_is_a_share_of_the_median_eigenvalue_that_is_not_zero(n: int, d: int) -> None:
    rows, labels = _clusters(n, d, 3)
    sizes = torch.linalg.svdvals(rows - rows.mean(dim=0))[
        : min(n, d) - 1
    ].square()  # rows add up to zero, or over columns

    assert typical_strength(_labelled(rows, labels)) == pytest.approx(
        0.3 * float(sizes.sort().values[(len(sizes) - 1) // 2])
    )


@pytest.mark.parametrize("value", [1.0, 0.1], ids=["exactly", "but for rounding"])
def test_equal_rows_have_the_smallest_strength(value: float) -> None:
    rows = torch.full((7, 3), value, dtype=torch.float64)

    assert choose_by_spectrum(typical_strength(_labelled(rows, torch.arange(7)))) == 0


def test_the_choice_by_spectrum_is_the_nearest_of_the_grid() -> None:
    assert [GRID[choose_by_spectrum(typical)] for typical in (1e-9, 0.0009, 0.1, 1e6)] == [GRID[0], 1e-3, 0.1, GRID[-1]]


def test_distinguishable_errors_overrule_the_spectrum() -> None:
    errors = [0.5] * len(GRID)
    errors[2] = 0.2

    assert choose_strength(errors, n=1000, typical=GRID[9]) == 2  # a standard error of 0.013
    assert choose_strength(errors, n=10, typical=GRID[9]) == 2  # 0.13: 0.5 is more than two above 0.2
    assert choose_strength(errors, n=5, typical=GRID[9]) == 9  # 0.18


def test_of_two_equally_near_the_larger_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lambda_choice, "GRID", (1.0, 4.0))  # whose logarithms are exactly as far from that of 2

    assert choose_strength([0.0, 0.0], n=4, typical=2.0) == 1


def test_an_error_of_nothing_is_uncertain_by_one_image() -> None:
    errors = [0.5] * len(GRID)
    errors[3], errors[6], errors[7] = 0.0, 0.01, 0.05

    assert choose_strength(errors, n=100, typical=GRID[7]) == 6  # within two images of a hundred, and five are not


def test_every_class_must_spare_a_row() -> None:
    assert can_be_left_out(torch.tensor([0, 1, 1, 0]))
    assert not can_be_left_out(torch.tensor([0, 1, 1]))


@pytest.mark.parametrize(("count", "rule"), [(1, "spectrum"), (4, "leave-one-out")])
def test_the_chosen_fit_is_the_fit_at_that_strength(count: int, rule: str) -> None:
    rows, labels = _clusters(5 * count, 16, 5, noise=0.7)
    train, queries = _features(rows, labels), torch.randn(50, 16, generator=torch.Generator().manual_seed(3))

    (setting,) = (fitted := LogisticAutoLambda().fit(train, CPU)).settings

    assert setting.chosen is not None
    assert setting.params == auto_settings()[0]
    assert setting.chosen["rule"] == rule
    strength = setting.chosen["lambda"]
    assert strength in GRID
    known = Logistic(lambdas=(cast(float, strength),)).fit(train, CPU)
    assert setting.objective == pytest.approx(known.settings[0].objective, rel=1e-6)
    assert setting.certificate is not None
    assert setting.certificate <= 1e-6
    (ours,), (theirs,) = fitted.scores(queries), known.scores(queries)
    assert torch.equal(ours.argmax(dim=1), theirs.argmax(dim=1))


def test_the_strength_is_chosen_by_the_left_out_errors_of_the_fits_at_each() -> None:
    rows, labels = _clusters(40, 16, 5, noise=1.5)
    labelled = _labelled(rows.float().double(), labels)
    errors = [left_out_error(labelled, _weights(rows, labels, strength, 5), strength) for strength in GRID]
    best = choose_strength(errors, n=40, typical=typical_strength(labelled))

    (setting,) = LogisticAutoLambda().fit(_features(rows, labels), CPU).settings

    assert setting.chosen is not None
    assert setting.chosen["lambda"] == GRID[best]
    assert setting.chosen["left_out_error"] == pytest.approx(errors[best])
    assert errors[best] > min(errors)  # or the smallest error could stand in the record as well


def test_very_many_rows_choose_as_few_do(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, labels = _clusters(200, 16, 4, noise=1.5)
    train = _features(5 * rows + torch.arange(200)[:, None], labels)  # as an encoder returns them: not prepared
    few = LogisticAutoLambda().fit(train, CPU).settings[0]
    monkeypatch.setattr(full_data, "_WHOLE_BYTES", 0)

    many = LogisticAutoLambda().fit(train, CPU).settings[0]

    assert many.chosen == pytest.approx(few.chosen)


def test_validation_images_do_not_influence_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation labels that would reveal the best lambda change no choice: with them shifted by one class, every lambda
    would look wrong, and a choice that saw them would be another."""
    from msn_eval.evaluation.eval_set import EvalSet

    def chosen(folder: str) -> list[Any]:
        found = evaluate(
            ["pixels"], data="digits", subsets=["1img@1", "2imgs@1"], lambda_=["auto"], limit=20, out=tmp_path / folder,
            device="cpu", no_cache=True,
        )  # fmt: skip
        assert {result.protocol["probe"]["params"]["auto"] for result in found} == {1}  # type: ignore[index]
        return [(result.probe.chosen, result.probe.certificate, result.metrics) for result in found]

    honest = chosen("honest")
    plain = EvalSet.select

    def shifted(self: EvalSet, features: Any) -> Any:
        selected = plain(self, features)
        selected.labels.add_(1).remainder_(10)
        return selected

    monkeypatch.setattr(EvalSet, "select", shifted)
    misled = chosen("misled")

    assert [item[:2] for item in misled] == [item[:2] for item in honest]
    assert [item[2] for item in misled] != [item[2] for item in honest]
