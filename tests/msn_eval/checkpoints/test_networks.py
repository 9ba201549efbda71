"""Networks of a file: where each is, and which of them is evaluated."""

import itertools

import pytest
import torch
from torch import Tensor

from msn_eval.checkpoints.networks import _PREFERENCES, StoredNetwork, choose_network, find_networks, stated_epoch
from msn_eval.errors import CheckpointError

Weights = dict[str, Tensor]


def network(value: float = 1.0, *, anchor: str = "patch_embed.proj.weight") -> Weights:
    """Return a minimal network: the anchor of its family, and another weight."""
    return {anchor: torch.full((2,), value), "norm.weight": torch.full((3,), value)}


def under(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def only(content: dict[str, object]) -> StoredNetwork:
    (found,) = find_networks(content)
    return found


def keys(content: dict[str, object]) -> list[str | None]:
    return [one.key for one in find_networks(content)]


def chosen_key(content: dict[str, object], key: str | None = None) -> str | None:
    return choose_network(find_networks(content), key, where="vit.pth").network.key


def refusal(content: dict[str, object], key: str | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        choose_network(find_networks(content), key, where="vit.pth")
    return caught.value


# Where networks are.


def test_file_that_is_a_state_dict_holds_one_network_without_a_key() -> None:
    found = only(network())
    assert (found.key, found.words, found.tensors.keys()) == (None, (), network().keys())


def test_network_behind_a_prefix_gives_its_words_and_not_its_key() -> None:
    found = only({"state_dict": under("backbone.vit.", network())})
    assert (found.key, found.words) == ("state_dict", ("state_dict", "backbone", "vit"))


@pytest.mark.parametrize(
    "anchor",
    [
        "patch_embed.proj.weight",
        "conv_proj.weight",
        "embeddings.patch_embeddings.projection.weight",
        "layer1.0.conv1.weight",
        "4.0.conv1.weight",
    ],
)
@pytest.mark.parametrize("prefix", ["", "backbone.", "model.vit."])
def test_weight_that_marks_a_layout_shows_where_a_network_begins(anchor: str, prefix: str) -> None:
    weights = network(anchor=anchor)
    content = {"state_dict": under(prefix, weights) | {"loss.weight": torch.ones(1)}}
    assert only(content).words == ("state_dict", *(word for word in prefix.split(".") if word))


def test_mark_counts_as_a_whole_word_alone() -> None:
    content = {"model": network() | {"fake_patch_embed.proj.weight": torch.ones(1)}}
    assert keys(content) == ["model"]


def test_names_behind_the_networks_prefix_are_its_weights_and_the_others_lie_beside() -> None:
    heads = {"head.weight": torch.ones(2), "queue": torch.ones(3)}
    found = only({"state_dict": under("backbone.", network()) | heads})
    assert (found.tensors.keys(), found.beside.keys()) == (network().keys(), heads.keys())


def test_weight_belongs_to_the_innermost_network_around_it() -> None:
    content = {"model": network() | under("teacher.", network(2))}
    outer, inner = find_networks(content)
    assert (outer.tensors.keys(), inner.tensors.keys()) == (network().keys(), network().keys())


def test_tensors_that_are_no_network_are_none_where_there_is_one() -> None:
    content = {
        "model": network(),
        "optimizer": {"state": {"0": {"exp_avg": torch.ones(2)}}},
        "dino_loss": {"center": torch.ones(2)},
        "predictor": {"blocks.0.norm1.weight": torch.ones(2)},
        "prototypes": torch.ones(2, 2),
    }
    assert keys(content) == ["model"]


def test_dictionaries_of_tensors_are_the_networks_where_none_is_familiar() -> None:
    weights = {"stem.weight": torch.ones(2)}
    assert keys({"generator": weights, "discriminator": {"ema": weights}}) == ["generator", "discriminator.ema"]


def test_unfamiliar_state_dict_is_a_network() -> None:
    found = only({"stem.weight": torch.ones(2), "epoch": 3})
    assert (found.key, list(found.tensors)) == (None, ["stem.weight"])


def test_lone_tensors_are_no_network() -> None:
    assert find_networks({"prototypes": torch.ones(2), "loss": torch.ones(())}) == ()


@pytest.mark.parametrize(("depth", "found"), [(4, 1), (5, 0)])
def test_networks_are_searched_four_dictionaries_deep(depth: int, found: int) -> None:
    content: dict[str, object] = network()
    for _ in range(depth):
        content = {"inner": content}
    assert len(find_networks(content)) == found


# Names that training tools change.


@pytest.mark.parametrize(
    "name",
    [
        "module.{}",
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "_fsdp_wrapped_module.{}",
        "backbone.module.{}",
        "module.backbone._orig_mod.{}",
    ],
)
def test_wrappers_are_taken_out_of_names(name: str) -> None:
    prefix = name.format("")
    found = only({"model": under(prefix, network())})
    assert (found.tensors.keys(), "module" in found.words) == (network().keys(), False)


@pytest.mark.parametrize("other", ["module.norm.weight", "module"])
def test_names_stay_where_two_would_become_one_or_one_would_vanish(other: str) -> None:
    content = network() | {other: torch.zeros(3)}
    assert other in only(content).tensors


HUB_ANCHOR = "embeddings.patch_embeddings.projection.weight"


def test_blocks_that_lost_their_prefix_come_back_to_their_embeddings() -> None:
    block = {"encoder.layer.0.output.dense.bias": torch.ones(1)}
    found = only({f"vit.{HUB_ANCHOR}": torch.ones(2), "classifier.weight": torch.ones(2)} | block)
    assert (list(found.tensors), list(found.beside)) == ([HUB_ANCHOR, *block], ["classifier.weight"])


def test_blocks_stay_apart_from_embeddings_that_have_blocks_of_their_own() -> None:
    own = {HUB_ANCHOR: torch.ones(2), "encoder.layer.0.output.dense.bias": torch.ones(1)}
    found = only(under("vit.", own) | {"encoder.layer.1.output.dense.bias": torch.ones(1)})
    assert found.tensors.keys() == own.keys()


def test_blocks_stay_apart_from_networks_of_other_libraries() -> None:
    block = {"encoder.layer.0.output.dense.bias": torch.ones(1)}
    assert list(only(under("vit.", network()) | block).beside) == list(block)


def test_blocks_stay_apart_where_two_networks_could_own_them() -> None:
    block = {"encoder.layer.0.output.dense.bias": torch.ones(1)}
    content = {f"student.{HUB_ANCHOR}": torch.ones(2), f"teacher.{HUB_ANCHOR}": torch.ones(2)} | block
    assert [list(one.beside) for one in find_networks(content)] == [list(block), list(block)]


# Which network is evaluated.


@pytest.mark.parametrize(("evaluated", "rival", "whose"), _PREFERENCES)
@pytest.mark.parametrize("order", [1, -1], ids=["evaluated first", "evaluated last"])
def test_network_that_its_authors_evaluate_is_chosen_among_dictionaries(
    evaluated: str, rival: str, whose: str, order: int
) -> None:
    content = dict([(evaluated, network(1)), (rival, network(2))][::order])
    choice = choose_network(find_networks(content), None, where="vit.pth")
    assert (choice.network.key, choice.why, choice.passed_over) == (evaluated, whose, None)


@pytest.mark.parametrize(("evaluated", "rival", "whose"), _PREFERENCES)
@pytest.mark.parametrize("suffix", [".", ".vit."])
def test_network_that_its_authors_evaluate_is_chosen_within_a_state_dict(
    evaluated: str, rival: str, whose: str, suffix: str
) -> None:
    weights = under(f"{rival}{suffix}", network(2)) | under(f"{evaluated}{suffix}", network(1))
    choice = choose_network(find_networks({"state_dict": weights}), None, where="vit.pth")
    assert (choice.network.words[1], choice.why) == (evaluated, whose)


def test_network_that_goes_before_a_better_one_is_chosen_among_three() -> None:
    assert (
        chosen_key({"encoder": network(1), "target_encoder": network(2), "online_encoder": network(3)})
        == "online_encoder"
    )


def test_only_network_is_chosen_whatever_it_is_called() -> None:
    choice = choose_network(find_networks({"student": network()}), None, where="vit.pth")
    assert (choice.network.key, choice.why, choice.passed_over) == ("student", "the only network", None)


def test_networks_whose_names_tell_no_order_are_refused_and_listed() -> None:
    error = refusal({"model": network(1), "model_ema": network(2) | {"rest": torch.ones(1000)}})
    assert str(error) == (
        "vit.pth: holds several networks:\n"
        "  model: 2 tensors, 5 values\n"
        "  model_ema: 3 tensors, 1,005 values\n"
        "Choose one by name: --checkpoint-key NAME."
    )


def test_only_those_that_remain_open_are_listed() -> None:
    error = refusal({"student": network(1), "teacher": network(2), "model_ema": network(3)})
    assert "student" not in str(error)


def test_file_without_networks_is_refused() -> None:
    error = refusal({"epoch": 3, "prototypes": torch.ones(2)})
    assert str(error) == "vit.pth: holds no network: no tensors by name\nSave model.state_dict()."


# A network asked for by name.

MOMENTUM = {
    "state_dict": under("base_encoder.", network(1)) | under("momentum_encoder.", network(2)),
    "ema": network(3),
}


@pytest.mark.parametrize(
    "key", ["momentum_encoder", "state_dict.momentum_encoder", "module.state_dict.momentum_encoder"]
)
def test_network_is_called_by_a_word_of_its_place_or_by_all_of_it(key: str) -> None:
    assert chosen_key(MOMENTUM, key) == "state_dict.momentum_encoder"


def test_key_that_names_several_is_decided_as_if_there_were_no_others() -> None:
    assert chosen_key(MOMENTUM, "state_dict") == "state_dict.base_encoder"


def test_network_asked_for_goes_before_the_one_that_its_authors_evaluate_which_is_reported() -> None:
    content = {"student": network(1), "teacher": network(2)}
    choice = choose_network(find_networks(content), "student", where="vit.pth")
    assert choice.passed_over is not None
    assert (choice.network.key, choice.why, choice.passed_over.key) == (
        "student",
        "asked for by --checkpoint-key",
        "teacher",
    )


@pytest.mark.parametrize("key", ["momentum", "encoder", "", "state_dict.encoder", "momentum_encoder.state_dict"])
def test_key_that_names_none_is_refused_with_all_there_are(key: str) -> None:
    error = refusal(MOMENTUM, key)
    assert str(error) == (
        f"vit.pth: has no network {key!r}; it holds:\n"
        "  state_dict.base_encoder: 2 tensors, 5 values\n"
        "  state_dict.momentum_encoder: 2 tensors, 5 values\n"
        "  ema: 2 tensors, 5 values\n"
        "Choose one by name: --checkpoint-key NAME."
    )


def test_file_that_is_its_network_is_listed_as_such() -> None:
    assert "\n  (the file itself): 2 tensors, 5 values\n" in str(refusal(network(), "teacher"))


# The same network stored twice.


def test_network_stored_twice_is_one_and_has_the_shorter_place() -> None:
    content = {"state_dict": under("model.backbone.", network()) | under("backbone.", network())}
    choice = choose_network(find_networks(content), None, where="vit.pth")
    assert (choice.network.key, choice.why) == ("state_dict.backbone", "stored 2 times with equal weights")


@pytest.mark.parametrize(
    "changed",
    [
        {"norm.weight": torch.tensor([1.0, 1.0, 1.5])},
        {"norm.weight": torch.ones(4)},
        {"norm.bias": torch.ones(3)},
    ],
    ids=["value", "shape", "name"],
)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_networks_that_differ_anywhere_stay_several(changed: Weights, order: tuple[int, ...]) -> None:
    stored = [("a", network()), ("b", network()), ("c", network() | changed)]
    assert "holds several networks" in refusal(dict(stored[one] for one in order)).what


@pytest.mark.parametrize(
    ("stated", "epoch"),
    [
        (600, 600),
        (0, 0),
        ("600", 600),
        ("last", None),
        ("6" * 10, None),
        ("-1", None),
        (True, None),
        (1.5, None),
        (None, None),
    ],
)
def test_epoch_is_the_whole_number_that_a_file_states(stated: object, epoch: int | None) -> None:
    assert stated_epoch({"epoch": stated}) == epoch


def test_networks_by_the_ten_thousand_are_found_and_listed_in_part() -> None:
    content = {f"network{number}.conv_proj.weight": torch.ones(1) * number for number in range(20_000)}
    networks = find_networks(content)
    with pytest.raises(CheckpointError, match="and 19,990 more"):
        choose_network(networks, None, where="vit.pth")
    assert len(networks) == 20_000


def test_name_of_very_many_words_is_not_a_burden() -> None:
    network = find_networks({"a.conv_proj.weight": torch.ones(1), "a." + "b." * 1_000_000 + "c": torch.ones(1)})[0]
    assert len(network.tensors) == 2
