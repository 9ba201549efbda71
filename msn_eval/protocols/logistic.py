"""L2-regularised multinomial regression on frozen features: the protocol of the MSN tables."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from msn_eval.errors import NumericalError
from msn_eval.features import Features
from msn_eval.protocols.cross_entropy import CrossEntropyProblem, Solution
from msn_eval.protocols.fitted import Fitted, Setting
from msn_eval.protocols.full_data import RowShare, is_large, minimise_in_chunks
from msn_eval.protocols.lbfgs import minimise_by_lbfgs
from msn_eval.protocols.newton import minimise_path
from msn_eval.protocols.reference_solvers import minimise_by_cyanure, minimise_by_sklearn
from msn_eval.protocols.rows import centred_rows
from msn_eval.protocols.team import Team, minimise_together

Solver = Literal["auto", "newton", "lbfgs", "cyanure", "sklearn"]
SOLVERS: tuple[Solver, ...] = ("auto", "newton", "lbfgs", "cyanure", "sklearn")
TARGET_GAP = 1e-6
LARGEST_GAP = 1e-3


@dataclass(frozen=True, kw_only=True)
class Logistic:
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


def default_lambda(subset: str) -> float:
    """Give the published strength: 0.075 for 1 % of ImageNet, 0.0025 for everything else."""
    return 0.075 if subset == "1pct" else 0.0025


def logistic_settings(probe: Logistic, n: int) -> tuple[dict[str, int | float], ...]:
    """Give the hyper-parameters of every protocol that the probe stands for, n being the labelled images."""
    return tuple({"lambda": strength} for strength in probe.lambdas)


def fit_logistic(probe: Logistic, train: Features, device: torch.device, *, team: Team | None = None) -> Fitted:
    """Solve for every lambda over the classes that have labelled images; the others can never be chosen.

    team: ranks that share the rows where there are very many
    Raises NumericalError for labelled images of a single class.
    """
    present, labels = torch.unique(train.labels.to(device), return_inverse=True)
    if len(present) < 2:
        raise NumericalError("logistic regression on a single class", remedy="Label images of at least two classes.")
    n, width = train.values.shape
    falling = sorted(set(probe.lambdas), reverse=True)  # from the smoothest problem to the roughest
    mus = [strength / n for strength in falling]
    basis = None
    if probe.solver in ("auto", "newton") and is_large(n, width, len(present)):
        share = RowShare(values=train.values.to(device), labels=labels, n_classes=len(present), n=n)
        if team is None:
            solutions = minimise_in_chunks(share, mus, target=TARGET_GAP)
        else:
            solutions = minimise_together(team, share, mus, target=TARGET_GAP)
    else:
        reduced, basis = reduced_rows(centred_rows(train.values.to(device)))
        problem = CrossEntropyProblem(rows=reduced, labels=labels, n_classes=len(present), mu=mus[0])
        solutions = _solve(problem, mus, probe.solver)
    solved = dict(zip(falling, solutions, strict=True))
    settings = [
        Setting(
            params={"lambda": strength},
            solver="newton" if probe.solver == "auto" else probe.solver,
            converged=solved[strength][0].gap <= LARGEST_GAP,
            certificate=solved[strength][0].gap,
            objective=solved[strength][0].objective,
            iterations=solved[strength][1],
        )
        for strength in probe.lambdas
    ]
    weights = [one if basis is None else one @ basis.T for one in (solved[key][0].weights for key in probe.lambdas)]

    def scores(values: Tensor) -> Iterator[Tensor]:
        queries = centred_rows(values.to(device))
        for one in weights:
            whole = queries.new_full((len(queries), train.n_classes), -torch.inf)
            whole[:, present] = queries @ one.T
            yield whole

    return Fitted(settings=tuple(settings), scores=scores)


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
