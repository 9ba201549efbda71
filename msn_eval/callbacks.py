"""Callbacks that evaluate a network while Lightning or transformers trains it: `low_shot/5imgs/logistic`, every n epochs.

    trainer = lightning.Trainer(callbacks=[LowShotCallback("digits", image_pixels=32)])
    trainer.add_callback(LowShotTrainerCallback(trainer, "digits", image_pixels=32))  # a transformers.Trainer

The network itself is evaluated, not a copy. Its modes, its device and the states of random generators stay as they were. Only
rank 0 measures. An error ends the training, unless `on_error="warn"`.
"""

import logging
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from msn_eval.errors import NumericalError, UsageError, named_as_arguments

if TYPE_CHECKING:
    from torch import nn

    from msn_eval.evaluation.plan import Plan
    from msn_eval.features.live_network import ComputeFeatures
    from msn_eval.results.record import Result

    LowShotCallback: Any
    LowShotTrainerCallback: Any

__all__ = ["LowShot", "LowShotCallback", "LowShotTrainerCallback"]
_log = logging.getLogger(__name__)
_NAME = "network in training"
_CHECKPOINT = "py:network:in_training"  # a name that a plan accepts; nothing is imported
_RENAMED = {"subset": "subsets", "probe": "probes"}


@dataclass(frozen=True, kw_only=True)
class LowShot:
    """The low-shot protocol of a network in training.

    Attributes:
        data: Name or folder of the data set.
        subsets: Names of labelled subsets.
        probes: Names of probes.
        every: Epochs between two evaluations.
        compute_features: Gets the network and normalised images (n, 3, S, S), and returns features (n, d). None calls the
            network.
        image_pixels: Image size; None means the network's attribute of this name, or 224.
        mean: A value per channel on the [0, 1] scale; None means the network's attribute, or ImageNet's.
        std: The same.
        out: Folder of the records; None keeps none.
        on_error: `raise` ends the training with the error; `warn` logs it and trains on.
    """

    data: str | Path
    subsets: str | Sequence[str] = "5imgs"
    probes: str | Sequence[str] = "logistic"
    every: int = 1
    compute_features: "ComputeFeatures | None" = None
    image_pixels: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    out: str | Path | None = None
    on_error: Literal["raise", "warn"] = "raise"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UsageError(f"every is {self.every}", hint="Give a number of epochs, at least 1.")
        if self.on_error not in ("raise", "warn"):
            raise UsageError(f"on_error is {self.on_error!r}", hint="Use 'raise' or 'warn'.")

    def measure(self, network: "nn.Module", *, epoch: int) -> dict[str, float]:
        """Measure a network, and return mean top-1 accuracies over draws, fractions in [0, 1], by their names in logs.

        Args:
            network: The network, on any device and in any mode; it stays as it is.
            epoch: Number of finished epochs, for the records.

        Raises:
            MsnEvalError: One of its subclasses; NumericalError where a probe has no result.
        """
        from msn_eval.evaluation.evaluate import Preparation, evaluate_checkpoint
        from msn_eval.features.live_network import encode_live

        live = encode_live(
            network,
            name=_NAME,
            compute_features=self.compute_features,
            image_pixels=self.image_pixels,
            mean=self.mean,
            std=self.std,
        )
        with named_as_arguments(vars(self), _RENAMED), live as encoder, tempfile.TemporaryDirectory() as folder:
            plan = self._plan(str(encoder.device), encoder.precision)
            plan = replace(plan, config=replace(plan.config, out=str(self.out or folder)))
            checkpoint = replace(encoder.checkpoint, name=f"epoch {epoch}", epoch=epoch)
            named = replace(encoder, checkpoint=checkpoint)
            # `evaluate_checkpoint` fills it.
            prepared = Preparation(encoder=named, name=checkpoint.name, taps={}, known=(), pending=())
            results = list(evaluate_checkpoint(plan, _CHECKPOINT, prepared=prepared))
        return name_accuracies(results)

    @cached_property
    def _plan(self) -> "Callable[[str, str], Plan]":
        """Makes the plan once for a device and precision: the data set is not read again in each epoch."""
        from msn_eval.config.request import EvaluationConfig
        from msn_eval.config.yaml_config import read_config
        from msn_eval.evaluation.plan import make_plan

        given = {
            "checkpoint": [_CHECKPOINT],
            "data": str(self.data),
            "subset": [self.subsets] if isinstance(self.subsets, str) else list(self.subsets),
            "probe": [self.probes] if isinstance(self.probes, str) else list(self.probes),
            "no_cache": True,
        }

        @cache
        def plan(device: str, precision: str) -> "Plan":
            return make_plan(read_config(EvaluationConfig, given=given | {"device": device, "precision": precision}))

        return plan

    def attempt(self, network: "nn.Module", *, epoch: int) -> "tuple[dict[str, float], Exception | None]":
        """Measure a network if the epoch is due, and return the accuracies and the error, if any; warn where asked to."""
        if epoch % self.every:
            return {}, None
        try:
            return self.measure(network, epoch=epoch), None
        except Exception as error:
            if self.on_error == "raise":
                return {}, error
            _log.warning("epoch %d could not be measured: %s: %s", epoch, type(error).__name__, error)
            return {}, None


