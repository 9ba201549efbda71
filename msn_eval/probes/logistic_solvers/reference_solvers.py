"""The same objective solved by scikit-learn and by cyanure, to check our own solvers against."""

import os
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from msn_eval.errors import ResourceError, UsageError
from msn_eval.probes.logistic_solvers.objective import (
    CrossEntropyProblem,
    Solution,
    certify,
    evaluate_point,
    search_line,
    zero_point,
)

_SKLEARN_TOLERANCE = 1e-10  # on the gradient; its default of 1e-4 stops after two steps here
_SKLEARN_STEPS = 20_000
_CYANURE_TOLERANCE = 1e-5  # on its own relative duality gap; the published runs stop at 1e-3
_CYANURE_EPOCHS = 3_000
_CHILD_SECONDS = 24 * 3600


def minimise_by_sklearn(problem: CrossEntropyProblem) -> tuple[Solution, int]:
    """Solve by scikit-learn's LogisticRegression with C = 1 / lambda (2 / lambda for its binary form)."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    strength = problem.mu * len(problem.rows)
    model = LogisticRegression(
        C=(2 if problem.n_classes == 2 else 1) / strength,
        fit_intercept=False,
        tol=_SKLEARN_TOLERANCE,
        max_iter=_SKLEARN_STEPS,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # our certificate says how far it came
        model.fit(problem.rows.cpu().numpy(), problem.labels.cpu().numpy())
    return _solution(problem, model.coef_), int(model.n_iter_.max())


def minimise_by_cyanure(problem: CrossEntropyProblem) -> tuple[Solution, int]:
    """Solve by cyanure in a process of its own.

    Its `fit` switches OpenMP to dynamic teams for the whole process, after which PyTorch's bf16 products are wrong
    there; so it never runs in ours. Raises UsageError where it is not installed, ResourceError where it dies.
    """
    with tempfile.TemporaryDirectory(prefix="msn-eval-cyanure-") as folder:
        task, answer = Path(folder) / "task.npz", Path(folder) / "answer.npz"
        np.savez(task, rows=problem.rows.cpu().numpy(), labels=problem.labels.cpu().numpy(), mu=problem.mu)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        child = subprocess.run(
            [sys.executable, "-m", "msn_eval.probes.logistic_solvers.reference_solvers", str(task), str(answer)],
            capture_output=True,
            text=True,
            timeout=_CHILD_SECONDS,
            env=environment,
            check=False,
        )
        if not answer.exists():
            if "No module named 'cyanure'" in child.stderr:
                raise UsageError("--solver cyanure: cyanure is not installed", hint="pip install cyanure")
            last = (child.stderr.strip().splitlines() or ["no message"])[-1]
            raise ResourceError(f"cyanure ended with code {child.returncode}: {last}", hint="Use --solver auto.")
        with np.load(answer) as stored:
            return _solution(problem, stored["weights"]), int(stored["epochs"])


def _solution(problem: CrossEntropyProblem, weights: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> Solution:
    if problem.n_classes == 2:  # one vector w for both classes: their weights are -w/2 and w/2
        weights = np.concatenate([-weights.reshape(1, -1) / 2, weights.reshape(1, -1) / 2])
    found: Tensor = torch.as_tensor(weights, dtype=torch.float64, device=problem.rows.device)
    return certify(problem, found)


def _cyanure_child(task: Path, answer: Path) -> None:
    """Solve the task in this process and write the weights: (classes, d), or (d,) for two classes."""
    from cyanure.estimators import Classifier

    with np.load(task) as stored:
        rows, labels, mu = stored["rows"], stored["labels"], float(stored["mu"])
    binary = len(np.unique(labels)) == 2
    model = Classifier(
        loss="logistic" if binary else "multiclass-logistic",
        penalty="l2",
        lambda_1=mu / 2 if binary else mu,
        fit_intercept=False,
        tol=_CYANURE_TOLERANCE,
        max_iter=_CYANURE_EPOCHS,
        verbose=False,
    )
    model.fit(rows, labels)
    weights = np.asarray(model.get_weights(), dtype=np.float64)
    np.savez(answer, weights=weights if binary else weights.T, epochs=int(np.max(model.n_iter_)))


if __name__ == "__main__":
    _cyanure_child(Path(sys.argv[1]), Path(sys.argv[2]))


_MEMORY = 20
_MOST_STEPS = 2000


def minimise_by_lbfgs(problem: CrossEntropyProblem, *, target: float) -> tuple[Solution, int]:
    """Minimise until the relative duality gap is at most `target`; give the solution and the steps taken.

    Two-loop recursion of Nocedal (1980), float64.
    """
    point, step = zero_point(problem), 0
    history: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=_MEMORY)
    while point.gap > target and step < _MOST_STEPS:
        direction = -_inverse_curvature_product(point.gradient, history, problem.mu)
        along = problem.rows @ direction.T
        length = search_line(problem, point, direction, along)
        moved = evaluate_point(problem, point.weights + length * direction, point.logits + length * along)
        step += 1
        if moved.objective > point.objective:
            if not history:  # even the steepest direction leads nowhere: float64 has no better answer
                break
            history.clear()
            continue
        change = moved.gradient - point.gradient
        curvature = float((change * direction).sum()) * length
        if curvature > 0:
            history.append((length * direction, change, 1 / curvature))
        point = moved
    return Solution(weights=point.weights, objective=point.objective, gap=point.gap), step


def _inverse_curvature_product(gradient: Tensor, history: "deque[tuple[Tensor, Tensor, float]]", mu: float) -> Tensor:
    """Give the L-BFGS approximation of the inverse Hessian times the gradient."""
    product = gradient.clone()
    shares = []
    for move, change, weight in reversed(history):
        share = weight * float((move * product).sum())
        product.sub_(change, alpha=share)
        shares.append(share)
    if history:
        _, change, weight = history[-1]
        product.div_(weight * float(change.square().sum()))
    else:
        product.div_(mu + 1 / len(gradient))
    for (move, change, weight), share in zip(history, reversed(shares), strict=True):
        product.add_(move, alpha=share - weight * float((change * product).sum()))
    return product
