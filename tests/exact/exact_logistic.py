"""Logistic regression over the whole grid of sizes and lambdas, against float64 optima found by another method.

    python tests/exact/exact_logistic.py [--widths 64,384] [--images 10,1000] > reports/exact/logistic.md

Every optimum is found by Newton's method with every product in float64, each from the optimum of the lambda before it,
until its own gap is below 1e-11: far below anything that is checked here. What must hold of our fits, all lambdas of a
size in one call: the objective within 1e-6 relative of that optimum, the certificate not below the true gap, and a call
for one lambda giving the same objective within 1e-6. Ends with 1 where one does not.
"""

import argparse
import sys
import time
from dataclasses import replace

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from msn_eval.features.extraction import Features
from msn_eval.probes.base import centre_rows
from msn_eval.probes.logistic import Logistic
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, evaluate_objective

_LAMBDAS = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)
_CLOSE = 1e-6
_ROUNDING = 1e-12  # relative, of a float64 objective: two of them are subtracted for the true gap
_OPTIMAL = 1e-11


def main() -> int:
    """Print a row per fit; return 1 where anything does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="64,384,768,1536")
    parser.add_argument("--images", default="10,1000,5000")
    parser.add_argument("--classes", type=int, default=100)
    options = parser.parse_args()
    print(f"# Logistic regression over sizes and lambdas\n\ntorch {torch.__version__}, {options.classes} classes.\n")
    print("| features | n | d | lambda | objective | above the optimum | certificate | true gap | alone | holds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    started, failed, fits = time.perf_counter(), 0, 0
    sets = [
        _clusters(n, d, options.classes)
        for d in map(int, options.widths.split(","))
        for n in map(int, options.images.split(","))
    ]
    for name, train in [*sets, ("digits, real", _digits())]:
        for row, holds in _checked(name, train):
            print(row, flush=True)
            failed, fits = failed + (not holds), fits + 1
    print(f"\n{fits - failed} of {fits} fits hold; {time.perf_counter() - started:.0f} s.")
    return int(failed > 0)


def _clusters(n: int, d: int, classes: int) -> tuple[str, Features]:
    generator = torch.Generator().manual_seed(n + d)
    classes = min(classes, n)
    labels = torch.arange(n) % classes
    spread = torch.linspace(0, -2, d).exp()  # some directions matter more than others
    centres = 0.3 * torch.randn(classes, d, generator=generator)
    return "clusters", _features((centres[labels] + torch.randn(n, d, generator=generator)) * spread, labels)


def _digits() -> Features:
    values, labels = load_digits(return_X_y=True)
    return _features(torch.from_numpy(values[:1000]).float(), torch.from_numpy(labels[:1000]))


def _features(values: Tensor, labels: Tensor) -> Features:
    ids = tuple(f"{row}.png" for row in range(len(values)))
    return Features(values=values, labels=labels, image_ids=ids, n_classes=int(labels.max()) + 1, tap="cls")


def _checked(name: str, train: Features):  # type: ignore[no-untyped-def]
    cpu = torch.device("cpu")
    together = Logistic(lambdas=_LAMBDAS).fit(train, cpu).settings
    rows = centre_rows(train.values)
    if len(rows) < rows.shape[1]:  # the objective only rotates; the optimum is sought in the smaller coordinates
        rows = torch.linalg.qr(rows.T).R.T.contiguous()
    problem = CrossEntropyProblem(rows=rows, labels=train.labels, n_classes=train.n_classes, mu=1.0)
    start = torch.zeros(train.n_classes, rows.shape[1], dtype=torch.float64)
    for strength, setting in zip(_LAMBDAS, together, strict=True):
        optimum, start = optimal(replace(problem, mu=strength / len(rows)), start)
        alone = Logistic(lambdas=(strength,)).fit(train, cpu).settings[0]
        assert setting.objective is not None
        assert setting.certificate is not None
        assert alone.objective is not None
        above = setting.objective / optimum - 1
        true = (setting.objective - optimum) / setting.objective
        apart = abs(alone.objective / setting.objective - 1)
        holds = (
            abs(above) <= _CLOSE and setting.certificate >= true - _ROUNDING and apart <= _CLOSE and setting.converged
        )
        yield (
            f"| {name} | {len(rows)} | {train.values.shape[1]} | {strength:g} | {setting.objective:.8f} | {above:.1e} | "
            f"{setting.certificate:.1e} | {true:.1e} | {apart:.1e} | {'yes' if holds else 'NO'} |",
            holds,
        )


def optimal(problem: CrossEntropyProblem, start: Tensor) -> tuple[float, Tensor]:
    """Return the minimum and its weights, by Newton steps solved in float64 throughout, halved while they lead uphill."""
    weights = start
    for _ in range(200):
        objective, gradient = evaluate_objective(problem, weights)
        gap = float(gradient.square().sum()) / (2 * problem.mu * objective)
        if gap <= _OPTIMAL:
            return objective, weights
        chances = (problem.rows @ weights.T).softmax(dim=1)
        direction, length = _step(problem, chances, -gradient, 1e-2 if gap < 1e-2 else 0.1), 1.0
        while evaluate_objective(problem, weights + length * direction)[0] > objective and length > 1e-6:
            length /= 2
        weights = weights + length * direction
    raise ArithmeticError(f"no optimum: gap {gap:.1e}")


def _step(problem: CrossEntropyProblem, chances: Tensor, right: Tensor, tolerance: float) -> Tensor:
    result, residual = torch.zeros_like(right), right.clone()
    search, squared = residual.clone(), float(residual.square().sum())
    goal = tolerance**2 * squared
    for _ in range(3000):
        change = problem.rows @ search.T
        bent = chances * change
        bent -= chances * bent.sum(dim=1, keepdim=True)
        product = bent.T @ problem.rows / len(problem.rows) + problem.mu * search
        length = squared / float((search * product).sum())
        result += length * search
        residual -= length * product
        squared, before = float(residual.square().sum()), squared
        if squared <= goal:
            break
        search = residual + squared / before * search
    return result


if __name__ == "__main__":
    sys.exit(main())
