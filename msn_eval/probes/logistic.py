"""L2-regularised multinomial regression on frozen features: the protocol of the MSN tables."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from msn_eval.config.recipes import Params
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FeatureProbe, FittedProbe, ProbeConfig, WorkerGroup, centre_rows
from msn_eval.probes.distributed import minimise_on_workers
from msn_eval.probes.logistic_solvers import lambda_selection
from msn_eval.probes.logistic_solvers.lambda_selection import GRID, LabelledRows
from msn_eval.probes.logistic_solvers.newton import RowShare, is_large, minimise_in_chunks, minimise_path
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, Solution
from msn_eval.probes.logistic_solvers.reference_solvers import MINIMISERS

Solver = Literal["auto", "newton", "lbfgs", "cyanure", "sklearn"]
SOLVERS: tuple[Solver, ...] = ("auto", "newton", "lbfgs", "cyanure", "sklearn")
TARGET_GAP = 1e-6
LARGEST_GAP = 1e-3  # above it, a fit has not converged


@dataclass(frozen=True, kw_only=True)
class Logistic(FeatureProbe):
    """Mean softmax cross-entropy + (lambda / n) / 2 ||W||^2 on centred, normalised rows; no intercept.

    Source: arXiv:2204.07141, appendix A.2, and its released evaluation.

    Attributes:
        lambdas: Positive, each a protocol; scikit-learn's C is 1 / lambda.
        solver: How the one minimum is found; `auto` is Newton's method, along the lambdas from large to small.
    """

    name: ClassVar[str] = "logistic"
    version: ClassVar[int] = 1
    has_probabilities: ClassVar[bool] = True

    lambdas: tuple[float, ...]
    solver: Solver = "auto"

    @property
    def taps(self) -> tuple[str, ...]:
        return ("cls",)

    def configs(self, n: int) -> tuple[Params, ...]:
        return tuple({"lambda": l2} for l2 in self.lambdas)

    def fit(
        self,
        train: Features,
        device: torch.device,
        *,
        workers: WorkerGroup | None = None,
        other_taps: Sequence[Features] = (),
    ) -> FittedProbe:
        """Solve over the classes that have labelled images; the others are never chosen. Many rows are shared by `workers`."""
        problem = _prepare(train, device, self.solver, workers)
        configs, solutions = zip(*self._solve(problem), strict=True)
        present, n_classes = problem.present, train.n_classes
        matrices = [each.weights if problem.basis is None else each.weights @ problem.basis.T for each in solutions]

        def scores(values: Tensor) -> Iterator[Tensor]:
            queries = centre_rows(values.to(device))
            for weights in matrices:
                result = queries.new_full((len(queries), n_classes), -torch.inf)
                result[:, present] = queries @ weights.T
                yield result

        return FittedProbe(settings=configs, scores=scores)

    def _solve(self, problem: "_Problem") -> Iterator[tuple[ProbeConfig, Solution]]:
        solved = problem.solve_each(self.lambdas)
        return ((_describe(self.solver, {"lambda": l2}, *solved[l2]), solved[l2][0]) for l2 in self.lambdas)


@dataclass(frozen=True, kw_only=True)
class LogisticAutoLambda(Logistic):
    """The same objective at the lambda that the labelled images choose by the rule of `lambda_selection`: a protocol."""

    lambdas: tuple[float, ...] = GRID

    def configs(self, n: int) -> tuple[Params, ...]:
        return lambda_selection.auto_settings()

    def _solve(self, problem: "_Problem") -> Iterator[tuple[ProbeConfig, Solution]]:
        """Choose lambda from the labelled images and solve for it; the certificate is that of the chosen fit."""
        typical = lambda_selection.typical_strength(problem.rows)
        if lambda_selection.can_be_left_out(problem.rows.labels):
            solved = problem.solve_each(GRID)
            errors = {l2: lambda_selection.left_out_error(problem.rows, solved[l2][0].weights, l2) for l2 in GRID}
            index = lambda_selection.choose_strength(list(errors.values()), n=problem.rows.n, typical=typical)
            evidence: dict[str, float | str] = {"rule": "leave-one-out", "typical": typical}
            evidence["left_out_error"] = errors[GRID[index]]
        else:
            index = lambda_selection.choose_by_spectrum(typical)
            solved, evidence = problem.solve_each([GRID[index]]), {"rule": "spectrum", "typical": typical}
        (params,) = self.configs(problem.rows.n)
        config = _describe(self.solver, params, *solved[GRID[index]])
        yield replace(config, chosen={"lambda": GRID[index], **evidence}), solved[GRID[index]][0]


def configure(config: EvaluationConfig, subset: Subset) -> Iterator[Logistic]:
    """Yield a probe for the lambdas of the options, the published one by default, and one for `auto`."""
    solver = cast(Solver, config.solver)
    if config.strengths or not config.chooses_strength:
        yield Logistic(lambdas=config.strengths or (default_lambda(subset.name),), solver=solver)
    if config.chooses_strength:
        yield LogisticAutoLambda(solver=solver)


def default_lambda(subset: str) -> float:
    """Return the published lambda: 0.075 for 1 % of ImageNet, 0.0025 for everything else."""
    return 0.075 if subset == "1pct" else 0.0025


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Labelled rows and their solver."""

    present: Tensor  # the classes that have labelled images
    rows: LabelledRows  # in the coordinates of the solver
    basis: Tensor | None  # (d, n) orthonormal, from those coordinates to the features'; None if they are the same
    solve: Callable[[Sequence[float]], Iterator[tuple[Solution, int]]]  # solutions and steps for descending lambdas

    def solve_each(self, lambdas: Sequence[float]) -> dict[float, tuple[Solution, int]]:
        """Solve for every lambda, from the smoothest problem to the roughest."""
        descending = sorted(set(lambdas), reverse=True)
        return dict(zip(descending, self.solve(descending), strict=True))


