"""Which network of a file is evaluated, and its weights in timm's naming."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

from msn_eval.errors import CheckpointError
from msn_eval.weights.families import StoredNetwork, choose_network, trunk_weights

WeightMaker = Callable[..., dict[str, Tensor]]
ONE = {"weight": torch.ones(2)}
TWO = {"weight": torch.full((3,), 2.0), "bias": torch.zeros(1)}


def stored(tensors: dict[str, Tensor], key: str | None = None) -> StoredNetwork:
    return StoredNetwork(key=key, tensors=tensors, epoch=None)


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def test_file_that_is_a_state_dict_has_no_key() -> None:
    chosen = choose_network(TWO, None, where="vit.pth")
    assert (chosen.key, chosen.tensors) == (None, TWO)


@pytest.mark.parametrize("name", ["state_dict", "model", "teacher"])
def test_only_network_of_a_file_is_chosen(name: str) -> None:
    chosen = choose_network({name: TWO, "epoch": 3, "optimizer": {"lr": 0.1}}, None, where="vit.pth")
    assert (chosen.key, chosen.tensors) == (name, TWO)


def test_target_encoder_is_chosen_among_several() -> None:
    chosen = choose_network({"encoder": ONE, "target_encoder": TWO}, None, where="vit.pth")
    assert (chosen.key, chosen.tensors) == ("target_encoder", TWO)


def test_key_given_by_hand_goes_before_the_target_encoder() -> None:
    chosen = choose_network({"encoder": ONE, "target_encoder": TWO}, "encoder", where="vit.pth")
    assert (chosen.key, chosen.tensors) == ("encoder", ONE)


def test_lone_tensors_beside_a_network_are_no_candidates() -> None:
    chosen = choose_network({"model": ONE, "prototypes": torch.ones(4, 2)}, None, where="vit.pth")
    assert chosen.key == "model"


@pytest.mark.parametrize(("stated", "epoch"), [(600, 600), ("last", None)])
def test_epoch_is_the_number_that_the_file_states(stated: object, epoch: int | None) -> None:
    assert choose_network({"model": ONE, "epoch": stated}, None, where="vit.pth").epoch == epoch


def test_several_networks_without_a_key_are_refused_and_listed() -> None:
    with pytest.raises(CheckpointError) as refusal:
        choose_network({"student": ONE, "teacher": TWO}, None, where="vit.pth")
    assert str(refusal.value) == (
        "vit.pth: holds several networks:\n"
        "  student: 1 tensors, 2 values\n"
        "  teacher: 2 tensors, 4 values\n"
        "Choose one by name: --checkpoint-key NAME."
    )


@pytest.mark.parametrize(
    ("content", "listed"), [({"model": TWO}, "model: 2 tensors, 4 values"), (TWO, "(the file itself): 2 tensors")]
)
def test_wrong_key_is_refused_and_the_candidates_listed(content: dict[str, object], listed: str) -> None:
    with pytest.raises(CheckpointError, match=r"vit\.pth: has no network 'teacher'") as refusal:
        choose_network(content, "teacher", where="vit.pth")
    assert listed in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"epoch": 3, "loss": 0.5},
        {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}},
        {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
    ],
    ids=["empty", "plain values", "optimizer in a file", "optimizer"],
)
def test_file_without_a_network_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"vit\.pth: holds no tensors") as refusal:
        choose_network(content, None, where="vit.pth")
    assert "state_dict()" in refusal.value.remedy


@pytest.mark.parametrize(("content", "kind"), [([ONE], "list"), (torch.ones(2), "Tensor"), (3, "int")])
def test_file_that_is_no_dictionary_is_refused_by_its_type(content: object, kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"vit\.pth: holds a {kind}, not a state dict"):
        choose_network(content, None, where="vit.pth")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_are_taken_off_every_name(vit_weights: WeightMaker, wrapper: str) -> None:
    weights = vit_weights()
    trunk = trunk_weights(stored(prefixed(wrapper, weights)))
    assert trunk.weights.keys() == weights.keys()


def test_wrapper_on_some_names_alone_stays(vit_weights: WeightMaker) -> None:
    weights = vit_weights() | {"module.norm.weight": torch.ones(192)}
    assert "module.norm.weight" in trunk_weights(stored(weights)).weights


@pytest.mark.parametrize("key", ["target_encoder", "encoder"])
def test_projection_head_of_an_msn_network_is_dropped(vit_weights: WeightMaker, key: str) -> None:
    weights = vit_weights()
    trunk = trunk_weights(stored(prefixed("module.", weights | {"fc.fc1.weight": torch.ones(8, 192)}), key))
    assert (trunk.weights.keys(), trunk.dropped) == (weights.keys(), ("fc.fc1.weight",))


def test_target_encoder_is_of_the_msn_family(vit_weights: WeightMaker) -> None:
    assert trunk_weights(stored(vit_weights(), "target_encoder")).format == "msn"


def test_classifiers_of_a_timm_network_are_dropped(vit_weights: WeightMaker) -> None:
    weights = vit_weights()
    trunk = trunk_weights(stored(weights | {"head.weight": torch.ones(10, 192), "head_dist.bias": torch.ones(10)}))
    assert (trunk.format, trunk.weights.keys()) == ("timm", weights.keys())


def test_torchvision_transformer_gets_timms_names_and_shapes(vit_weights: WeightMaker) -> None:
    theirs = TorchvisionViT(image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=768)
    trunk = trunk_weights(stored(theirs.state_dict()))
    assert {name: weight.shape for name, weight in trunk.weights.items()} == {
        name: weight.shape for name, weight in vit_weights().items()
    }


def test_torchvision_transformer_of_older_releases_gets_the_same_names() -> None:
    theirs = TorchvisionViT(image_size=32, patch_size=8, num_layers=1, num_heads=3, hidden_dim=192, mlp_dim=768)
    older = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): weight
        for name, weight in theirs.state_dict().items()
    }
    assert (
        trunk_weights(stored(older)).weights.keys() == trunk_weights(stored(dict(theirs.state_dict()))).weights.keys()
    )


def test_torchvision_classifiers_are_dropped() -> None:
    residual = {"layer1.0.conv1.weight": torch.ones(64, 64, 3, 3), "fc.weight": torch.ones(10, 512)}
    transformer = {
        "conv_proj.bias": torch.ones(192),
        "conv_proj.weight": torch.ones(1),
        "heads.head.bias": torch.ones(10),
    }
    dropped = [trunk_weights(stored(tensors)).dropped for tensors in (residual, transformer)]
    assert dropped == [("fc.weight",), ("heads.head.bias",)]


def test_unfamiliar_network_keeps_its_names() -> None:
    trunk = trunk_weights(stored({"stem.weight": torch.ones(2), "classifier.weight": torch.ones(2)}))
    assert (trunk.format, list(trunk.weights)) == ("other", ["stem.weight"])


def test_state_dict_with_a_number_beside_its_weights_is_still_a_network(vit_weights: WeightMaker) -> None:
    weights = vit_weights(depth=1)

    network = choose_network({**weights, "epoch": 3}, None, where="vit.pth")

    assert (network.key, network.epoch, network.tensors.keys()) == (None, 3, weights.keys())
