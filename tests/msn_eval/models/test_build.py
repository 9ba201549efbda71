"""Networks of an architecture: with drawn weights, and outlines with none."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msn_eval.errors import CheckpointError, ResourceError
from msn_eval.models.architectures import Architecture, name_architecture, recognise_architecture
from msn_eval.models.build import build_network, outline_network

WeightMaker = Callable[..., dict[str, Tensor]]
TINY = "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1"


def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


@pytest.mark.parametrize("name", ["resnet18?stem=small", "vit_tiny_patch16_224?stem=cifar"])
def test_stem_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="residual networks only"):
        build_network(name_architecture(name))


def test_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(CheckpointError, match=r"Did you mean vit_tiny_patch16_224\?"):
        build_network(name_architecture("vit_tiny_patch16_223"))


@pytest.mark.parametrize("query", ["img_sise=32", "num_classes=10", "img_size=big", "depth=-1&embed_dim=7"])
def test_keywords_that_the_network_does_not_take_are_refused(query: str) -> None:
    with pytest.raises(CheckpointError, match="timm cannot build"):
        build_network(name_architecture(f"vit_tiny_patch16_224?{query}"))


def test_network_has_no_classifier_and_is_in_eval_mode() -> None:
    network = build_network(name_architecture(TINY))
    assert (network.training, [name for name in network.state_dict() if name.startswith("head")]) == (False, [])


@pytest.mark.parametrize("architecture", [name_architecture(TINY), Architecture(name="resnet18", timm_name="resnet18")])
def test_building_leaves_the_global_generator_alone(architecture: Architecture) -> None:
    before = torch.get_rng_state()
    build_network(architecture, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "architecture",
    [name_architecture(TINY), name_architecture("resnet18"), name_architecture("vit_gigantic_patch14_224")],
    ids=["ViT", "ResNet", "7 gigabytes"],
)
def test_outline_has_no_values(architecture: Architecture) -> None:
    outline = outline_network(architecture)
    assert {tensor.device.type for tensor in outline.state_dict().values()} == {"meta"}


def test_outline_has_the_shapes_of_the_network(vit_weights: WeightMaker) -> None:
    for architecture in (name_architecture(TINY), recognise_architecture(vit_weights())):
        outline, network = outline_network(architecture), build_network(architecture)
        assert shapes(outline.state_dict()) == shapes(network.state_dict())


def test_network_without_end_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(CheckpointError, match="more than 10,000 weights"):
        outline_network(
            Architecture(name="deep", timm_name=None, keywords={"depth": 100_000, "embed_dim": 8, "num_heads": 1})
        )


@pytest.mark.parametrize(
    ("query", "limit"),
    [
        ("depth=1000000", "256"),
        ("depths=(2,2,1000000,2)", "256"),
        ("layers=[1,[1000000]]", "256"),
        ("num_blocks=257", "256"),
        ("img_size=4097", "4,096"),
        ("img_size=(32,4097)", "4,096"),
        ("embed_dim=1e999", "16,384"),
        ("embed_dim=-20000", "16,384"),
    ],
)
def test_keyword_of_a_network_larger_than_any_is_refused_before_it_is_built(
    query: str, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msn_eval.models.build._construct", lambda architecture: pytest.fail("it is built"))
    with pytest.raises(CheckpointError, match=f"is above the largest supported number, {limit}"):
        build_network(name_architecture(f"vit_tiny_patch16_224?{query}"))


def test_network_larger_than_the_memory_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msn_eval.models.build.available_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match=r"has weights of [\d,]+ bytes, the free memory 1,000") as refusal:
        build_network(name_architecture(TINY))
    assert refusal.value.exit_code == 30


@pytest.mark.parametrize("build", [build_network, outline_network])
def test_network_for_images_of_13_channels_is_refused_with_a_module_of_ones_own_as_hint(
    build: Callable[[Architecture], object],
) -> None:
    with pytest.raises(CheckpointError, match="takes images of 13 channels; images here have 3") as refusal:
        build(name_architecture(f"{TINY}&in_chans=13"))
    assert "py:package.module:factory" in refusal.value.hint


@pytest.mark.parametrize("query", ["img_size=(32,64)", "img_size=[64,32]", "patch_size=(8,16)"])
def test_stated_rectangle_is_refused(query: str) -> None:
    with pytest.raises(CheckpointError, match="only square images and patches are supported") as refusal:
        outline_network(name_architecture(f"vit_tiny_patch16_224?{query}"))
    assert "py:package.module:factory" in refusal.value.hint


def test_square_stated_by_both_sides_is_built() -> None:
    assert (
        outline_network(name_architecture(f"{TINY}&img_size=(32,32)".replace("img_size=32&", ""))).pos_embed.shape[1]
        == 17
    )
