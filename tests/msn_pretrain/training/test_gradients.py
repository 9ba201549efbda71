import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msn_pretrain.config.recipe import MSNRecipe
from msn_pretrain.methods.msn import MSN, Step, build_msn
from msn_pretrain.training.gradients import compute_gradients

_NO_CAST = contextlib.nullcontext


def _computed(recipe: MSNRecipe, micro_batch: int) -> tuple[MSN, Step]:
    model = build_msn(recipe).double()
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(8, 3, side, side, generator=generator).double() for side in (16, 16, 8, 8)]
    torch.manual_seed(2)
    kept = model.draw_kept(generator, images=8)
    step = compute_gradients(model, views, kept, sharpening=0.25, micro_batch=micro_batch, autocast=_NO_CAST())
    return model, step


def _gradients(model: MSN) -> dict[str, Tensor]:
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("micro_batch", [4, 3])
@pytest.mark.parametrize("per_image", ["true", "false"])
def test_micro_batches_give_loss_and_gradients_of_the_whole_batch(
    tiny: Callable[..., MSNRecipe], micro_batch: int, per_image: str
) -> None:
    recipe = tiny("encoder.drop_path=0.0", f"masking.per_image={per_image}")
    whole, whole_step = _computed(recipe, 0)

    pieces, step = _computed(recipe, micro_batch)

    assert torch.allclose(step.total, whole_step.total, rtol=1e-9)
    expected, found = _gradients(whole), _gradients(pieces)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-6, atol=1e-10), name
    assert all(
        torch.allclose(one, other, rtol=1e-9) for one, other in zip(whole.buffers(), pieces.buffers(), strict=True)
    )


def test_both_passes_of_a_micro_batch_skip_the_same_blocks(tiny: Callable[..., MSNRecipe]) -> None:
    recipe = tiny("encoder.drop_path=0.5")
    again = [_computed(recipe, 4)[0] for _ in range(2)]
    seen: list[Tensor] = []
    model = build_msn(recipe).double()
    model.anchor.trunk.register_forward_hook(lambda module, given, answer: seen.append(answer.detach()))
    views = [torch.randn(8, 3, side, side).double() for side in (16, 16, 8, 8)]

    compute_gradients(model, views, None, sharpening=0.25, micro_batch=4, autocast=_NO_CAST())

    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(one, _gradients(again[1])[name]) for name, one in _gradients(again[0]).items())
