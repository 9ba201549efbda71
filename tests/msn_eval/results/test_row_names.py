"""Names of checkpoints in tables."""

from dataclasses import replace

import pytest

from msn_eval.results.record import CheckpointInfo
from msn_eval.results.row_names import name_networks, shorten_architecture

_DEMO = "vit_tiny_patch16_224?img_size=16&patch_size=4&embed_dim=128&depth=2&num_heads=4"
_INFO = CheckpointInfo(
    name="best",
    path="runs/a/best.pth",
    sha256="0" * 64,
    weights_sha256="0" * 64,
    format="timm",
    key=None,
    arch=_DEMO,
    params=1,
    matched=1.0,
    epoch=None,
)


@pytest.mark.parametrize(
    ("arch", "short"),
    [
        (_DEMO, "vit_width128_depth2_patch4_16_heads4"),
        ("vit_tiny_patch16_224?img_size=32&patch_size=4", "vit_tiny_patch4_32"),
        ("vit_small_patch16_224?depth=2", "vit_small_depth2_patch16_224"),
        ("vit_base_patch16_clip_224?global_pool=avg", "vit_base_patch16_clip_224_global_pool_avg"),
        ("resnet50?stem=cifar", "resnet50_stem_cifar"),
        ("resnet50", "resnet50"),
        ("what?", "what?"),
    ],
)
def test_short_architecture_has_no_query_and_keeps_every_keyword(arch: str, short: str) -> None:
    assert shorten_architecture(arch) == short


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ({"name": "a"}, {"name": "b"}, ["a", "b"]),  # names are enough
        ({}, {"path": "runs/b/best.pth"}, ["a/best", "b/best"]),
        ({"path": "best.pth"}, {"path": "b/best.pth"}, ["best", "b/best"]),
        ({"path": "/x/a/ckpt/best.pth"}, {"path": "/x/b/ckpt/best.pth"}, ["a/ckpt/best", "b/ckpt/best"]),
        ({}, {"arch": "resnet18"}, ["best (vit_width128_depth2_patch4_16_heads4)", "best (resnet18)"]),
        ({"key": "teacher"}, {"key": "student"}, ["best (teacher)", "best (student)"]),
        ({"weights_sha256": "1" * 64}, {"weights_sha256": "2" * 64}, ["best [11111111]", "best [22222222]"]),
        (
            {"name": f"random:{_DEMO}", "path": f"random:{_DEMO}"},
            {"name": "random:demo", "path": "random:demo"},
            ["random:vit_width128_depth2_patch4_16_heads4", "random:demo"],
        ),
    ],
)
def test_name_has_what_tells_it_from_the_other_and_nothing_else(
    first: dict[str, str], second: dict[str, str], names: list[str]
) -> None:
    both = {"first": replace(_INFO, **first), "second": replace(_INFO, **second)}  # type: ignore[arg-type]

    assert list(name_networks(both).values()) == names


def test_of_three_names_only_the_equal_ones_are_longer() -> None:
    infos = [_INFO, replace(_INFO, path="runs/b/best.pth"), replace(_INFO, name="last", path="runs/b/last.pth")]

    assert list(name_networks(dict(enumerate(infos))).values()) == ["a/best", "b/best", "last"]