def name_accuracies(results: "Sequence[Result]") -> dict[str, float]:
    """Return the mean accuracy over draws by name: `low_shot/5imgs/logistic`, and `low_shot/5imgs/knn/k=10` where k varies.

    Raises:
        NumericalError: A result failed.
    """
    by_probe: defaultdict[str, defaultdict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        by_probe[f"low_shot/{result.split.subset}/{result.probe.name}"][result.protocol_id].append(result)
    accuracies = {}
    for name, protocols in by_probe.items():
        params = [draws[0].probe.params for draws in protocols.values()]
        for draws in protocols.values():
            own = draws[0].probe.params
            varying = [f"{key}={own[key]}" for key in own if len({str(other.get(key)) for other in params}) > 1]
            scores = [draw.metrics.top1 for draw in draws if draw.metrics is not None]
            if len(scores) < len(draws):
                raise NumericalError(next(draw.error for draw in draws if draw.error) or "no result", where=name)
            if any(draw.status == "not_converged" for draw in draws):
                _log.warning("%s: the solver did not converge", name)
            accuracies["/".join([name, *([",".join(varying)] if varying else [])])] = fmean(scores)
    return accuracies


def __getattr__(name: str) -> Any:
    if name == "LowShotCallback":
        return _make_lightning_class()
    if name == "LowShotTrainerCallback":
        return _make_trainer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _make_lightning_class() -> type:
    """Make the class for `lightning` or `pytorch_lightning`, whichever is loaded; for both where both are."""
    names = ("lightning.pytorch", "pytorch_lightning")
    loaded = [name for name in names if name in sys.modules]
    names_found = loaded or [name for name in names if find_spec(name.partition(".")[0]) is not None][:1]
    if not names_found:
        raise UsageError("Lightning is not installed", hint="Install it: pip install lightning.")
    bases = tuple(import_module(name).Callback for name in names_found)

    def __init__(self: Any, data: str | Path, **options: Any) -> None:  # noqa: N807
        self.low_shot = LowShot(data=data, **options)

    def on_train_epoch_end(self: Any, trainer: Any, pl_module: Any) -> None:
        outcome: Any = ({}, None)
        if trainer.is_global_zero:
            outcome = self.low_shot.attempt(pl_module, epoch=trainer.current_epoch + 1)
        accuracies, error = trainer.strategy.broadcast(outcome)  # all ranks end together
        if error is not None:
            raise error
        pl_module.log_dict(accuracies)

    members = {"__init__": __init__, "on_train_epoch_end": on_train_epoch_end, "__module__": __name__}
    return type(
        "LowShotCallback", bases, members | {"__doc__": "Callback of Lightning; takes the arguments of `LowShot`."}
    )


@cache
def _make_trainer_class() -> type:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise UsageError("transformers is not installed", hint="Install it: pip install 'msn-eval[hf]'.") from error

    class LowShotTrainerCallback(TrainerCallback):  # type: ignore[misc]
        """Callback of transformers' Trainer, which logs the accuracies; takes the arguments of `LowShot`."""

        def __init__(self, trainer: Any, data: str | Path, **options: Any) -> None:
            self.trainer, self.low_shot = trainer, LowShot(data=data, **options)

        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if not state.is_world_process_zero:
                return
            accuracies, error = self.low_shot.attempt(model, epoch=round(state.epoch))
            if error is not None:
                raise error
            if accuracies:
                self.trainer.log(accuracies)

    LowShotTrainerCallback.__qualname__ = "LowShotTrainerCallback"
    return LowShotTrainerCallback
