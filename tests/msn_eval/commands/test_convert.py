"""`msn-eval convert`: output and exit codes."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torchvision
from torch import Tensor, save

from msn_eval.cli import main

WeightMaker = Callable[..., dict[str, Tensor]]
MSNWriter = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Undo the logging set-up of the command line."""
    package = logging.getLogger("msn_eval")
    before = (package.handlers[:], package.level, package.propagate)
    yield
    package.handlers[:], _, package.propagate = before
    package.setLevel(before[1])


def convert(*arguments: str | Path) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.mark.parametrize(
    ("to", "arch"), [("hf", "vit_width192_depth2_patch8_32, "), ("timm", "vit_width192_depth2_patch8_32, "), ("safetensors", "")]
)  # fmt: skip
def test_output_is_described_on_one_line(
    msn_file: MSNWriter, tmp_path: Path, capsys: Capture, to: str, arch: str
) -> None:
    out = tmp_path / "out"
    code = convert(msn_file(), out, "--to", to)
    content = (out / "model.safetensors" if to == "hf" else out).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert (code, capsys.readouterr().out) == (
        0,
        f"{out}\t{arch}{len(content):,} bytes, sha256 {digest}, read back equal\n",
    )


def test_key_and_architecture_are_passed_on(msn_file: MSNWriter, tmp_path: Path, capsys: Capture) -> None:
    arch = "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2&num_heads=6"
    convert(msn_file(), tmp_path / "out", "--to", "hf", "--arch", arch, "--checkpoint-key", "target_encoder")
    assert "vit_width192_depth2_patch8_32_heads6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "out", "code", "text"),
    [
        ("nowhere.pth", "out", 20, "No such checkpoint file: "),
        ("page.pth", "out", 20, "a web page"),
        ("vit.pth.tar", "vit.pth.tar", 2, "OUT exists already"),
        ("vit.pth.tar", "nowhere/out", 2, "No such folder"),
        ("resnet.pth", "out", 20, "it is a ResNet, not a plain Vision Transformer"),
    ],
)
def test_refusal_ends_with_its_exit_code_and_one_block(
    msn_file: MSNWriter, tmp_path: Path, capsys: Capture, source: str, out: str, code: int, text: str
) -> None:
    msn_file()
    (tmp_path / "page.pth").write_bytes(b"<html>")
    save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    ended = convert(tmp_path / source, tmp_path / out, "--to", "hf")
    error = capsys.readouterr().err
    assert (ended, text in error, "Traceback" in error, (tmp_path / "out").exists()) == (code, True, False, False)


@pytest.mark.parametrize("arguments", [["--to", "onnx"], ["--to", "HF"], ["--to"], []], ids=" ".join)
def test_unknown_target_ends_with_2(msn_file: MSNWriter, tmp_path: Path, capsys: Capture, arguments: list[str]) -> None:
    assert (convert(msn_file(), tmp_path / "out", *arguments), "--to" in capsys.readouterr().err) == (2, True)


def test_released_network_is_converted_by_its_name(
    msn_file: MSNWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    msn_file(name="vits16_800ep.pth.tar")
    monkeypatch.setenv("MSN_EVAL_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    assert (convert("msn:vits16", tmp_path / "out", "--to", "hf"), (tmp_path / "out").is_dir()) == (0, True)
