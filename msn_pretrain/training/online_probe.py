"""Probe: how good the encoder of a run is by now, measured by msn_eval and kept as its ordinary records."""

import logging
import random
from pathlib import Path

import numpy as np
import torch

from msn_eval.checkpoints.run_folder import EVAL
from msn_eval.config.request import EvaluationConfig
from msn_eval.errors import CheckpointError, DataError, NumericalError, UsageError
from msn_eval.evaluation.evaluate import evaluate_checkpoint
from msn_eval.evaluation.plan import make_plan
from msn_eval.results.record import Result
from msn_pretrain.training.run import Recipe

_log = logging.getLogger(__name__)


def is_due(recipe: Recipe, epoch: int) -> bool:
    """Tell whether the encoder is measured once `epoch` epochs are finished."""
    return bool(recipe.watch.probe_every) and epoch % recipe.watch.probe_every == 0


def measure(run: Path, recipe: Recipe, device: torch.device) -> list[Result]:
    """Measure the newest snapshot of a run by the recipe's probes, and write the records to its `eval` folder.

    Global generators are left where they stand. What cannot be measured is told in the log: training goes on.
    """
    watch = recipe.watch
    request = EvaluationConfig(
        checkpoint=[str(run)],
        data=watch.probe_data or recipe.data.root,
        subset=[watch.subset],
        probe=list(watch.probes),
        device=str(device),
        out=str(run / EVAL),
    )
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return list(evaluate_checkpoint(make_plan(request), str(run)))
    except (CheckpointError, DataError, NumericalError, UsageError) as error:
        _log.warning("the encoder could not be measured: %s", error)
        return []
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def describe(results: list[Result]) -> str:
    """Say what was measured, the mean over draws of each probe and setting."""
    found: dict[str, list[float]] = {}
    for result in results:
        if result.metrics is not None:
            setting = ",".join(f"{name}={value:g}" for name, value in result.probe.params.items())
            found.setdefault(f"{result.probe.name} {setting}".strip(), []).append(result.metrics.top1)
    return "; ".join(f"{name} {100 * sum(values) / len(values):.1f} %" for name, values in found.items())