def _prepare(train: Features, device: torch.device, solver: Solver, workers: WorkerGroup | None) -> _Problem:
    present, labels = torch.unique(train.labels.to(device), return_inverse=True)
    n, width = train.values.shape
    newton = solver in ("auto", "newton")
    if newton and is_large(n, width, len(present)):
        share = RowShare(values=train.values.to(device), labels=labels, n_classes=len(present), n=n)

        def solve_in_chunks(lambdas: Sequence[float]) -> Iterator[tuple[Solution, int]]:
            mus = [l2 / n for l2 in lambdas]
            if workers is not None:
                return minimise_on_workers(workers, share, mus, target=TARGET_GAP)
            return minimise_in_chunks(share, mus, target=TARGET_GAP)

        rows = LabelledRows(labels=labels, width=width, prepared=lambda some: centre_rows(share.values[some]))
        return _Problem(present=present, rows=rows, basis=None, solve=solve_in_chunks)
    reduced, basis = reduced_rows(centre_rows(train.values.to(device)))

    def solve(lambdas: Sequence[float]) -> Iterator[tuple[Solution, int]]:
        problems = [
            CrossEntropyProblem(rows=reduced, labels=labels, n_classes=len(present), mu=l2 / n) for l2 in lambdas
        ]
        if newton:
            return minimise_path(problems[0], [problem.mu for problem in problems], target=TARGET_GAP)
        return (MINIMISERS[solver](problem, target=TARGET_GAP) for problem in problems)

    rows = LabelledRows(labels=labels, width=reduced.shape[1], prepared=reduced.__getitem__)
    return _Problem(present=present, rows=rows, basis=basis, solve=solve)


def _describe(solver: Solver, params: Params, solution: Solution, steps: int) -> ProbeConfig:
    return ProbeConfig(
        params=params,
        solver="newton" if solver == "auto" else solver,
        converged=solution.gap <= LARGEST_GAP,
        certificate=solution.gap,
        objective=solution.objective,
        iterations=steps,
    )


def reduced_rows(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (n, min(n, d)) coordinates of rows in an orthonormal basis of their span, and that (d, n) basis if it is smaller."""
    n, d = rows.shape
    if n >= d:
        return rows, None
    basis, coordinates = torch.linalg.qr(rows.T)
    return coordinates.T.contiguous(), basis
