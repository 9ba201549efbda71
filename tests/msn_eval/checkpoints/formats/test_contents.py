"""Outlines: a file's tensors by shape and type, and their values read from where they lie."""

import io
import os
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from msn_eval.checkpoints.formats.contents import Outline, plain_content
from msn_eval.checkpoints.formats.read import read_weight_file, read_weight_outline
from msn_eval.errors import CheckpointError

_SHARED = torch.arange(24.0).reshape(4, 6)
TENSORS = {
    "matrix": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)),
    "transposed": _SHARED.t(),
    "slice": _SHARED[1:3, 2:4],
    "step": torch.arange(10)[::3],
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "bytes": torch.tensor([1, 255], dtype=torch.uint8),
    "truth": torch.tensor([True, False, True]),
    "long": torch.tensor([-(2**40), 7]),
    "complex": torch.tensor([1 + 2j, -3j]),
    "large": torch.arange(3_000_000, dtype=torch.int32),
}


def save_safely(content: dict[str, Tensor], path: Path) -> None:
    safetensors.torch.save_file({name: one.contiguous().clone() for name, one in content.items()}, path)


WRITERS: dict[str, Callable[..., None]] = {
    "zip": torch.save,
    "old": partial(torch.save, _use_new_zipfile_serialization=False),
    "safetensors": save_safely,
}


def outlined(content: object, path: Path, container: str = "zip") -> tuple[dict[str, Tensor], Outline]:
    WRITERS[container](content, path)
    file, outline = read_weight_outline(path)
    return file.content, outline  # type: ignore[return-value]


def whole(outline: Outline, tensor: Tensor) -> Tensor:
    return torch.cat([*outline.pieces(tensor), torch.empty(0, dtype=tensor.dtype)]).reshape(tensor.shape)


@pytest.mark.parametrize("container", WRITERS)
@pytest.mark.parametrize("name", TENSORS)
def test_values_are_read_from_where_they_lie(tmp_path: Path, container: str, name: str) -> None:
    content, outline = outlined(TENSORS, tmp_path / "weights", container)
    assert torch.equal(whole(outline, content[name]), TENSORS[name])


@pytest.mark.parametrize("container", WRITERS)
def test_outline_has_names_shapes_and_types_of_the_file_and_no_values(tmp_path: Path, container: str) -> None:
    content, _ = outlined(TENSORS, tmp_path / "weights", container)
    assert {name: (one.shape, one.dtype, one.device.type) for name, one in content.items()} == {
        name: (one.shape, one.dtype, "meta") for name, one in TENSORS.items()
    }


@pytest.mark.parametrize("container", ["zip", "old"])
def test_outline_is_nested_as_what_torch_loads(tmp_path: Path, container: str) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    content = {
        "model": module.state_dict(),
        "parameters": OrderedDict(module.named_parameters()),
        "args": Namespace(lr=0.1),
        "optimizer": {"state": {0: {"step": torch.ones(2)}}, "name": "adamw"},
        "epoch": 3,
        "list": [torch.ones(3)],
        "nothing": None,
    }
    WRITERS[container](content, tmp_path / "a.pth")

    outline, loaded = read_weight_outline(tmp_path / "a.pth")[0], read_weight_file(tmp_path / "a.pth")

    assert shapes(outline.content) == shapes(loaded.content)
    assert (outline.sha256, outline.notes, outline.file_bytes) == (loaded.sha256, loaded.notes, loaded.file_bytes)


def shapes(content: object) -> object:
    if isinstance(content, dict):
        return {name: shapes(value) for name, value in content.items()}
    return (tuple(content.shape), content.dtype) if isinstance(content, Tensor) else content


def test_two_names_of_one_tensor_share_their_place(tmp_path: Path) -> None:
    tied = torch.randn(4)
    content, outline = outlined({"a": {"x": tied}, "b": {"y": tied, "part": tied[1:3]}}, tmp_path / "a.pth")
    values = [whole(outline, content[group][name]) for group, name in (("a", "x"), ("b", "y"), ("b", "part"))]  # type: ignore[index]
    assert all(map(torch.equal, values, (tied, tied, tied[1:3])))


def test_file_of_another_byte_order_is_read_in_full(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a.b": torch.ones(2)}, buffer)
    # The member's checksum is that of the text, so the test writes the archive anew.
    reader = torch._C.PyTorchFileReader(io.BytesIO(buffer.getvalue()))
    path = tmp_path / "a.pth"
    writer = torch._C.PyTorchFileWriter(str(path))
    for name in reader.get_all_records():
        record = b"big" if name == "byteorder" else reader.get_record(name)
        if name not in ("version", ".data/serialization_id"):
            record = record[:4][::-1] * 2 if name.startswith("data/") else record
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()

    file, outline = read_weight_outline(path)

    assert (dict(outline.starts), torch.equal(file.content["a.b"], torch.ones(2))) == ({}, True)  # type: ignore[arg-type]


def test_file_that_was_replaced_since_is_refused(tmp_path: Path) -> None:
    content, outline = outlined({"a.b": torch.ones(2)}, tmp_path / "a.pth")
    torch.save({"a.b": torch.zeros(2)}, tmp_path / "b.pth")
    (tmp_path / "b.pth").replace(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: changed while it was being read"):
        list(outline.pieces(content["a.b"]))


def test_file_that_was_shortened_since_is_refused(tmp_path: Path) -> None:
    content, outline = outlined(TENSORS, tmp_path / "a.pth")
    os.truncate(tmp_path / "a.pth", 1000)
    with pytest.raises(CheckpointError, match="changed"):
        list(outline.pieces(content["large"]))


def test_file_that_went_away_is_refused(tmp_path: Path) -> None:
    content, outline = outlined({"a.b": torch.ones(2)}, tmp_path / "a.pth")
    (tmp_path / "a.pth").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(outline.pieces(content["a.b"]))


def test_outline_holds_its_own_tensors_alone(tmp_path: Path) -> None:
    content, outline = outlined({"a.b": torch.ones(2)}, tmp_path / "a.pth")
    held = [outline.holds(one) for one in (content["a.b"], torch.ones(2), torch.empty(2, device="meta"))]
    assert held == [True, False, False]


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
    assert (error.what, error.hint) == (f"holds a {kind}, not a state dict", "Save model.state_dict().")


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
