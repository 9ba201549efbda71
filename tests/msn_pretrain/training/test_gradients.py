import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msn_pretrain.config.recipe import MSNRecipe
from msn_pretrain.methods.msn import MSN, Step, build_msn
from msn_pretrain.training.gradients import compute_gradients

_NO_CAST = contextlib.nullcontext


def _compute(recipe: MSNRecipe, micro_batch: int) -> tuple[MSN, Step]:
    model = build_msn(recipe).double()
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(8, 3, side, side, generator=generator).double() for side in (16, 16, 8, 8)]
    torch.manual_seed(2)
    kept = model.draw_kept(generator, images=8)
    step = compute_gradients(model, views, kept, sharpening=0.25, micro_batch=micro_batch, autocast=_NO_CAST())
    return model, step


def _gradients(model: MSN) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("micro_batch", [4, 3])
@pytest.mark.parametrize("per_image", ["true", "false"])
def test_micro_batches_give_loss_and_gradients_of_the_complete_batch(
    tiny: Callable[..., MSNRecipe], micro_batch: int, per_image: str
) -> None:
    recipe = tiny("encoder.drop_path=0.0", f"masking.per_image={per_image}")
    expected, expected_step = _compute(recipe, 0)

    model, step = _compute(recipe, micro_batch)

    assert torch.allclose(step.total, expected_step.total, rtol=1e-9)
    torch.testing.assert_close(_gradients(model), _gradients(expected), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(list(model.buffers()), list(expected.buffers()), rtol=1e-9, atol=0)


def test_both_passes_of_a_micro_batch_skip_the_same_blocks(tiny: Callable[..., MSNRecipe]) -> None:
    recipe = tiny("encoder.drop_path=0.5")
    outputs: list[Tensor] = []
    model = build_msn(recipe).double()
    model.anchor.trunk.register_forward_hook(lambda module, given, output: outputs.append(output.detach()))
    views = [torch.randn(8, 3, side, side).double() for side in (16, 16, 8, 8)]

    compute_gradients(model, views, None, sharpening=0.25, micro_batch=4, autocast=_NO_CAST())

    first, second = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    once, again = (_gradients(_compute(recipe, 4)[0]) for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)
