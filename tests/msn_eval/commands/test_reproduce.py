"""`msn-eval reproduce` on the command line, with the digits in place of ImageNet."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import msn_eval.data.imagenet_subsets
import msn_eval.data.subsets
import msn_eval.results.reproduction
from msn_eval.cli import main
from msn_eval.data import read_dataset
from msn_eval.data.dataset import class_map_sha256
from msn_eval.data.imagenet_subsets import read_publication
from msn_eval.results.reproduction import Network, Reproduction

_NETWORK = Network(name="p", method="P", printed_arch="ViT-P/1", arch="pixels", checkpoint="pixels")


@pytest.fixture
def digits_as_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = read_dataset("digits")
    class_map = class_map_sha256(digits.classes)
    publication = replace(read_publication(), class_map_sha256=class_map, val_images=len(digits.val), lists=())
    for module in (msn_eval.data.imagenet_subsets, msn_eval.data.subsets):
        monkeypatch.setattr(module, "read_publication", lambda: publication)


def _publish(monkeypatch: pytest.MonkeyPatch, value: float, *, network: Network = _NETWORK) -> None:
    published = Reproduction(
        name="p-1img", network=network, subset="1img", probe="logistic", strength=(0.0025, "here"), expected=value,
        spread=0.5, epochs="1", source="a table",
    )  # fmt: skip
    monkeypatch.setattr(msn_eval.results.reproduction, "list_reproductions", lambda: (published,))


def _reproduce(tmp_path: Path, *arguments: str) -> int:
    return main(["reproduce", "p-1img", "--data", "digits", "--no-cache", "--out", str(tmp_path), *arguments, "-q"])


@pytest.mark.usefixtures("digits_as_imagenet")
def test_number_within_the_spread_is_reproduced_and_another_differs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _publish(monkeypatch, 99.0)
    assert (_reproduce(tmp_path), "DIFFERS: -" in capsys.readouterr().out) == (10, True)
    _reproduce(tmp_path, "--json")
    (verdict,) = json.loads(capsys.readouterr().out)
    measured = round(verdict["measured"], 1)
    _publish(monkeypatch, measured)

    code = _reproduce(tmp_path)

    assert (code, f"expected {measured} ± 0.5  measured {measured} ± " in capsys.readouterr().out) == (0, True)


@pytest.mark.usefixtures("digits_as_imagenet")
def test_other_network_is_refused_before_the_evaluation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _publish(monkeypatch, 50.0, network=replace(_NETWORK, arch="vit_small_patch16_224"))

    code = _reproduce(tmp_path)

    assert (code, list(tmp_path.iterdir())) == (20, [])
    assert "pixels: is pixels, and p-1img was published for vit_small_patch16_224" in capsys.readouterr().err


def test_missing_imagenet_prints_the_plan_and_exits_with_21(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MSN_EVAL_DATA", raising=False)

    code = main(["reproduce", "msn-vits16-5imgs"])

    captured = capsys.readouterr()
    assert (code, "ImageNet is missing" in captured.err) == (21, True)
    assert "lambda 0.0025" in captured.out
    assert "published  62.8 ± 0.3 (arXiv:2204.07141 Table 1)" in captured.out


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("msn-vits16-5imgs", 21, "digits: is not ImageNet: 10 classes"),
        ("ibot-vits16-1pct", 20, "Give --checkpoint FILE"),
    ],
)
def test_other_data_and_weights_without_a_checkpoint_name_are_refused(
    name: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", name, "--data", "digits"]) == code
    assert message in capsys.readouterr().err


def test_list_shows_which_lambdas_are_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    main(["reproduce", "--list"])

    lines = capsys.readouterr().out.splitlines()
    assert sum("unknown" in line for line in lines) == len(lines) - 1 - 3  # the header, two lambdas, and k-NN has none
