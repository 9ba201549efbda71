"""Probes: what is fitted to the labelled features. One visible choice among them."""

from collections.abc import Sequence

import torch

from msn_eval.config.recipes import Finetune, Params
from msn_eval.features.extraction import Features
from msn_eval.probes.base import FittedProbe, ProbeConfig, check_labelled
from msn_eval.probes.distributed import WorkerGroup
from msn_eval.probes.knn import NearestNeighbours
from msn_eval.probes.linear import Linear, fit_linear, linear_settings
from msn_eval.probes.linear_augmented import LinearAugmented, augmented_settings
from msn_eval.probes.logistic import Logistic, LogisticAutoLambda
from msn_eval.probes.ncm import NearestClassMean
from msn_eval.probes.ridge import Ridge

__all__ = [
    "PROBES",
    "FeatureProbe",
    "Finetune",
    "FittedProbe",
    "Probe",
    "ProbeConfig",
    "fit",
    "named_taps",
    "probe_configs",
]

FeatureProbe = Logistic | LogisticAutoLambda | NearestNeighbours | Ridge | NearestClassMean | Linear
Probe = FeatureProbe | LinearAugmented | Finetune
PROBES = {
    "logistic": "L2-regularised multinomial regression, the protocol of the MSN tables",
    "knn": "weighted nearest neighbours, every k and temperature from one search",
    "ridge": "ridge regression onto classes, its strength by exact leave-one-out error",
    "ncm": "nearest class mean",
    "linear": "a linear layer by SGD, chosen from a grid of learning rates and weight decays on held-out labelled images",
    "linear-augmented": "norm and linear layer by SGD on the frozen encoder's features of random crops and flips",
    "finetune": "encoder and head trained together, from images; never in one column with frozen features",
}


def probe_configs(probe: Probe, n: int) -> tuple[Params, ...]:
    """Give the hyper-parameters of every protocol that `probe` stands for, n being the labelled images."""
    match probe:
        case Logistic() | LogisticAutoLambda() | NearestNeighbours() | Ridge() | NearestClassMean():
            return probe.configs(n)
        case Linear():
            return linear_settings(probe)
        case LinearAugmented():
            return augmented_settings(probe)
        case Finetune():
            return (probe.params,)


def named_taps(probe: Probe) -> tuple[str, ...]:
    """Give the taps that a probe names: one by its rule, or those among which it is to choose."""
    return (isinstance(probe, Linear) and probe.named_taps) or (probe.tap,)


def fit(
    probe: FeatureProbe,
    train: Features,
    device: torch.device,
    *,
    team: WorkerGroup | None = None,
    elsewhere: Sequence[Features] = (),
) -> FittedProbe:
    """Fit every setting of `probe` to labelled features. The validation features are not here, so nothing can be
    chosen on them.

    team:      ranks that help where there are very many labelled images
    elsewhere: the same images at the other taps that the probe is to choose among
    Raises NumericalError for a single class, labels out of range, features that are not finite, and a k above n.
    """
    for features in (train, *elsewhere):
        check_labelled(features)
    match probe:
        case Logistic() | LogisticAutoLambda() | NearestNeighbours() | Ridge() | NearestClassMean():
            return probe.fit(train, device, workers=team, other_taps=elsewhere)
        case Linear():
            return fit_linear(probe, train, device, elsewhere=elsewhere)
