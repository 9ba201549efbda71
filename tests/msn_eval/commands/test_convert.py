"""`msn-eval convert`: output and exit codes."""

import hashlib
import logging
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torchvision
from torch import Tensor, save

from msn_eval.checkpoints.convert import convert_checkpoint
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


def test_folder_holds_weights_config_and_processor(msn_file: MSNWriter, tmp_path: Path) -> None:
    convert(msn_file(), tmp_path / "out", "--to", "hf")
    names = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_key_and_architecture_are_passed_on(msn_file: MSNWriter, tmp_path: Path, capsys: Capture) -> None:
    arch = "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2&num_heads=6"
    convert(msn_file(), tmp_path / "out", "--to", "hf", "--arch", arch, "--checkpoint-key", "target_encoder")
    assert "vit_width192_depth2_patch8_32_heads6" in capsys.readouterr().out


def test_key_that_is_not_there_ends_with_20(msn_file: MSNWriter, tmp_path: Path, capsys: Capture) -> None:
    code = convert(msn_file(), tmp_path / "out", "--to", "hf", "--checkpoint-key", "teacher")
    assert (code, "has no network 'teacher'" in capsys.readouterr().err) == (20, True)


def test_network_that_transformers_cannot_compute_ends_with_20(tmp_path: Path, capsys: Capture) -> None:
    save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    code = convert(tmp_path / "resnet.pth", tmp_path / "out", "--to", "hf")
    assert (code, "it is a ResNet, not a plain Vision Transformer" in capsys.readouterr().err) == (20, True)


def test_unreadable_file_ends_with_20_and_one_block(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "vit.pth").write_bytes(b"<html>")
    code = convert(tmp_path / "vit.pth", tmp_path / "out", "--to", "hf")
    assert (code, "Traceback" in capsys.readouterr().err, (tmp_path / "out").exists()) == (20, False, False)


def test_missing_file_ends_with_20(tmp_path: Path, capsys: Capture) -> None:
    code = convert(tmp_path / "nowhere.pth", tmp_path / "out", "--to", "hf")
    assert (code, "No such checkpoint file: " in capsys.readouterr().err) == (20, True)


def test_existing_out_ends_with_2(msn_file: MSNWriter, capsys: Capture) -> None:
    path = msn_file()
    assert (convert(path, path, "--to", "timm"), "OUT exists already" in capsys.readouterr().err) == (2, True)


def test_missing_folder_above_out_ends_with_2(msn_file: MSNWriter, tmp_path: Path, capsys: Capture) -> None:
    code = convert(msn_file(), tmp_path / "nowhere" / "out", "--to", "timm")
    assert (code, "No such folder" in capsys.readouterr().err) == (2, True)


@pytest.mark.parametrize("arguments", [["--to", "onnx"], ["--to", "HF"], ["--to"], []], ids=" ".join)
def test_unknown_target_ends_with_2(msn_file: MSNWriter, tmp_path: Path, capsys: Capture, arguments: list[str]) -> None:
    assert (convert(msn_file(), tmp_path / "out", *arguments), "--to" in capsys.readouterr().err) == (2, True)


def test_full_disk_ends_with_22_and_leaves_nothing(msn_file: MSNWriter, tmp_path: Path, capsys: Capture) -> None:
    source, (soft, hard) = msn_file(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        code = convert(source, tmp_path / "out", "--to", "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, "File too large" in capsys.readouterr().err, list(tmp_path.iterdir())) == (22, True, [source])


def test_released_network_is_converted_by_its_name(
    msn_file: MSNWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    msn_file(name="vits16_800ep.pth.tar")
    monkeypatch.setenv("MSN_EVAL_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    assert (convert("msn:vits16", tmp_path / "out", "--to", "hf"), (tmp_path / "out").is_dir()) == (0, True)


def test_folder_is_converted_by_its_name_on_the_hub(msn_file: MSNWriter, tmp_path: Path) -> None:
    convert_checkpoint(msn_file(), tmp_path / "folder", to="hf")
    assert convert(f"hf:{tmp_path / 'folder'}", tmp_path / "out", "--to", "timm") == 0
