import pytest
import torch
from torch import Tensor

from msn_eval.encoder import Encoder, encode, load_encoder
from msn_eval.errors import UsageError
from msn_eval.visible_patches import attention_maps, check_patches, choose_patches, encode_visible, patches_a_side

_SMALL = "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=3"


@pytest.fixture(
    scope="module",
    params=[f"random:{_SMALL}", f"random:{_SMALL}&reg_tokens=2", f"random:{_SMALL}&pre_norm=True"],
    ids=["plain", "registers", "pre_norm"],
)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return load_encoder(request.param, device="cpu")


def _all(images: int) -> Tensor:
    return torch.arange(16).expand(images, -1)


def test_with_every_patch_it_is_the_encoders_own_feature(encoder: Encoder, random_pixels: Tensor) -> None:
    seen = encode_visible(encoder, random_pixels, _all(4))

    assert torch.allclose(seen, encode(encoder, random_pixels, ["cls-norm"])["cls-norm"], atol=1e-5)


def test_hidden_patches_have_no_say(encoder: Encoder, random_pixels: Tensor) -> None:
    visible = torch.tensor([[0, 5, 10]]).expand(4, -1)
    others = random_pixels.clone()
    others[:, 8:16, :8] = 255 - others[:, 8:16, :8]  # patch 4, hidden

    assert torch.equal(encode_visible(encoder, random_pixels, visible), encode_visible(encoder, others, visible))


def test_visible_patches_are_counted_row_by_row(encoder: Encoder, random_pixels: Tensor) -> None:
    others = random_pixels.clone()
    others[:, 8:16, :8] = 255 - others[:, 8:16, :8]
    visible = torch.tensor([[4]]).expand(4, -1)

    before, after = (encode_visible(encoder, pixels, visible) for pixels in (random_pixels, others))

    assert (before - after).abs().amax(dim=1).min() > 1e-4


def test_order_of_the_visible_patches_does_not_matter(encoder: Encoder, random_pixels: Tensor) -> None:
    one, other = (torch.tensor([order]).expand(4, -1) for order in ([1, 6, 11], [11, 1, 6]))

    assert torch.allclose(
        encode_visible(encoder, random_pixels, one), encode_visible(encoder, random_pixels, other), atol=1e-5
    )


def test_attention_is_timms_own(encoder: Encoder, random_pixels: Tensor) -> None:
    attention = encoder.network.blocks[-1].attn  # type: ignore[index, union-attr]
    caught: list[Tensor] = []
    hook = attention.attn_drop.register_forward_hook(lambda module, given, shares: caught.append(shares))
    attention.fused_attn = False
    try:
        encoder.network(_images(encoder, random_pixels))
    finally:
        hook.remove()
        attention.fused_attn = True

    maps = attention_maps(encoder, random_pixels)

    assert torch.allclose(maps.flatten(2), caught[0][:, :, 0, -16:], atol=1e-5)


def _images(encoder: Encoder, pixels: Tensor) -> Tensor:
    mean, std = torch.tensor(encoder.transform.mean), torch.tensor(encoder.transform.std)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize(("masked", "kept"), [(0.0, 16), (0.5, 8), (0.9, 2), (0.99, 1)])
def test_share_of_patches_that_stay(masked: float, kept: int) -> None:
    visible = choose_patches(16, masked=masked, images=5, generator=torch.Generator().manual_seed(1))

    assert visible.shape == (5, kept)
    assert all(len(set(row)) == kept and row == sorted(row) for row in visible.tolist())


def test_more_masking_hides_what_less_hides_too() -> None:
    few, many = (
        choose_patches(16, masked=masked, images=5, generator=torch.Generator().manual_seed(1)) for masked in (0.5, 0.9)
    )

    assert all(set(b) < set(a) for a, b in zip(few.tolist(), many.tolist(), strict=True))


@pytest.mark.parametrize("name", ["pixels", "random:resnet18"])
def test_network_without_patches_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no plain Vision Transformer with a class token"):
        check_patches(load_encoder(name, device="cpu"))


def test_patches_a_side(encoder: Encoder) -> None:
    assert patches_a_side(encoder) == 4
