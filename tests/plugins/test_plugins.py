"""A distribution that is installed from outside adds a probe, a data set, an encoder and a report format."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

_TOY = Path(__file__).parent / "toy"
_ROOT = Path(__file__).parents[2]
_DISTRIBUTION = "toy-plugins 1.2"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(folder), str(_TOY)], check=True, timeout=120)
    return folder


@pytest.fixture(scope="module")
def msn_eval(installed: Path) -> Run:
    """Return a function that runs `msn-eval` with the toy distribution installed."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": f"{_ROOT}{os.pathsep}{installed}"}
        command = [sys.executable, "-m", "msn_eval", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.fixture(scope="module")
def toy_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    for split, shade in (("train", 200), ("val", 220)):
        for name, colour in (("blue", (0, 0, shade)), ("red", (shade, 0, 0))):
            path = folder / f"{split}-images" / name
            path.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (32, 32), tuple(value // (number + 1) for value in colour)).save(
                    path / f"{number}.png"
                )
    return folder


@pytest.fixture(scope="module")
def runs(msn_eval: Run, toy_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a result folder: the toy encoder on the toy data set by the toy probe."""
    folder = tmp_path_factory.mktemp("runs")
    done = msn_eval(
        *("--checkpoint", "toy-pooled:2", "--data", f"toy-folder:{toy_images}", "--probe", "toy-nearest-mean"),
        *("--subset", "1img@1", "--device", "cpu", "--no-cache", "--out", str(folder)),
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def record(runs: Path) -> dict[str, Any]:
    (path,) = runs.glob("*.json")
    return json.loads(path.read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("probes", "toy-nearest-mean"),
        ("datasets", "toy-folder"),
        ("checkpoints", "toy-pooled"),
        ("reports", "toy-names"),
    ],
)
def test_plugin_is_listed_with_its_distribution(msn_eval: Run, kind: str, name: str) -> None:
    lines = dict(line.split("\t", 1) for line in msn_eval("ls", kind).stdout.splitlines())

    assert _DISTRIBUTION in lines[name]


def test_plugins_are_evaluated(record: dict[str, Any]) -> None:
    assert record["metrics"]["n"] == 6
    assert record["metrics"]["top1"] == 1.0


def test_protocol_names_the_distribution_of_probe_and_data_set(record: dict[str, Any]) -> None:
    assert record["protocol"]["plugins"] == {"data": _DISTRIBUTION, "probe": _DISTRIBUTION}


def test_record_names_the_distribution_of_the_encoder(record: dict[str, Any]) -> None:
    assert record["checkpoint"]["distribution"] == _DISTRIBUTION


def test_report_of_a_plugin_is_written(msn_eval: Run, runs: Path, tmp_path: Path) -> None:
    done = msn_eval("report", str(runs), "--format", "toy-names,md", "--out", str(tmp_path))

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table.names").read_text() == "toy-pooled:2\n"
    assert "toy-nearest-mean" in (tmp_path / "table.md").read_text()


def test_records_of_plugins_can_be_verified(msn_eval: Run, runs: Path) -> None:
    assert msn_eval("verify", str(runs)).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "pixels", "--data", "digits", "--probe", "toy-nearest-men"), "toy-nearest-mean"),
        (("--checkpoint", "pixels", "--data", "toy-foldr:x"), "toy-folder"),
        (("report", "RUNS", "--format", "toy-name", "--out", "x"), "toy-names"),
    ],
)
def test_mistyped_name_of_a_plugin_is_refused_with_a_suggestion(
    msn_eval: Run, runs: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = msn_eval(*(str(runs) if argument == "RUNS" else argument for argument in arguments))

    assert done.returncode == 2
    assert f"Did you mean {message}?" in done.stderr


def test_protocol_without_plugins_does_not_mention_them(msn_eval: Run, tmp_path: Path) -> None:
    done = msn_eval(
        *("--checkpoint", "pixels", "--data", "digits", "--probe", "ncm", "--subset", "1img@1", "--limit", "2"),
        *("--device", "cpu", "--no-cache", "--out", str(tmp_path)),
    )

    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    assert "plugins" not in json.loads(path.read_text())["protocol"]


def test_plugin_with_the_name_of_a_built_in_probe_is_refused(msn_eval: Run, installed: Path, tmp_path: Path) -> None:
    info = tmp_path / "rival-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[msn_eval.probes]\nncm = toy_plugins.probe:configure\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (_ROOT, installed, tmp_path)))}
    command = [sys.executable, "-m", "msn_eval", "ls", "probes"]

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 2
    assert "rival 0.1 adds 'ncm' to probes, but that name is taken by msn-eval" in done.stderr
