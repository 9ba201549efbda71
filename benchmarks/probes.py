"""Compare logistic regression with torch.optim.LBFGS, with cyanure, and with single fits: seconds, as ratios within one run.

    python benchmarks/probes.py [--rounds 3] [--only lbfgs,cyanure,nine,gpu]

The data are Gaussian clusters of 1,000 classes, with rows centred and normalised.

- lbfgs: 5,000 images, 768 features, lambda 0.0025. torch.optim.LBFGS in float32 with its strong Wolfe search stops at
  the first evaluation whose relative duality gap is at most 1e-4; ours stops at a gap of 1e-4 certified in float64.
- cyanure: 2,000 images, 384 features, lambda 0.0025, as the published evaluation runs it (tol 1e-3, at most 300 epochs),
  in a separate process, where only `fit` is timed; ours stops at its default gap of 1e-6.
- nine: three draws of 2,000 images, 768 features, lambdas 0.0025, 0.0137 and 0.075 (the published two and their
  geometric mean), in three calls compared with nine calls, from features to fitted settings.
- gpu: nine fits with 12,811 images and 768 features on CUDA, and their peak memory; only if there is a GPU.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from msn_eval.features.extraction import Features
from msn_eval.probes.base import centre_rows
from msn_eval.probes.logistic import TARGET_GAP, Logistic
from msn_eval.probes.logistic_solvers.newton import minimise_by_newton
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, certify

_CLASSES = 1000
_LAMBDA = 0.0025
_LAMBDAS = (0.0025, 0.0137, 0.075)
_EQUAL_GAP = 1e-4
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
    """Print seconds, gaps and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="lbfgs,cyanure,nine,gpu")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_CLASSES} classes")
    parts = {"lbfgs": _against_lbfgs, "cyanure": _against_cyanure, "nine": _nine_against_alone, "gpu": _nine_on_gpu}
    for name in options.only.split(","):
        parts[name](options.rounds)


def _against_lbfgs(rounds: int) -> None:
    problem = _problem(5000, 768)
    ours, theirs = _interleaved(
        rounds, lambda: minimise_by_newton(problem, target=_EQUAL_GAP), lambda: _torch_lbfgs(problem)
    )
    solution, steps = minimise_by_newton(problem, target=_EQUAL_GAP)
    weights, evaluations = _torch_lbfgs(problem)
    print(f"lbfgs    ours {_median(ours)} s, {steps} steps, gap {solution.gap:.1e}")
    print(f"         torch {_median(theirs)} s, {evaluations} evaluations, gap {certify(problem, weights).gap:.1e}")
    print(f"         ratio {_ratio(theirs, ours)}")


def _torch_lbfgs(problem: CrossEntropyProblem) -> tuple[torch.Tensor, int]:
    """Minimise in float32 with torch.optim.LBFGS until the gap, computed from the gradient, is small enough."""
    rows = problem.rows.float()
    weights = torch.zeros(problem.n_classes, rows.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=2000, history_size=20, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    evaluations = 0

    class Enough(Exception):  # noqa: N818
        pass

    def closure() -> float:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(rows @ weights.T, problem.labels)
        loss = loss + problem.mu / 2 * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert weights.grad is not None
        value = float(loss.detach())
        if float(weights.grad.square().sum()) / (2 * problem.mu * value) <= _EQUAL_GAP:
            raise Enough
        return value

    with contextlib.suppress(Enough):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach(), evaluations


def _against_cyanure(rounds: int) -> None:
    problem = _problem(2000, 384)
    ours, theirs = [], []
    for round_ in range(rounds):
        started = time.perf_counter()
        solution, _ = minimise_by_newton(problem, target=TARGET_GAP)
        ours.append(time.perf_counter() - started)
        if round_ == 0:  # only once, because it takes twenty times as long
            seconds, weights = _cyanure(problem)
            theirs.append(seconds)
    other = certify(problem, torch.from_numpy(weights))
    print(f"cyanure  ours {_median(ours)} s, objective {solution.objective:.8f}, gap {solution.gap:.1e}")
    print(f"         cyanure {_median(theirs)} s, objective {other.objective:.8f}, gap {other.gap:.1e}")
    print(f"         ratio {theirs[0] / statistics.median(ours):.1f}")


def _cyanure(problem: CrossEntropyProblem) -> "tuple[float, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]":
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder) / "task.npz", Path(folder) / "answer.npz"
        rows = problem.rows.to(torch.float32).numpy()
        np.savez(task, rows=rows, labels=problem.labels.numpy(), strength=problem.mu * len(rows))
        subprocess.run([sys.executable, "-c", _CYANURE, str(task), str(answer)], check=True)
        with np.load(answer) as stored:
            return float(stored["seconds"]), stored["weights"].astype(np.float64)


def _nine_against_alone(rounds: int) -> None:
    draws = [_features(2000, 768, seed) for seed in range(3)]
    cpu = torch.device("cpu")
    together, alone = _interleaved(
        rounds,
        lambda: [Logistic(lambdas=_LAMBDAS).fit(draw, cpu) for draw in draws],
        lambda: [Logistic(lambdas=(one,)).fit(draw, cpu) for draw in draws for one in _LAMBDAS],
    )
    print(f"nine     in three calls {_median(together)} s, in nine {_median(alone)} s")
    print(f"         share {_ratio(together, alone)}")


def _nine_on_gpu(rounds: int) -> None:
    if not torch.cuda.is_available():
        print("gpu      skipped: no CUDA device")
        return
    device = torch.device("cuda")
    draws = [_features(12_811, 768, seed) for seed in range(3)]

    def fit() -> None:
        for draw in draws:
            settings = Logistic(lambdas=_LAMBDAS).fit(draw, device).settings
            assert all(one.converged for one in settings)
        torch.cuda.synchronize()

    fit()  # the first call loads the libraries
    torch.cuda.reset_peak_memory_stats()
    seconds = [_seconds(fit) for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(
        f"gpu      nine fits of 12,811 x 768 on {torch.cuda.get_device_name()}: {_median(seconds)} s, peak {peak:.2f} GB"
    )


def _features(images: int, width: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(0)  # the same classes for every draw
    centres = 0.3 * torch.randn(_CLASSES, width, generator=generator)
    labels = torch.arange(images) % _CLASSES
    values = centres[labels] + torch.randn(images, width, generator=generator.manual_seed(seed + 1))
    ids = tuple(f"{row}.png" for row in range(images))
    return Features(values=values, labels=labels, image_ids=ids, n_classes=_CLASSES, tap="cls")


def _problem(images: int, width: int) -> CrossEntropyProblem:
    drawn = _features(images, width, 0)
    return CrossEntropyProblem(
        rows=centre_rows(drawn.values), labels=drawn.labels, n_classes=_CLASSES, mu=_LAMBDA / images
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _interleaved(
    rounds: int, one: Callable[[], object], other: Callable[[], object]
) -> tuple[list[float], list[float]]:
    """Time two functions alternately, so that changes of the machine's speed affect both."""
    pairs = [(_seconds(one), _seconds(other)) for _ in range(rounds)]
    return [first for first, _ in pairs], [second for _, second in pairs]


def _median(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f}"


def _ratio(above: list[float], below: list[float]) -> str:
    ratios = [up / down for up, down in zip(above, below, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
