"""Which weights are trained, at which learning rate, and that the head gets the features of the evaluation."""

import pytest
import torch
from torch import Tensor

from msn_eval.checkpoints.checkpoint import read_checkpoint
from msn_eval.config.recipes import FinetuneRecipe
from msn_eval.errors import UsageError
from msn_eval.features.encoder import Encoder, build_encoder, encode, normalise_pixels
from msn_eval.probes.finetune.model import DrawnDropPath, build_finetune_model, build_optimizer

_VIT = "random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=32&depth=3&num_heads=2"
_NORMED_MEAN = "random:vit_tiny_patch16_224?img_size=16&patch_size=8&embed_dim=32&depth=2&num_heads=2&fc_norm=True"
_STILL = FinetuneRecipe(drop_path=0.0)


def _encoder(name: str) -> Encoder:
    return build_encoder(read_checkpoint(name), device=torch.device("cpu"), precision="fp32")


@pytest.mark.parametrize(
    ("name", "tap"),
    [(_VIT, "cls-norm"), (_VIT, "mean"), (_NORMED_MEAN, "mean"), ("random:resnet18", "pool"), ("pixels", "pixels")],
)
def test_head_gets_the_features_of_its_tap(name: str, tap: str) -> None:
    encoder = _encoder(name)
    model = build_finetune_model(encoder, _STILL, tap=tap, n_classes=4)
    side = encoder.transform.crop
    pixels = torch.randint(256, (2, side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    seen: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))

    logits = model.network(normalise_pixels(pixels, encoder))

    torch.testing.assert_close(seen[0], encode(encoder, pixels, [tap])[tap], rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, torch.zeros(2, 4))


def test_the_encoder_keeps_its_weights() -> None:
    encoder = _encoder(_VIT)
    model = build_finetune_model(encoder, _STILL, tap="cls-norm", n_classes=4)
    before = encoder.checkpoint.network.norm.weight.clone()  # type: ignore[union-attr, operator]

    with torch.no_grad():
        model.trained["norm.weight"].add_(1)

    assert torch.equal(encoder.checkpoint.network.norm.weight, before)  # type: ignore[arg-type, union-attr]
    assert torch.equal(encoder.network.norm.weight, before)  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(0, {"norm", "head"}), (1, {"blocks.2", "norm", "head"}), (2, {"blocks.1", "blocks.2", "norm", "head"})],
)
def test_only_the_last_blocks_are_trained(blocks: int, expected: set[str]) -> None:
    model = build_finetune_model(_encoder(_VIT), FinetuneRecipe(blocks=blocks), tap="cls-norm", n_classes=4)

    parts = {".".join(name.split(".")[: 2 if name.startswith("blocks") else 1]) for name in model.trained}

    assert parts == expected


def test_all_weights_are_trained_if_no_blocks_are_named() -> None:
    model = build_finetune_model(_encoder(_VIT), _STILL, tap="cls-norm", n_classes=4)

    assert model.trained.keys() == dict(model.network.named_parameters()).keys()


def test_each_layer_has_a_smaller_rate_than_the_one_above_it() -> None:
    model = build_finetune_model(_encoder(_VIT), _STILL, tap="cls-norm", n_classes=4)
    optimizer = build_optimizer(model, FinetuneRecipe(layer_decay=0.5, weight_decay=0.1))
    rate = {id(item): group["lr_scale"] for group in optimizer.param_groups for item in group["params"]}
    decay = {id(item): group["weight_decay"] for group in optimizer.param_groups for item in group["params"]}
    named = model.trained

    layers = [
        "head.weight",
        "blocks.2.mlp.fc1.weight",
        "blocks.1.mlp.fc1.weight",
        "blocks.0.mlp.fc1.weight",
        "patch_embed.proj.weight",
    ]
    assert [rate[id(named[name])] for name in layers] == [1, 0.5, 0.25, 0.125, 0.0625]
    assert [decay[id(named[name])] for name in ("head.weight", "head.bias", "pos_embed", "norm.weight")] == [
        0.1,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("name", "recipe", "tap", "message"),
    [
        (_VIT, FinetuneRecipe(blocks=4), "cls-norm", "has 3 blocks, not 4"),
        ("random:resnet18", FinetuneRecipe(blocks=1), "pool", "has no blocks that could be counted"),
        (_VIT, _STILL, "cls", "--tap cls: a head that is trained"),
        ("pixels", FinetuneRecipe(), "pixels", r"finetune\.drop_path"),
    ],
    ids=["too many blocks", "no blocks", "tap before the norm", "no residual branches"],
)
def test_what_a_network_does_not_have_is_refused(name: str, recipe: FinetuneRecipe, tap: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_finetune_model(_encoder(name), recipe, tap=tap, n_classes=4)


def test_drop_path_grows_with_depth_and_skips_frozen_blocks() -> None:
    rates = [
        [
            path.drop_prob
            for path in build_finetune_model(
                _encoder(_VIT), FinetuneRecipe(drop_path=0.2, blocks=blocks), tap="cls-norm", n_classes=4
            ).paths
        ]
        for blocks in (None, 1)
    ]

    assert rates == [[0.1, 0.1, 0.2, 0.2], [0.2, 0.2]]


def test_branch_is_dropped_by_its_draw_and_scaled_elsewhere() -> None:
    path = DrawnDropPath(0.2)
    path.draws = torch.tensor([0.1, 0.2, 0.9])

    assert path(torch.ones(3, 2)).tolist() == [[0, 0], [1.25, 1.25], [1.25, 1.25]]


def test_a_network_of_unknown_layers_has_a_smaller_rate_than_its_head_and_no_bias_decays() -> None:
    recipe = FinetuneRecipe(drop_path=0.0, layer_decay=0.5, weight_decay=0.1)
    model = build_finetune_model(_encoder("pixels"), recipe, tap="pixels", n_classes=4)
    model.network.get_submodule("trunk").add_module("layer", torch.nn.Linear(3, 2))

    groups = build_optimizer(model, recipe).param_groups

    result = {tuple(group["params"][0].shape): (group["lr_scale"], group["weight_decay"]) for group in groups}
    assert result == {(2, 3): (0.5, 0.1), (2,): (0.5, 0.0), (4, 3072): (1.0, 0.1), (4,): (1.0, 0.0)}
