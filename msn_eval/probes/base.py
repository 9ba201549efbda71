"""Fitted: a probe after it has seen the labelled images. The corridor never hands it the validation labels."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from msn_eval.config.recipes import Params
from msn_eval.errors import NumericalError


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of a probe's hyper-parameters, and how well its fit came out.

    certificate: relative duality gap, None for probes that are not solved for
    chosen:      what the fit chose for itself from the labelled images, by a rule that is part of the protocol
    """

    params: Params
    solver: str | None = None
    converged: bool | None = None
    certificate: float | None = None
    objective: float | None = None
    iterations: int | None = None
    chosen: Mapping[str, float | str] | None = None


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Settings, and a function from (m, d) features to (m, n_classes) scores: one matrix a setting, in their order.

    Scores are float64, higher is better, -inf for a class that cannot be chosen.
    failures: settings that came to nothing, each by its hyper-parameters, and why
    tap:      where several taps were offered, the one whose features the scores are of
    """

    settings: tuple[Setting, ...]
    scores: Callable[[Tensor], Iterator[Tensor]]
    failures: tuple[tuple[Params, NumericalError], ...] = ()
    tap: str | None = None
