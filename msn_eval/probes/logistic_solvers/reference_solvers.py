"""The same objective by scipy, scikit-learn and cyanure, to check our own solver against."""

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from msn_eval.errors import ResourceError, UsageError
from msn_eval.probes.logistic_solvers.newton import minimise_by_newton
from msn_eval.probes.logistic_solvers.objective import (
    CrossEntropyProblem,
    Solution,
    certify,
    evaluate_objective,
    inner,
    relative_gap,
)

_LBFGS_STEPS = 5_000
_SKLEARN_TOLERANCE = 1e-10  # of the gradient; its default of 1e-4 stops after two steps here
_SKLEARN_STEPS = 20_000
_CYANURE_TOLERANCE = 1e-5  # of its own relative duality gap; the published runs stop at 1e-3
_CYANURE_EPOCHS = 3_000
_CYANURE_SECONDS = 24 * 3600


def minimise_by_lbfgs(problem: CrossEntropyProblem, *, target: float) -> tuple[Solution, int]:
    """Minimise by scipy's L-BFGS-B in float64 until the relative duality gap is at most `target`."""
    from scipy.optimize import minimize

    shape = (problem.n_classes, problem.rows.shape[1])
    best, smallest = np.zeros(shape), np.inf

    def evaluate(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        nonlocal best, smallest
        weights = torch.from_numpy(flat.reshape(shape)).to(problem.rows.device)
        objective, gradient = evaluate_objective(problem, weights)
        gap = relative_gap(objective, inner(gradient, gradient), problem.mu)
        if gap < smallest:
            best, smallest = flat.reshape(shape).copy(), gap
        return objective, gradient.cpu().numpy().ravel()

    def stop(intermediate_result: object) -> None:
        if smallest <= target:
            raise StopIteration

    options = {"maxcor": 20, "maxiter": _LBFGS_STEPS, "maxfun": 2 * _LBFGS_STEPS, "ftol": 0.0, "gtol": 0.0}
    result = minimize(evaluate, np.zeros(best.size), jac=True, method="L-BFGS-B", callback=stop, options=options)
    return certify(problem, torch.from_numpy(best).to(problem.rows.device)), int(result.nit)


def minimise_by_sklearn(problem: CrossEntropyProblem, *, target: float) -> tuple[Solution, int]:
    """Minimise by scikit-learn's LogisticRegression, to its own tolerance, with C = 1 / lambda (2 / lambda for two classes)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    inverse = (2 if problem.n_classes == 2 else 1) / (problem.mu * len(problem.rows))
    model = LogisticRegression(C=inverse, fit_intercept=False, tol=_SKLEARN_TOLERANCE, max_iter=_SKLEARN_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the certificate says how far it came
        model.fit(problem.rows.cpu().numpy(), problem.labels.cpu().numpy())
    return _certify_weights(problem, model.coef_), int(model.n_iter_.max())


def minimise_by_cyanure(problem: CrossEntropyProblem, *, target: float) -> tuple[Solution, int]:
    """Minimise by cyanure, to its own tolerance, in a separate process.

    Its `fit` switches OpenMP to dynamic teams, after which PyTorch's bfloat16 products in that process are wrong.
    Raises UsageError if cyanure is not installed, ResourceError if the process died.
    """
    with tempfile.TemporaryDirectory(prefix="msn-eval-cyanure-") as folder:
        task, answer = Path(folder) / "task.npz", Path(folder) / "answer.npz"
        np.savez(task, rows=problem.rows.cpu().numpy(), labels=problem.labels.cpu().numpy(), mu=problem.mu)
        command = [sys.executable, "-m", __name__, str(task), str(answer)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        child = subprocess.run(command, capture_output=True, text=True, timeout=_CYANURE_SECONDS, env=env, check=False)
        if not answer.exists():
            if "No module named 'cyanure'" in child.stderr:
                hint = (
                    "pip install cyanure (wheels: Python 3.11 and 3.12, none for Linux on ARM), or use --solver auto."
                )
                raise UsageError("--solver cyanure: the package cyanure is not installed", hint=hint)
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise ResourceError(f"cyanure ended with code {child.returncode}: {last}", hint="Use --solver auto.")
        with np.load(answer) as stored:
            return _certify_weights(problem, stored["weights"]), int(stored["epochs"])


MINIMISERS: dict[str, Callable[..., tuple[Solution, int]]] = {
    "auto": minimise_by_newton,
    "newton": minimise_by_newton,
    "lbfgs": minimise_by_lbfgs,
    "cyanure": minimise_by_cyanure,
    "sklearn": minimise_by_sklearn,
}


def _certify_weights(problem: CrossEntropyProblem, weights: NDArray[np.float64]) -> Solution:
    if problem.n_classes == 2:  # one vector w for both classes: their weights are -w / 2 and w / 2
        weights = np.concatenate([-weights.reshape(1, -1) / 2, weights.reshape(1, -1) / 2])
    return certify(problem, torch.as_tensor(weights, dtype=torch.float64, device=problem.rows.device))


def _run_cyanure(task: Path, answer: Path) -> None:
    """Solve the task in this process and write the weights: (classes, d), or (d,) for two classes."""
    from cyanure.estimators import Classifier

    with np.load(task) as stored:
        rows, labels, mu = stored["rows"], stored["labels"], float(stored["mu"])
    binary = len(np.unique(labels)) == 2
    loss, lambda_1 = ("logistic", mu / 2) if binary else ("multiclass-logistic", mu)
    limits = {"tol": _CYANURE_TOLERANCE, "max_iter": _CYANURE_EPOCHS}
    model = Classifier(loss=loss, penalty="l2", lambda_1=lambda_1, fit_intercept=False, verbose=False, **limits)
    model.fit(rows, labels)
    weights = np.asarray(model.get_weights(), dtype=np.float64)
    np.savez(answer, weights=weights if binary else weights.T, epochs=int(np.max(model.n_iter_)))


if __name__ == "__main__":
    _run_cyanure(Path(sys.argv[1]), Path(sys.argv[2]))
