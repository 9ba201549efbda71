"""Optimisers and their parameter groups."""

from dataclasses import dataclass

import torch

from msn_pretrain.config.recipe import MSNRecipe, SimSiamRecipe
from msn_pretrain.config.schedule import StepSettings
from msn_pretrain.methods.msn import MSN
from msn_pretrain.methods.simsiam import SimSiam


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters with the same settings.

    Attributes:
        label: `encoder`, `prototypes` or `predictor`.
        names: Parameter names in the model.
        decays: Whether weight decay applies.
        fixed_rate: Whether the learning rate stays constant.
    """

    label: str
    names: tuple[str, ...]
    decays: bool
    fixed_rate: bool = False


def parameter_groups(model: MSN | SimSiam, recipe: MSNRecipe | SimSiamRecipe) -> list[ParameterGroup]:
    """Sort the trained parameters of a model into groups, without empty ones.

    MSN: weight decay applies to matrices, and as in the release to class token and positions; not to biases, norms and other
    vectors, nor to prototypes. SimSiam with SGD: it applies to everything; with AdamW as in MSN. The predictor is a separate
    group.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    everything = isinstance(recipe, SimSiamRecipe) and recipe.optimization.optimizer == "sgd"
    fixed = isinstance(recipe, SimSiamRecipe) and recipe.optimization.fixed_predictor_rate
    sorted_names: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in trained.items():
        part = name.partition(".")[0]
        label = part if part in ("prototypes", "predictor") else "encoder"
        vector = parameter.dim() == 1 or name.endswith("bias")
        decays = label != "prototypes" and (everything or not vector)
        sorted_names.setdefault((label, decays), []).append(name)
    return [
        ParameterGroup(label=label, names=tuple(names), decays=decays, fixed_rate=fixed and label == "predictor")
        for (label, decays), names in sorted_names.items()
    ]


def build_optimizer(model: MSN | SimSiam, recipe: MSNRecipe | SimSiamRecipe) -> torch.optim.Optimizer:
    """Build the optimiser of a recipe. Call `set_for_step` before each step to set learning rates and weight decay.

    AdamW has torch's defaults (betas 0.9 and 0.999, epsilon 1e-8), as in the release. It is fused on a GPU.
    """
    parameters = dict(model.named_parameters())
    groups = [
        {"params": [parameters[name] for name in group.names], "decays": group.decays, "fixed_rate": group.fixed_rate}
        for group in parameter_groups(model, recipe)
    ]
    if isinstance(recipe, SimSiamRecipe) and recipe.optimization.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=recipe.optimization.momentum, foreach=True)
    on_gpu = next(iter(parameters.values())).is_cuda
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=on_gpu, foreach=not on_gpu)


def set_for_step(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Set learning rate and weight decay of each group for one step."""
    for group in optimizer.param_groups:
        group["lr"] = settings.fixed_learning_rate if group["fixed_rate"] else settings.learning_rate
        group["weight_decay"] = settings.weight_decay if group["decays"] else 0.0
