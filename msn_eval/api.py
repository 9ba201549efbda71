"""The functions of `import msn_eval` that need every layer."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec

from msn_eval.errors import named_as_arguments
from msn_eval.evaluation import evaluate as evaluation
from msn_eval.reports.result_list import Results
from msn_eval.results.record import Result

_Arguments = ParamSpec("_Arguments")
_RENAMED = {"checkpoint": "checkpoints", "test": "tests", "subset": "subsets", "probe": "probes", "lambda": "lambda_"}


def _return_results(function: Callable[_Arguments, list[Result]]) -> Callable[_Arguments, Results]:
    """Let a function return `Results`, and let its errors name its arguments instead of options."""

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Results:
        with named_as_arguments(inspect.signature(function).parameters, _RENAMED):
            return Results(function(*args, **kwargs))

    return call


evaluate = _return_results(evaluation.evaluate)
