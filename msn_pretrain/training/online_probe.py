"""Online probes: evaluation of a run's encoder during training, as ordinary records of msn_eval."""

import logging
from pathlib import Path

import torch

from msn_eval.checkpoints.run_folder import EVAL
from msn_eval.config.request import EvaluationConfig
from msn_eval.data.images import ImageSet
from msn_eval.errors import CheckpointError, DataError, NumericalError, ResourceError, StoreError, UsageError
from msn_eval.evaluation.evaluate import evaluate_checkpoint
from msn_eval.evaluation.plan import make_plan
from msn_eval.features.batch_size import OUT_OF_MEMORY_ERRORS, is_out_of_memory
from msn_eval.features.live_network import restored_random_states
from msn_pretrain.training.run import Recipe

_log = logging.getLogger(__name__)


def is_due(recipe: Recipe, images: ImageSet, epoch: int) -> bool:
    """Whether the recipe asks for an evaluation after `epoch` epochs, and its data set or that of the run has classes."""
    is_possible = images.is_labelled or bool(recipe.watch.probe_data)
    return is_possible and bool(recipe.watch.probe_every) and epoch % recipe.watch.probe_every == 0


def evaluate(run: Path, recipe: Recipe, device: torch.device) -> str:
    """Evaluate the newest snapshot of a run with the recipe's probes, and write the records to its `eval` folder.

    The states of global random generators are restored. An error is logged, and training continues.

    Returns:
        One line with the mean accuracy over draws of each probe.
    """
    watch = recipe.watch
    config = EvaluationConfig(
        checkpoint=[str(run)],
        data=watch.probe_data or recipe.data.root,
        subset=[watch.subset],
        probe=list(watch.probes),
        device=str(device),
        out=str(run / EVAL),
    )
    try:
        with restored_random_states(device):
            results = list(evaluate_checkpoint(make_plan(config), str(run)))
    except (CheckpointError, DataError, NumericalError, ResourceError, StoreError, UsageError) as error:
        _log.warning("the encoder could not be evaluated: %s", error)
        return ""
    except OUT_OF_MEMORY_ERRORS as error:
        if not is_out_of_memory(error):
            raise
        _log.warning("the encoder could not be evaluated: %s", str(error).partition("\n")[0])
        return ""
    accuracies: dict[str, list[float]] = {}
    for result in results:
        if result.metrics is not None:
            setting = ",".join(f"{name}={value:g}" for name, value in result.probe.params.items())
            accuracies.setdefault(f"{result.probe.name} {setting}".strip(), []).append(result.metrics.top1)
    return "; ".join(f"{name} {100 * sum(values) / len(values):.1f} %" for name, values in accuracies.items())
