"""`msn-eval inspect`: what is printed, and what never reaches the terminal."""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from msn_eval.checkpoints.convert import convert_checkpoint
from msn_eval.checkpoints.inspection import Inspection
from msn_eval.cli import main

Weights = dict[str, Tensor]
WeightMaker = Callable[..., Weights]
MSNWriter = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Take back what the command line sets up for a process of its own."""
    package = logging.getLogger("msn_eval")
    before = (package.handlers[:], package.level, package.propagate)
    yield
    package.handlers[:], _, package.propagate = before
    package.setLevel(before[1])


def saved(folder: Path, content: object, *, name: str = "vit.pth") -> Path:
    path = folder / name
    torch.save(content, path)
    return path


def printed(capsys: Capture, *words: str | Path) -> str:
    """Return what a successful inspection prints."""
    assert main(["inspect", *map(str, words)]) == 0
    return capsys.readouterr().out


def entries(text: str) -> dict[str, str]:
    """Return the printed lines by the name that each begins with."""
    found = (re.match(r"(\S+(?: \S+)*)\s{2,}(.*)", line) for line in text.splitlines())
    return {one[1]: one[2] for one in found if one}


def output(capsys: Capture, *words: str | Path) -> dict[str, object]:
    def refuse(constant: str) -> object:
        raise AssertionError(f"{constant} is not JSON")

    return dict(json.loads(printed(capsys, *words, "--json"), parse_constant=refuse))


# For people.


def test_msn_release_is_reported_on_one_screen(msn_file: MSNWriter, capsys: Capture) -> None:
    path = msn_file()
    found = entries(printed(capsys, path))
    assert found["file"].startswith(f"{path} (zip, ")
    assert {
        name: found[name]
        for name in ("networks", "epoch", "family", "architecture", "parameters", "images", "mean, std")
    } == {
        "networks": "target_encoder: 32 tensors, 932,168 values  <- used: the only network",
        "epoch": "600",
        "family": "msn",
        "architecture": "vit_width192_depth2_patch8_32",
        "parameters": "930,624, 100.00% of the values matched",
        "images": "32 pixels, patches of 8",
        "mean, std": "0.485,0.456,0.406; 0.229,0.224,0.225 (ImageNet's, as published for msn)",
    }
    assert (found["verdict"], "ALARM" in found) == ("would be evaluated", False)


def test_statistics_are_reported_on_one_line(msn_file: MSNWriter, capsys: Capture) -> None:
    line = entries(printed(capsys, msn_file()))["weights"]
    number = r"-?\d[\d.e-]*"
    assert re.fullmatch(
        rf"float32; mean {number}, std {number}, from {number} to {number}, 0 zeros, 0 not finite", line
    )


def test_five_names_are_shown_and_all_are_counted(msn_file: MSNWriter, capsys: Capture) -> None:
    line = entries(printed(capsys, msn_file()))["used"]
    assert (line.count(", "), line.endswith(", … (30 in all)")) == (5, True)


def test_open_choice_is_refused_in_the_verdict_with_exit_code_0(
    tmp_path: Path, vit_weights: WeightMaker, capsys: Capture
) -> None:
    text = printed(capsys, saved(tmp_path, {"one": vit_weights(), "two": vit_weights(depth=1)}))
    assert "would be REFUSED: holds several networks:" in text
    assert "Choose one by name: --checkpoint-key NAME." in text


def test_architecture_given_manually_is_reported(tmp_path: Path, vit_weights: WeightMaker, capsys: Capture) -> None:
    arch = "vit_tiny_patch16_224?embed_dim=96&num_heads=4&img_size=32&patch_size=8&depth=2"
    found = entries(printed(capsys, saved(tmp_path, vit_weights(width=96)), "--arch", arch))
    assert (found["architecture"], found["verdict"]) == (arch, "would be evaluated")


def test_misfits_are_listed_by_kind(tmp_path: Path, vit_weights: WeightMaker, capsys: Capture) -> None:
    weights = vit_weights() | {"blocks.1.norm1.bias": torch.ones(3), "neck.bias": torch.ones(2)}
    del weights["norm.bias"]
    found = entries(printed(capsys, saved(tmp_path, weights)))
    assert (found["missing"], found["no place for"], found["reshaped"]) == (
        "norm.bias",
        "neck.bias",
        "blocks.1.norm1.bias: file (3,), model (192,)",
    )


def test_alarms_are_on_lines_of_their_own(tmp_path: Path, vit_weights: WeightMaker, capsys: Capture) -> None:
    poisoned = vit_weights() | {"norm.bias": torch.full((192,), math.nan), "head.weight": torch.ones(10, 192)}
    lines = printed(capsys, saved(tmp_path, poisoned)).splitlines()
    assert [line.split(maxsplit=1)[1].split()[0] for line in lines if line.startswith("ALARM")] == ["NaN", "a"]


def test_unreadable_file_ends_with_20_and_one_block(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "vit.pth").write_bytes(b"<html>Sign in</html>")
    code = main(["inspect", str(tmp_path / "vit.pth")])
    streams = capsys.readouterr()
    assert (code, streams.out, "Traceback" in streams.err, "vit.pth: " in streams.err) == (20, "", False, True)


def test_missing_file_ends_with_20_and_the_schemes(capsys: Capture) -> None:
    assert (main(["inspect", "nowhere.pth"]), "msn-eval ls checkpoints" in capsys.readouterr().err) == (20, True)


def test_file_is_left_as_it_is(msn_file: MSNWriter, tmp_path: Path, capsys: Capture) -> None:
    path = msn_file()
    before = path.read_bytes()
    printed(capsys, path)
    assert ([one.name for one in tmp_path.iterdir()], path.read_bytes()) == (["vit.pth.tar"], before)


# Names of weights elsewhere.


def test_released_network_is_inspected_by_its_name(
    msn_file: MSNWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    msn_file(name="vits16_800ep.pth.tar")
    monkeypatch.setenv("MSN_EVAL_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    assert entries(printed(capsys, "msn:vits16"))["family"] == "msn"


def test_released_network_that_is_not_there_ends_with_20_where_the_network_is_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("MSN_EVAL_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("MSN_EVAL_OFFLINE", "1")
    assert (main(["inspect", "msn:vits16"]), "MSN_EVAL_OFFLINE" in capsys.readouterr().err) == (20, True)


def test_folder_is_inspected_by_its_name_on_the_hub(msn_file: MSNWriter, tmp_path: Path, capsys: Capture) -> None:
    convert_checkpoint(msn_file(), tmp_path / "folder", to="hf")
    assert entries(printed(capsys, f"hf:{tmp_path / 'folder'}"))["family"] == "huggingface"


# For programs.


def test_json_has_the_fields_of_the_record(msn_file: MSNWriter, capsys: Capture) -> None:
    fields = [field.name for field in dataclasses.fields(Inspection)]
    assert list(output(capsys, msn_file())) == fields


@pytest.mark.parametrize(
    "poisoned",
    [
        lambda weights: {name: torch.full_like(tensor, math.nan) for name, tensor in weights.items()},
        lambda weights: weights | {"norm.bias": torch.full((192,), math.inf)},
        lambda weights: weights | {"norm.bias": torch.full((192,), 1e308, dtype=torch.float64)},
        lambda weights: weights | {"norm.bias": torch.full((192,), 3e38)},
    ],
    ids=["NaN alone", "infinite", "beyond float32", "large"],
)
def test_json_has_no_number_that_json_has_not(
    tmp_path: Path, vit_weights: WeightMaker, capsys: Capture, poisoned: Callable[[Weights], Weights]
) -> None:
    found = output(capsys, saved(tmp_path, poisoned(vit_weights())))
    assert found["arch"] == "vit_width192_depth2_patch8_32"


# Hostile names.

HOSTILE = {
    "escapes": "\x1b[2J\x1b]0;owned\x07",
    "another direction": "gnp.\u202efdp\u2066",
    "one-byte escapes": "\x9b31m",
    "new line": "x\nverdict  would be evaluated",
    "carriage return": "x\rverdict",
    "long": "z" * 5_000,
}
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def everywhere(draw: WeightMaker, name: str) -> list[object]:
    """Return files with a hostile name of a weight, a network, one of several networks, or in the file's text."""
    zeros = {f"{name}.weight": torch.zeros(2, 2), "blocks.0.norm1.bias": torch.ones(3)}
    return [
        draw() | {name: torch.ones(2)},
        draw() | zeros,
        draw() | {f"head.{name}": torch.ones(2)},
        {name: draw()},
        {name: draw(), "another": draw(depth=1)},
        {"teacher": {name: draw()}, "student": {name: draw(depth=1)}},
    ]


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_name_is_escaped_cut_and_makes_no_line_of_its_own(
    tmp_path: Path, vit_weights: WeightMaker, capsys: Capture, kind: str
) -> None:
    texts = [printed(capsys, saved(tmp_path, content)) for content in everywhere(vit_weights, HOSTILE[kind])]
    assert [RAW.findall(text) for text in texts] == [[]] * len(texts)
    assert [len(re.findall("^verdict", text, re.MULTILINE)) for text in texts] == [1] * len(texts)
    assert max(len(line) for text in texts for line in text.splitlines()) < 2_000


def test_new_line_in_a_name_is_spelled_out(tmp_path: Path, vit_weights: WeightMaker, capsys: Capture) -> None:
    path = saved(tmp_path, vit_weights() | {HOSTILE["new line"]: torch.ones(2)})
    assert entries(printed(capsys, path))["no place for"] == "x\\x0averdict  would be evaluated"


@pytest.mark.parametrize("kind", HOSTILE)
def test_json_keeps_a_hostile_name_as_plain_text(
    tmp_path: Path, vit_weights: WeightMaker, capsys: Capture, kind: str
) -> None:
    path = saved(tmp_path, vit_weights() | {HOSTILE[kind]: torch.ones(2)})
    text = printed(capsys, path, "--json")
    assert (RAW.findall(text), json.loads(text)["left_over"]) == ([], [HOSTILE[kind]])
