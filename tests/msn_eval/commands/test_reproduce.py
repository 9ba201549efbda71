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
    publication = replace(
        read_publication(), class_map_sha256=class_map_sha256(digits.classes), val_images=len(digits.val), lists=()
    )
    for module in (msn_eval.data.imagenet_subsets, msn_eval.data.subsets):
        monkeypatch.setattr(module, "read_publication", lambda: publication)


def _publish(monkeypatch: pytest.MonkeyPatch, value: float, *, network: Network = _NETWORK) -> None:
    published = Reproduction(
        name="p-1img",
        network=network,
        subset="1img",
        probe="logistic",
        strength=(0.0025, "here"),
        expected=value,
        spread=0.5,
        epochs="1",
        source="a table",
    )
    monkeypatch.setattr(msn_eval.results.reproduction, "list_reproductions", lambda: (published,))


def _reproduce(tmp_path: Path, *arguments: str) -> int:
    return main(["reproduce", "p-1img", "--data", "digits", "--no-cache", "--out", str(tmp_path), *arguments, "-q"])


@pytest.mark.usefixtures("digits_as_imagenet")
def test_number_within_the_spread_is_reproduced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _publish(monkeypatch, 50.0)
    _reproduce(tmp_path, "--json")
    (found,) = json.loads(capsys.readouterr().out)
    _publish(monkeypatch, round(found["measured"], 1))

    code = _reproduce(tmp_path)

    assert code == 0
    assert f"expected {found['measured']:.1f} ± 0.5  measured {found['measured']:.1f} ± " in capsys.readouterr().out


@pytest.mark.usefixtures("digits_as_imagenet")
def test_number_outside_the_spread_differs_with_exit_code_10(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _publish(monkeypatch, 99.0)

    code = _reproduce(tmp_path)

    assert (code, "DIFFERS: -" in capsys.readouterr().out) == (10, True)


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


def test_other_data_set_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["reproduce", "msn-vits16-5imgs", "--data", "digits"])

    assert (code, "digits: is not ImageNet: 10 classes" in capsys.readouterr().err) == (21, True)


def test_weights_without_a_checkpoint_name_are_requested(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["reproduce", "ibot-vits16-1pct", "--data", "digits"])

    assert (code, "Give --checkpoint FILE" in capsys.readouterr().err) == (20, True)


def test_list_shows_which_lambdas_are_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    main(["reproduce", "--list"])

    lines = capsys.readouterr().out.splitlines()
    assert sum("unknown" in line for line in lines) == len(lines) - 1 - 3  # the header, two lambdas, and k-NN has none
