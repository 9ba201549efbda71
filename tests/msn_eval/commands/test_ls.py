import subprocess
import sys
from types import SimpleNamespace

import pytest

from msn_eval.cli import main

_LIST = """
import sys
from msn_eval.cli import main
code = main(["ls", sys.argv[1]])
sys.exit(code or 9 * ("torch" in sys.modules))
"""


@pytest.mark.parametrize("kind", ["checkpoints", "subsets", "probes", "datasets", "reports", "recipes"])
def test_listing_does_not_import_torch(kind: str) -> None:
    process = subprocess.run([sys.executable, "-c", _LIST, kind], capture_output=True, text=True, timeout=60)
    lines = process.stdout.splitlines()
    assert (process.returncode, process.stderr) == (0, "")
    assert lines
    assert all(name and summary for name, summary in (line.split("\t") for line in lines))


def test_reports_are_the_built_in_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "reports"]) == 0
    names = [line.partition("\t")[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:6] == ["md", "csv", "tidy", "json", "latex", "html"]


def test_recipes_are_those_of_both_programs_with_their_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "msn_vitb4\tMasked Siamese Networks, ViT-B/4 (msn-pretrain msn_vitb4)" in lines
    assert any(line.startswith("low_shot\t") and line.endswith("(msn-eval --config low_shot)") for line in lines)


def test_protocols_have_their_hyper_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "protocols"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "logistic 1img\tversion 1, tap cls, lambda=0.0025" in lines
    assert "knn 1pct\tversion 1, tap cls-norm, k=10,20,100,200, temperature=0.07" in lines
    assert any(line.startswith("logistic 1pct --lambda auto\t") for line in lines)


@pytest.mark.parametrize(
    ("kind", "group"),
    [("checkpoints", "encoders"), ("probes", "probes"), ("datasets", "datasets"), ("reports", "reports")],
)
def test_plugin_is_listed_with_its_distribution(
    kind: str, group: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = SimpleNamespace(name="toy", value="toy:make", dist=SimpleNamespace(name="toy-plugin", version="1.2"))
    points = {f"msn_eval.{group}": [point]}
    monkeypatch.setattr("msn_eval.registry.entry_points", lambda group: points.get(group, []))
    assert main(["ls", kind]) == 0
    assert "toy\tplug-in of toy-plugin 1.2" in capsys.readouterr().out.splitlines()


def test_tested_layouts_are_at_least_a_hundred(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "checkpoints", "--tested"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 100
    assert all("; taps " in line for line in lines)


def test_tested_layouts_are_those_of_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "probes", "--tested"]) == 2
    assert "--tested is for checkpoints, not for probes" in capsys.readouterr().err
