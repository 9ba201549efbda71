import pytest
import torch
from torch import Tensor

from msn_eval.errors import UsageError
from msn_eval.features.encoder import Encoder, encode, load_encoder
from msn_eval.features.patch_drop import (
    PatchDrop,
    attention_maps,
    check_patch_drop,
    check_patches,
    choose_patches,
    draw_kept_patches,
    encode_kept_patches,
)

_SMALL = "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=3"


@pytest.fixture(
    scope="module",
    params=[f"random:{_SMALL}", f"random:{_SMALL}&reg_tokens=2", f"random:{_SMALL}&pre_norm=True"],
    ids=["plain", "registers", "pre_norm"],
)
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return load_encoder(request.param, device="cpu")


def _class_token(encoder: Encoder, pixels: Tensor, visible: Tensor) -> Tensor:
    return encode_kept_patches(encoder, pixels, ["cls-norm"], visible)["cls-norm"]


def test_visible_patches_are_counted_row_by_row(encoder: Encoder, random_pixels: Tensor) -> None:
    others = random_pixels.clone()
    others[:, 8:16, :8] = 255 - others[:, 8:16, :8]
    visible = torch.tensor([[4]]).expand(4, -1)

    before, after = (_class_token(encoder, pixels, visible) for pixels in (random_pixels, others))

    assert (before - after).abs().amax(dim=1).min() > 1e-4


def test_order_of_the_visible_patches_does_not_matter(encoder: Encoder, random_pixels: Tensor) -> None:
    one, other = (torch.tensor([order]).expand(4, -1) for order in ([1, 6, 11], [11, 1, 6]))

    assert torch.allclose(
        _class_token(encoder, random_pixels, one), _class_token(encoder, random_pixels, other), atol=1e-5
    )


def test_attention_equals_timms(encoder: Encoder, random_pixels: Tensor) -> None:
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
    with pytest.raises(UsageError, match="is not a plain Vision Transformer with a class token"):
        check_patches(load_encoder(name, device="cpu"))


# Patch drop.


def test_kept_patches_are_the_share_rounded_down_and_each_images_own() -> None:
    kept = draw_kept_patches(PatchDrop(share=0.7, seed=0), ["a/1", "a/2"], patches=196)

    assert kept.shape == (2, 58)
    assert all(len(set(row)) == 58 and row == sorted(row) and row[0] >= 0 and row[-1] < 196 for row in kept.tolist())
    assert not torch.equal(kept[0], kept[1])


def test_kept_patches_depend_only_on_seed_and_id() -> None:
    drop = PatchDrop(share=0.5, seed=3)
    both, alone = (draw_kept_patches(drop, ids, patches=16) for ids in (["a/1", "a/2"], ["a/2"]))
    other = draw_kept_patches(PatchDrop(share=0.5, seed=4), ["a/2"], patches=16)

    assert torch.equal(both[1], alone[0])
    assert not torch.equal(alone, other)
    assert alone.tolist() == [
        [0, 2, 3, 4, 8, 10, 13, 15]
    ]  # must never change: stored features and results depend on it


def test_every_patch_is_kept_about_as_often_as_any_other() -> None:
    kept = draw_kept_patches(PatchDrop(share=0.75, seed=0), [f"a/{n}" for n in range(4000)], patches=16)
    counts = torch.bincount(kept.flatten(), minlength=16)

    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_keeping_all_patches_gives_the_features_of_the_complete_image(encoder: Encoder, random_pixels: Tensor) -> None:
    taps = list(encoder.taps)
    kept = torch.arange(16).expand(4, -1)
    some, complete = encode_kept_patches(encoder, random_pixels, taps, kept), encode(encoder, random_pixels, taps)

    assert all(torch.equal(some[tap], complete[tap]) for tap in taps)


def test_dropped_patches_change_no_tap_and_enter_no_block(encoder: Encoder, random_pixels: Tensor) -> None:
    kept = torch.tensor([[0, 5, 10]]).expand(4, -1)
    others = random_pixels.clone()
    others[:, 8:16, :8] = 255 - others[:, 8:16, :8]  # patch 4, dropped
    entered: list[int] = []
    blocks = encoder.network.blocks
    hook = blocks[0].register_forward_pre_hook(lambda block, given: entered.append(given[0].shape[1]))  # type: ignore[index, union-attr]
    taps = list(encoder.taps)

    one, other = (encode_kept_patches(encoder, pixels, taps, kept) for pixels in (random_pixels, others))
    hook.remove()

    assert all(torch.equal(one[tap], other[tap]) for tap in taps)
    assert entered == [3 + encoder.network.num_prefix_tokens] * 2
    complete = encode(encoder, random_pixels, ["cls"])["cls"]  # afterwards no patch is dropped
    assert not torch.allclose(one["cls"], complete, atol=1e-3)


@pytest.mark.parametrize("name", ["pixels", "random:resnet18"])
def test_patches_are_dropped_only_from_vision_transformers(name: str) -> None:
    with pytest.raises(UsageError, match=r"--patch-drop 0.5: .* is not a plain Vision Transformer"):
        check_patch_drop(load_encoder(name, device="cpu"), PatchDrop(share=0.5, seed=0))


def test_dropping_every_patch_is_refused(encoder: Encoder) -> None:
    with pytest.raises(UsageError, match="keeps none of the 16 patches"):
        check_patch_drop(encoder, PatchDrop(share=0.95, seed=0))
