"""Plain content of loaded files."""

from collections import OrderedDict

import pytest
import torch

from msn_eval.checkpoints.formats.content import plain_content
from msn_eval.errors import CheckpointError


def refused(loaded: object, file_bytes: int = 10_000) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        plain_content(loaded, file_bytes=file_bytes, where="vit.pth")
    return caught.value


def test_mappings_tensors_and_plain_values_stay() -> None:
    loaded = {"model": OrderedDict(a=torch.ones(2)), "epoch": 3, "loss": 0.5, "done": True, "arch": "vit"}
    found = plain_content(loaded, file_bytes=100, where="vit.pth")
    assert found["model"]["a"].tolist() == [1, 1]  # type: ignore[index, union-attr, call-overload]
    assert {name: value for name, value in found.items() if name != "model"} == {
        "epoch": 3,
        "loss": 0.5,
        "done": True,
        "arch": "vit",
    }


@pytest.mark.parametrize(
    "value", [None, [torch.ones(1)], (1,), object(), {1: torch.ones(1)}, b"x", {1, 2}, torch.float32]
)
def test_everything_else_is_left_out(value: object) -> None:
    assert plain_content({"value": value}, file_bytes=100, where="vit.pth") in ({}, {"value": {}})


def test_parameter_becomes_its_values() -> None:
    found = plain_content({"a": torch.nn.Parameter(torch.ones(2))}, file_bytes=100, where="vit.pth")["a"]
    assert isinstance(found, torch.Tensor)
    assert (type(found), found.requires_grad) == (torch.Tensor, False)


@pytest.mark.parametrize(("loaded", "kind"), [([], "list"), (torch.ones(1), "Tensor"), (3, "int")])
def test_root_that_is_no_mapping_is_refused_by_its_kind(loaded: object, kind: str) -> None:
    error = refused(loaded)
    assert (error.what, error.remedy) == (f"holds a {kind}, not a state dict", "Save model.state_dict().")


def test_circle_is_refused() -> None:
    loaded: dict[str, object] = {}
    loaded["self"] = loaded
    assert "nested more than 100 deep" in refused(loaded).what


def test_dict_shared_over_and_over_is_refused() -> None:
    loaded: dict[str, object] = {}
    for _ in range(60):
        loaded = {"a": loaded, "b": loaded}
    assert "more than 1,000,000 values" in refused(loaded).what


def test_dict_shared_twice_is_kept_twice() -> None:
    shared = {"weight": torch.ones(2)}
    found = plain_content({"model": shared, "ema": shared}, file_bytes=100, where="vit.pth")
    assert found.keys() == {"model", "ema"}


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(1, 1).expand(1 << 20, 1 << 16), "in fewer bytes"),
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.empty(3, device="meta"), "device meta"),
        (torch.masked.MaskedTensor, "left out"),
    ],
    ids=["expanded", "sparse", "meta", "class"],
)
def test_tensor_that_is_more_or_less_than_its_bytes_is_refused(tensor: object, reason: str) -> None:
    if reason == "left out":
        assert plain_content({"a": tensor}, file_bytes=100, where="vit.pth") == {}
    else:
        assert reason in refused({"layer.weight": tensor}).what


def test_subclass_of_tensor_is_refused() -> None:
    class Odd(torch.Tensor):
        pass

    assert "a Odd" in refused({"a": torch.ones(2).as_subclass(Odd)}).what


def test_views_that_repeat_their_bytes_too_often_are_refused() -> None:
    base = torch.ones(1 << 20)
    loaded = {str(turn): base[turn:] for turn in range(10)}
    assert "tensors of" in refused(loaded, file_bytes=1 << 22).what


def test_tied_weights_count_once() -> None:
    base = torch.ones(1 << 20)
    assert len(plain_content({str(turn): base for turn in range(10)}, file_bytes=1 << 22, where="vit.pth")) == 10
