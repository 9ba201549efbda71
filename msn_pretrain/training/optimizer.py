"""Optimisers and their parameter groups."""

from typing import Any

import torch
from torch import Tensor

from msn_eval.distributed.collective import is_sharded
from msn_pretrain.config.recipe import MSNRecipe, SimSiamRecipe
from msn_pretrain.config.schedule import StepSettings
from msn_pretrain.methods.msn import MSN
from msn_pretrain.methods.simsiam import SimSiam


def build_optimizer(model: MSN | SimSiam, recipe: MSNRecipe | SimSiamRecipe) -> torch.optim.Optimizer:
    """Build the optimiser of a recipe. Call `set_for_step` before each step to set learning rates and weight decay.

    MSN: weight decay applies to matrices, and as in the release to class token and positions; not to biases, norms and other
    vectors, nor to prototypes. SimSiam with SGD: it applies to everything; with AdamW as in MSN. The predictor is a separate
    group. AdamW has torch's defaults (betas 0.9 and 0.999, epsilon 1e-8), as in the release. Both are fused.
    """
    is_sgd = isinstance(recipe, SimSiamRecipe) and recipe.optimization.optimizer == "sgd"
    fixed = isinstance(recipe, SimSiamRecipe) and recipe.optimization.fixed_predictor_rate
    groups: dict[tuple[str, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        module = name.partition(".")[0]
        is_vector = parameter.dim() == 1 or name.endswith("bias")
        decays = module != "prototypes" and (is_sgd or not is_vector)
        key = (module if module in ("prototypes", "predictor") else "encoder", decays, is_sharded(parameter))
        group = {"params": [], "decays": decays, "fixed_rate": fixed and module == "predictor"}
        groups.setdefault(key, group)["params"].append(parameter)
    if isinstance(recipe, SimSiamRecipe) and is_sgd:
        sgd = torch.optim.SGD(groups.values(), lr=0.0, momentum=recipe.optimization.momentum, fused=True)
        # torch creates them in its first step, uninitialised, and leaves them so if that step is skipped.
        for parameter in (parameter for group in sgd.param_groups for parameter in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(groups.values(), lr=0.0, weight_decay=0.0, fused=True)


def set_for_step(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Set learning rate and weight decay of each group for one step."""
    for group in optimizer.param_groups:
        group["lr"] = settings.fixed_learning_rate if group["fixed_rate"] else settings.learning_rate
        group["weight_decay"] = settings.weight_decay if group["decays"] else 0.0


def update_weights(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Take the step of a fused optimiser; if the scalar `skipped` is 1 and not 0, weights and moments stay as they are.

    The scalar is read on the device: the host does not wait to know it.
    """
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # how torch.amp.GradScaler tells a fused optimiser
    optimizer.step()
