"""Logistic regression against cyanure at the published settings: seconds as ratios in one run.

    python benchmarks/logistic.py [--images 2000] [--classes 1000] [--width 384] [--rounds 3]

Gaussian clusters, rows centred and normalised, lambda 0.0025. Cyanure runs as the published evaluation runs it
(tol 1e-3, at most 300 epochs) in a process of its own, timed inside that process around `fit` alone. Our solver runs to
its default certificate, a relative duality gap of 1e-6. Objectives are computed in float64 for both.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from msn_eval.protocols.cross_entropy import CrossEntropyProblem, evaluate_point
from msn_eval.protocols.logistic import TARGET_GAP
from msn_eval.protocols.newton import minimise_by_newton
from msn_eval.protocols.rows import centred_rows

_LAMBDA = 0.0025
_CYANURE = """
import sys, time, numpy as np
from cyanure.estimators import Classifier
with np.load(sys.argv[1]) as task:
    rows, labels, strength = task["rows"], task["labels"], float(task["strength"])
model = Classifier(loss="multiclass-logistic", penalty="l2", lambda_1=strength / len(rows), fit_intercept=False,
                   tol=1e-3, max_iter=300, verbose=False)
started = time.perf_counter()
model.fit(rows, labels)
np.savez(sys.argv[2], seconds=time.perf_counter() - started, weights=np.asarray(model.get_weights()).T)
"""


def main() -> None:
    """Print seconds, objectives and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    problem = _clusters(options.images, options.classes, options.width)
    ours = []
    for _ in range(options.rounds):
        started = time.perf_counter()
        point, _ = minimise_by_newton(problem, target=TARGET_GAP)
        ours.append(time.perf_counter() - started)
    seconds, weights = _cyanure(problem)
    theirs = evaluate_point(problem, torch.from_numpy(weights))
    print(
        f"n={options.images} d={options.width} classes={options.classes} lambda={_LAMBDA} threads={torch.get_num_threads()}"
    )
    print(f"ours:    {statistics.median(ours):.2f} s, objective {point.objective:.8f}, relative gap {point.gap:.1e}")
    print(f"cyanure: {seconds:.2f} s, objective {theirs.objective:.8f}, relative gap {theirs.gap:.1e}")
    print(f"ratio:   {seconds / statistics.median(ours):.1f}")


def _clusters(images: int, classes: int, width: int) -> CrossEntropyProblem:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    centres = 0.3 * torch.randn(classes, width, generator=generator)
    rows = centred_rows(centres[labels] + torch.randn(images, width, generator=generator))
    return CrossEntropyProblem(rows=rows, labels=labels, n_classes=classes, mu=_LAMBDA / images)


def _cyanure(problem: CrossEntropyProblem) -> "tuple[float, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]":
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder) / "task.npz", Path(folder) / "answer.npz"
        rows = problem.rows.to(torch.float32).numpy()
        np.savez(task, rows=rows, labels=problem.labels.numpy(), strength=problem.mu * len(rows))
        subprocess.run([sys.executable, "-c", _CYANURE, str(task), str(answer)], check=True)
        with np.load(answer) as stored:
            return float(stored["seconds"]), stored["weights"].astype(np.float64)


if __name__ == "__main__":
    main()
