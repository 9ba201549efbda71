"""L2-regularised multinomial regression on frozen features: the protocol of the MSN tables."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from msn_eval.config.recipes import Params
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.subsets import Subset
from msn_eval.errors import NumericalError
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FeatureProbe, FittedProbe, ProbeConfig, WorkerGroup, centred_rows
from msn_eval.probes.distributed import minimise_together
from msn_eval.probes.logistic_solvers.chunked_newton import RowShare, is_large, minimise_in_chunks
from msn_eval.probes.logistic_solvers.lambda_selection import (
    GRID,
    Choice,
    LabelledRows,
    auto_settings,
    can_be_left_out,
    choose_by_spectrum,
    choose_strength,
    left_out_error,
    typical_strength,
)
from msn_eval.probes.logistic_solvers.newton import minimise_path
from msn_eval.probes.logistic_solvers.objective import CrossEntropyProblem, Solution
from msn_eval.probes.logistic_solvers.reference_solvers import (
    minimise_by_cyanure,
    minimise_by_lbfgs,
    minimise_by_sklearn,
)

Solver = Literal["auto", "newton", "lbfgs", "cyanure", "sklearn"]
SOLVERS: tuple[Solver, ...] = ("auto", "newton", "lbfgs", "cyanure", "sklearn")
TARGET_GAP = 1e-6
LARGEST_GAP = 1e-3


@dataclass(frozen=True, kw_only=True)
class Logistic(FeatureProbe):
    """Mean softmax cross-entropy + (lambda / n) / 2 ||W||^2 on centred, normalised rows; no intercept.

    lambdas: > 0, each a protocol of its own; scikit-learn's C is 1 / lambda
    solver:  how the one minimum is found; `auto` is Newton's method, along the lambdas from large to small
    Source: arXiv:2204.07141, appendix A.2, and its released evaluation.
    """

    name: ClassVar[str] = "logistic"
    version: ClassVar[int] = 1
    tap: ClassVar[str] = "cls"

    lambdas: tuple[float, ...]
    solver: Solver = "auto"

    @property
    def taps(self) -> tuple[str, ...]:
        return (self.tap,)

    def configs(self, n: int) -> tuple[Params, ...]:
        return logistic_settings(self, n)

    def fit(
        self,
        train: Features,
        device: torch.device,
        *,
        workers: WorkerGroup | None = None,
        other_taps: Sequence[Features] = (),
    ) -> FittedProbe:
        return fit_logistic(self, train, device, team=workers)


def default_lambda(subset: str) -> float:
    """Give the published strength: 0.075 for 1 % of ImageNet, 0.0025 for everything else."""
    return 0.075 if subset == "1pct" else 0.0025


def logistic_settings(probe: Logistic, n: int) -> tuple[dict[str, int | float], ...]:
    """Give the hyper-parameters of every protocol that the probe stands for, n being the labelled images."""
    return tuple({"lambda": strength} for strength in probe.lambdas)


@dataclass(frozen=True, kw_only=True)
class LogisticAutoLambda(FeatureProbe):
    """The same objective at the lambda that the labelled images choose; the rule is that of lambda_choice, and its own protocol.

    solver: as in Logistic
    """

    name: ClassVar[str] = "logistic"
    version: ClassVar[int] = 1
    tap: ClassVar[str] = "cls"

    solver: Solver = "auto"

    @property
    def taps(self) -> tuple[str, ...]:
        return (self.tap,)

    def configs(self, n: int) -> tuple[Params, ...]:
        return auto_settings()

    def fit(
        self,
        train: Features,
        device: torch.device,
        *,
        workers: WorkerGroup | None = None,
        other_taps: Sequence[Features] = (),
    ) -> FittedProbe:
        return fit_chosen(self, train, device, team=workers)


@dataclass(frozen=True, kw_only=True)
class _Labelled:
    """Labelled rows, ready to be solved for.

    present:  the classes that have labelled images; the others can never be chosen
    rows:     in the coordinates in which they are solved for
    basis:    (d, n) orthonormal, from those coordinates; None where they are the features' own
    solve:    from strengths, best from large to small, to a solution and its number of steps for each
    """

    present: Tensor
    rows: LabelledRows
    basis: Tensor | None
    solve: Callable[[Sequence[float]], Iterator[tuple[Solution, int]]]


def fit_logistic(
    probe: Logistic, train: Features, device: torch.device, *, team: WorkerGroup | None = None
) -> FittedProbe:
    """Solve for every lambda over the classes that have labelled images; the others can never be chosen.

    team: ranks that share the rows where there are very many
    Raises NumericalError for labelled images of a single class.
    """
    labelled = _labelled(train, device, probe.solver, team)
    falling = sorted(set(probe.lambdas), reverse=True)  # from the smoothest problem to the roughest
    solved = dict(zip(falling, labelled.solve(falling), strict=True))
    found = [(_setting(probe.solver, {"lambda": one}, solved[one]), solved[one][0]) for one in probe.lambdas]
    return _fitted(labelled, found, train.n_classes, device)


def fit_chosen(
    probe: LogisticAutoLambda, train: Features, device: torch.device, *, team: WorkerGroup | None = None
) -> FittedProbe:
    """Choose lambda from the labelled images and solve for it; the certificate is that of the chosen fit.

    Raises NumericalError for labelled images of a single class.
    """
    labelled = _labelled(train, device, probe.solver, team)
    typical = typical_strength(labelled.rows)
    if can_be_left_out(labelled.rows.labels):
        falling = sorted(GRID, reverse=True)
        solved, errors = {}, {}
        for strength, (solution, steps) in zip(falling, labelled.solve(falling), strict=True):
            solved[strength] = (solution, steps)
            errors[strength] = left_out_error(labelled.rows, solution.weights, strength)
        strength = GRID[choose_strength([errors[one] for one in GRID], n=labelled.rows.n, typical=typical)]
        choice = Choice(strength=strength, rule="leave-one-out", typical=typical, left_out=errors[strength])
        best = solved[strength]
    else:
        strength = GRID[choose_by_spectrum(typical)]
        choice = Choice(strength=strength, rule="spectrum", typical=typical)
        (best,) = labelled.solve([strength])
    setting = replace(_setting(probe.solver, auto_settings()[0], best), chosen=choice.as_chosen())
    return _fitted(labelled, [(setting, best[0])], train.n_classes, device)


def _labelled(train: Features, device: torch.device, solver: Solver, team: WorkerGroup | None) -> _Labelled:
    present, labels = torch.unique(train.labels.to(device), return_inverse=True)
    if len(present) < 2:
        raise NumericalError("logistic regression on a single class", hint="Label images of at least two classes.")
    n, width = train.values.shape
    if solver in ("auto", "newton") and is_large(n, width, len(present)):
        whole = RowShare(values=train.values.to(device), labels=labels, n_classes=len(present), n=n)

        def solve(strengths: Sequence[float]) -> Iterator[tuple[Solution, int]]:
            mus = [strength / n for strength in strengths]
            if team is not None:
                return minimise_together(team, whole, mus, target=TARGET_GAP)
            return minimise_in_chunks(whole, mus, target=TARGET_GAP)

        rows = LabelledRows(labels=labels, width=width, prepared=lambda some: centred_rows(whole.values[some]))
        return _Labelled(present=present, rows=rows, basis=None, solve=solve)
    reduced, basis = reduced_rows(centred_rows(train.values.to(device)))
    return _Labelled(
        present=present,
        rows=LabelledRows(labels=labels, width=reduced.shape[1], prepared=reduced.__getitem__),
        basis=basis,
        solve=lambda strengths: _solve(
            CrossEntropyProblem(rows=reduced, labels=labels, n_classes=len(present), mu=strengths[0] / n),
            [strength / n for strength in strengths],
            solver,
        ),
    )


def _setting(solver: Solver, params: Mapping[str, int | float], solved: tuple[Solution, int]) -> ProbeConfig:
    solution, steps = solved
    return ProbeConfig(
        params=params,
        solver="newton" if solver == "auto" else solver,
        converged=solution.gap <= LARGEST_GAP,
        certificate=solution.gap,
        objective=solution.objective,
        iterations=steps,
    )


def _fitted(
    labelled: _Labelled, found: Sequence[tuple[ProbeConfig, Solution]], n_classes: int, device: torch.device
) -> FittedProbe:
    basis = labelled.basis
    weights = [solution.weights if basis is None else solution.weights @ basis.T for _, solution in found]

    def scores(values: Tensor) -> Iterator[Tensor]:
        queries = centred_rows(values.to(device))
        for one in weights:
            whole = queries.new_full((len(queries), n_classes), -torch.inf)
            whole[:, labelled.present] = queries @ one.T
            yield whole

    return FittedProbe(settings=tuple(setting for setting, _ in found), scores=scores)


def _solve(problem: CrossEntropyProblem, mus: Sequence[float], solver: Solver) -> Iterator[tuple[Solution, int]]:
    """Give the solution and its number of steps for every mu in turn."""
    if solver in ("auto", "newton"):
        yield from minimise_path(problem, mus, target=TARGET_GAP)
        return
    for one in (replace(problem, mu=mu) for mu in mus):
        match solver:
            case "lbfgs":
                yield minimise_by_lbfgs(one, target=TARGET_GAP)
            case "cyanure":
                yield minimise_by_cyanure(one)
            case "sklearn":
                yield minimise_by_sklearn(one)


def reduced_rows(rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Give the rows in a basis of their own span where that is smaller: the problem only rotates.

    returns: (n, min(n, d)) coordinates, and the (d, n) orthonormal basis or None
    """
    n, d = rows.shape
    if n >= d:
        return rows, None
    basis, coordinates = torch.linalg.qr(rows.T)
    return coordinates.T.contiguous(), basis


def configure(config: EvaluationConfig, subset: Subset) -> Iterator[Logistic | LogisticAutoLambda]:
    """Yield the probe with the lambdas of the options, and the one that chooses its own where that is asked for."""
    solver = cast(Solver, config.solver)
    if config.strengths or not config.chooses_strength:
        yield Logistic(lambdas=config.strengths or (default_lambda(subset.name),), solver=solver)
    if config.chooses_strength:
        yield LogisticAutoLambda(solver=solver)
